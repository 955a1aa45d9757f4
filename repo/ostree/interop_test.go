//go:build interop

package ostree_test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// peer runs cfsctl, and returns what it prints.
func peer(t *testing.T, r *repo.Repo, args ...string) string {
	t.Helper()
	out, err := exec.Command(vm.Cache(t, "cargo/bin/cfsctl"), append([]string{"--repo", r.Path()}, args...)...).CombinedOutput()
	if err != nil {
		t.Errorf("cfsctl %q: %v: %s", args, err, out)
	}
	return string(out)
}

// dump is what ostree dump prints.
func dump(t *testing.T, r *repo.Repo, s *ostree.Stored) string {
	t.Helper()
	o, err := s.Objects(r)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := o.Tree(ostree.CfsctlNames)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := dumpfile.Write(&out, tree, dumpfile.Cfsctl); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// Each program reads, checks and extends what the other has written.
func TestInterop(t *testing.T) {
	first := loadVectors(t).Commits.First
	for _, mode := range []string{"archive", "bare", "bare-user"} {
		dir := vector(t, mode)
		for _, a := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
			for _, f := range []erofs.Format{erofs.V1, erofs.V2} {
				ours, theirs := newRepo(t, a, f), newRepo(t, a, f)
				p := pull(t, ours, local(t, dir), ref, ostree.PullOptions{Transform: boot.Transform, Depth: 1})
				said := peer(t, theirs, "ostree", "pull-local", dir, ref)
				image, _ := p.Find(false, f)
				if !strings.Contains(said, "image   "+image.String()) {
					t.Errorf("%s %v %v: %s: want %v", mode, a, f, said, image)
				}
				for _, args := range [][]string{{"inspect", ref}, {"inspect", "--metadata", ref}, {"inspect", "2828"}, {"dump", ref}, {"compute-id", ref}, {"images"}} {
					args = append([]string{"ostree"}, args...)
					if one, two := peer(t, ours, args...), peer(t, theirs, args...); one != two {
						t.Errorf("%q: %s\n%s", args, one, two)
					}
				}
				// What is ours stays when it collects garbage, and the parent with it.
				for range 2 {
					peer(t, ours, "gc")
					peer(t, ours, "fsck")
				}
				peer(t, ours, "ostree", "inspect", first)
				mustBeClean(t, openRepo(t, ours.Path()))

				// What is theirs is read, and gets the images that it lacks; they go on with that.
				theirs = openRepo(t, theirs.Path())
				s, err := ostree.Open(theirs, ref)
				if err != nil {
					t.Fatal(err)
				}
				if d, ok := s.Image(); !ok || d != image {
					t.Errorf("%v, want %v", d, image)
				}
				if dump(t, theirs, s) != peer(t, theirs, "ostree", "dump", ref) {
					t.Error("the dumps differ")
				}
				again := pull(t, theirs, local(t, dir), ref, ostree.PullOptions{Transform: boot.Transform, Depth: 1})
				if again.Stats.Files != 5 || len(again.Linked) != 2 || again.Linked[1] != p.Linked[1] {
					t.Errorf("%+v, %+v, want %+v", again.Stats, again.Linked, p.Linked)
				}
				peer(t, theirs, "ostree", "tag", ref, "other/name%")
				peer(t, theirs, "ostree", "pull-local", dir, ref)
				peer(t, theirs, "gc")
				peer(t, theirs, "fsck")
				theirs = openRepo(t, theirs.Path())
				if c, err := ostree.Resolve(theirs, "other/name%"); err != nil || c != p.Checksum {
					t.Errorf("%v, %v", c, err)
				}
				mustBeClean(t, theirs)
			}
		}
	}
}
