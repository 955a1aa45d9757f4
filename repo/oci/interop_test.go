//go:build interop

package oci_test

import (
	"errors"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
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

// What was repaired is sound for cfsctl as well.
func TestInteropRepair(t *testing.T) {
	repairAll(t, func(what string, r *repo.Repo) {
		if out := peer(t, r, "oci", "fsck"); t.Failed() {
			t.Fatalf("%s: %s", what, out)
		}
	})
}

// A layout that was written here is one for cfsctl, with artifacts and other images in it; and a repository that keeps layers as they
// came is one for it, too: it checks them, leaves them where they are, and goes on with it.
func TestInteropPush(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulled, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{Tag: "os", KeepBlobs: true, Transform: boot.Transform})
	if err != nil {
		t.Fatal(err)
	}
	signature := &memory{blobs: map[oci.Digest][]byte{}}
	signature.manifest = []byte(`{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": "a/b", "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": "` +
		string(signature.add([]byte("{}"))) + `", "size": 2}, "layers": [], "subject": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": "` + string(pulled.Image.Digest) + `", "size": 1}}`)
	if _, err := oci.Pull(ctx, r, signature, oci.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	before := peer(t, r, "oci", "inspect", "os")
	for range 2 {
		peer(t, r, "oci", "fsck")
		peer(t, r, "gc")
	}
	peer(t, r, "oci", "tag", string(pulled.Image.Digest), "again")
	if after := peer(t, r, "oci", "inspect", "again"); after != before {
		t.Errorf("%s\n%s", before, after)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	if result, err := pushTo(t, r, pulled.Image, dir, oci.PushOptions{Exact: true}); err != nil || len(result.Referrers) != 1 || result.Layers[0].How != oci.HowKept {
		t.Fatalf("%+v, %v", result, err)
	}
	tagged, err := oci.CreateLayout(dir, "tagged")
	if err != nil {
		t.Fatal(err)
	}
	defer tagged.Close()
	if _, err := oci.Push(ctx, r, pulled.Image, tagged, oci.PushOptions{Exact: true}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{dir, dir + ":tagged"} {
		other := newRepo(t, fsverity.SHA256, erofs.V1)
		if out := peer(t, other, "oci", "pull", "--bootable", "oci:"+name, "os"); !strings.Contains(out, string(pulled.Image.Digest)) {
			t.Errorf("%s: %s", name, out)
		}
		peer(t, other, "oci", "fsck")
	}
	// cfsctl pulls into the repository: what it writes replaces the manifest's stream, and does not lead to the kept layers any more.
	// They are garbage then, and come again when they are wanted.
	kept := len(pulled.Image.Blobs)
	if p, err := r.GC(ctx, repo.GCOptions{}); err != nil || p.Objects > 0 || kept == 0 {
		t.Fatal(p, err)
	}
	peer(t, r, "oci", "pull", "--bootable", "oci:"+dir, "third")
	for round := range 2 {
		peer(t, r, "oci", "fsck")
		r = openRepo(t, r.Path())
		mustBeClean(t, r)
		image, err := oci.Open(r, "os")
		if err != nil || image.Digest != pulled.Image.Digest || len(image.Blobs) > 0 {
			t.Fatal(image, err)
		}
		if p, err := r.GC(ctx, repo.GCOptions{}); err != nil || (p.Objects >= kept) != (round == 0) {
			t.Errorf("%d objects were removed, %d layers had been kept, %v", p.Objects, kept, err)
		}
	}
	again, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{Tag: "os", KeepBlobs: true})
	if err != nil || len(again.Image.Blobs) != kept {
		t.Errorf("%d blobs of %d, %v", len(again.Image.Blobs), kept, err)
	}
	peer(t, r, "oci", "fsck")
}

// The same deltas make the same images in cfsctl, in repositories that it has filled, or this program has.
func TestInteropDelta(t *testing.T) {
	for _, version := range []int{1, 2} {
		images := newTwoImages(version)
		old, delta := filepath.Join(t.TempDir(), "old"), filepath.Join(t.TempDir(), "delta")
		images.old.save(t, old)
		images.delta.save(t, delta)
		ours := newRepo(t, fsverity.SHA256, erofs.V1)
		if _, err := oci.Pull(ctx, ours, images.old, oci.PullOptions{Tag: "old"}); err != nil {
			t.Fatal(err)
		}
		theirs := newRepo(t, fsverity.SHA256, erofs.V1)
		peer(t, theirs, "oci", "pull", "oci:"+old, "old")
		for name, r := range map[string]*repo.Repo{"ours": ours, "cfsctl's": theirs} {
			out := peer(t, r, "oci", "pull", "oci:"+delta, "new")
			if !strings.Contains(out, string(oci.DigestOf(images.new.manifest))) {
				t.Errorf("tardf%d, %s: %s", version, name, out)
			}
			peer(t, r, "oci", "fsck")
			mustBeClean(t, openRepo(t, r.Path()))
		}
		// What cfsctl has pulled is the old image of a delta here.
		theirs = newRepo(t, fsverity.SHA256, erofs.V1)
		peer(t, theirs, "oci", "pull", "oci:"+old, "old")
		theirs = openRepo(t, theirs.Path())
		if _, err := oci.Pull(ctx, theirs, images.delta, oci.PullOptions{Tag: "new"}); err != nil {
			t.Error(err)
		}
		peer(t, theirs, "oci", "fsck")
	}
}

// An artifact that is an index is nothing that cfsctl knows: it goes on with the repository, counts it, and leaves it with all that is in
// it where it is.
func TestInteropIndex(t *testing.T) {
	x := newIndexed()
	r, _ := x.pull(t, x)
	if _, err := r.GC(ctx, repo.GCOptions{Follows: oci.Follows}); err != nil {
		t.Fatal(err)
	}
	if out := peer(t, r, "oci", "images"); !regexp.MustCompile(`(?m)os .* 1 +│$`).MatchString(out) {
		t.Error(out)
	}
	for range 2 {
		peer(t, r, "oci", "fsck")
		if out := peer(t, r, "gc", "--dry-run"); !strings.Contains(out, "Objects: 0 removed") {
			t.Error(out)
		}
		peer(t, r, "gc")
		if out := peer(t, r, "oci", "inspect", "os"); !strings.Contains(out, string(x.index)) {
			t.Error(out)
		}
	}
	peer(t, r, "oci", "tag", string(x.image), "again")
	dir := filepath.Join(t.TempDir(), "layout")
	other := newSource(func(_ int, b []byte) []byte { return gzipped(b) }, archiveOf(dirOf("usr/"), file("usr/x", "y")))
	other.save(t, dir)
	peer(t, r, "oci", "pull", "oci:"+dir, "other")
	x.check(t, openRepo(t, r.Path()))
	peer(t, r, "oci", "untag", "again")
	peer(t, r, "oci", "untag", "os")
	peer(t, r, "gc")
	peer(t, r, "oci", "fsck")
	r = openRepo(t, r.Path())
	for range 2 {
		if _, err := r.GC(ctx, repo.GCOptions{Follows: oci.Follows}); err != nil {
			t.Fatal(err)
		}
	}
	mustBeClean(t, r)
	if _, err := oci.OpenIndex(r, x.index); !errors.Is(err, repo.ErrNotFound) {
		t.Error(err)
	}
}
