package delta

import (
	"archive/tar"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

const (
	first  = "6b4bf01eeb87e0073796f7e68e2ecb95407ee8f443360d06ac0792f04f1e0a94"
	second = "2828e5bbdf3f2082a488f64daf230e4cebc05ff3ca3f98f74519bd67ab7d474e"
)

func checksum(t testing.TB, s string) Checksum {
	t.Helper()
	n, err := ParseName(s)
	if err != nil {
		t.Fatal(err)
	}
	return n.To
}

// archive is a directory with a repository of mode archive.
type archive string

// vectors unpacks the repository that ostree 2026.4 has made, with deltas from nothing to the first commit and from there to the second.
func vectors(t testing.TB) archive {
	t.Helper()
	f, err := os.Open("testdata/archive.tar.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o755)
		case tar.TypeReg:
			var b []byte
			if b, err = io.ReadAll(r); err == nil {
				os.MkdirAll(filepath.Dir(path), 0o755)
				err = os.WriteFile(path, b, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return archive(filepath.Join(dir, "archive"))
}

func (a archive) path(o Object) string {
	ext := map[Kind]string{File: "filez", DirTree: "dirtree", DirMeta: "dirmeta", Commit: "commit"}[o.Kind]
	s := o.Checksum.String()
	return filepath.Join(string(a), "objects", s[:2], s[2:]+"."+ext)
}

// stream returns an object as the stream that its checksum is of.
func (a archive) stream(o Object) ([]byte, error) {
	b, err := os.ReadFile(a.path(o))
	if err != nil || o.Kind != File {
		return b, err
	}
	n := binary.BigEndian.Uint32(b)
	head, body := b[8:8+n], b[8+n:]
	v, err := gvariant.New("(tuuuusa(ayay))", head)
	if err != nil {
		return nil, err
	}
	var members gvariant.Tuple
	for i := 1; i < 7; i++ {
		m, err := v.At(i)
		if err != nil {
			return nil, err
		}
		members = append(members, m)
	}
	v, err = gvariant.Encode("(uuuusa(ayay))", members)
	if err != nil {
		return nil, err
	}
	var content []byte
	if len(body) > 0 { // symbolic links have none
		content, err = io.ReadAll(flate.NewReader(bytes.NewReader(body)))
	}
	out := append(binary.BigEndian.AppendUint32(nil, uint32(len(v.Bytes()))), 0, 0, 0, 0)
	return append(append(out, v.Bytes()...), content...), err
}

// loaded is the content of a file in memory.
type loaded struct{ *bytes.Reader }

func (loaded) Close() error { return nil }

func (a archive) source(_ context.Context, sum Checksum) (Content, error) {
	b, err := a.stream(Object{File, sum})
	if err != nil {
		return nil, err
	}
	r := bytes.NewReader(b)
	if _, _, err := readHeader(r); err != nil {
		return nil, err
	}
	return loaded{bytes.NewReader(b[len(b)-r.Len():])}, nil
}

// objects returns all objects of a commit.
func (a archive) objects(t testing.TB, commit string) map[Object]bool {
	t.Helper()
	all := map[Object]bool{{Commit, checksum(t, commit)}: true}
	b, err := a.stream(Object{Commit, checksum(t, commit)})
	if err != nil {
		t.Fatal(err)
	}
	v, err := gvariant.New("(a{sv}aya(say)sstayay)", b)
	if err != nil {
		t.Fatal(err)
	}
	at := func(v gvariant.Value, i int) gvariant.Value {
		v, err := v.At(i)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	sum := func(v gvariant.Value) Checksum { return Checksum(v.Bytes()) }
	var walk func(tree, meta Checksum)
	walk = func(tree, meta Checksum) {
		all[Object{DirTree, tree}], all[Object{DirMeta, meta}] = true, true
		b, err := a.stream(Object{DirTree, tree})
		if err != nil {
			t.Fatal(err)
		}
		v, err := gvariant.New("(a(say)a(sayay))", b)
		if err != nil {
			t.Fatal(err)
		}
		files, dirs := at(v, 0), at(v, 1)
		n, _ := files.Len()
		for i := range n {
			all[Object{File, sum(at(at(files, i), 1))}] = true
		}
		n, _ = dirs.Len()
		for i := range n {
			walk(sum(at(at(dirs, i), 1)), sum(at(at(dirs, i), 2)))
		}
	}
	walk(sum(at(v, 6)), sum(at(v, 7)))
	return all
}

func temp() (*os.File, error) {
	f, err := os.CreateTemp("", "delta")
	if err == nil {
		err = os.Remove(f.Name())
	}
	return f, err
}

// apply applies a delta and returns the streams of the objects that it makes.
func apply(d *Delta, s Store) (map[Object][]byte, error) {
	type made struct {
		Object
		stream []byte
	}
	objects := make(chan made, 1<<16)
	s.Put = func(_ context.Context, o Object, size int64, r io.Reader) error {
		b, err := io.ReadAll(r)
		if err == nil && int64(len(b)) != size {
			err = fmt.Errorf("%s: %d bytes, said %d", o, len(b), size)
		}
		objects <- made{o, b}
		return err
	}
	if s.Temp == nil {
		s.Temp = temp
	}
	err := d.Apply(context.Background(), s)
	close(objects)
	all := map[Object][]byte{}
	for m := range objects {
		if _, twice := all[m.Object]; twice {
			err = errors.Join(err, fmt.Errorf("%s is made twice", m.Object))
		}
		all[m.Object] = m.stream
	}
	return all, err
}

// parts opens the parts that are files in a directory.
func parts(dir string) func(context.Context, int) (io.ReadCloser, error) {
	return func(_ context.Context, i int) (io.ReadCloser, error) {
		return os.Open(filepath.Join(dir, fmt.Sprint(i)))
	}
}

func openFile(t testing.TB, path string) *Delta {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// wantObjects compares the objects that a delta has made with those of the archive that commit to has and commit from lacks.
func wantObjects(t testing.TB, a archive, made map[Object][]byte, from, to string) {
	t.Helper()
	want := a.objects(t, to)
	delete(want, Object{Commit, checksum(t, to)})
	if from != "" {
		for o := range a.objects(t, from) {
			delete(want, o)
		}
	}
	for o := range want {
		b, err := a.stream(o)
		if err != nil {
			t.Fatal(err)
		}
		if is, ok := made[o]; !ok {
			t.Errorf("%s is not made", o)
		} else if !bytes.Equal(is, b) {
			t.Errorf("%s differs", o)
		}
	}
	if len(made) != len(want) {
		t.Errorf("%d objects are made, want %d", len(made), len(want))
	}
}

func hexBytes(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
