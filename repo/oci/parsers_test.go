package oci

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// FuzzTar reads an archive whose headers have the checksums that they should have, so that what is behind the checksum is reached.
func FuzzTar(f *testing.F) {
	entry := func(kind byte, data string) []byte {
		block := make([]byte, blockSize, 2*blockSize)
		copy(block, "dir/name")
		copy(block[100:], fmt.Sprintf("%07o\x00%07o\x00%07o\x00%011o\x00%011o\x00", 0o755, 0, 0, len(data), 1))
		block[156] = kind
		copy(block[157:], "target")
		copy(block[257:], "ustar\x0000")
		if data != "" {
			block = append(append(block, data...), make([]byte, blockSize-len(data))...)
		}
		return block
	}
	for _, kind := range []byte("0123456S") {
		data := ""
		if kind == '0' {
			data = "15 path=longer\n"
		}
		for _, extended := range []byte("xgLK") {
			f.Add(slices.Concat(entry(extended, "15 path=longer\n"), entry(kind, data), make([]byte, 2*blockSize)))
		}
		f.Add(slices.Concat(entry(kind, data), entry('0', data)))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := &sealing{b: b}
		reader := &tarReader{r: in}
		for {
			start := reader.at
			e, err := reader.next()
			if err != nil {
				return
			}
			if reader.at <= start || e.size < 0 || e.padding() < 0 {
				t.Fatalf("an entry of %d bytes, from %d to %d", e.size, start, reader.at)
			}
			for _, path := range []string{e.path, e.link} {
				if path != "" && fstree.CheckName(strings.SplitN(path, "/", 2)[0]) != nil || len(path) > maxPath {
					t.Fatalf("path %q", path)
				}
			}
			n, err := io.CopyN(io.Discard, in, e.size+e.padding())
			reader.skip(n)
			if err != nil {
				return
			}
		}
	})
}

// sealing gives blocks that are read as such the checksum of a header.
type sealing struct{ b []byte }

func (s *sealing) Read(p []byte) (int, error) {
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.b)
	s.b = s.b[n:]
	if n == blockSize && len(p) == blockSize && !bytes.Equal(p, make([]byte, blockSize)) {
		copy(p[148:], "        ")
		sum := 0
		for _, c := range p {
			sum += int(c)
		}
		copy(p[148:], fmt.Sprintf("%06o\x00 ", sum))
	}
	return n, nil
}

// FuzzPAX reads extended headers.
func FuzzPAX(f *testing.F) {
	for _, s := range []string{
		"30 mtime=1350244992.023960108\n", "13 path=a/b\n", "27 SCHILY.xattr.user.a=b\x00c\n", "18 size=123456789\n",
		"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", "27 GNU.sparse.offset=1024\n29 GNU.sparse.numbytes=100\n",
		"30 GNU.sparse.map=0,1,512,512\n", "999999999 path=a\n",
	} {
		for _, kind := range []byte("xgLK") {
			f.Add(kind, []byte(s))
		}
	}
	f.Fuzz(func(t *testing.T, kind byte, b []byte) {
		var x extended
		if x.add(kind, b) != nil {
			return
		}
		for _, a := range x.xattrs {
			if a.Name == "" || len(a.Name) > maxXattrName || len(a.Value) > maxXattr || strings.ContainsRune(a.Name, 0) {
				t.Fatalf("attribute %q of %d bytes", a.Name, len(a.Value))
			}
		}
	})
}

