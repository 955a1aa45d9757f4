package ostree_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// What is damaged is found, and named by what it damages.
func TestFsck(t *testing.T) {
	m := newMemory(t)
	c := m.system("os", ostree.Checksum{}, 40, 1)
	for name, damage := range map[string]struct {
		do   func(t *testing.T, path string, p ostree.Pulled)
		want ostree.FsckKind
	}{
		"content": {func(t *testing.T, path string, _ ostree.Pulled) {
			objects, _ := filepath.Glob(filepath.Join(path, "objects/*/*"))
			for _, o := range objects {
				if b, err := os.ReadFile(o); err == nil && bytes.HasPrefix(b, []byte("39 in 1, ")) {
					b[0] ^= 1
					os.WriteFile(o, b, 0o644)
				}
			}
		}, ostree.ContentBroken},
		"image": {func(t *testing.T, path string, p ostree.Pulled) {
			if err := os.Remove(filepath.Join(path, "images", p.Linked[0].Digest.String())); err != nil {
				t.Fatal(err)
			}
		}, ostree.ImageMissing},
		"stream": {func(t *testing.T, path string, p ostree.Pulled) {
			if err := os.Truncate(filepath.Join(path, "objects", p.Stream().ObjectPath()), 100); err != nil {
				t.Fatal(err)
			}
		}, ostree.StreamBroken},
	} {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		p := pull(t, r, m, "os", ostree.PullOptions{})
		mustBeClean(t, r)
		damage.do(t, r.Path(), p)
		r = openRepo(t, r.Path())
		report, err := ostree.Fsck(ctx, r, ostree.FsckOptions{})
		if err != nil || report.Bad != 1 || report.Commits != 1 || len(report.Findings) != 1 {
			t.Fatalf("%s: %+v, %v", name, report, err)
		}
		if f := report.Findings[0]; f.Kind != damage.want || f.Ref != "os" || f.Commit != c.String() || !strings.HasPrefix(f.String(), "fsck: "+string(f.Kind)+": os: ") {
			t.Errorf("%s: %v", name, f)
		}
	}
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	report, err := ostree.Fsck(ctx, r, ostree.FsckOptions{Ref: "nothing"})
	if err != nil || len(report.Findings) != 1 || report.Findings[0].Kind != ostree.RefMissing {
		t.Errorf("%+v, %v", report, err)
	}
}
