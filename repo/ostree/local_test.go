package ostree_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// bare-split-xattrs is as bare, with the extended attributes in files of their own.
func TestSplitXattrs(t *testing.T) {
	dir := vector(t, "bare")
	write(t, filepath.Join(dir, "config"), "[core]\nrepo_version=1\nmode=bare-split-xattrs\n")
	split := 0
	err := filepath.WalkDir(filepath.Join(dir, "objects"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".file") {
			return err
		}
		list := gvariant.List{}
		value := make([]byte, 256)
		if n, err := unix.Lgetxattr(path, "security.capability", value); err == nil {
			list = append(list, gvariant.Tuple{[]byte("security.capability\x00"), value[:n]})
			if err := unix.Lremovexattr(path, "security.capability"); err != nil {
				return err
			}
			split++
		}
		v, err := gvariant.Encode("a(ayay)", list)
		if err != nil {
			return err
		}
		return os.WriteFile(path+"-xattrs-link", v.Bytes(), 0o644)
	})
	if err != nil || split == 0 {
		t.Fatalf("%d files with extended attributes, %v", split, err)
	}
	p := pull(t, newRepo(t, fsverity.SHA256, erofs.V1), local(t, dir), ref, ostree.PullOptions{})
	if got, _ := p.Find(false, erofs.V1); got.String() != loadVectors(t).Digests["bare"]["sha256 v1"] {
		t.Errorf("%v", got)
	}
}

// What a repository has not, the one behind it has.
func TestParentRepository(t *testing.T) {
	parent := vector(t, "archive")
	child := filepath.Join(t.TempDir(), "child")
	write(t, filepath.Join(child, "config"), "# a comment\n[core]\nrepo_version = 1\nmode=bare-user\nparent="+parent+"\n\n[remote \"x\"]\nurl=https://example/a;b\n")
	if err := os.Mkdir(filepath.Join(child, "objects"), 0o755); err != nil {
		t.Fatal(err)
	}
	l := local(t, child)
	p := pull(t, newRepo(t, fsverity.SHA256, erofs.V1), l, ref, ostree.PullOptions{})
	if got, _ := p.Find(false, erofs.V1); got.String() != loadVectors(t).Digests["archive"]["sha256 v1"] {
		t.Errorf("%v", got)
	}
	if url, ok := l.Config.Get(`remote "x"`, "url"); !ok || url != "https://example/a;b" || len(l.Config.List(`remote "x"`, "url")) != 2 {
		t.Errorf("%q", url)
	}
	write(t, filepath.Join(child, "config"), "[core]\nrepo_version=1\nparent=.\n")
	if _, err := ostree.OpenLocal(child); err == nil || !strings.Contains(err.Error(), "more than 8 repositories") {
		t.Errorf("its own parent: %v", err)
	}
}

func TestRefs(t *testing.T) {
	dir := vector(t, "archive")
	v := loadVectors(t)
	refs := filepath.Join(dir, "refs")
	write(t, filepath.Join(refs, "remotes/fedora/os/stable"), v.Commits.First+"\n")
	write(t, filepath.Join(refs, "mirrors/org.example.Vec/os/stable"), v.Commits.Second+"\n")
	write(t, filepath.Join(refs, "mirrors/org.example.Vec/os/testing"), v.Commits.Second)
	write(t, filepath.Join(refs, "heads/bad"), "not a checksum")
	if err := os.Symlink("vec/x86_64/one", filepath.Join(refs, "heads/alias")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(refs, "heads/out")); err != nil {
		t.Fatal(err)
	}
	l := local(t, dir)
	for name, want := range map[string]string{
		ref: v.Commits.Second, "alias": v.Commits.Second, "heads/" + ref: v.Commits.Second, ref + "^": v.Commits.First, v.Commits.Second + "^": v.Commits.First,
		"fedora:os/stable": v.Commits.First, "org.example.Vec:os/stable": v.Commits.Second, "os/testing": v.Commits.Second,
		"remotes/fedora/os/stable": v.Commits.First,
		"os/stable":                "say which one", "nothing": "not found", "vec": "not found", "bad": "not a checksum", "../config": "file name", "": "file name",
		"a//b": "file name", "..:x": "file name", ref + "^^": "no parent", "out": "escape",
	} {
		c, err := l.Ref(ctx, name)
		if err != nil && !strings.Contains(err.Error(), want) || err == nil && c.String() != want {
			t.Errorf("%q: %v, %v, want %s", name, c, err, want)
		}
	}
	if err := os.Remove(filepath.Join(refs, "heads/bad")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(refs, "heads/out")); err != nil {
		t.Fatal(err)
	}
	list, err := l.Refs()
	var names []string
	for _, r := range list {
		names = append(names, r.Name)
	}
	if got := strings.Join(names, " "); err != nil || got != "alias fedora:os/stable org.example.Vec:os/stable org.example.Vec:os/testing ostree-metadata vec/x86_64/one" {
		t.Errorf("%s, %v", got, err)
	}
}