// FuzzMerge lays layers upon each other, and does the same with a plain map of paths.
func FuzzMerge(f *testing.F) {
	f.Add([]byte{0, 1, 0, 1, 5, 0, 0xff, 0, 0, 2, 5, 0})
	f.Add([]byte{0, 1, 0, 1, 5, 0, 3, 6, 5, 0xff, 0, 0, 4, 1, 0, 1, 7, 0})
	f.Add([]byte{1, 1, 0, 0xff, 0, 0, 2, 1, 0, 3, 2, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		m := newMerged()
		want := map[string]*fstree.Inode{}
		for len(b) > 0 {
			var layer []*entry
			for len(b) >= 3 && b[0] != 0xff {
				layer = append(layer, operation(b[0], b[1], b[2]))
				b = b[3:]
			}
			b = b[min(3, len(b)):]
			rest := layer
			err := m.layer(func() (*entry, error) {
				if len(rest) == 0 {
					return nil, io.EOF
				}
				e := *rest[0]
				rest = rest[1:]
				return &e, nil
			})
			wantErr := plainly(want, layer)
			if (err == nil) != (wantErr == nil) {
				t.Fatalf("%v, but %v", err, wantErr)
			}
			if err != nil {
				return
			}
		}
		have := map[string]*fstree.Inode{}
		if err := m.tree().Walk(func(path string, i *fstree.Inode) error {
			if path != "/" {
				have[path[1:]] = i
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if keys := slices.Sorted(maps.Keys(want)); !slices.Equal(slices.Sorted(maps.Keys(have)), keys) {
			t.Fatalf("%q, want %q", slices.Sorted(maps.Keys(have)), keys)
		}
		for path, i := range want {
			if have[path].UID != i.UID || (have[path].Dir() == nil) != (i.Dir() == nil) {
				t.Errorf("%s is %+v, want %+v", path, have[path], i)
			}
			for other, j := range want {
				if i.Dir() == nil && (i == j) != (have[path] == have[other]) {
					t.Errorf("%s and %s: one file, or two?", path, other)
				}
			}
		}
	})
}

// operation makes an entry from three bytes. What is the owner tells entries apart.
func operation(kind, where, to byte) *entry {
	path := func(b byte) string {
		n := int(b) % 39
		name := string("abc"[n%3])
		for n = n / 3; n > 0; n = (n - 1) / 3 {
			name = string("abc"[(n-1)%3]) + "/" + name
		}
		return name
	}
	e := &entry{path: path(where), inode: fstree.Inode{UID: uint32(kind)<<16 | uint32(where)<<8 | uint32(to)}}
	switch parent := strings.TrimSuffix(e.path, base(e.path)); kind % 5 {
	case 0:
		e.inode.Content = &fstree.Directory{}
	case 1:
		e.inode.Content = fstree.Inline(nil)
	case 2:
		e.path = parent + whiteout + base(e.path)
	case 3:
		e.isLink, e.link = true, path(to)
	case 4:
		e.path = parent + opaque
	}
	return e
}

// plainly lays a layer upon a tree that is a map of paths.
func plainly(tree map[string]*fstree.Inode, layer []*entry) error {
	below := maps.Clone(tree)
	remove := func(dir string) {
		maps.DeleteFunc(tree, func(path string, _ *fstree.Inode) bool { return strings.HasPrefix(path, dir) })
	}
	hides := func(e *entry) bool { return strings.HasPrefix(base(e.path), whiteout) }
	for _, e := range layer {
		if !hides(e) {
			continue
		}
		parent, name := strings.TrimSuffix(e.path, base(e.path)), base(e.path)
		if i := tree[strings.TrimSuffix(parent, "/")]; parent != "" && (i == nil || i.Dir() == nil) {
			continue
		}
		if name == opaque {
			remove(parent)
		} else {
			hidden := parent + strings.TrimPrefix(name, whiteout)
			delete(tree, hidden)
			remove(hidden + "/")
		}
	}
	hasWhiteouts := slices.ContainsFunc(layer, hides)
	for _, e := range layer {
		if hides(e) {
			continue
		}
		for k, c := range e.path {
			if c != '/' {
				continue
			}
			switch i := tree[e.path[:k]]; {
			case i == nil:
				tree[e.path[:k]] = fstree.NewDir(0o755)
			case i.Dir() == nil:
				return errors.New("not a directory")
			}
		}
		have := tree[e.path]
		switch {
		case e.isLink:
			to := tree[e.link]
			if to == nil && hasWhiteouts {
				to = below[e.link]
			}
			if to == nil || to.Dir() != nil {
				return errors.New("no such file")
			}
			remove(e.path + "/")
			tree[e.path] = to
		case have != nil && have.Dir() != nil && e.inode.Dir() != nil:
			have.UID = e.inode.UID
		default:
			remove(e.path + "/")
			i := e.inode
			tree[e.path] = &i
		}
	}
	return nil
}
