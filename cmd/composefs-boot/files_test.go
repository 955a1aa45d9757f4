package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// command runs the program, and returns its exit code and what it prints.
func command(args ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = run(context.Background(), append([]string{"composefs-boot", "-q"}, args...), nil, &o, &e)
	return code, o.String(), e.String()
}

// randomFiles makes a tree of about n files of all types, and stores its objects.
func randomFiles(t testing.TB, r *rand.Rand, n int, objects string) *fstree.Tree {
	tree := fstree.New()
	dirs := []*fstree.Inode{tree.Root}
	var files []*fstree.Inode
	for k := range n {
		i := &fstree.Inode{Perm: r.Uint32() & 0o7777, UID: r.Uint32() >> (1 + r.IntN(31)), GID: r.Uint32() >> (1 + r.IntN(31)),
			Mtime: fstree.Time{Sec: int64(r.IntN(1 << 32)), Nsec: uint32(r.IntN(1e9))}}
		for m := range r.IntN(3) {
			i.SetXattr(fmt.Sprintf("trusted.%d%s", m, []string{"", "=", "%", "%3D=", "ä"}[r.IntN(5)]), []byte(strings.Repeat("\x00v\n", r.IntN(20))))
		}
		switch r.IntN(10) {
		case 0, 1:
			i.Content = &fstree.Directory{}
		case 2:
			i.Perm, i.Content = 0o777, fstree.Symlink(strings.Repeat("../t", 1+r.IntN(250))) // Linux knows no other mode
		case 3:
			i.Content = fstree.Device{Block: r.IntN(2) == 0, Rdev: r.Uint32() >> r.IntN(32)}
		case 4:
			i.Content = fstree.Device{}
		case 5:
			i.Content = fstree.Fifo{}
		case 6:
			i.Content = fstree.Inline(strings.Repeat("i", r.IntN(65)))
		default:
			content := bytes.Repeat(fmt.Append(nil, k), 65+r.IntN(5000))
			d := fsverity.Of(fsverity.SHA256, content)
			i.Content = &fstree.Object{Digest: d, Size: uint64(len(content))}
			path := filepath.Join(objects, d.ObjectPath())
			os.MkdirAll(filepath.Dir(path), 0o755)
			if err := os.WriteFile(path, content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if len(files) > 0 && r.IntN(6) == 0 {
			i = files[r.IntN(len(files))]
		}
		name := fmt.Sprintf("%s%d", strings.Repeat([]string{"n", "ü", "\xff", " ", "\\"}[r.IntN(5)], 1+r.IntN(60)), k)
		dirs[r.IntN(len(dirs))].Dir().Set(name, i)
		if i.Dir() != nil {
			dirs = append(dirs, i)
		} else {
			files = append(files, i)
		}
	}
	tree.CountLinks()
	return tree
}

// readTar reads an archive into a tree, independently of how it was written.
func readTar(t testing.TB, r io.Reader) *fstree.Tree {
	tree := fstree.New()
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if err == io.EOF {
			tree.CountLinks()
			return tree
		}
		if err != nil {
			t.Fatal(err)
		}
		i := &fstree.Inode{Perm: uint32(h.Mode), UID: uint32(h.Uid), GID: uint32(h.Gid),
			Mtime: fstree.Time{Sec: h.ModTime.Unix(), Nsec: uint32(h.ModTime.Nanosecond())}}
		for key, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				i.SetXattr(strings.NewReplacer("%3D", "=", "%25", "%").Replace(name), []byte(value))
			}
		}
		rdev := uint32(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))
		switch h.Typeflag {
		case tar.TypeDir:
			i.Content = &fstree.Directory{}
		case tar.TypeReg:
			content, err := io.ReadAll(in)
			if err != nil {
				t.Fatal(err)
			}
			i.Content = fstree.Inline(content)
			if len(content) > fstree.MaxInline {
				i.Content = &fstree.Object{Digest: fsverity.Of(fsverity.SHA256, content), Size: uint64(len(content))}
			}
		case tar.TypeSymlink:
			i.Content = fstree.Symlink(h.Linkname)
		case tar.TypeLink:
			i = tree.Lookup(h.Linkname)
		case tar.TypeChar, tar.TypeBlock:
			i.Content = fstree.Device{Block: h.Typeflag == tar.TypeBlock, Rdev: rdev}
		case tar.TypeFifo:
			i.Content = fstree.Fifo{}
		}
		name := strings.TrimSuffix(h.Name, "/")
		if name == "." {
			tree.Root = i
			continue
		}
		tree.Lookup(filepath.Dir(name)[:max(0, strings.LastIndex(name, "/"))]).Dir().Set(filepath.Base(name), i)
	}
}

func differences(t testing.TB, a, b *fstree.Tree) (list []string) {
	if err := fstree.Diff(a, b, func(d fstree.Difference) error { list = append(list, fmt.Sprint(d)); return nil }); err != nil {
		t.Fatal(err)
	}
	return list
}

