package oci_test

import (
	"archive/tar"
	"bytes"
	"context"
	varint "encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

const tarDiff = "application/vnd.tar-diff"

// tarDiffOf writes a delta: operations that are a code and a text, or a code and a number.
func tarDiffOf(version int, ops ...any) []byte {
	var b []byte
	for k := 0; k < len(ops); k += 2 {
		b = append(b, byte(ops[k].(int)))
		switch v := ops[k+1].(type) {
		case string:
			b = append(varint.AppendUvarint(b, uint64(len(v))), v...)
		case int:
			b = varint.AppendUvarint(b, uint64(v))
		}
	}
	z, _ := zstd.NewWriter(nil)
	return z.EncodeAll(b, fmt.Appendf(nil, "tardf%d\n\x00", version))
}

// twoImages are two versions of an image: one layer is the same, one has a file that was changed in the middle, and one is new. The delta
// of the second layer is an old header, and the file by its path.
type twoImages struct {
	old, new, delta *memory
	diff            []byte // of the second layer
}

func newTwoImages(version int) twoImages {
	same := archiveOf(dirOf("usr/"), file("usr/a", string(noise(21, 5000)))) // cfsctl wants every directory to be there
	before := string(noise(22, 200_000))
	after := before[:80_000] + "changed" + before[80_007:]
	oldLayer, newLayer := archiveOf(dirOf("data/"), file("data/large", before), file("data/small", "few bytes")),
		archiveOf(dirOf("data/"), file("data/large", after), file("data/small", "more bytes"))
	added := archiveOf(dirOf("opt/"), file("opt/new", string(noise(23, 1000))))

	start := bytes.Index(newLayer, []byte(after[:100]))
	end := start + len(after)
	ops := []any{0, string(newLayer[:start]), 1, "data/large"}
	if version == 1 {
		change := make([]byte, 7)
		for k := range change {
			change[k] = after[80_000+k] - before[80_000+k]
		}
		ops = append(ops, 2, 80_000, 3, string(change), 4, 80_007, 2, len(before)-80_007)
	} else {
		z, _ := zstd.NewWriter(nil, zstd.WithEncoderDictRaw(0, []byte(before)))
		ops = append(ops, 5, string(z.EncodeAll([]byte(after), nil)))
	}
	// The small file is in the image itself.
	at := bytes.LastIndex(newLayer, []byte("more bytes"))
	ops = append(ops, 0, string(newLayer[end:at])+"more ", 1, "/data/small", 4, 4, 2, 5, 0, string(newLayer[at+10:]))

	t := twoImages{old: newSource(func(_ int, b []byte) []byte { return gzipped(b) }, same, oldLayer),
		new: newSource(func(_ int, b []byte) []byte { return gzipped(b) }, same, newLayer, added), diff: tarDiffOf(version, ops...)}
	t.delta = t.deltaOf(t.diff)
	return t
}

func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// deltaOf makes the artifact, with a difference for the second layer, and the third as it is.
func (t twoImages) deltaOf(diff []byte) *memory {
	m := &memory{blobs: map[oci.Digest][]byte{}}
	blob := func(mediaType, content, to string, b []byte) string {
		return fmt.Sprintf(`{"mediaType": %q, "digest": %q, "size": %d, "annotations": {"io.github.containers.delta.content": %q, "io.github.containers.delta.to": %q}}`,
			mediaType, m.add(b), len(b), content, to)
	}
	layers := layersOf(t.new.manifest)
	config := configOf(t.new)
	m.manifest = fmt.Appendf(nil, `{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"artifactType": "application/vnd.io.github.containers.oci-delta.v1",
		"config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": %q, "size": 2},
		"annotations": {"io.github.containers.delta.source-config": %q}, "layers": [%s]}`, m.add([]byte("{}")), configOf(t.old),
		strings.Join([]string{
			blob("application/vnd.oci.image.manifest.v1+json", "image-manifest", "", t.new.manifest),
			blob("application/vnd.oci.image.config.v1+json", "image-config", "", t.new.blobs[config]),
			blob(tarDiff, "image-layer", string(layers[1]), diff),
			blob("application/vnd.oci.image.layer.v1.tar+gzip", "image-layer", string(layers[2]), t.new.blobs[layers[2]]),
		}, ", "))
	return m
}

// Of the old image and a delta comes the new image as it would come itself, and no more is read than the delta.
func TestDelta(t *testing.T) {
	for _, version := range []int{1, 2} {
		images := newTwoImages(version)
		r, whole := newRepo(t, fsverity.SHA256, erofs.V1), newRepo(t, fsverity.SHA256, erofs.V1)
		if _, err := oci.Pull(ctx, r, images.old, oci.PullOptions{Tag: "old"}); err != nil {
			t.Fatal(err)
		}
		want, err := oci.Pull(ctx, whole, images.new, oci.PullOptions{Tag: "new"})
		if err != nil {
			t.Fatal(err)
		}
		for round := range 2 {
			images.delta.read.Store(0)
			got, err := oci.Pull(ctx, r, images.delta, oci.PullOptions{Tag: "new", Resume: true})
			if err != nil {
				t.Fatalf("tardf%d: %v", version, err)
			}
			if got.Image.Digest != want.Image.Digest || got.Image.Stream() != want.Image.Stream() || got.Image.Linked[0] != want.Image.Linked[0] {
				t.Errorf("tardf%d: %+v, want %+v", version, got.Image, want.Image)
			}
			if n := images.delta.read.Load(); n > int64(len(images.diff))+4096 || got.Stats.Fetched != n || got.Stats.Present != 1+2*round {
				t.Errorf("tardf%d: %d bytes of a difference of %d were read: %+v", version, n, len(images.diff), got.Stats)
			}
			images.delta.cut = func() int { return 1 << 20 }
		}
		// The old one is not needed any more.
		if err := oci.Untag(ctx, r, "old", repo.LockOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
			t.Fatal(err)
		}
		if report, err := oci.Fsck(ctx, r, oci.FsckOptions{}); err != nil || len(report.Findings) > 0 || report.Images != 1 {
			t.Error(report, err)
		}
		mustBeClean(t, r)
	}
}

// A delta over a bad network goes on, too.
func TestDeltaCut(t *testing.T) {
	images := newTwoImages(1)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.Pull(ctx, r, images.old, oci.PullOptions{Tag: "old"}); err != nil {
		t.Fatal(err)
	}
	images.delta.cut = func() int { return 300 }
	if _, err := oci.Pull(ctx, r, images.delta, oci.PullOptions{Tag: "new", Retry: oci.Retry{Attempts: 3}}); err != nil {
		t.Error(err)
	}
}

// Pulls of a delta that break off read no byte of it twice, and leave nothing behind.
func TestDeltaResume(t *testing.T) {
	for _, version := range []int{1, 2} {
		images := newTwoImages(version)
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		if _, err := oci.Pull(ctx, r, images.old, oci.PullOptions{Tag: "old"}); err != nil {
			t.Fatal(err)
		}
		read := func(source oci.Source) error {
			_, err := oci.Pull(ctx, openRepo(t, r.Path()), source, oci.PullOptions{Tag: "new", Resume: true})
			return err
		}
		// Manifest and config come every time; they are not counted here.
		layers := onlyLayers{images.delta}
		random := rand.New(rand.NewPCG(uint64(version), 5))
		images.delta.cut = func() int { return 1 + random.IntN(20+len(images.diff)/4) }
		pulls := 1
		for err := read(layers); err != nil; err = read(layers) {
			if pulls++; !strings.Contains(err.Error(), "connection reset") || pulls > 1000 {
				t.Fatal(err)
			}
		}
		want := int64(len(images.diff) + len(images.delta.blobs[layersOf(images.new.manifest)[2]]))
		if got := images.delta.read.Load(); got != want || pulls < 5 {
			t.Errorf("tardf%d: %d bytes in %d pulls, want %d", version, got, pulls, want)
		}
		if files := keptFiles(t, r.Path()); len(files) > 0 {
			t.Errorf("tardf%d: left: %v", version, files)
		}
		mustBeClean(t, r)
	}
	// What was kept and is wrong costs bytes, but not the image.
	images := newTwoImages(1)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.Pull(ctx, r, images.old, oci.PullOptions{Tag: "old"}); err != nil {
		t.Fatal(err)
	}
	spoiled := bytes.Clone(images.diff)
	spoiled[len(spoiled)/2] ^= 1
	if err := os.MkdirAll(filepath.Join(r.Path(), "tmp"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.Path(), "tmp/blob-"+strings.Replace(string(oci.DigestOf(images.diff)), ":", "-", 1)), spoiled, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := oci.Pull(ctx, r, images.delta, oci.PullOptions{Tag: "new", Resume: true}); err != nil {
		t.Error(err)
	}
}

// killedAt is a source that fails when a blob is asked for, as soon as something has happened.
type killedAt struct {
	*memory
	blob  oci.Digest
	until func() bool
}

func (k killedAt) Blob(ctx context.Context, d oci.Descriptor, offset int64) (io.ReadCloser, int64, error) {
	if d.Digest != k.blob {
		return k.memory.Blob(ctx, d, offset)
	}
	for !k.until() {
		select {
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	return nil, 0, errors.New("killed")
}

// A layer that was made of a difference is there as soon as it is complete, for whoever goes on after this process is killed.
func TestDeltaLayersStay(t *testing.T) {
	images := newTwoImages(1)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.Pull(ctx, r, images.old, oci.PullOptions{Tag: "old"}); err != nil {
		t.Fatal(err)
	}
	var config oci.Config
	if err := json.Unmarshal(images.new.blobs[configOf(images.new)], &config); err != nil {
		t.Fatal(err)
	}
	source := killedAt{images.delta, layersOf(images.new.manifest)[2], func() bool {
		_, err := oci.Layer(r, config.RootFS.DiffIDs[1], scan.Digests(fsverity.SHA256))
		return err == nil
	}}
	limit, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	if _, err := oci.Pull(limit, openRepo(t, r.Path()), source, oci.PullOptions{Tag: "new"}); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatal(err)
	}
	images.delta.read.Store(0)
	got, err := oci.Pull(ctx, openRepo(t, r.Path()), images.delta, oci.PullOptions{Tag: "new"})
	if err != nil || got.Stats.Present != 2 || images.delta.read.Load() > 4096 {
		t.Errorf("%d bytes were read: %+v, %v", images.delta.read.Load(), got.Stats, err)
	}
}

// Blobs that a delta has as they are can be kept, and those that are kept with the old image; others that is said of.
func TestDeltaKeepBlobs(t *testing.T) {
	images := newTwoImages(1)
	odd := func(_ int, b []byte) []byte { return append(gzipped(b[:100]), gzipped(b[100:])...) }
	var same, added []byte
	for _, kept := range []bool{true, false} {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		if _, err := oci.Pull(ctx, r, images.old, oci.PullOptions{Tag: "old", KeepBlobs: kept}); err != nil {
			t.Fatal(err)
		}
		if _, err := oci.Pull(ctx, r, images.delta, oci.PullOptions{Tag: "new", KeepBlobs: true}); !errors.Is(err, oci.ErrDifference) {
			t.Errorf("a layer of which there is a difference: %v", err)
		}
		mustBeClean(t, r)

		same, added = archiveOf(dirOf("usr/"), file("usr/a", "same")), archiveOf(dirOf("opt/"), file("opt/b", "added"))
		whole := twoImages{old: newSource(odd, same, same), new: newSource(odd, same, same, added)}
		delta := whole.deltaOf([]byte("not read"))
		r = newRepo(t, fsverity.SHA256, erofs.V1)
		if _, err := oci.Pull(ctx, r, whole.old, oci.PullOptions{Tag: "old", KeepBlobs: kept}); err != nil {
			t.Fatal(err)
		}
		got, err := oci.Pull(ctx, r, delta, oci.PullOptions{Tag: "new", KeepBlobs: true})
		if (err == nil) != kept || err != nil && !errors.Is(err, oci.ErrDifference) {
			t.Fatal(err)
		}
		if !kept {
			continue
		}
		if result, err := pushTo(t, r, got.Image, filepath.Join(t.TempDir(), "layout"), oci.PushOptions{Exact: true}); err != nil || result.Layers[2].How != oci.HowKept {
			t.Errorf("%+v, %v", result, err)
		}
	}
}

// What a delta says and is not so is an error, and leaves nothing behind that has a name.
func TestHostileDeltas(t *testing.T) {
	good := newTwoImages(1)
	for what, c := range map[string]struct {
		noOld bool
		diff  []byte
		text  [2]string // in the artifact
		err   string
	}{
		"no-old-image":       {noOld: true, err: "which is not in the repository: pull that first"},
		"unknown-operation":  {diff: tarDiffOf(1, 9, 0), err: "unknown operation 9"},
		"other-content":      {diff: tarDiffOf(1, 0, "something"), err: "unexpected EOF"},
		"other-archive":      {diff: tarDiffOf(1, 0, string(archiveOf(file("data/x", "y")))), err: "the content has digest"},
		"path-outside":       {diff: tarDiffOf(1, 1, "../../etc/passwd"), err: "not one of a file in the tree"},
		"path-missing":       {diff: tarDiffOf(1, 1, "data/none"), err: "the old image has no such file"},
		"path-directory":     {diff: tarDiffOf(1, 1, "data"), err: "not a regular file in the old image"},
		"range":              {diff: tarDiffOf(1, 1, "data/large", 2, 1<<40), err: "unexpected EOF"},
		"endless":            {diff: tarDiffOf(1, endless()...), err: "larger than the limit"},
		"no-source":          {text: [2]string{"delta.source-config", "delta.other"}, err: "source-config"},
		"source-no-digest":   {text: [2]string{`source-config": "sha256:`, `source-config": "`}, err: "not a digest"},
		"no-manifest":        {text: [2]string{"image-manifest", "other"}, err: "manifest or config of the new image are not in it"},
		"no-config":          {text: [2]string{"image-config", "other"}, err: "manifest or config of the new image are not in it"},
		"to-no-digest":       {text: [2]string{`delta.to": "sha256:`, `delta.to": "sha257:`}, err: "not a digest"},
		"to-other-layer":     {text: [2]string{`delta.to": "sha256:`, `delta.to": "sha256:` + strings.Repeat("0", 64) + `", "x": "`}, err: "is not one of the new image"},
		"layer-missing":      {text: [2]string{"image-layer", "other"}, err: "it is not in the delta"},
		"manifest-of-config": {text: [2]string{"image-manifest", "image-config"}, err: "are not in it"},
	} {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		if !c.noOld {
			if _, err := oci.Pull(ctx, r, good.old, oci.PullOptions{Tag: "old"}); err != nil {
				t.Fatal(err)
			}
		}
		delta := good.delta
		if c.diff != nil {
			delta = good.deltaOf(c.diff)
		}
		if c.text[0] != "" {
			delta = &memory{blobs: delta.blobs, manifest: bytes.Replace(delta.manifest, []byte(c.text[0]), []byte(c.text[1]), 1)}
		}
		_, err := oci.Pull(ctx, r, delta, oci.PullOptions{Tag: "new", Limits: oci.Limits{Layer: 4 << 20}})
		if err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := oci.Open(r, "new"); !errors.Is(err, repo.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
			t.Fatal(err)
		}
		mustBeClean(t, r)
	}
	// A delta to a delta, and one that refers to an image, are not applied.
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	nested := good
	nested.new = &memory{manifest: bytes.Replace(good.new.manifest, []byte("{"), []byte(`{"artifactType": "application/vnd.io.github.containers.oci-delta.v1",`), 1), blobs: good.new.blobs}
	if _, err := oci.Pull(ctx, r, good.old, oci.PullOptions{Tag: "old"}); err != nil {
		t.Fatal(err)
	}
	if p, err := oci.Pull(ctx, r, nested.deltaOf(good.diff), oci.PullOptions{Tag: "nested"}); err != nil || !p.Image.Manifest.IsImage() {
		t.Error(err)
	}
}

// endless are operations that write more than a layer may have.
func endless() []any {
	var header bytes.Buffer
	tar.NewWriter(&header).WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: 1 << 30})
	ops := []any{0, header.String(), 1, "data/large"}
	for range 100 {
		ops = append(ops, 4, 0, 2, 200_000)
	}
	return ops
}

// A file of the old image may have holes, so that it is in no layer as it is in the image.
func TestDeltaHoles(t *testing.T) {
	archive, content := sparseArchive(t)
	copied := archiveOf(file("usr/copy", string(content)))
	images := twoImages{old: newSource(nil, archive), new: newSource(nil, archive, copied, archiveOf(file("x", "y")))}
	at := bytes.Index(copied, content)
	delta := images.deltaOf(tarDiffOf(1, 0, string(copied[:at]), 1, "usr/sparse", 2, len(content), 0, string(copied[at+len(content):])))
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.Pull(ctx, r, images.old, oci.PullOptions{Tag: "old"}); err != nil {
		t.Fatal(err)
	}
	// The composefs image of the old one is not needed, nor what belongs to that alone.
	if err := os.Remove(filepath.Join(r.Path(), object(fsverity.Of(fsverity.SHA256, content)))); err != nil {
		t.Fatal(err)
	}
	if _, err := oci.Pull(ctx, openRepo(t, r.Path()), delta, oci.PullOptions{Tag: "new"}); err != nil {
		t.Fatal(err)
	}
}

// The image to boot is made of a delta as well.
func TestDeltaBoot(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	old, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{Tag: "old"})
	if err != nil {
		t.Fatal(err)
	}
	images := twoImages{old: &memory{manifest: old.Image.ManifestJSON}}
	var layers [][]byte
	for _, id := range old.Image.Config.RootFS.DiffIDs {
		var b bytes.Buffer
		if err := oci.WriteLayer(&b, r, id); err != nil {
			t.Fatal(err)
		}
		layers = append(layers, b.Bytes())
	}
	hostname := archiveOf(dirOf("etc/"), file("etc/hostname", "new"))
	images.new = newSource(nil, append(layers[:1:1], hostname, layers[1])...)
	delta := images.deltaOf(tarDiffOf(1, 0, string(hostname[:1024]), 0, string(hostname[1024:])))
	got, err := oci.Pull(ctx, r, delta, oci.PullOptions{Tag: "new", Transform: boot.Transform})
	if err != nil || len(got.Image.Linked) != 2 {
		t.Error(got.Image, err)
	}
}
