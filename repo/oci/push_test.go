package oci_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// pushTo pushes to a layout, without a tag.
func pushTo(t testing.TB, r *repo.Repo, i *oci.Image, dir string, o oci.PushOptions) (oci.PushResult, error) {
	t.Helper()
	target, err := oci.CreateLayout(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	return oci.Push(ctx, r, i, target, o)
}

// checkLayout checks that all that a layout names is there, with its digest, and nothing else lies about.
func checkLayout(t testing.TB, dir string) (manifests int) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if errors.Is(err, os.ErrNotExist) {
		return 0
	}
	var index struct{ Manifests []oci.Descriptor }
	if err == nil {
		err = json.Unmarshal(text, &index)
	}
	if err != nil {
		t.Fatal(err)
	}
	read := func(d oci.Descriptor) []byte {
		b, err := os.ReadFile(filepath.Join(dir, "blobs", strings.Replace(string(d.Digest), ":", "/", 1)))
		if err != nil || oci.DigestOf(b) != d.Digest || int64(len(b)) != d.Size {
			t.Fatalf("%s: %d bytes with digest %s: %v", d.Digest, len(b), oci.DigestOf(b), err)
		}
		return b
	}
	var check func(list []oci.Descriptor)
	check = func(list []oci.Descriptor) {
		for _, d := range list {
			text := read(d)
			if x, err := oci.ParseIndex(d.Digest, text); err == nil {
				check(x.Manifests)
				continue
			}
			var m oci.Manifest
			if err := json.Unmarshal(text, &m); err != nil {
				t.Fatal(err)
			}
			for _, d := range append(m.Layers, m.Config) {
				read(d)
			}
		}
	}
	check(index.Manifests)
	return len(index.Manifests)
}

// However layers were compressed, the image comes back with its digest if they were kept, or if the compressor is a usual one, and
// otherwise as another image with the same content.
func TestPush(t *testing.T) {
	odd := func(b []byte) []byte { // a compressor that nobody has
		var out bytes.Buffer
		z, _ := gzip.NewWriterLevel(&out, 4)
		z.Name = "odd"
		z.Write(b)
		z.Close()
		return out.Bytes()
	}
	level := func(n int) func([]byte) []byte {
		return func(b []byte) []byte {
			var out bytes.Buffer
			z, _ := gzip.NewWriterLevel(&out, n)
			z.Write(b)
			z.Close()
			return out.Bytes()
		}
	}
	stream := func(open func(io.Writer) io.WriteCloser) func([]byte) []byte {
		return func(b []byte) []byte {
			var out bytes.Buffer
			z := open(&out)
			z.Write(b)
			z.Close()
			return out.Bytes()
		}
	}
	for name, c := range map[string]struct {
		pack      func([]byte) []byte
		mediaType string
		how       string
	}{
		"none":        {func(b []byte) []byte { return b }, "tar", oci.HowRebuilt},
		"none-lies":   {func(b []byte) []byte { return b }, "tar+gzip", oci.HowRebuilt},
		"docker":      {level(gzip.DefaultCompression), "tar+gzip", "gzip of Go, level 6"},
		"level-1":     {level(1), "tar+gzip", "gzip of Go, level 1"},
		"level-9":     {level(9), "tar+gzip", "gzip of Go, level 9"},
		"podman":      {stream(func(w io.Writer) io.WriteCloser { return pgzip.NewWriter(w) }), "tar+gzip", "pgzip"},
		"podman-zstd": {stream(func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z }), "tar+zstd", "zstd of klauspost/compress"},
		"odd":         {odd, "tar+gzip", oci.HowRemade},
		"odd-zstd":    {func(b []byte) []byte { return append(zstandard(b), skippable([]byte("toc"))...) }, "tar+zstd", oci.HowRemade},
		"odd-no-type": {odd, "tar", oci.HowRemade},
	} {
		layers := append(bigLayers(3, 2, 30), archiveOf(file("usr/last", "")))
		source := newSource(func(_ int, b []byte) []byte { return c.pack(b) }, layers...)
		source.manifest = bytes.ReplaceAll(source.manifest, []byte("tar+gzip"), []byte(c.mediaType))
		for _, keep := range []bool{false, true} {
			r := newRepo(t, fsverity.SHA256, erofs.V1)
			pulled, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "a", KeepBlobs: keep})
			if err != nil {
				t.Fatal(err)
			}
			// A pull that keeps nothing leaves what was kept.
			if _, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "a"}); err != nil {
				t.Fatal(err)
			}
			if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
				t.Fatal(err)
			}
			image, err := oci.Open(r, "a")
			if err != nil {
				t.Fatal(err)
			}
			how := c.how
			if keep && how != oci.HowRebuilt {
				how = oci.HowKept
			}
			dir := filepath.Join(t.TempDir(), "layout")
			if _, err := pushTo(t, r, image, dir, oci.PushOptions{Exact: true}); errors.Is(err, oci.ErrRemade) != (how == oci.HowRemade) {
				t.Errorf("%s, kept %v, exact: %v", name, keep, err)
			}
			if n := checkLayout(t, dir); how == oci.HowRemade && n > 0 {
				t.Errorf("%s: %d manifests after an error", name, n)
			}
			result, err := pushTo(t, r, image, filepath.Join(t.TempDir(), "other"), oci.PushOptions{})
			if err != nil || len(result.Layers) != 3 || result.Layers[1].How != how || result.Layers[2].How != how {
				t.Fatalf("%s, kept %v: %+v, %v", name, keep, result, err)
			}
			again, err := pushTo(t, r, image, dir, oci.PushOptions{})
			if err != nil || again.Digest != result.Digest || (again.Digest == image.Digest) != (how != oci.HowRemade) || checkLayout(t, dir) != 1 {
				t.Errorf("%s, kept %v: %+v, %v", name, keep, again, err)
			}
			other := newRepo(t, fsverity.SHA512, erofs.V2)
			back, err := oci.Pull(ctx, other, openLayout(t, dir), oci.PullOptions{Formats: []erofs.Format{erofs.V1}})
			if err != nil || back.Image.Digest != result.Digest || !bytes.Equal(back.Image.ConfigJSON, pulled.Image.ConfigJSON) {
				t.Errorf("%s, kept %v: pulled again: %v", name, keep, err)
			}
			mustBeClean(t, r)
		}
	}
}

