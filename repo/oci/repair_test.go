package oci_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// damage breaks a part of an image in a repository.
type damage struct {
	what   string
	needs  bool // a source
	kept   bool // with the layers as they came
	paths  func(i *oci.Image) []string
	remove bool
}

var damages = []damage{
	{what: "manifest", needs: true, paths: func(i *oci.Image) []string { return []string{object(i.Stream())} }},
	{what: "manifest's name", needs: true, remove: true, paths: func(i *oci.Image) []string { return []string{"streams/oci-manifest-" + string(i.Digest)} }},
	{what: "config", needs: true, paths: func(i *oci.Image) []string { return []string{object(i.ConfigStream())} }},
	{what: "manifest and config", needs: true, paths: func(i *oci.Image) []string { return []string{object(i.Stream()), object(i.ConfigStream())} }},
	{what: "config's name, without which its images are garbage", remove: true, paths: func(i *oci.Image) []string { return []string{"streams/oci-config-" + string(i.ConfigDigest())} }},
	{what: "layer", needs: true, paths: func(i *oci.Image) []string { return []string{object(i.Layers[1])} }},
	{what: "layers that are gone", needs: true, remove: true, paths: func(i *oci.Image) []string { return []string{object(i.Layers[0]), object(i.Layers[3])} }},
	{what: "layer, of what was kept", kept: true, paths: func(i *oci.Image) []string { return []string{object(i.Layers[0])} }},
	{what: "layer's name", remove: true, paths: func(i *oci.Image) []string {
		return []string{"streams/oci-layer-" + string(i.Config.RootFS.DiffIDs[0])}
	}},
	{what: "images", paths: func(i *oci.Image) []string { return []string{object(i.Linked[0].Digest), object(i.Linked[1].Digest)} }},
	{what: "images' names", remove: true, paths: func(i *oci.Image) []string {
		return []string{"images/" + i.Linked[0].Digest.String(), "images/" + i.Linked[1].Digest.String()}
	}},
	{what: "layer as it came", kept: true, needs: true, paths: func(i *oci.Image) []string { return []string{object(i.Blobs[i.Manifest.Layers[0].Digest])} }},
	{what: "layer as it came, gone", kept: true, needs: true, remove: true, paths: func(i *oci.Image) []string { return []string{object(i.Blobs[i.Manifest.Layers[0].Digest])} }},
}

// do does the damage, and returns the repository as a new process sees it.
func (d damage) do(t *testing.T, r *repo.Repo, i *oci.Image) *repo.Repo {
	t.Helper()
	for _, path := range d.paths(i) {
		path = filepath.Join(r.Path(), path)
		err := os.Remove(path)
		if err == nil && !d.remove {
			err = os.WriteFile(path, []byte("something else"), 0o644)
		}
		if err != nil {
			t.Fatal(d.what, err)
		}
	}
	return openRepo(t, r.Path())
}

// Every part of an image that is damaged is brought again: from the repository, if that has what is needed, or from a source. What is
// healed is as it was before.
func TestRepair(t *testing.T) { repairAll(t, nil) }

