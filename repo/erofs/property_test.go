package erofs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Names of attributes that an image stores or overlayfs reads in a way of their own, and names that only look like them.
var oddXattrs = []string{
	"lustre.x", "system.posix_acl_default", "system.posix_acl_accessory", "system.posix_acl", "user.", "trusted.", "security.", "x",
	"trusted.overlay.", "trusted.overlay.opaque", "trusted.overlay.metacopy", "trusted.overlay.redirect",
	"trusted.overlay.overlay.opaque", "trusted.overlayfs", "user.overlay.opaque", "user.overlay.whiteouts", "security.selinux",
}

// randomTree makes a tree of about n inodes in which everything occurs that images can hold.
func randomTree(r *rand.Rand, n int) *fstree.Tree {
	t := fstree.New()
	dirs := []*fstree.Inode{t.Root}
	var files []*fstree.Inode
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	text := func(max int) string { return strings.Repeat(string(rune('a'+r.IntN(26))), 1+r.IntN(max)) }
	seconds := pick("close", "far")
	fill := func(i *fstree.Inode) {
		i.Perm, i.UID, i.GID = r.Uint32()&0o7777, r.Uint32()>>r.IntN(32), r.Uint32()>>r.IntN(32)
		i.Mtime = fstree.Time{Sec: int64(r.IntN(3)), Nsec: uint32(r.IntN(2)) * 7}
		if seconds == "far" {
			i.Mtime = fstree.Time{Sec: int64(r.Uint64()) >> r.IntN(64), Nsec: uint32(r.IntN(1e9))}
		}
		for range r.IntN(4) {
			name := pick("user.", "trusted.", "security.", "trusted.overlay.", "user.overlay.", "other.") + text(3)
			i.SetXattr(name, []byte(strings.Repeat("v", r.IntN(3)*r.IntN(600))))
		}
		if r.IntN(9) == 0 {
			i.SetXattr("system.posix_acl_access", []byte{2, 0, 0, 0})
		}
		if r.IntN(6) == 0 {
			i.SetXattr(pick(oddXattrs...), []byte(text(2)))
		}
		if r.IntN(40) == 0 {
			for k := range r.IntN(200) { // more than an inode may share
				i.SetXattr(fmt.Sprint("user.many", k), nil)
			}
		}
	}
	fill(t.Root)
	for k := range n {
		i := &fstree.Inode{}
		fill(i)
		switch r.IntN(12) {
		case 0, 1, 2:
			i.Content = &fstree.Directory{}
		case 3:
			i.Content = fstree.Symlink(text(fstree.MaxSymlink))
		case 4:
			i.Content = fstree.Device{Block: r.IntN(2) == 0, Rdev: r.Uint32() >> r.IntN(33)}
		case 5:
			i.Content = fstree.Fifo{}
		case 6:
			i.Content = fstree.Socket{}
		case 7, 8:
			i.Content = fstree.Inline(strings.Repeat("i", r.IntN(70)))
		case 9:
			i.Content = fstree.Inline(strings.Repeat("I", r.IntN(5001)))
		default:
			alg := []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512}[r.IntN(2)]
			i.Content = &fstree.Object{Digest: fsverity.Of(alg, []byte{byte(k)}), Size: 1 + r.Uint64()>>(12+r.IntN(50))}
			switch o := i.Content.(*fstree.Object); r.IntN(8) {
			case 0:
				o.Path = text(300) // elsewhere
			case 1:
				o.Digest, o.Path = fsverity.Digest{}, text(300)
			case 2:
				o.Digest = fsverity.Digest{}
			}
		}
		d := dirs[r.IntN(len(dirs))].Dir()
		if len(files) > 0 && r.IntN(8) == 0 {
			i = files[r.IntN(len(files))] // a hard link
		}
		name := fmt.Sprint(text(200), k)
		if r.IntN(10) == 0 {
			d, name = t.Root.Dir(), fmt.Sprintf("%02x", r.IntN(256)) // where the object store would show through
			if d.Lookup(name) != nil {
				continue
			}
		}
		d.Set(name, i)
		if i.Dir() != nil {
			dirs = append(dirs, i)
		} else {
			files = append(files, i)
		}
	}
	t.CountLinks()
	return t
}

