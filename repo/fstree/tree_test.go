package fstree_test

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

func file(content string) *fstree.Inode {
	return &fstree.Inode{Perm: 0o644, Content: fstree.Inline(content)}
}

// sample is a small container root with a hard link, foreign attributes and leftovers in /run.
func sample() *fstree.Tree {
	t := fstree.New()
	root := t.Root.Dir()
	usr := fstree.NewDir(0o555)
	usr.UID, usr.Mtime = 7, fstree.Time{Sec: 100, Nsec: 5}
	usr.SetXattr("user.u", []byte("v"))
	shared := file("x")
	shared.SetXattr("security.capability", []byte{1})
	shared.SetXattr("security.selinux", []byte("host_t"))
	usr.Dir().Set("b", shared)
	usr.Dir().Set("a", shared)
	run := fstree.NewDir(0o755)
	run.Dir().Set("pid", shared)
	root.Set("usr", usr)
	root.Set("run", run)
	return t
}

func TestDirectoryStaysSorted(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	d := &fstree.Directory{}
	want := map[string]*fstree.Inode{}
	for range 2000 {
		name := string(rune('a'+r.IntN(26))) + string(rune('a'+r.IntN(26)))
		if r.IntN(3) == 0 {
			d.Remove(name)
			delete(want, name)
			continue
		}
		want[name] = file(name)
		d.Set(name, want[name])
	}
	if !slices.IsSortedFunc(d.Entries, func(a, b fstree.Entry) int { return strings.Compare(a.Name, b.Name) }) {
		t.Error("entries are not sorted")
	}
	if len(d.Entries) != len(want) {
		t.Errorf("%d entries, want %d", len(d.Entries), len(want))
	}
	for name, inode := range want {
		if d.Lookup(name) != inode {
			t.Errorf("%s points to the wrong inode", name)
		}
	}
}

func TestXattrsStaySorted(t *testing.T) {
	i := file("")
	for _, name := range []string{"user.b", "user.a", "user.c", "user.a"} {
		i.SetXattr(name, []byte(name+"2"))
	}
	i.RemoveXattr("user.c")
	i.RemoveXattr("user.absent")
	var got []string
	for _, x := range i.Xattrs {
		got = append(got, x.Name+"="+string(x.Value))
	}
	if want := []string{"user.a=user.a2", "user.b=user.b2"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if _, ok := i.Xattr("user.c"); ok {
		t.Error("user.c is still there")
	}
}

func TestLookup(t *testing.T) {
	tree := sample()
	for path, found := range map[string]bool{
		"": true, "/": true, "usr": true, "/usr/a": true, "usr//b/": true, "/usr/a/b": false, "/nope": false, "/usr/..": false,
	} {
		if got := tree.Lookup(path) != nil; got != found {
			t.Errorf("Lookup(%q): found %v, want %v", path, got, found)
		}
	}
}

func TestWalkOrderAndEnd(t *testing.T) {
	var paths []string
	tree := sample()
	tree.Walk(func(path string, _ *fstree.Inode) error { paths = append(paths, path); return nil })
	if want := []string{"/", "/run", "/run/pid", "/usr", "/usr/a", "/usr/b"}; !slices.Equal(paths, want) {
		t.Errorf("walked %q, want %q", paths, want)
	}
	stop := errors.New("stop")
	if err := tree.Walk(func(path string, _ *fstree.Inode) error {
		if path == "/run/pid" {
			return stop
		}
		return nil
	}); err != stop {
		t.Errorf("the walk ended with %v", err)
	}
}

func TestMakeContainerRoot(t *testing.T) {
	tree := sample()
	if err := tree.MakeContainerRoot(fstree.XattrsAllowlist); err != nil {
		t.Fatal(err)
	}
	root, usr, run := tree.Root, tree.Lookup("usr"), tree.Lookup("run")
	if root.Perm != 0o555 || root.UID != 7 || root.Mtime != usr.Mtime {
		t.Errorf("the root is not like /usr: %+v", root)
	}
	if len(run.Dir().Entries) != 0 || run.Mtime != usr.Mtime || run.Perm != 0o755 {
		t.Errorf("/run is not empty with the time of /usr: %+v", run)
	}
	a := tree.Lookup("usr/a")
	if a.Nlink != 2 {
		t.Errorf("%d links after the third name is gone, want 2", a.Nlink)
	}
	if len(a.Xattrs) != 1 || a.Xattrs[0].Name != "security.capability" {
		t.Errorf("attributes kept: %v", a.Xattrs)
	}
	root.SetXattr("user.only-root", nil)
	if _, ok := usr.Xattr("user.only-root"); ok {
		t.Error("the root and /usr share their attributes")
	}
}

func TestMakeContainerRootRefuses(t *testing.T) {
	noUsr := fstree.New()
	if err := noUsr.MakeContainerRoot(fstree.XattrsAll); !errors.Is(err, fstree.ErrNoUsr) {
		t.Errorf("no /usr: %v", err)
	}
	runFile := sample()
	runFile.Root.Dir().Set("run", file(""))
	if err := runFile.MakeContainerRoot(fstree.XattrsAll); err == nil || !strings.Contains(err.Error(), "/run") {
		t.Errorf("/run is a file: %v", err)
	}
}

func TestXattrModes(t *testing.T) {
	for mode, kept := range map[string][]bool{
		"allowlist-only":   {true, false, false},
		"keep-user-xattrs": {true, true, false},
		"all":              {true, true, true},
	} {
		m, err := fstree.ParseXattrMode(mode)
		if err != nil || m.String() != mode {
			t.Fatalf("%s: %v, %v", mode, m, err)
		}
		for k, name := range []string{"security.capability", "user.x", "security.selinux"} {
			if m.Keeps(name) != kept[k] {
				t.Errorf("%s keeps %s: %v", mode, name, !kept[k])
			}
		}
	}
	if _, err := fstree.ParseXattrMode("none"); err == nil {
		t.Error(`"none" is a mode`)
	}
}

func TestCheckName(t *testing.T) {
	for _, bad := range []string{"", ".", "..", "a/b", "a\x00", strings.Repeat("x", 256)} {
		if fstree.CheckName(bad) == nil {
			t.Errorf("%q is a name", bad)
		}
	}
	for _, good := range []string{"a", "...", "\xff", strings.Repeat("x", 255)} {
		if err := fstree.CheckName(good); err != nil {
			t.Error(err)
		}
	}
}
