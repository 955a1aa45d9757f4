package ostree_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// seeds returns the metadata objects of the vectors by their kind, and the headers of content objects.
func seeds(t testing.TB) map[ostree.Kind][][]byte {
	t.Helper()
	list := map[ostree.Kind][][]byte{}
	err := filepath.WalkDir(filepath.Join(vector(t, "archive"), "objects"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		for _, k := range []ostree.Kind{ostree.KindCommit, ostree.KindDirTree, ostree.KindDirMeta} {
			if strings.HasSuffix(path, "."+k.String()) {
				list[k] = append(list[k], b)
			}
		}
		if strings.HasSuffix(path, ".filez") {
			n := 8 + int(binary.BigEndian.Uint32(b))
			list[ostree.KindFile] = append(list[ostree.KindFile], b[:n])
		}
		return err
	})
	if err != nil || len(list) != 4 {
		t.Fatalf("%d kinds, %v", len(list), err)
	}
	return list
}

// rewrite parses an object and writes it again.
func rewrite(k ostree.Kind, b []byte) ([]byte, error) {
	switch k {
	case ostree.KindCommit:
		c, err := ostree.ParseCommit(b)
		if err != nil {
			return nil, err
		}
		return c.Encode()
	case ostree.KindDirTree:
		t, err := ostree.ParseDirTree(b)
		if err != nil {
			return nil, err
		}
		return t.Encode()
	case ostree.KindDirMeta:
		m, err := ostree.ParseDirMeta(b)
		if err != nil {
			return nil, err
		}
		return m.EncodeDirMeta()
	}
	r := bytes.NewReader(b)
	h, err := ostree.ReadFilezHeader(r)
	if err != nil {
		return nil, err
	}
	if r.Len() > 0 {
		return nil, io.ErrUnexpectedEOF
	}
	return h.EncodeFilez()
}

// What ostree writes is what is written here.
func TestRewrite(t *testing.T) {
	for k, list := range seeds(t) {
		for _, b := range list {
			if again, err := rewrite(k, b); err != nil || !bytes.Equal(again, b) {
				t.Errorf("%v %x: %x, %v", k, b, again, err)
			}
		}
	}
}

func fuzz(f *testing.F, k ostree.Kind) {
	for _, b := range seeds(f)[k] {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if again, err := rewrite(k, b); err == nil && !bytes.Equal(again, b) {
			t.Fatalf("%x was taken for %x", b, again)
		}
	})
}

func FuzzCommit(f *testing.F)     { fuzz(f, ostree.KindCommit) }
func FuzzDirTree(f *testing.F)    { fuzz(f, ostree.KindDirTree) }
func FuzzDirMeta(f *testing.F)    { fuzz(f, ostree.KindDirMeta) }
func FuzzFileHeader(f *testing.F) { fuzz(f, ostree.KindFile) }

// streamOf makes a commit's stream of these objects, each of 8 bytes.
func streamOf(names ...byte) []byte {
	b := make([]byte, 8+256*4)
	for at := range 256 {
		for _, n := range names {
			if int(n) <= at {
				b[8+4*at]++
			}
		}
	}
	for _, n := range names {
		b = append(b, bytes.Repeat([]byte{n}, 32)...)
	}
	for k := range names {
		b = append(b, byte(k), 0, 0, 0, 8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff)
	}
	for _, n := range names {
		b = append(b, bytes.Repeat([]byte{n}, 8)...)
	}
	return b
}

