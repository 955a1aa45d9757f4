package oci_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

var ctx = context.Background()

func newRepo(t testing.TB, a fsverity.Algorithm, f erofs.Format) *repo.Repo {
	t.Helper()
	path := filepath.Join(t.TempDir(), "repo")
	if _, err := repo.Init(path, repo.Config{Algorithm: a, Format: f, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	return openRepo(t, path)
}

func openRepo(t testing.TB, path string) *repo.Repo {
	t.Helper()
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// goldenLayout is the layout of the golden vectors.
func goldenLayout(t testing.TB) *oci.Layout {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	if err := os.CopyFS(dir, golden.Files(t, "oci/oci-boot")); err != nil {
		t.Fatal(err)
	}
	return openLayout(t, dir)
}

func openLayout(t testing.TB, dir string) *oci.Layout {
	t.Helper()
	l, err := oci.OpenLayout(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// The golden image has the golden digests, in every algorithm and format, and is the same when it is pulled again.
func TestGoldenImage(t *testing.T) {
	var want struct {
		OCI map[string]map[string]struct{ Boot, Container string }
	}
	if err := json.Unmarshal(golden.Read(t, "digests.json"), &want); err != nil {
		t.Fatal(err)
	}
	for _, a := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		for _, f := range []erofs.Format{erofs.V1, erofs.V2} {
			r := newRepo(t, a, f)
			first, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{Tag: "a/b%:1", Transform: boot.Transform})
			if err != nil {
				t.Fatal(err)
			}
			w := want.OCI["oci-boot"][fmt.Sprintf("%v v%d", a, f)]
			for bootable, digest := range map[bool]string{false: w.Container, true: w.Boot} {
				got, _ := first.Image.Find(bootable, f, fstree.XattrsAllowlist)
				if got.String() != digest {
					t.Errorf("%v %v bootable %v: %v, want %s", a, f, bootable, got, digest)
				}
			}
			again, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{Tag: "a/b%:1", Transform: boot.Transform})
			if err != nil || again.Image.Stream() != first.Image.Stream() || again.Stats.Present != 4 || again.Stats.Objects != 0 {
				t.Errorf("again: %+v, %v", again.Stats, err)
			}
			mustBeClean(t, r)
		}
	}
}

// The trees are the golden ones, to the last attribute. The repositories that cfsctl has written give them as well, and are
// extended by what is missing.
func TestGoldenTrees(t *testing.T) {
	for _, name := range []string{"oci-boot.sha512.v1", "oci-boot.sha256.v2"} {
		r := openRepo(t, filepath.Join(golden.Extract(t, "repos/"+name+".tar.gz"), "repo"))
		image, err := oci.Open(r, "vec")
		if err != nil {
			t.Fatal(err)
		}
		plain, _ := image.Find(false, r.Formats()[0], 0)
		boots, _ := image.Find(true, r.Formats()[0], 0)
		tree, err := image.Tree(ctx, r, nil, oci.Limits{})
		if err == nil {
			err = tree.MakeContainerRoot(fstree.XattrsAllowlist)
		}
		if err != nil {
			t.Fatal(err)
		}
		check := func(want fsverity.Digest, dump string) {
			t.Helper()
			d := fsverity.NewDigester(r.Algorithm())
			if err := erofs.Write(d, tree, r.Formats()[0]); err != nil || d.Sum() != want {
				t.Errorf("%s: %v, want %v: %v", name, d.Sum(), want, err)
			}
			var text bytes.Buffer
			if err := dumpfile.Write(&text, tree, dumpfile.Cfsctl); err != nil {
				t.Fatal(err)
			}
			if r.Algorithm() == fsverity.SHA256 && text.String() != string(golden.Read(t, dump)) {
				t.Errorf("%s: another tree:\n%s", dump, text.String())
			}
		}
		check(plain, "oci/oci-boot.container.sha256.dump.gz")
		if err := boot.Transform(tree, oci.Files(r)); err != nil {
			t.Fatal(err)
		}
		check(boots, "oci/oci-boot.boot.sha256.dump.gz")

		result, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{Tag: "other", Transform: boot.Transform,
			Formats: []erofs.Format{erofs.V1, erofs.V2}})
		if err != nil || result.Stats.Present != 4 || len(result.Image.Linked) != 4 {
			t.Errorf("%+v, %v", result.Stats, err)
		}
		mustBeClean(t, r)
	}
}

func mustBeClean(t testing.TB, r *repo.Repo) {
	t.Helper()
	report, err := r.Fsck(ctx, repo.FsckOptions{})
	if err != nil || !report.OK() {
		t.Fatalf("%v, %v", report.Findings, err)
	}
}