// Layers that were kept with one image are those of another one, too, and are not read again.
func TestKeptOnce(t *testing.T) {
	layers := bigLayers(31, 3, 10)
	pack := func(_ int, b []byte) []byte { return append(gzipped(b[:100]), gzipped(b[100:])...) }
	first, second := newSource(pack, layers[:2]...), newSource(pack, layers[1:]...)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.Pull(ctx, r, first, oci.PullOptions{Tag: "first", KeepBlobs: true}); err != nil {
		t.Fatal(err)
	}
	pulled, err := oci.Pull(ctx, r, onlyLayers{second}, oci.PullOptions{Tag: "second", KeepBlobs: true})
	if want := int64(len(second.blobs[layersOf(second.manifest)[1]])); err != nil || second.read.Load() != want {
		t.Errorf("%d bytes were read, want %d: %v", second.read.Load(), want, err)
	}
	// They stay when the first one goes.
	if err := oci.Untag(ctx, r, "first", repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
		t.Fatal(err)
	}
	if result, err := pushTo(t, r, pulled.Image, filepath.Join(t.TempDir(), "layout"), oci.PushOptions{Exact: true}); err != nil || result.Layers[0].How != oci.HowKept {
		t.Errorf("%+v, %v", result, err)
	}
}

// What belongs to an image goes along, to a layout that has other images already, and comes from there.
func TestPushReferrers(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulled, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{Tag: "os", KeepBlobs: true, Transform: boot.Transform})
	if err != nil {
		t.Fatal(err)
	}
	subject := pulled.Image.Digest
	var artifacts []oci.Digest
	for k := range 3 { // the last one signs the second one
		m := &memory{blobs: map[oci.Digest][]byte{}}
		m.manifest = fmt.Appendf(nil, `{"schemaVersion": 2, "artifactType": "test/%d", "config": {"mediaType": "application/vnd.oci.empty.v1+json",
			"digest": %q, "size": 2}, "layers": [{"mediaType": "test", "digest": %q, "size": 9}], "subject": {"digest": %q, "size": 1}}`,
			k, m.add([]byte("{}")), m.add([]byte("signature")), subject)
		a, err := oci.Pull(ctx, r, m, oci.PullOptions{})
		if err != nil {
			t.Fatal(err)
		}
		artifacts = append(artifacts, a.Image.Digest)
		if k == 1 {
			subject = a.Image.Digest
		}
	}
	dir := filepath.Join(t.TempDir(), "layout")
	newSource(nil, bigLayers(1, 1, 1)...).save(t, dir)
	target, err := oci.CreateLayout(dir, "os")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := oci.CreateLayout(dir, "other"); err == nil || !strings.Contains(err.Error(), "locked") {
		t.Errorf("two at once: %v", err)
	}
	for range 2 {
		result, err := oci.Push(ctx, r, pulled.Image, target, oci.PushOptions{Exact: true})
		if err != nil || len(result.Referrers) != 3 {
			t.Fatal(result, err)
		}
	}
	target.Close()
	if n := checkLayout(t, dir); n != 5 {
		t.Errorf("%d manifests", n)
	}
	l, err := oci.OpenLayout(dir, "os")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, source := range []oci.Source{l, oci.NewStored(r, pulled.Image.Digest)} {
		other := newRepo(t, fsverity.SHA256, erofs.V1)
		back, err := oci.Pull(ctx, other, source, oci.PullOptions{Tag: "os", KeepBlobs: true, Transform: boot.Transform})
		if err != nil || back.Image.Digest != pulled.Image.Digest || back.Image.Stream() != pulled.Image.Stream() {
			t.Errorf("%+v, %v", back.Image, err)
		}
		list, err := oci.PullReferrers(ctx, other, source, back.Image.Digest, "", oci.PullOptions{})
		if err != nil || len(list) != 3 {
			t.Errorf("%v, want %v: %v", list, artifacts, err)
		}
		if _, err := other.GC(ctx, repo.GCOptions{}); err != nil {
			t.Fatal(err)
		}
		for _, d := range artifacts {
			if _, err := oci.Open(other, "@"+string(d)); err != nil {
				t.Error(err)
			}
		}
	}
	// What refers to an image does not come along when that has become another one.
	odd := newSource(func(_ int, b []byte) []byte { return append(gzipped(b[:100]), gzipped(b[100:])...) }, bigLayers(2, 1, 1)...)
	image, err := oci.Pull(ctx, r, odd, oci.PullOptions{Tag: "odd"})
	if err != nil {
		t.Fatal(err)
	}
	signature := &memory{blobs: map[oci.Digest][]byte{}}
	signature.manifest = fmt.Appendf(nil, `{"config": {"digest": %q, "size": 2}, "layers": [], "subject": {"digest": %q, "size": 1}}`,
		signature.add([]byte("{}")), image.Image.Digest)
	if _, err := oci.Pull(ctx, r, signature, oci.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if result, err := pushTo(t, r, image.Image, dir, oci.PushOptions{}); err != nil || len(result.Left) != 1 || len(result.Referrers) > 0 {
		t.Errorf("%+v, %v", result, err)
	}
}

