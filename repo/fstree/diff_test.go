package fstree_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// lines returns the differences of two trees, one a line.
func lines(t testing.TB, a, b *fstree.Tree) string {
	t.Helper()
	var list []string
	err := fstree.Diff(a, b, func(d fstree.Difference) error {
		list = append(list, strings.Join(strings.Fields(fmt.Sprintf("%s %s %s %s %s %s", d.Kind, d.Path, d.Attribute, d.Xattr, d.Old, d.New)), " "))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(list, "\n")
}

func object(alg fsverity.Algorithm, content string, size uint64) *fstree.Object {
	return &fstree.Object{Digest: fsverity.Of(alg, []byte(content)), Size: size}
}

// Every attribute makes a difference, and the first one is named.
func TestDiffAttributes(t *testing.T) {
	one, two := object(fsverity.SHA256, "1", 100), object(fsverity.SHA256, "2", 100)
	for _, c := range []struct {
		name string
		a, b fstree.Inode
		want string
	}{
		{"nothing", fstree.Inode{}, fstree.Inode{}, ""},
		{"type", fstree.Inode{Content: fstree.Fifo{}}, fstree.Inode{Perm: 1}, "type fifo file"},
		{"type of device", fstree.Inode{Content: fstree.Device{Block: true, Rdev: 1}}, fstree.Inode{Content: fstree.Device{Rdev: 1}}, "type block device character device"},
		{"mode", fstree.Inode{Perm: 0o644, UID: 1}, fstree.Inode{Perm: 0o4755}, "mode 0644 4755"},
		{"owner", fstree.Inode{UID: 1, Mtime: fstree.Time{Sec: 1}}, fstree.Inode{UID: 2}, "owner 1:0 2:0"},
		{"group", fstree.Inode{GID: 1}, fstree.Inode{GID: 4294967295}, "owner 0:1 0:4294967295"},
		{"seconds", fstree.Inode{Mtime: fstree.Time{Sec: -1}}, fstree.Inode{}, "mtime -1.000000000 0.000000000"},
		{"nanoseconds", fstree.Inode{Mtime: fstree.Time{Nsec: 7}}, fstree.Inode{Content: fstree.Inline("x")}, "mtime 0.000000007 0.000000000"},
		{"xattr", fstree.Inode{Xattrs: []fstree.Xattr{{"user.a", nil}, {"user.b", []byte("1")}}},
			fstree.Inode{Xattrs: []fstree.Xattr{{"user.a", nil}, {"user.b", []byte("2")}}}, `xattr user.b "1" "2"`},
		{"xattr removed", fstree.Inode{Xattrs: []fstree.Xattr{{"user.a", nil}, {"user.b", nil}}},
			fstree.Inode{Xattrs: []fstree.Xattr{{"user.b", nil}}}, `xattr user.a "" -`},
		{"xattr added", fstree.Inode{}, fstree.Inode{Xattrs: []fstree.Xattr{{"user.b", nil}}}, `xattr user.b - ""`},
		{"inline", fstree.Inode{Content: fstree.Inline("a")}, fstree.Inode{Content: fstree.Inline("b")}, `content "a" "b"`},
		{"inline and object", fstree.Inode{Content: fstree.Inline("1")}, fstree.Inode{Content: one}, `content "1" ` + text(one)},
		{"object", fstree.Inode{Content: one}, fstree.Inode{Content: two}, "content " + text(one) + " " + text(two)},
		{"size", fstree.Inode{Content: one}, fstree.Inode{Content: object(fsverity.SHA256, "1", 101)},
			"content " + text(one) + " " + strings.Replace(text(one), "100", "101", 1)},
		{"path of the object", fstree.Inode{Content: &fstree.Object{Path: "x", Size: 1}}, fstree.Inode{Content: &fstree.Object{Path: "y", Size: 1}},
			`content "x" without digest, 1 bytes "y" without digest, 1 bytes`},
		{"two algorithms", fstree.Inode{Content: one}, fstree.Inode{Content: object(fsverity.SHA512, "2", 100)}, ""},
		{"two algorithms, two sizes", fstree.Inode{Content: one}, fstree.Inode{Content: object(fsverity.SHA512, "2", 101)},
			"content " + text(one) + " " + text(object(fsverity.SHA512, "2", 101))},
		{"target", fstree.Inode{Content: fstree.Symlink("a")}, fstree.Inode{Content: fstree.Symlink("b")}, `target "a" "b"`},
		{"device", fstree.Inode{Content: fstree.Device{Rdev: 0x103}}, fstree.Inode{Content: fstree.Device{Rdev: 0xfff00000 | 0x103}}, "device 1:3 1:1048323"},
		{"nlink", fstree.Inode{Nlink: 1}, fstree.Inode{Nlink: 2}, "nlink 1 2"},
	} {
		a, b := fstree.New(), fstree.New()
		for i, tree := range map[*fstree.Inode]*fstree.Tree{&c.a: a, &c.b: b} {
			if i.Content == nil {
				i.Content = fstree.Inline("x")
			}
			tree.Root.Dir().Set("f", i)
		}
		want := c.want
		if want != "" {
			want = "changed /f " + want
		}
		if got := lines(t, a, b); got != want {
			t.Errorf("%s: %q, want %q", c.name, got, want)
		}
	}
}

func text(o *fstree.Object) string {
	return fmt.Sprintf("%v:%v, %d bytes", o.Digest.Algorithm(), o.Digest, o.Size)
}

// tree makes one of names; "dir/" is a directory, "b=a" another name of a.
func tree(names ...string) *fstree.Tree {
	t := fstree.New()
	for _, name := range names {
		name, target, linked := strings.Cut(name, "=")
		inode := file(name)
		if linked {
			inode = t.Lookup(target)
		}
		if strings.HasSuffix(name, "/") {
			inode, name = fstree.NewDir(0o755), strings.TrimSuffix(name, "/")
		}
		parent := t.Root
		if k := strings.LastIndex(name, "/"); k >= 0 {
			parent, name = t.Lookup(name[:k]), name[k+1:]
		}
		parent.Dir().Set(name, inode)
	}
	return t // with Nlink 0 everywhere: only what leads where counts
}

func TestDiffPaths(t *testing.T) {
	root := tree()
	root.Root.Perm = 0o700
	for _, c := range []struct {
		name string
		a, b *fstree.Tree
		want []string
	}{
		{"same", tree("a", "b/", "b/c"), tree("a", "b/", "b/c"), nil},
		{"root", tree(), root, []string{"changed / mode 0755 0700"}},
		{"added with all below", tree("a"), tree("a", "b/", "b/c/", "b/c/d"),
			[]string{"added /b - directory", "added /b/c - directory", "added /b/c/d - file"}},
		{"removed with all below", tree("a/", "a/x", "b"), tree("b"), []string{"removed /a directory -", "removed /a/x file -"}},
		{"directory and file", tree("a/", "a/x"), tree("a"), []string{"changed /a type directory file", "removed /a/x file -"}},
		{"names of one beginning", tree("a-", "a/", "a/x"), tree("a/", "a/y", "a0"),
			[]string{"removed /a/x file -", "added /a/y - file", "removed /a- file -", "added /a0 - file"}},
		{"linked the same", tree("a", "b=a", "c", "d=c"), tree("a", "b=a", "c", "d=c"), nil},
		{"link broken", tree("a", "b=a"), links("a", "b"), []string{"changed /b link /a -"}},
		{"link made", links("a", "b"), tree("a", "b=a"), []string{"changed /b link - /a"}},
		{"linked with another", links("a", "b=a", "c"), links("a", "b", "c=b"),
			[]string{"changed /b link /a -", "changed /c link - /b"}},
		{"linked with what is gone", links("a", "b=a", "c=a"), links("b", "c=b"), []string{"removed /a file -"}},
	} {
		if got := lines(t, c.a, c.b); got != strings.Join(c.want, "\n") {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, strings.Join(c.want, "\n"))
		}
	}
}

// links is tree with the same content everywhere.
func links(names ...string) *fstree.Tree {
	t := tree(names...)
	t.Walk(func(_ string, i *fstree.Inode) error {
		if i.Dir() == nil {
			i.Content = fstree.Inline("a")
		}
		return nil
	})
	return t
}

func TestDiffStops(t *testing.T) {
	stop := errors.New("stop")
	if err := fstree.Diff(tree(), tree("a/", "a/b"), func(fstree.Difference) error { return stop }); err != stop {
		t.Errorf("%v", err)
	}
}

func BenchmarkDiff(b *testing.B) {
	many := func() *fstree.Tree {
		t := fstree.New()
		for k := range 1000 {
			dir := fstree.NewDir(0o755)
			for n := range 100 {
				i := &fstree.Inode{Perm: 0o644, Nlink: 1, Content: object(fsverity.SHA256, fmt.Sprint(k, n), 1000)}
				i.SetXattr("security.selinux", []byte("system_u:object_r:usr_t:s0\x00"))
				dir.Dir().Set(fmt.Sprintf("file-%02d", n), i)
			}
			t.Root.Dir().Set(fmt.Sprintf("dir-%03d", k), dir)
		}
		return t
	}
	one, two := many(), many()
	b.ReportAllocs()
	for b.Loop() {
		fstree.Diff(one, two, func(d fstree.Difference) error { b.Fatal(d); return nil })
	}
}
