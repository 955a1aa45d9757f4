package oci_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// referring is a source that lists what refers to its manifests.
type referring struct {
	*memory
	list map[oci.Digest][]oci.Digest
}

func (r referring) Referrers(_ context.Context, subject oci.Digest, _ string) ([]oci.Descriptor, error) {
	var list []oci.Descriptor
	for _, d := range r.list[subject] {
		list = append(list, oci.Descriptor{Digest: d})
	}
	return list, nil
}

// addArtifact adds an artifact that refers to something, or to nothing if that is "".
func (m *memory) addArtifact(kind string, subject oci.Digest) oci.Digest {
	text := fmt.Sprintf(`{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": %q, "config": {"mediaType":
		"application/vnd.oci.empty.v1+json", "digest": %q, "size": 2}, "layers": [{"mediaType": "test", "digest": %q, "size": %d}]`,
		kind, m.add([]byte("{}")), m.add([]byte(kind)), len(kind))
	if subject != "" {
		text += fmt.Sprintf(`, "subject": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": %q, "size": 1}`, subject)
	}
	return m.add([]byte(text + "}"))
}

// addIndex adds an index of manifests.
func (m *memory) addIndex(kind string, subject oci.Digest, manifests ...oci.Digest) oci.Digest {
	var list []string
	for _, d := range manifests {
		list = append(list, fmt.Sprintf(`{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": %q, "size": %d}`, d, len(m.blobs[d])))
	}
	text := fmt.Sprintf(`{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [%s]`, strings.Join(list, ", "))
	if kind != "" {
		text += fmt.Sprintf(`, "artifactType": %q`, kind)
	}
	if subject != "" {
		text += fmt.Sprintf(`, "subject": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": %q, "size": 1}`, subject)
	}
	return m.add([]byte(text + "}"))
}

// indexed is an image to which an index refers: of two artifacts, a container image whose layer nobody can compress again, and an index of
// one more. One artifact signs the index, and one an artifact in it.
type indexed struct {
	referring
	image, index, inner oci.Digest
	members             []oci.Digest // of both indexes
	all                 []oci.Digest // that are not members, sorted
}

func newIndexed() indexed {
	m := newSource(nil, archiveOf(dirOf("usr/"), file("usr/a", "b")))
	x := indexed{image: m.add(m.manifest)}
	first, second, third := m.addArtifact("test/1", ""), m.addArtifact("test/2", ""), m.addArtifact("test/3", "")
	other := newSource(func(_ int, b []byte) []byte { return append(gzipped(b[:100]), gzipped(b[100:])...) }, bigLayers(2, 1, 1)...)
	for _, b := range other.blobs {
		m.add(b)
	}
	x.inner = m.addIndex("", "", third)
	x.members = []oci.Digest{first, second, m.add(other.manifest), x.inner, third}
	x.index = m.addIndex("test/index", x.image, x.members[:4]...)
	signature, inner := m.addArtifact("test/signature", x.index), m.addArtifact("test/signature", third)
	x.all = slices.Sorted(slices.Values([]oci.Digest{x.index, signature, inner}))
	x.referring = referring{m, map[oci.Digest][]oci.Digest{x.image: {x.index}, x.index: {signature}, third: {inner}}}
	return x
}

// pull brings the image and all that refers to it.
func (x indexed) pull(t *testing.T, source oci.Source) (*repo.Repo, *oci.Image) {
	t.Helper()
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulled, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "os"})
	if err != nil {
		t.Fatal(err)
	}
	list, err := oci.PullReferrers(ctx, r, source, pulled.Image.Digest, "", oci.PullOptions{})
	slices.Sort(list)
	if err != nil || pulled.Image.Digest != x.image || !slices.Equal(list, x.all) {
		t.Fatalf("%v, want %v: %v", list, x.all, err)
	}
	x.check(t, r)
	return r, pulled.Image
}

// check checks that all of it is there, and sound.
func (x indexed) check(t *testing.T, r *repo.Repo) {
	t.Helper()
	for _, d := range slices.Concat(x.all, x.members) {
		text, err := oci.NewStored(r, "").Manifest(ctx, d)
		if err != nil || oci.DigestOf(text) != d {
			t.Errorf("%s: %v", d, err)
		}
	}
	if report, err := oci.Fsck(ctx, r, oci.FsckOptions{}); err != nil || len(report.Findings) > 0 {
		t.Error(report, err)
	}
	mustBeClean(t, r)
}

