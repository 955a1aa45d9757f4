package ostree_test

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"sync"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// memory is a source in memory, which counts how often each object is asked for.
type memory struct {
	t     testing.TB
	metas map[ostree.ObjectName][]byte
	files map[ostree.Checksum]memoryFile
	refs  map[string]ostree.Checksum

	mu    sync.Mutex
	asked map[ostree.ObjectName]int
	fail  func(n int, name ostree.ObjectName) error // before object n is given; nil: never
	total int
}

type memoryFile struct {
	ostree.FileHeader
	content []byte
}

func newMemory(t testing.TB) *memory {
	return &memory{t: t, metas: map[ostree.ObjectName][]byte{}, files: map[ostree.Checksum]memoryFile{}, refs: map[string]ostree.Checksum{},
		asked: map[ostree.ObjectName]int{}}
}

func (m *memory) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *memory) meta(k ostree.Kind, data []byte) ostree.Checksum {
	c := ostree.Checksum(sha256.Sum256(data))
	m.metas[ostree.ObjectName{Checksum: c, Kind: k}] = data
	return c
}

func (m *memory) file(h ostree.FileHeader, content []byte) ostree.Checksum {
	h.Size = int64(len(content))
	sum, err := h.NewHash()
	m.must(err)
	sum.Write(content)
	c := ostree.Checksum(sum.Sum(nil))
	m.files[c] = memoryFile{h, content}
	return c
}

// regular is a file of mode 0644.
func (m *memory) regular(content []byte) ostree.Checksum {
	return m.file(ostree.FileHeader{Meta: ostree.Meta{Mode: fstree.TypeRegular | 0o644}}, content)
}

func (m *memory) dir(t *ostree.DirTree) ostree.Checksum {
	data, err := t.Encode()
	m.must(err)
	return m.meta(ostree.KindDirTree, data)
}

func (m *memory) dirMeta() ostree.Checksum {
	data, err := ostree.Meta{Mode: fstree.TypeDir | 0o755}.EncodeDirMeta()
	m.must(err)
	return m.meta(ostree.KindDirMeta, data)
}

func (m *memory) commit(ref string, tree, parent ostree.Checksum) ostree.Checksum {
	data, err := (&ostree.Commit{Subject: ref, Time: 1, RootTree: tree, RootMeta: m.dirMeta(), Parent: parent}).Encode()
	m.must(err)
	m.refs[ref] = m.meta(ostree.KindCommit, data)
	return m.refs[ref]
}

// system makes a commit with directories of files, whose contents depend on the seed of their directory.
func (m *memory) system(ref string, parent ostree.Checksum, files int, seeds ...int) ostree.Checksum {
	root := &ostree.DirTree{}
	for k, seed := range seeds {
		dir := &ostree.DirTree{}
		for f := range files {
			content := bytes.Repeat([]byte(fmt.Sprintf("%d in %d, ", f, seed)), 1+f*f%700)
			dir.Files = append(dir.Files, ostree.TreeFile{Name: fmt.Sprintf("file%04d", f), File: m.regular(content)})
		}
		root.Dirs = append(root.Dirs, ostree.TreeDir{Name: fmt.Sprintf("dir%04d", k), Tree: m.dir(dir), Meta: m.dirMeta()})
	}
	return m.commit(ref, m.dir(root), parent)
}

func (m *memory) ask(n ostree.ObjectName) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total++
	if m.fail != nil {
		if err := m.fail(m.total, n); err != nil {
			return err
		}
	}
	m.asked[n]++
	return nil
}

func (m *memory) Ref(_ context.Context, name string) (ostree.Checksum, error) {
	c, ok := m.refs[name]
	if !ok {
		return c, ostree.ErrNotFound
	}
	return c, nil
}

func (m *memory) Metadata(_ context.Context, n ostree.ObjectName) ([]byte, error) {
	data, ok := m.metas[n]
	if !ok {
		return nil, ostree.ErrNotFound
	}
	return data, m.ask(n)
}

func (m *memory) File(_ context.Context, c ostree.Checksum) (*ostree.File, error) {
	f, ok := m.files[c]
	if !ok {
		return nil, ostree.ErrNotFound
	}
	if err := m.ask(ostree.ObjectName{Checksum: c, Kind: ostree.KindFile}); err != nil {
		return nil, err
	}
	if c[0]&1 == 0 {
		return &ostree.File{FileHeader: f.FileHeader, Content: io.NopCloser(bytes.NewReader(f.content))}, nil
	}
	h, err := f.EncodeFilez()
	if err != nil {
		return nil, err
	}
	out := bytes.NewBuffer(h)
	z, _ := flate.NewWriter(out, 1)
	z.Write(f.content)
	z.Close()
	return ostree.OpenFilez(io.NopCloser(out))
}