func TestHostileStream(t *testing.T) {
	const ids, refs = 8 + 256*4, 8 + 256*4 + 3*32
	for name, c := range map[string]struct {
		want   string
		change func([]byte) []byte
	}{
		"sound":                {"", func(b []byte) []byte { return b }},
		"empty":                {"want at least", func(b []byte) []byte { return nil }},
		"header-truncated":     {"want at least", func(b []byte) []byte { return b[:1000] }},
		"buckets-descending":   {"and 2 before", func(b []byte) []byte { b[8+4*5] = 1; return b }},
		"bucket-wrong":         {"wrong bucket", func(b []byte) []byte { b[8+4*2] = 1; return b }},
		"too-many-objects":     {"objects in", func(b []byte) []byte { b[8+4*255+3] = 1; return b }},
		"ids-unsorted":         {"not after the one before", func(b []byte) []byte { b[ids+32] = 0; return b }},
		"ids-twice":            {"not after the one before", func(b []byte) []byte { copy(b[ids+32:], b[ids:ids+32]); return b }},
		"content-past-the-end": {"of 24 bytes", func(b []byte) []byte { b[refs+3] = 1; return b }},
		"content-too-long":     {"of 24 bytes", func(b []byte) []byte { b[refs+7] = 1; return b }},
		"object-out-of-range":  {"object 0 of 0", func(b []byte) []byte { clear(b[refs+8 : refs+12]); return b }},
		"commit-out-of-range":  {"the commit is object 3", func(b []byte) []byte { b[0] = 3; return b }},
		"no-commit":            {"the commit is object", func(b []byte) []byte { copy(b, "\xff\xff\xff\xff"); return b }},
		"content-truncated":    {"of 20 bytes", func(b []byte) []byte { return b[:len(b)-4] }},
	} {
		b := c.change(streamOf(1, 2, 5))
		again, err := ostree.Decode(b)
		if c.want == "" {
			if err != nil || !bytes.Equal(again, b) {
				t.Errorf("%s: %v", name, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func FuzzStream(f *testing.F) {
	f.Add(streamOf())
	f.Add(streamOf(1, 2, 5))
	f.Fuzz(func(t *testing.T, b []byte) {
		if again, err := ostree.Decode(b); err == nil {
			if once, err := ostree.Decode(again); err != nil || !bytes.Equal(once, again) {
				t.Fatalf("%v", err)
			}
		}
	})
}

// hostile sources give objects whose checksums are right, or contents that do not belong to them.
func TestHostileSource(t *testing.T) {
	tree := func(m *memory, files gvariant.List, dirs gvariant.List) {
		v, err := gvariant.Encode("(a(say)a(sayay))", gvariant.Tuple{files, dirs})
		m.must(err)
		m.commit("os", m.meta(ostree.KindDirTree, v.Bytes()), ostree.Checksum{})
	}
	named := func(names ...string) func(*memory) {
		return func(m *memory) {
			var files gvariant.List
			for _, name := range names {
				c := m.regular([]byte("content"))
				files = append(files, gvariant.Tuple{name, c[:]})
			}
			tree(m, files, gvariant.List{})
		}
	}
	one := func(h ostree.FileHeader, content string) func(*memory) {
		return func(m *memory) {
			c := m.file(h, []byte(content))
			tree(m, gvariant.List{gvariant.Tuple{"file", c[:]}}, gvariant.List{})
		}
	}
	regular := ostree.FileHeader{Meta: ostree.Meta{Mode: fstree.TypeRegular | 0o644}}
	// lie makes the file another one than its checksum says, after the commit is made.
	lie := func(change func(*memoryFile)) func(*memory) {
		return func(m *memory) {
			one(regular, strings.Repeat("content", 100))(m)
			for c, f := range m.files {
				change(&f)
				m.files[c] = f
			}
		}
	}
	xattrs := func(names ...string) ostree.FileHeader {
		h := regular
		for _, n := range names {
			h.Xattrs = append(h.Xattrs, fstree.Xattr{Name: n})
		}
		return h
	}
	for name, c := range map[string]struct {
		want string
		make func(*memory)
	}{
		"name-slash":     {"slash", named("a/b")},
		"name-dot-dot":   {`file name ".."`, named("..")},
		"name-dot":       {`file name "."`, named(".")},
		"name-empty":     {"empty file name", named("")},
		"name-long":      {"at most 255", named(strings.Repeat("x", 256))},
		"names-unsorted": {"not sorted", named("b", "a")},
		"name-twice":     {"not sorted, or the same", named("a", "a")},
		"name-file-and-dir": {"is there twice", func(m *memory) {
			c, d := m.regular([]byte("x")), m.dirMeta()
			e := m.dir(&ostree.DirTree{})
			tree(m, gvariant.List{gvariant.Tuple{"a", c[:]}}, gvariant.List{gvariant.Tuple{"a", e[:], d[:]}})
		}},
		"checksum-short": {"a checksum of 31 bytes", func(m *memory) {
			tree(m, gvariant.List{gvariant.Tuple{"a", make([]byte, 31)}}, gvariant.List{})
		}},
		"object-missing": {"not found", func(m *memory) {
			tree(m, gvariant.List{gvariant.Tuple{"a", bytes.Repeat([]byte{7}, 32)}}, gvariant.List{})
		}},
		"dirmeta-missing": {"dirmeta: not found", func(m *memory) {
			m.commit("os", m.dir(&ostree.DirTree{}), ostree.Checksum{})
			for n := range m.metas {
				if n.Kind == ostree.KindDirMeta {
					delete(m.metas, n)
				}
			}
		}},
		"metadata-changed": {"another checksum", func(m *memory) {
			m.system("os", ostree.Checksum{}, 3, 1)
			for n, b := range m.metas {
				if n.Kind == ostree.KindDirTree {
					b[len(b)-1] ^= 1
				}
			}
		}},
		"commit-changed": {"another checksum", func(m *memory) {
			m.metas[ostree.ObjectName{Checksum: m.system("os", ostree.Checksum{}, 3, 1), Kind: ostree.KindCommit}][0] ^= 1
		}},
		"commit-is-a-tree": {"commit: ", func(m *memory) {
			b, _ := (&ostree.DirTree{}).Encode()
			m.refs["os"] = m.meta(ostree.KindCommit, b)
		}},
		"commit-not-normal": {"normal form", func(m *memory) {
			c := m.system("os", ostree.Checksum{}, 1, 1)
			b := bytes.Clone(m.metas[ostree.ObjectName{Checksum: c, Kind: ostree.KindCommit}])
			b[len(b)-1]++
			m.refs["os"] = m.meta(ostree.KindCommit, b)
		}},
		"dirmeta-of-a-file": {"not that of a directory", func(m *memory) {
			b, err := ostree.Meta{Mode: fstree.TypeRegular | 0o644}.EncodeDirMeta()
			m.must(err)
			c, e := m.meta(ostree.KindDirMeta, b), m.dir(&ostree.DirTree{})
			tree(m, gvariant.List{}, gvariant.List{gvariant.Tuple{"a", e[:], c[:]}})
		}},
		"content-changed":    {"another checksum", lie(func(f *memoryFile) { f.content[3] ^= 1 })},
		"content-too-short":  {"not of 700 bytes", lie(func(f *memoryFile) { f.content = f.content[:699] })},
		"content-too-long":   {"not of 700 bytes", lie(func(f *memoryFile) { f.content = append(f.content, 'x') })},
		"size-too-large":     {"bytes", lie(func(f *memoryFile) { f.Size = 1 << 40 })},
		"size-smaller":       {"bytes", lie(func(f *memoryFile) { f.Size = 0 })},
		"owner-changed":      {"another checksum", lie(func(f *memoryFile) { f.UID = 1 })},
		"device":             {"not that of a file", one(ostree.FileHeader{Meta: ostree.Meta{Mode: fstree.TypeChar | 0o644}}, "")},
		"file-with-a-target": {"target", one(ostree.FileHeader{Meta: regular.Meta, Target: "x"}, "")},
		"link-without-one":   {"target of 0 bytes", one(ostree.FileHeader{Meta: ostree.Meta{Mode: fstree.TypeSymlink | 0o777}}, "")},
		"link-too-long":      {"target of 1025 bytes", one(ostree.FileHeader{Meta: ostree.Meta{Mode: fstree.TypeSymlink | 0o777}, Target: strings.Repeat("x", 1025)}, "")},
		"xattr-twice":        {"one is there twice", one(xattrs("user.a", "user.a"), "x")},
		"xattrs-unsorted":    {"not sorted", one(xattrs("user.b", "user.a"), "x")},
		"xattr-empty-name":   {"0 bytes", one(xattrs(""), "x")},
		"xattr-nul":          {"NUL", one(xattrs("user.a\x00b"), "x")},
		"xattr-long-name":    {"256 bytes", one(xattrs(strings.Repeat("x", 256)), "x")},
		// A directory that is in many places, which are in many places, would be a tree of more files than there are atoms.
		"tree-of-trees": {"files in the tree", func(m *memory) {
			c, meta := m.regular([]byte("x")), m.dirMeta()
			d := m.dir(&ostree.DirTree{Files: []ostree.TreeFile{{Name: "file", File: c}}})
			for range 60 {
				d = m.dir(&ostree.DirTree{Dirs: []ostree.TreeDir{{Name: "a", Tree: d, Meta: meta}, {Name: "b", Tree: d, Meta: meta}}})
			}
			m.commit("os", d, ostree.Checksum{})
		}},
		"deep-tree-by-steps": {"directories in each other", func(m *memory) {
			meta, d := m.dirMeta(), m.dir(&ostree.DirTree{})
			root := &ostree.DirTree{}
			for k := range 2100 {
				d = m.dir(&ostree.DirTree{Dirs: []ostree.TreeDir{{Name: "a", Tree: d, Meta: meta}}})
				root.Dirs = append(root.Dirs, ostree.TreeDir{Name: fmt.Sprintf("%04d", k), Tree: d, Meta: meta})
			}
			m.commit("os", m.dir(root), ostree.Checksum{})
		}},
		"deep-tree": {"directories in each other", func(m *memory) {
			meta, d := m.dirMeta(), m.dir(&ostree.DirTree{})
			for range 3000 {
				d = m.dir(&ostree.DirTree{Dirs: []ostree.TreeDir{{Name: "a", Tree: d, Meta: meta}}})
			}
			m.commit("os", d, ostree.Checksum{})
		}},
	} {
		m := newMemory(t)
		c.make(m)
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		_, err := ostree.Pull(context.Background(), r, m, []string{"os"}, ostree.PullOptions{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %.300v, want %q", name, err, c.want)
		}
		if tags, _ := ostree.Tags(r); len(tags) > 0 {
			t.Errorf("%s: %v", name, tags)
		}
		if list, _ := ostree.Commits(r); len(list) > 0 {
			t.Errorf("%s: %v has a name", name, list)
		}
	}
}

// What is no header of a content object.
func TestHostileHeader(t *testing.T) {
	for name, b := range map[string]string{
		"empty":        "",
		"short":        "\x00\x00",
		"huge":         "\xff\xff\xff\xff\x00\x00\x00\x00",
		"not-zero":     "\x00\x00\x00\x01\x00\x00\x00\x01x",
		"truncated":    "\x00\x00\x00\x20\x00\x00\x00\x00abc",
		"not-a-header": "\x00\x00\x00\x01\x00\x00\x00\x00x",
	} {
		for _, read := range []func(io.Reader) (*ostree.FileHeader, error){ostree.ReadFileHeader, ostree.ReadFilezHeader} {
			if _, err := read(strings.NewReader(b)); err == nil || !strings.HasPrefix(err.Error(), "file header") {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}