func TestHostileRepository(t *testing.T) {
	for name, c := range map[string]struct{ config, want string }{
		"no-mode":     {"[core]\nrepo_version=1\nmode=zip\n", `unknown mode "zip"`},
		"version":     {"[core]\nrepo_version=2\nmode=bare\n", "repo_version=2"},
		"no-group":    {"mode=bare\n", "below a [GROUP]"},
		"open-group":  {"[core\n", "a group ends with ]"},
		"no-equals":   {"[core]\nmode\n", "KEY=VALUE"},
		"no-objects":  {"[core]\nrepo_version=1\nmode=bare\n", "objects"},
		"lost-parent": {"[core]\nrepo_version=1\nmode=bare\nparent=/nowhere\n", "objects"},
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "config"), c.config)
		if _, err := ostree.OpenLocal(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, err := ostree.OpenLocal(t.TempDir()); err == nil || !strings.Contains(err.Error(), "not an OSTree repository") {
		t.Errorf("%v", err)
	}
	// Objects that are no files, and a commit that is known as partial.
	dir := vector(t, "bare-user")
	var victim string
	filepath.WalkDir(filepath.Join(dir, "objects"), func(path string, e fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".file") {
			victim = path
		}
		return nil
	})
	state := filepath.Join(dir, "state", loadVectors(t).Commits.Second+".commitpartial")
	write(t, state, "f")
	for name, c := range map[string]struct {
		replace func() error
		want    string
	}{
		"missing": {func() error { return nil }, "the commit is partial in its repository"},
		"fifo":    {func() error { return unix.Mkfifo(victim, 0o644) }, "user.ostreemeta"},
		"link":    {func() error { return os.Symlink("/etc/passwd", victim) }, "user.ostreemeta"},
		"dir":     {func() error { return os.Mkdir(victim, 0o755) }, "user.ostreemeta"},
		"other":   {func() error { return os.WriteFile(victim, []byte("other"), 0o644) }, "user.ostreemeta"},
		"bad-meta": {func() error {
			return errors.Join(os.WriteFile(victim, []byte("other"), 0o644), unix.Setxattr(victim, "user.ostreemeta", []byte("xx"), 0))
		}, "normal form"},
	} {
		if err := os.RemoveAll(victim); err != nil {
			t.Fatal(err)
		}
		if err := c.replace(); err != nil {
			t.Fatal(err)
		}
		if _, err := ostree.Pull(ctx, newRepo(t, fsverity.SHA256, erofs.V1), local(t, dir), []string{ref}, ostree.PullOptions{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// randomTree makes a directory in which no two files are alike, since those become one in a commit, and all times are 0.
func randomTree(t testing.TB, r *rand.Rand, dir string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dirs, serial := []string{dir}, 0
	for range 5 + r.IntN(40) {
		serial++
		name := filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("%d%s", serial, strings.Repeat("ä ü", r.IntN(4))))
		mode := os.FileMode(r.Uint32() & 0o777)
		switch r.IntN(4) {
		case 0:
			must(os.Mkdir(name, 0o755))
			dirs = append(dirs, name)
			mode |= 0o700
		case 1:
			must(os.Symlink(fmt.Sprintf("target%d", serial), name))
			must(os.Lchown(name, r.IntN(3)*1000, r.IntN(70000)))
			continue
		default:
			size := []int{0, 10, 64, 65, 128, 4096, 5000, 300_000, 1_500_000}[r.IntN(9)]
			must(os.WriteFile(name, append(fmt.Appendf(nil, "%d", serial), bytes.Repeat([]byte{byte(serial)}, size)...), 0o644))
			if r.IntN(4) == 0 {
				must(os.Link(name, filepath.Join(dirs[r.IntN(len(dirs))], fmt.Sprintf("link%d", serial))))
			}
		}
		must(os.Lchown(name, r.IntN(3)*1000, r.IntN(70000)))
		must(os.Chmod(name, mode|os.FileMode(r.IntN(2))*os.ModeSetgid|os.FileMode(r.IntN(2))*os.ModeSticky))
		if r.IntN(3) == 0 {
			must(unix.Lsetxattr(name, "user.b", bytes.Repeat([]byte{1}, 1+r.IntN(3000)), 0)) // ostree leaves empty ones out
			must(unix.Lsetxattr(name, "user.a", []byte{0}, 0))
		}
	}
	must(filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, make([]unix.Timespec, 2), unix.AT_SYMLINK_NOFOLLOW)
	}))
}

// A directory that ostree has committed, into a repository of any mode, gives the tree that the directory gives.
func TestProperty(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	run := func(args ...string) {
		t.Helper()
		if out, err := vm.Ostree(t, args...).CombinedOutput(); err != nil {
			t.Fatalf("ostree %q: %v: %s", args, err, out)
		}
	}
	for round := range 4 {
		top := t.TempDir()
		dir := filepath.Join(top, "tree")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		randomTree(t, r, dir)
		mine := newRepo(t, fsverity.SHA256, erofs.V1)
		want, err := scan.Dir(ctx, dir, scan.Digests(fsverity.SHA256), scan.Options{Xattrs: fstree.XattrsAll})
		if err != nil {
			t.Fatal(err)
		}
		for _, mode := range []string{"archive", "bare", "bare-user"} {
			path := filepath.Join(top, mode)
			run("--repo="+path, "init", "--mode="+mode)
			run("--repo="+path, "commit", "--branch=os/"+mode, "--subject="+mode, "--tree=dir="+dir)
			o, err := pull(t, mine, local(t, path), "os/"+mode, ostree.PullOptions{}).Objects(mine)
			if err != nil {
				t.Fatal(err)
			}
			got, err := o.Tree(ostree.RightNames)
			if err != nil {
				t.Fatal(err)
			}
			var images [2]bytes.Buffer
			for k, tree := range []*fstree.Tree{want, got} {
				if err := erofs.Write(&images[k], tree, erofs.V1); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(images[0].Bytes(), images[1].Bytes()) {
				t.Errorf("round %d: %s: the images differ", round, mode)
				fstree.Diff(want, got, func(d fstree.Difference) error {
					t.Logf("%+v", d)
					return nil
				})
			}
		}
		mustBeClean(t, mine)
	}
}