func repairAll(t *testing.T, check func(what string, r *repo.Repo)) {
	layout := goldenLayout(t)
	for _, d := range damages {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		pulled, err := oci.Pull(ctx, r, layout, oci.PullOptions{Tag: "os", Transform: boot.Transform, KeepBlobs: d.kept})
		if err != nil {
			t.Fatal(err)
		}
		image := pulled.Image
		r = d.do(t, r, image)
		o := oci.RepairOptions{Transform: boot.Transform}
		foretold(t, d, r, image, layout, o)
		report, err := oci.Repair(ctx, r, nil, o)
		if err != nil || len(report.Before.Findings) == 0 {
			t.Fatal(d.what, report.Before.Findings, err)
		}
		if d.needs {
			if err := report.Failed["os"]; !errors.Is(err, oci.ErrNoSource) || len(report.After.Findings) == 0 {
				t.Errorf("%s: without a source: %v, %v", d.what, report.Failed, report.After.Findings)
			}
			if report, err = oci.Repair(ctx, openRepo(t, r.Path()), layout, o); err != nil || report.Fetched == 0 && !strings.HasPrefix(d.what, "manifest") {
				t.Errorf("%s: %d bytes fetched, %v", d.what, report.Fetched, err)
			}
		} else if report.Fetched > 0 {
			t.Errorf("%s: %d bytes fetched from nowhere", d.what, report.Fetched)
		}
		if len(report.Failed)+len(report.After.Findings) > 0 {
			t.Errorf("%s: %v, %v", d.what, report.Failed, report.After.Findings)
		}
		r = openRepo(t, r.Path())
		healed, err := oci.Open(r, "os")
		if err != nil {
			t.Errorf("%s: %v", d.what, err)
			continue
		}
		if len(healed.Linked) != 2 || healed.ConfigStream() != image.ConfigStream() || len(healed.Blobs) != len(image.Blobs) {
			t.Errorf("%s: %+v, it was %+v", d.what, healed.Linked, image.Linked)
		}
		report2, err := oci.Fsck(ctx, r, oci.FsckOptions{})
		if err != nil || len(report2.Findings) > 0 {
			t.Errorf("%s: %v, %v", d.what, report2.Findings, err)
		}
		mustBeClean(t, r)
		if check != nil {
			check(d.what, r)
		}
	}
}

// foretold looks at what a dry run says, and that it does nothing.
func foretold(t *testing.T, d damage, r *repo.Repo, image *oci.Image, source oci.Source, o oci.RepairOptions) {
	t.Helper()
	o.DryRun = true
	before := filesOf(t, r)
	for _, s := range []oci.Source{nil, source} {
		report, err := oci.Repair(ctx, openRepo(t, r.Path()), s, o)
		if err != nil || report.Fetched > int64(len(image.ConfigJSON)) || len(report.After.Findings) == 0 {
			t.Fatal(d.what, report, err)
		}
		var bytes int64
		for _, step := range report.Steps {
			bytes += step.Bytes
		}
		if lacks := d.needs && s == nil; lacks != errors.Is(report.Failed["os"], oci.ErrNoSource) || !lacks && (len(report.Steps) == 0 || d.needs != (bytes > 0)) {
			t.Errorf("%s: foretold: %+v, %v", d.what, report.Steps, report.Failed)
		}
	}
	if after := filesOf(t, r); after != before {
		t.Errorf("%s: a dry run changes files: %s, they were %s", d.what, after, before)
	}
}

