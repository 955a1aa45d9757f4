package delta

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

const (
	first  = "6b4bf01eeb87e0073796f7e68e2ecb95407ee8f443360d06ac0792f04f1e0a94"
	second = "2828e5bbdf3f2082a488f64daf230e4cebc05ff3ca3f98f74519bd67ab7d474e"
)

func checksum(t testing.TB, s string) ostree.Checksum {
	t.Helper()
	c, err := ostree.ParseChecksum(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// vectors unpacks the archive that ostree 2026.4 has made, with deltas from nothing to the first commit and from there to the second.
func vectors(t testing.TB) *ostree.Local {
	t.Helper()
	l, err := ostree.OpenLocal(filepath.Join(golden.Extract(t, "ostree/archive.tar.gz"), "archive"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// memory is a store that keeps what it is given, and has the sources of an archive.
type memory struct {
	sources ostree.Source // nil: none
	mu      sync.Mutex
	made    map[ostree.ObjectName][]byte // files with their headers
	had     map[ostree.Checksum]bool
}

func (m *memory) Has(sum ostree.Checksum) bool { return m.had[sum] }

func (m *memory) File(sum ostree.Checksum) (*ostree.File, error) {
	if m.sources == nil {
		return nil, ostree.ErrNotFound
	}
	return m.sources.File(context.Background(), sum)
}

func (m *memory) PutMetadata(o ostree.ObjectName, b []byte) error {
	if err := o.Verify(b); err != nil {
		return err
	}
	return m.put(o, b)
}

func (m *memory) PutFile(sum ostree.Checksum, h *ostree.FileHeader, r io.Reader) error {
	name := ostree.ObjectName{Checksum: sum, Kind: ostree.KindFile}
	head, err := h.Encode()
	if err != nil {
		return err
	}
	b, err := io.ReadAll(io.MultiReader(bytes.NewReader(head), r))
	if err != nil {
		return err
	}
	if size := int64(len(b) - len(head)); size != h.Size {
		return fmt.Errorf("object %s: %d bytes, want %d", name, size, h.Size)
	}
	metadata := ostree.ObjectName{Checksum: sum, Kind: ostree.KindDirTree}
	if err := metadata.Verify(b); err != nil { // the checksum is that of these bytes, whatever they are
		return fmt.Errorf("object %s: %w", name, ostree.ErrChecksum)
	}
	return m.put(name, b)
}

func (m *memory) put(o ostree.ObjectName, b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, twice := m.made[o]; twice {
		return fmt.Errorf("object %s is made twice", o)
	}
	if m.made == nil {
		m.made = map[ostree.ObjectName][]byte{}
	}
	m.made[o] = b
	return nil
}

// offline writes a golden delta that is one file into a directory, and returns its path.
func offline(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, golden.Read(t, "ostree/"+name), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func openDelta(t testing.TB, path string) *Offline {
	t.Helper()
	o, err := OpenOffline(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return o
}

// objects returns the objects of a commit, without the commit.
func objects(t testing.TB, l ostree.Source, commit ostree.Checksum) map[ostree.ObjectName]bool {
	t.Helper()
	all := map[ostree.ObjectName]bool{}
	if commit.IsZero() {
		return all
	}
	b, err := l.Metadata(context.Background(), ostree.ObjectName{Checksum: commit, Kind: ostree.KindCommit})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := readTree(context.Background(), l, b)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range tree.metadata {
		all[o] = true
	}
	for _, f := range tree.files {
		all[fileName(f.sum)] = true
	}
	return all
}

// applied applies a delta and wants exactly the objects made that one commit has and the other lacks, fallbacks apart.
func applied(t testing.TB, l *ostree.Local, path string) *Offline {
	t.Helper()
	d := openDelta(t, path)
	m := &memory{sources: l}
	if err := d.Apply(context.Background(), m, d.Part); err != nil {
		t.Fatal(err)
	}
	want := objects(t, l, d.To)
	for o := range objects(t, l, d.From) {
		delete(want, o)
	}
	for _, f := range d.Fallbacks {
		if !want[f.ObjectName] {
			t.Errorf("object %s is a fallback and not wanted", f.ObjectName)
		}
		delete(want, f.ObjectName)
	}
	for o := range want {
		if _, ok := m.made[o]; !ok {
			t.Errorf("object %s is not made", o)
		}
	}
	if len(m.made) != len(want) {
		t.Errorf("%d objects are made, want %d", len(m.made), len(want))
	}
	return d
}
