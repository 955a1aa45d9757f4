package publish_test

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/ostree/publish"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

var ctx = context.Background()

// modes are all that a repository can have.
var modes = []ostree.Mode{ostree.Archive, ostree.Bare, ostree.BareUser, ostree.BareUserOnly, ostree.BareSplitXattrs}

// peer runs ostree, and returns what it printed.
func peer(t testing.TB, args ...string) string {
	t.Helper()
	c := vm.Ostree(t, args...)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s%s", c.Args, err, out, errs.String())
	}
	return strings.TrimSpace(string(out))
}

// newRepo makes a composefs repository.
func newRepo(t testing.TB, a fsverity.Algorithm) *repo.Repo {
	t.Helper()
	path := filepath.Join(t.TempDir(), "repo")
	if _, err := repo.Init(path, repo.Config{Algorithm: a, Format: erofs.V1, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// newTarget makes an OSTree repository.
func newTarget(t testing.TB, mode ostree.Mode) *publish.Repository {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ostree")
	if created, err := publish.Init(path, mode, ""); err != nil || !created {
		t.Fatal(created, err)
	}
	return openTarget(t, path)
}

func openTarget(t testing.TB, path string) *publish.Repository {
	t.Helper()
	target, err := publish.Open(ctx, path, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { target.Close() })
	return target
}

// tree extracts a golden tree, without what OSTree cannot hold.
func tree(t testing.TB, name string) string {
	t.Helper()
	top := golden.Extract(t, "trees/"+name+".tar.gz")
	var odd []string
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err == nil && (!utf8.ValidString(e.Name()) || e.Type()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0) {
			odd = append(odd, path)
			if e.IsDir() {
				return fs.SkipDir
			}
		}
		return err
	})
	for _, path := range odd {
		if err == nil {
			err = os.RemoveAll(path)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(top)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) == 1 { // the tree is a directory of the archive
		return filepath.Join(top, entries[0].Name())
	}
	return top
}

// commit makes a commit of a directory.
func commit(t testing.TB, r *repo.Repo, dir string, d ostree.Description, tag string, change ...func(*fstree.Tree)) *ostree.Stored {
	t.Helper()
	i, err := r.Begin(ctx, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Abort()
	tree, err := scan.Dir(ctx, dir, i, scan.Options{Xattrs: fstree.XattrsAll})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(tree)
	}
	o, err := ostree.Compose(ctx, tree, scan.Files(dir), i, r.Algorithm(), d)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ostree.Store(ctx, r, i, o, ostree.StoreOptions{Tag: tag})
	if err == nil {
		err = i.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func text(s string) gvariant.Value {
	v, err := gvariant.Encode("s", s)
	if err != nil {
		panic(err)
	}
	return v
}