// An image that was given away with another manifest and comes back has the same config: none takes away what was made of the other,
// whichever is pulled last, with the image to boot or without it, and whichever goes.
func TestTwoManifestsOfOneConfig(t *testing.T) {
	for _, bootable := range []bool{true, false} {
		for _, goes := range []string{"one", "two"} {
			r := newRepo(t, fsverity.SHA256, erofs.V1)
			o := []oci.PullOptions{{Tag: "one"}, {Tag: "two"}}
			if bootable {
				o[0].Transform = boot.Transform
			} else {
				o[1].Transform = boot.Transform
			}
			one, err := oci.Pull(ctx, r, goldenLayout(t), o[0])
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(t.TempDir(), "layout")
			if _, err := pushTo(t, r, one.Image, dir, oci.PushOptions{}); err != nil {
				t.Fatal(err)
			}
			two, err := oci.Pull(ctx, r, openLayout(t, dir), o[1])
			if err != nil || two.Image.Digest == one.Image.Digest || two.Image.ConfigDigest() != one.Image.ConfigDigest() || len(two.Image.Linked) != 2 {
				t.Fatalf("%+v, %v", two.Image, err)
			}
			for _, name := range []string{"", goes} {
				if name != "" {
					if err := oci.Untag(ctx, r, name, repo.LockOptions{}); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
					t.Fatal(err)
				}
				if report, err := oci.Fsck(ctx, r, oci.FsckOptions{}); err != nil || len(report.Findings) > 0 {
					t.Errorf("bootable first: %v, without %q: %v, %v", bootable, name, report.Findings, err)
				}
				mustBeClean(t, r)
			}
		}
	}
}