func text(t *testing.T, tree *fstree.Tree) string {
	var b bytes.Buffer
	if err := dumpfile.Write(&b, tree, dumpfile.Cfsctl); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Any tree comes back from its image, the image from the tree, and fsck.erofs has no complaint.
func TestRandomTrees(t *testing.T) {
	file := filepath.Join(t.TempDir(), "image")
	for seed := range 60 {
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		tree := randomTree(r, 1+r.IntN(400))
		before := text(t, tree)
		for _, format := range []erofs.Format{erofs.V0, erofs.V1, erofs.V2} {
			var img, again bytes.Buffer
			if err := erofs.Write(&img, tree, format); err != nil {
				t.Fatal(err)
			}
			if text(t, tree) != before {
				t.Fatalf("seed %d %v: Write changed the tree", seed, format)
			}
			back, got, err := erofs.Read(bytes.NewReader(img.Bytes()), int64(img.Len()))
			if err != nil || got != format {
				t.Fatalf("seed %d %v: read as %v: %v", seed, format, got, err)
			}
			if err := erofs.Write(&again, back, format); err != nil || !bytes.Equal(again.Bytes(), img.Bytes()) {
				t.Fatalf("seed %d %v: another image after reading it: %v", seed, format, err)
			}
			if format == erofs.V0 && text(t, back) != before {
				t.Fatalf("seed %d %v: another tree", seed, format)
			}
			if seed%6 == 0 && format != erofs.V2 {
				if err := os.WriteFile(file, img.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
				if out, err := vm.Peer(t, "usr/bin/fsck.erofs", file).CombinedOutput(); err != nil {
					t.Errorf("seed %d %v: fsck.erofs: %v\n%s", seed, format, err, out)
				}
			}
		}
	}
}

func TestTreesThatDoNotFit(t *testing.T) {
	for want, inode := range map[string]*fstree.Inode{
		"/x: a file of 18446744073709551615 bytes": {Content: &fstree.Object{Size: 1<<64 - 1}},
		"/x: inline content of 5001 bytes":         {Content: fstree.Inline(make([]byte, 5001))},
		"/x: symlink target of 0 bytes":            {Content: fstree.Symlink("")},
		"/x: symlink target of 1025 bytes":         {Content: fstree.Symlink(strings.Repeat("x", 1025))},
		"/x: an inode without content":             {},
		"/x: xattr":                                {Content: fstree.Fifo{}, Xattrs: []fstree.Xattr{{Name: "user." + strings.Repeat("x", 256)}}},
		"a value of 65536 bytes":                   {Content: fstree.Fifo{}, Xattrs: []fstree.Xattr{{Name: "user.x", Value: make([]byte, 65536)}}},
	} {
		tree := fstree.New()
		tree.Root.Dir().Set("x", inode)
		if err := erofs.Write(io.Discard, tree, erofs.V1); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestWriteErrorIsReturned(t *testing.T) {
	full := errors.New("disk full")
	if err := erofs.Write(failing{full}, fstree.New(), erofs.V1); !errors.Is(err, full) {
		t.Errorf("%v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestFS(t *testing.T) {
	tree := fstree.New()
	root := tree.Root.Dir()
	usr := fstree.NewDir(0o755)
	root.Set("usr", usr)
	usr.Dir().Set("inline", &fstree.Inode{Perm: 0o644, Content: fstree.Inline("hello")})
	data := strings.Repeat("object", 100)
	usr.Dir().Set("object", &fstree.Inode{Perm: 0o4755, Content: &fstree.Object{
		Digest: fsverity.Of(fsverity.SHA256, []byte(data)), Size: uint64(len(data))}})
	root.Set("link", &fstree.Inode{Perm: 0o777, Content: fstree.Symlink("usr/inline")})
	tree.CountLinks()
	for _, format := range []erofs.Format{erofs.V0, erofs.V1, erofs.V2} {
		var img bytes.Buffer
		if err := erofs.Write(&img, tree, format); err != nil {
			t.Fatal(err)
		}
		fsys, err := erofs.NewFS(bytes.NewReader(img.Bytes()), int64(img.Len()))
		if err != nil {
			t.Fatal(err)
		}
		f, err := fsys.Open("usr/object")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(f); !errors.Is(err, erofs.ErrNoObjects) {
			t.Errorf("%v: reading an object without a store: %v", format, err)
		}
		fsys.Objects = func(o *fstree.Object) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(data)), nil }
		if err := fstest.TestFS(fsys, "usr/inline", "usr/object", "link"); err != nil {
			t.Errorf("%v: %v", format, err)
		}
		if target, err := fsys.ReadLink("link"); target != "usr/inline" || err != nil {
			t.Errorf("%v: link to %q, %v", format, target, err)
		}
		if info, err := fsys.Stat("usr/object"); err != nil || info.Mode() != fs.ModeSetuid|0o755 {
			t.Errorf("%v: %v, %v", format, info.Mode(), err)
		}
		if _, err := fsys.Stat("usr/none"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v: a missing file: %v", format, err)
		}
	}
}

// hostile makes the images that no honest writer makes, each with the words that the error must have.
func hostile(t testing.TB) map[string]struct {
	img  []byte
	want string
} {
	base := golden.Read(t, "images/every-type.v1.erofs.gz")
	le := binary.LittleEndian
	out := map[string]struct {
		img  []byte
		want string
	}{}
	add := func(name, want string, change func([]byte) []byte) {
		out[name] = struct {
			img  []byte
			want string
		}{change(bytes.Clone(base)), want}
	}
	put32 := func(at int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { le.PutUint32(b[at:], v); return b }
	}
	root := int(le.Uint16(base[1024+14:])) * 32
	add("empty", "not an image", func(b []byte) []byte { return nil })
	add("truncated-header", "not an image", func(b []byte) []byte { return b[:1100] })
	add("truncated-data", "truncated", func(b []byte) []byte { return b[:len(b)-1] })
	add("wrong-magic", "no magic number at offset 0", put32(0, 1))
	add("wrong-version", "want 0, 1 or 2", put32(12, 3))
	add("wrong-erofs-magic", "no EROFS magic", put32(1024, 0))
	add("unknown-feature", "unknown features", put32(1024+80, 1))
	add("huge-block-count", "truncated", put32(1024+36, 1<<31))
	add("block-size", "block size", func(b []byte) []byte { b[1024+12] = 16; return b })
	add("root-past-the-end", "past the end", func(b []byte) []byte { le.PutUint16(b[1024+14:], 0xffff); return b })
	add("root-unknown-format", "unknown format", func(b []byte) []byte { le.PutUint16(b[root:], 0xfff0); return b })
	add("root-no-type", "no file type", func(b []byte) []byte { le.PutUint16(b[root+4:], 0o644); return b })
	add("root-is-file", "", func(b []byte) []byte { le.PutUint16(b[root+4:], 0o100644); return b })
	add("root-huge-size", "at most", put32(root+8, 0xffffffff))
	add("root-block-past-the-end", "", put32(root+16, 0xffffff))
	add("root-links", "links to a directory", func(b []byte) []byte { le.PutUint16(b[root+6:], 99); return b })
	add("shared-count", "do not fit", func(b []byte) []byte {
		size := 32 + 32*int(le.Uint16(b[root:])&1)
		b[root+size+4] = 255
		return b
	})
	// The root's entries are in a block of their own, since there are more than 256.
	dir := int(le.Uint32(base[root+16:])) * 4096
	add("dot-of-another", `"." is inode`, put32(dir, 1))
	add("names-out-of-block", "names begin at", func(b []byte) []byte { le.PutUint16(b[dir+8:], 5000); return b })
	add("names-odd", "names begin at", func(b []byte) []byte { le.PutUint16(b[dir+8:], 13); return b })
	add("name-backwards", "has its name at", func(b []byte) []byte { le.PutUint16(b[dir+12+8:], 1); return b })
	add("entry-past-the-end", "past the end", put32(dir+24, 1<<30))
	add("entry-wrong-type", "in the directory", func(b []byte) []byte { b[dir+24+10] = 2; return b })
	add("directory-loop", "", put32(dir+24, uint32(root/32)))
	return out
}

func TestHostile(t *testing.T) {
	for name, h := range hostile(t) {
		_, _, err := erofs.Read(bytes.NewReader(h.img), int64(len(h.img)))
		if err == nil || !strings.Contains(err.Error(), h.want) {
			t.Errorf("%s: %v, want %q", name, err, h.want)
		}
	}
}

// What is read is written and read again as the same tree; nothing panics, loops or takes memory without bound.
func FuzzRead(f *testing.F) {
	for _, name := range []string{"every-type", "hardlinks", "whiteouts", "xattr-shared", "symlinks", "empty-root"} {
		for _, format := range []string{".v0", ".v1"} {
			f.Add(golden.Read(f, "images/"+name+format+".erofs.gz"))
		}
	}
	var v2 bytes.Buffer
	erofs.Write(&v2, randomTree(rand.New(rand.NewPCG(1, 1)), 30), erofs.V2)
	f.Add(v2.Bytes())
	for _, h := range hostile(f) {
		f.Add(h.img)
	}
	f.Fuzz(func(t *testing.T, img []byte) {
		tree, format, err := erofs.Read(bytes.NewReader(img), int64(len(img)))
		if fsys, err := erofs.NewFS(bytes.NewReader(img), int64(len(img))); err == nil {
			fsys.ReadDir(".")
			fsys.Open("usr/bin")
		}
		if err != nil {
			return
		}
		var one bytes.Buffer
		if err := erofs.Write(&one, tree, format); err != nil {
			return // what is read may be more than what is written: names of attributes
		}
		again, _, err := erofs.Read(bytes.NewReader(one.Bytes()), int64(one.Len()))
		if err != nil {
			t.Fatalf("reading what was written: %v", err)
		}
		var two bytes.Buffer
		if err := erofs.Write(&two, again, format); err != nil || !bytes.Equal(one.Bytes(), two.Bytes()) {
			t.Fatalf("another image after reading it: %v", err)
		}
	})
}

func manyFiles(n int) *fstree.Tree {
	t := fstree.New()
	var dir *fstree.Directory
	for k := range n {
		if k%100 == 0 {
			d := fstree.NewDir(0o755)
			d.SetXattr("security.selinux", []byte("system_u:object_r:usr_t:s0\x00"))
			t.Root.Dir().Set(fmt.Sprintf("d%06d", k/100), d)
			dir = d.Dir()
		}
		i := &fstree.Inode{Perm: 0o644, Nlink: 1, Mtime: fstree.Time{Sec: 1700000000, Nsec: uint32(k)},
			Content: &fstree.Object{Digest: fsverity.Of(fsverity.SHA256, fmt.Append(nil, k)), Size: 12345}}
		i.SetXattr("security.selinux", []byte("system_u:object_r:usr_t:s0\x00"))
		dir.Set(fmt.Sprintf("file-%02d", k%100), i)
	}
	return t
}

func BenchmarkWrite(b *testing.B) {
	tree := manyFiles(100_000)
	b.ReportAllocs()
	for b.Loop() {
		if err := erofs.Write(io.Discard, tree, erofs.V1); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRead(b *testing.B) {
	var img bytes.Buffer
	erofs.Write(&img, manyFiles(100_000), erofs.V1)
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := erofs.Read(bytes.NewReader(img.Bytes()), int64(img.Len())); err != nil {
			b.Fatal(err)
		}
	}
}