// Any tree comes back from its archive and from the directory that its image is extracted to.
func TestExportAndExtractRandomTrees(t *testing.T) {
	for seed := range 25 {
		r := rand.New(rand.NewPCG(uint64(seed), 5))
		dir := t.TempDir()
		img, objects, archive, out := filepath.Join(dir, "img"), filepath.Join(dir, "objects"), filepath.Join(dir, "tar"), filepath.Join(dir, "out")
		tree := randomFiles(t, r, 1+r.IntN(200), objects)
		writeImage(t, tree, img)
		if err := os.MkdirAll(objects, 0o755); err != nil {
			t.Fatal(err)
		}
		if code, _, err := command("export", "--tar", "--objects", objects, "-o", archive, img); code != 0 {
			t.Fatalf("seed %d: %s", seed, err)
		}
		f, err := os.Open(archive)
		if err != nil {
			t.Fatal(err)
		}
		if list := differences(t, tree, readTar(t, f)); len(list) > 0 {
			t.Errorf("seed %d: export: %q", seed, list)
		}
		f.Close()
		if os.Geteuid() != 0 {
			continue
		}
		if code, _, err := command("extract", "--objects", objects, img, out); code != 0 || err != "" {
			t.Fatalf("seed %d: %s", seed, err)
		}
		if code, list, err := command("diff", "--no-propagate-usr-to-root", img, out); code != 0 {
			t.Errorf("seed %d: extract: %s%s", seed, list, err)
		}
	}
}

// A bad image gives an error, and nothing outside of the directory is touched.
func TestHostileImages(t *testing.T) {
	base := golden.Read(t, "images/every-type.v1.erofs.gz")
	le := binary.LittleEndian
	root := int(le.Uint16(base[1024+14:])) * 32
	rootEntries := int(le.Uint32(base[root+16:])) * 4096
	named := fstree.New()
	sub := fstree.NewDir(0o755)
	named.Root.Dir().Set("q_file", &fstree.Inode{Perm: 0o644, Nlink: 1, Content: fstree.Inline("out")})
	named.Root.Dir().Set("qq", sub)
	sub.Dir().Set("__", fstree.NewDir(0o755))
	path := filepath.Join(t.TempDir(), "img")
	writeImage(t, named, path)
	names, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	change := func(b []byte, change func([]byte)) []byte {
		b = bytes.Clone(b)
		change(b)
		return b
	}
	replace := func(old, new string) []byte {
		if bytes.Count(names, []byte(old)) != 1 {
			t.Fatalf("%q is not there once", old)
		}
		return bytes.Replace(names, []byte(old), []byte(new), 1)
	}
	for name, img := range map[string][]byte{
		"empty":          {},
		"truncated":      base[:len(base)-1],
		"directory-loop": change(base, func(b []byte) { le.PutUint32(b[rootEntries+24:], uint32(root/32)) }),
		"past-the-end":   change(base, func(b []byte) { le.PutUint32(b[rootEntries+24:], 1<<30) }),
		"slash-in-name":  replace("q_file", "q/file"),
		"nul-in-name":    replace("q_file", "q\x00file"),
		"dot-dot-twice":  replace("__", ".."),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path, out := filepath.Join(dir, "img"), filepath.Join(dir, "out")
			if err := os.WriteFile(path, img, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, args := range [][]string{{"ls", "-R", path}, {"ls", "-R", "--names", path}, {"extract", path, out},
				{"extract", "--dry-run", path, out}, {"export", "--tar", path}, {"diff", path, path}, {"cat", path, "/nothing"}} {
				code, _, err := command(args...)
				if code != 1 || strings.Count(err, "\n") != 1 || !strings.Contains(err, path) {
					t.Errorf("%s: exit code %d: %s", args[0], code, err)
				}
			}
			command("ls", path) // whatever it says, it ends
			if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
				t.Errorf("there is %v, %v", list, err)
			}
		})
	}
}

// A symbolic link of the image leads to other files of the image.
func TestCatStaysInside(t *testing.T) {
	tree := fstree.New()
	etc := fstree.NewDir(0o755)
	tree.Root.Dir().Set("etc", etc)
	etc.Dir().Set("passwd", &fstree.Inode{Nlink: 1, Content: fstree.Inline("inside")})
	for name, target := range map[string]string{"up": "../../../../etc/passwd", "abs": "/etc/passwd", "dir": "/../etc", "loop": "loop", "self": "."} {
		tree.Root.Dir().Set(name, &fstree.Inode{Perm: 0o777, Nlink: 1, Content: fstree.Symlink(target)})
	}
	path := filepath.Join(t.TempDir(), "img")
	writeImage(t, tree, path)
	for _, p := range []string{"up", "abs", "dir/passwd", "../../etc/passwd", "self/self/up", "/etc/../etc/passwd"} {
		if code, out, err := command("cat", path, p); code != 0 || out != "inside" {
			t.Errorf("%s: %q, %s", p, out, err)
		}
	}
	if code, _, err := command("cat", path, "loop"); code != 1 || !strings.Contains(err, "/loop: too many symbolic links") {
		t.Errorf("a loop: %s", err)
	}
}

func TestModeString(t *testing.T) {
	for mode, want := range map[uint32]string{0o100644: "-rw-r--r--", 0o107777: "-rwsrwsrwt", 0o047000: "d--S--S--T", 0o120777: "lrwxrwxrwx", 0o020001: "c--------x"} {
		if got := modeString(mode); got != want {
			t.Errorf("%o: %s, want %s", mode, got, want)
		}
	}
}