func TestCreateLayout(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := oci.CreateLayout(dir, ""); err == nil || !strings.Contains(err.Error(), "neither empty nor an OCI layout") {
		t.Error(err)
	}
	if _, err := oci.CreateLayout(filepath.Join(dir, "no/where"), ""); err == nil {
		t.Error("no error")
	}
	// A blob that is not what its name says, after a power cut, is replaced; what others have put into the index stays.
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulled, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{KeepBlobs: true})
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "layout")
	if _, err := pushTo(t, r, pulled.Image, dir, oci.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	blobs, _ := filepath.Glob(filepath.Join(dir, "blobs/sha256/*"))
	for k, name := range blobs {
		if err := os.Truncate(name, int64(k%2*10)); err != nil {
			t.Fatal(err)
		}
	}
	index := `{"schemaVersion":2,"annotations":{"mine":"1"},"manifests":[{"mediaType":"x","digest":"sha256:` + strings.Repeat("0", 64) + `","size":1,"urls":["u"]}]}`
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(index), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, ".composefs-boot-left"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := pushTo(t, r, pulled.Image, dir, oci.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range blobs {
		b, err := os.ReadFile(name)
		if err != nil || oci.DigestOf(b) != oci.Digest("sha256:"+filepath.Base(name)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "index.json"))
	if err != nil || !strings.Contains(string(text), `"mine":"1"`) || !strings.Contains(string(text), `"urls":["u"]`) {
		t.Errorf("%s, %v", text, err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".composefs-boot-left")); err == nil {
		t.Error("a temporary file is left")
	}
}

func push(r *repo.Repo, tag, dir string) error {
	i, err := oci.Open(r, tag)
	if err != nil {
		return err
	}
	target, err := oci.CreateLayout(dir, tag)
	if err != nil {
		return err
	}
	defer target.Close()
	_, err = oci.Push(ctx, r, i, target, oci.PushOptions{})
	return err
}

// Killed at any moment, a push leaves a layout in which everything that is named is there.
func TestPushKilled(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	for k := range 2 {
		source := newSource(func(_ int, b []byte) []byte { return gzipped(b) }, bigLayers(uint64(k), 3, 40)...)
		if _, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: fmt.Sprint(k), KeepBlobs: k == 0}); err != nil {
			t.Fatal(err)
		}
	}
	random := rand.New(rand.NewPCG(6, 7))
	killed, complete := 0, 0
	longest := time.Second
	var dir string
	for round := range 60 {
		if dir == "" {
			dir = filepath.Join(t.TempDir(), "layout")
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TEST_PULL_REPO="+r.Path(), "TEST_PUSH_LAYOUT="+dir, fmt.Sprint("TEST_PUSH_TAG=", round%2))
		var errs bytes.Buffer
		cmd.Stderr = &errs
		start := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(random.Int64N(int64(longest))), func() { cmd.Process.Kill() })
		err := cmd.Wait()
		timer.Stop()
		if err == nil {
			longest = max(50*time.Millisecond, time.Since(start))
			complete++
		} else if killed++; errs.Len() > 0 {
			t.Fatalf("round %d: %s", round, errs.String())
		}
		if n := checkLayout(t, dir); n == 2 {
			dir = ""
		} else if err == nil && n == 0 {
			t.Fatalf("round %d: no image", round)
		}
	}
	if killed < 15 || complete == 0 {
		t.Errorf("%d of 60 were killed, %d were complete", killed, complete)
	}
	mustBeClean(t, r)
}

func TestPushCancelled(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulled, err := oci.Pull(ctx, r, goldenLayout(t), oci.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(ctx)
	stop()
	dir := filepath.Join(t.TempDir(), "layout")
	target, err := oci.CreateLayout(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if _, err := oci.Push(ctx, r, pulled.Image, target, oci.PushOptions{}); !errors.Is(err, context.Canceled) || checkLayout(t, dir) != 0 {
		t.Error(err)
	}
}

// takes is a target that takes everything, and counts.
type takes struct{ blobs, manifests int }

func (*takes) Has(context.Context, oci.Descriptor) (bool, error) { return false, nil }
func (t *takes) PutBlob(_ context.Context, _ oci.Descriptor, content io.Reader) error {
	t.blobs++
	_, err := io.Copy(io.Discard, content)
	return err
}
func (t *takes) PutManifest(context.Context, oci.Descriptor, []byte, oci.Known) error {
	t.manifests++
	return nil
}

// What is damaged in the repository is not tried again, and the image is not named.
func TestPushDamaged(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulled, err := oci.Pull(ctx, r, newSource(nil, bigLayers(1, 1, 20)...), oci.PullOptions{Tag: "a"})
	if err != nil {
		t.Fatal(err)
	}
	objects, err := filepath.Glob(filepath.Join(r.Path(), "objects/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range objects {
		if d := strings.ReplaceAll(strings.TrimPrefix(path, r.Path()+"/objects/"), "/", ""); d != pulled.Image.Layers[0].String() {
			if err := os.WriteFile(path, []byte("something else"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	to := &takes{}
	_, err = oci.Push(ctx, openRepo(t, r.Path()), pulled.Image, to, oci.PushOptions{Retry: oci.Retry{Attempts: 5}})
	if !errors.Is(err, repo.ErrCorrupt) || to.blobs != 1 || to.manifests > 0 {
		t.Errorf("%+v, %v", to, err)
	}
}