// An artifact that is an index comes with what is in it and refers to that, goes to a layout and to other repositories with its digest,
// stays as long as the image, and goes with it.
func TestIndexReferrer(t *testing.T) {
	x := newIndexed()
	r, image := x.pull(t, x)
	// Others that have the same config move its stream, and the streams of manifests with it.
	if _, err := oci.Pull(ctx, r, &memory{manifest: x.blobs[x.addArtifact("test/4", x.image)], blobs: x.blobs}, oci.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	x.all = slices.Sorted(slices.Values(append(x.all, x.addArtifact("test/4", x.image))))
	dir := filepath.Join(t.TempDir(), "layout")
	for range 2 {
		result, err := pushTo(t, r, image, dir, oci.PushOptions{})
		slices.Sort(result.Referrers)
		if err != nil || !slices.Equal(result.Referrers, x.all) || len(result.Left) > 0 {
			t.Fatalf("%+v, want %v: %v", result, x.all, err)
		}
	}
	if n := checkLayout(t, dir); n != 1+len(x.all) {
		t.Errorf("%d manifests", n)
	}
	layout, err := oci.OpenLayout(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer layout.Close()
	x.pull(t, layout)
	r, _ = x.pull(t, oci.NewStored(r, x.image))
	list, err := oci.List(r)
	if err != nil || len(list) != 1 || list[0].Referrers != 2 {
		t.Error(list, err)
	}
	if _, err := r.GC(ctx, repo.GCOptions{Follows: oci.Follows}); err != nil {
		t.Fatal(err)
	}
	x.check(t, r)

	// It is no image.
	if _, err := oci.Open(r, "@"+string(x.index)); !errors.Is(err, oci.ErrIndex) {
		t.Error(err)
	}
	if err := oci.SetTag(ctx, r, x.index, "index", repo.LockOptions{}); !errors.Is(err, oci.ErrIndex) {
		t.Error(err)
	}
	if _, err := oci.FindLinked(r, fsverity.Of(fsverity.SHA256, nil)); err == nil || errors.Is(err, oci.ErrIndex) {
		t.Error(err)
	}

	if _, err := oci.Remove(ctx, r, x.image, repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := r.GC(ctx, repo.GCOptions{Follows: oci.Follows}); err != nil {
			t.Fatal(err)
		}
	}
	for _, left := range []string{"objects/*/*", "streams/oci-*", "streams/refs/oci-*/*"} {
		if list, err := filepath.Glob(filepath.Join(r.Path(), left)); err != nil || len(list) > 0 {
			t.Error(list, err)
		}
	}
}

// What is lost of an index is found and brought again: from the source, or from the repository if only names are gone.
func TestRepairIndex(t *testing.T) {
	x := newIndexed()
	member, inner := "streams/refs/oci-members/"+string(x.index)+"/"+string(x.members[1]), "streams/oci-manifest-"+string(x.inner)
	for what, c := range map[string]struct {
		paths []string // that are removed
		here  bool     // all is in the repository
		kind  oci.Kind
	}{
		"ref":             {[]string{member}, true, oci.MemberMissing},
		"all refs":        {[]string{"streams/refs/oci-members"}, true, oci.MemberMissing},
		"index":           {[]string{"streams/oci-manifest-" + string(x.index)}, false, oci.ManifestReadFailed},
		"manifest":        {[]string{"streams/oci-manifest-" + string(x.members[0])}, false, oci.MemberMissing},
		"index in it":     {[]string{inner}, false, oci.MemberMissing},
		"much":            {[]string{inner, member, "streams/oci-manifest-" + string(x.members[1]), "streams/oci-manifest-" + string(x.members[4])}, false, oci.MemberMissing},
		"layer of one":    {[]string{"streams/oci-layer-" + string(oci.DigestOf([]byte("test/3")))}, false, ""},
		"everything else": {[]string{"objects"}, false, oci.ManifestReadFailed},
	} {
		r, image := x.pull(t, x)
		for _, path := range c.paths {
			if err := os.RemoveAll(filepath.Join(r.Path(), path)); err != nil {
				t.Fatal(err)
			}
		}
		r = openRepo(t, r.Path())
		report, err := oci.Fsck(ctx, r, oci.FsckOptions{})
		if err != nil || c.kind != "" && !slices.ContainsFunc(report.Findings, func(f oci.Finding) bool { return f.Kind == c.kind }) {
			t.Errorf("%s: %v, %v", what, report.Findings, err)
		}
		x.add(image.ManifestJSON)
		for _, source := range []oci.Source{nil, x} {
			plan, err := oci.Repair(ctx, r, source, oci.RepairOptions{DryRun: true})
			healable := c.here || source != nil
			if c.here && source != nil {
				continue // it is healed by now
			}
			if err != nil || c.kind != "" && (len(plan.Failed) > 0) == healable || healable && c.kind != "" && len(plan.Steps) == 0 {
				t.Errorf("%s: with a source: %v: %+v, %v", what, source != nil, plan, err)
			}
			if !healable {
				continue
			}
			done, err := oci.Repair(ctx, r, source, oci.RepairOptions{})
			if err != nil || len(done.Failed) > 0 || len(done.After.Findings) > 0 {
				t.Errorf("%s: %v, %v, %v", what, done.Failed, done.After.Findings, err)
			}
		}
		x.check(t, openRepo(t, r.Path()))
	}
}

// An index that is not as it should be brings nothing that has a name.
func TestHostileIndexes(t *testing.T) {
	for what, c := range map[string]struct {
		make func(m *memory, image oci.Digest) oci.Digest
		n    int
		err  string
	}{
		"empty": {func(m *memory, image oci.Digest) oci.Digest { return m.addIndex("", image) }, 1, ""},
		"twice": {func(m *memory, image oci.Digest) oci.Digest {
			a := m.addArtifact("a", "")
			return m.addIndex("", image, a, a, a)
		}, 1, ""},
		"no-subject":    {func(m *memory, image oci.Digest) oci.Digest { return m.addIndex("", "", m.addArtifact("a", "")) }, 0, ""},
		"other-subject": {func(m *memory, image oci.Digest) oci.Digest { return m.addIndex("", oci.DigestOf(nil)) }, 0, ""},
		"missing":       {func(m *memory, image oci.Digest) oci.Digest { return m.addIndex("", image, oci.DigestOf([]byte("?"))) }, 0, "the content has digest"},
		"other-content": {func(m *memory, image oci.Digest) oci.Digest {
			a := m.addArtifact("a", "")
			m.blobs[a] = append(m.blobs[a], ' ')
			return m.addIndex("", image, a)
		}, 0, "the content has digest"},
		"no-digest": {func(m *memory, image oci.Digest) oci.Digest {
			return m.add([]byte(strings.Replace(string(m.blobs[m.addIndex("", image, image)]), `"digest"`, `"digests"`, 1)))
		}, 0, "manifest 0: no digest"},
		"deep": {func(m *memory, image oci.Digest) oci.Digest {
			d := m.addArtifact("a", "")
			for range 4 {
				d = m.addIndex("", "", d)
			}
			return m.addIndex("", image, d)
		}, 0, "more than 4 indexes in each other"},
		"wide": {func(m *memory, image oci.Digest) oci.Digest {
			var list []oci.Digest
			for k := range 1001 {
				list = append(list, m.add(fmt.Appendf(nil, "%d", k)))
			}
			return m.addIndex("", image, list...)
		}, 0, "1001 manifests: at most 1000"},
		"wide-and-deep": {func(m *memory, image oci.Digest) oci.Digest {
			var list []oci.Digest
			for k := range 600 {
				list = append(list, m.addIndex(fmt.Sprint("test/", k), ""))
			}
			return m.addIndex("", image, append([]oci.Digest{m.addIndex("", "", list...)}, list...)...)
		}, 0, "more than 1000 manifests in it, and in others"},
	} {
		m := newSource(nil, archiveOf(dirOf("usr/")))
		image := m.add(m.manifest)
		d := c.make(m, image)
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		if _, err := oci.Pull(ctx, r, m, oci.PullOptions{Tag: "os"}); err != nil {
			t.Fatal(err)
		}
		list, err := oci.PullReferrers(ctx, r, referring{m, map[oci.Digest][]oci.Digest{image: {d}}}, image, "", oci.PullOptions{})
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) || len(list) != c.n {
			t.Errorf("%s: %v, %v", what, list, err)
		}
		if stored, err := oci.Referrers(r, image); err != nil || len(stored) != c.n {
			t.Errorf("%s: %v, %v", what, stored, err)
		}
	}
}