// filesOf lists the files of a repository.
func filesOf(t *testing.T, r *repo.Repo) string {
	t.Helper()
	var list strings.Builder
	err := filepath.WalkDir(r.Path(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && !d.IsDir() {
			target, _ := os.Readlink(path)
			fmt.Fprintln(&list, path, info.Size(), target)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list.String()
}

// What refers to an image is checked and repaired with it.
func TestRepairReferrers(t *testing.T) {
	source := newSource(nil, bigLayers(1, 1, 2)...)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	image, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "os"})
	if err != nil {
		t.Fatal(err)
	}
	subject := image.Image.Digest
	source.add(source.manifest)
	var last *oci.Image
	for range 2 { // the second refers to the first
		source.manifest = fmt.Appendf(nil, `{"schemaVersion": 2, "artifactType": "test", "config": {"mediaType": "application/vnd.oci.empty.v1+json",
			"digest": %q, "size": 2}, "layers": [{"mediaType": "test", "digest": %q, "size": 11}], "subject": {"digest": %q, "size": 1}}`,
			source.add([]byte("{}")), source.add([]byte("a signature")), subject)
		pulled, err := oci.Pull(ctx, r, source, oci.PullOptions{})
		if err != nil {
			t.Fatal(err)
		}
		subject, last = source.add(source.manifest), pulled.Image
	}
	if err := os.WriteFile(filepath.Join(r.Path(), object(last.Stream())), []byte("something else"), 0o644); err != nil {
		t.Fatal(err)
	}
	r = openRepo(t, r.Path())
	report, err := oci.Repair(ctx, r, nil, oci.RepairOptions{})
	if err != nil || report.After.Bad != 1 || !errors.Is(report.Failed["os"], oci.ErrNoSource) ||
		report.After.Findings[0].Image != "os (referrer "+string(last.Digest)+")" {
		t.Fatal(report, err)
	}
	if report, err = oci.Repair(ctx, openRepo(t, r.Path()), source, oci.RepairOptions{}); err != nil || len(report.Healed()) != 1 {
		t.Fatal(report, err)
	}
	mustBeClean(t, openRepo(t, r.Path()))
}

// Objects are brought again as well: of layers, and of files with holes, which are in no layer as they are in the image.
func TestRepairObjects(t *testing.T) {
	archive, content := sparseArchive(t)
	source := newSource(func(_ int, b []byte) []byte { return gzipped(b) }, append(bigLayers(4, 2, 20), archive)...)
	source.add(source.manifest)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulled, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "os"})
	if err != nil {
		t.Fatal(err)
	}
	objects, err := filepath.Glob(filepath.Join(r.Path(), "objects/*/*"))
	if err != nil || len(objects) < 10 {
		t.Fatal(objects, err)
	}
	holes := object(fsverity.Of(fsverity.SHA256, content))
	for k, path := range objects {
		if k%3 != 0 && !strings.HasSuffix(path, holes) {
			continue
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if k%2 == 0 {
			if err := os.WriteFile(path, []byte("something else"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	report, err := oci.Repair(ctx, openRepo(t, r.Path()), source, oci.RepairOptions{})
	if err != nil || len(report.Failed) > 0 {
		t.Fatal(report.Failed, err)
	}
	r = openRepo(t, r.Path())
	mustBeClean(t, r)
	// The one with holes alone, without a source.
	if err := os.Remove(filepath.Join(r.Path(), holes)); err != nil {
		t.Fatal(err)
	}
	if report, err := oci.Repair(ctx, openRepo(t, r.Path()), nil, oci.RepairOptions{DryRun: true}); err != nil || len(report.Steps) != 1 || report.Steps[0].What != "image" {
		t.Error(report, err)
	}
	if report, err := oci.Repair(ctx, openRepo(t, r.Path()), nil, oci.RepairOptions{Image: "os"}); err != nil || len(report.Failed) > 0 {
		t.Fatal(report.Failed, err)
	}
	mustBeClean(t, openRepo(t, r.Path()))
	// A source with something else under the same name does not help, and does no harm.
	other := newSource(nil, bigLayers(5, 1, 2)...)
	if err := os.Remove(filepath.Join(r.Path(), object(pulled.Image.Stream()))); err != nil {
		t.Fatal(err)
	}
	other.blobs[pulled.Image.Digest] = other.manifest
	report, err = oci.Repair(ctx, openRepo(t, r.Path()), other, oci.RepairOptions{})
	if err != nil || report.Failed["os"] == nil || !strings.Contains(report.Failed["os"].Error(), "the content has digest") {
		t.Error(report.Failed, err)
	}
}

// sparseArchive is an archive with the file usr/sparse, which has a hole, and what is in it.
func sparseArchive(t *testing.T) (archive, content []byte) {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "usr"), 0o755); err != nil {
		t.Fatal(err)
	}
	sparse := filepath.Join(dir, "usr/sparse")
	if err := os.WriteFile(sparse, bytes.Repeat([]byte("data"), 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(sparse, 1<<20); err != nil {
		t.Fatal(err)
	}
	var err error
	archive, err = exec.Command("tar", "--sparse", "-C", dir, "-cf", "-", "usr").Output()
	if err != nil {
		t.Fatal(err)
	}
	if content, err = os.ReadFile(sparse); err != nil {
		t.Fatal(err)
	}
	return archive, content
}
