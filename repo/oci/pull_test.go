package oci_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// TestMain is also the program that is killed: it pulls a layout, or pushes to one.
func TestMain(m *testing.M) {
	path := os.Getenv("TEST_PULL_REPO")
	if path == "" {
		os.Exit(m.Run())
	}
	err := func() error {
		r, err := repo.Open(path, repo.Options{})
		if err != nil {
			return err
		}
		if dir := os.Getenv("TEST_PUSH_LAYOUT"); dir != "" {
			return push(r, os.Getenv("TEST_PUSH_TAG"), dir)
		}
		l, err := oci.OpenLayout(os.Getenv("TEST_PULL_LAYOUT"), "")
		if err != nil {
			return err
		}
		_, err = oci.Pull(ctx, r, l, oci.PullOptions{Tag: "os"})
		return err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Killed at any moment, a pull leaves a repository without fault, whose tag leads to nothing or to all of it, and the next one
// uses what is there.
func TestPullKilled(t *testing.T) {
	layout := filepath.Join(t.TempDir(), "layout")
	newSource(func(_ int, b []byte) []byte { return gzipped(b) }, bigLayers(1, 4, 60)...).save(t, layout)
	var r *repo.Repo
	killed, complete := 0, 0
	random := rand.New(rand.NewPCG(2, 3))
	longest := 500 * time.Millisecond
	for round := range 200 {
		if r == nil {
			r = newRepo(t, fsverity.SHA256, erofs.V1)
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TEST_PULL_REPO="+r.Path(), "TEST_PULL_LAYOUT="+layout)
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
			complete++
			longest = max(50*time.Millisecond, time.Since(start)) // about as long as a pull takes here
		} else if killed++; errs.Len() > 0 {
			t.Fatalf("round %d: %s", round, errs.String())
		}
		mustBeClean(t, r)
		tags, tagErr := oci.Tags(r)
		report, fsckErr := oci.Fsck(ctx, r, oci.FsckOptions{})
		if tagErr != nil || fsckErr != nil || len(report.Findings) > 0 || err == nil && len(tags) != 1 {
			t.Fatalf("round %d: %v, %v, %v, %v", round, tags, report.Findings, tagErr, fsckErr)
		}
		if len(tags) == 1 {
			r = nil // and from the beginning
		}
	}
	if killed < 50 || complete == 0 {
		t.Errorf("%d of 200 were killed, %d were complete", killed, complete)
	}
}

// A connection that breaks again and again costs no byte twice.
func TestResume(t *testing.T) {
	layers := bigLayers(3, 2, 40)
	whole, err := oci.Pull(ctx, newRepo(t, fsverity.SHA256, erofs.V1), newSource(nil, layers...), oci.PullOptions{Tag: "a"})
	if err != nil {
		t.Fatal(err)
	}
	source := newSource(func(_ int, b []byte) []byte { return gzipped(b) }, layers...)
	var size int64
	for _, b := range source.blobs {
		size += int64(len(b))
	}
	random := rand.New(rand.NewPCG(4, 5))
	var mu sync.Mutex
	source.cut = func() int {
		mu.Lock()
		defer mu.Unlock()
		return 1 + random.IntN(200_000)
	}
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "a"}); err == nil || !strings.Contains(err.Error(), "connection reset") {
		t.Errorf("without another attempt: %v", err)
	}
	if tags, _ := oci.Tags(r); len(tags) > 0 {
		t.Errorf("tags: %v", tags)
	}
	r = newRepo(t, fsverity.SHA256, erofs.V1)
	source.read.Store(0)
	result, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "a", Retry: oci.Retry{Attempts: 1}})
	if err != nil || result.Image.Linked[0] != whole.Image.Linked[0] {
		t.Fatal(err)
	}
	if got := source.read.Load(); got != size || result.Stats.Fetched != size {
		t.Errorf("%d bytes were read, %d counted, of %d", got, result.Stats.Fetched, size)
	}
}

// An image is the same as one layer or as several, and the same as the directory.
func TestLayersOfATree(t *testing.T) {
	digests := golden.Load(t)
	for _, name := range []string{"files", "links", "metadata", "names", "selinux"} {
		dir := golden.Extract(t, "trees/"+name+".tar.gz")
		whole, err := exec.Command("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "-C", dir, "-cf", "-", ".").Output()
		if err != nil {
			t.Fatal(err)
		}
		for round := range 6 {
			layers := [][]byte{whole}
			if round > 0 {
				layers = distribute(t, whole, uint64(round))
			}
			r := newRepo(t, fsverity.SHA256, erofs.V1)
			result, err := oci.Pull(ctx, r, newSource(nil, layers...), oci.PullOptions{Tag: "a"})
			if err != nil {
				t.Fatalf("%s, round %d: %v", name, round, err)
			}
			want := digests.Trees[name].Modes["container"]["sha256"]["v1"]
			if got := result.Image.Linked[0].Digest.String(); got != want {
				t.Errorf("%s, round %d: %s, want %s", name, round, got, want)
			}
		}
	}
}

// distribute deals the files of an archive out to several layers, with others that a whiteout, an opaque directory or another file
// takes away again.
func distribute(t *testing.T, archive []byte, seed uint64) [][]byte {
	random := rand.New(rand.NewPCG(seed, 11))
	const layers = 4
	var out [layers]bytes.Buffer
	var writers [layers]*tar.Writer
	for k := range writers {
		writers[k] = tar.NewWriter(&out[k])
	}
	put := func(k int, h *tar.Header, content []byte) {
		c := *h
		c.Format = tar.FormatPAX
		if err := writers[k].WriteHeader(&c); err != nil {
			t.Fatal(err)
		}
		writers[k].Write(content)
	}
	at := map[string]int{}
	for in := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		first := 1
		if h.Typeflag == tar.TypeLink {
			first = at[h.Linkname]
		}
		k := first + random.IntN(layers-first)
		at[h.Name] = k
		name := strings.TrimSuffix(h.Name, "/")
		switch random.IntN(5) {
		case 0: // another file that is replaced; a directory would keep its entries
			if h.Typeflag != tar.TypeDir {
				put(0, &tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o700}, nil)
				put(0, &tar.Header{Name: name + "/in-the-way", Typeflag: tar.TypeReg}, nil)
			}
		case 1: // one that is taken away
			if len(filepath.Base(name)) > 250 {
				break
			}
			put(0, &tar.Header{Name: name + "-away", Typeflag: tar.TypeReg, Size: 100}, make([]byte, 100))
			put(1+random.IntN(layers-1), &tar.Header{Name: filepath.Dir(name) + "/.wh." + filepath.Base(name+"-away"), Typeflag: tar.TypeReg}, nil)
		case 2: // below a directory that becomes opaque in the layer after it
			if h.Typeflag == tar.TypeDir {
				put(0, &tar.Header{Name: name + "/hidden/file", Typeflag: tar.TypeReg}, nil)
				put(1, &tar.Header{Name: name + "/.wh..wh..opq", Typeflag: tar.TypeReg}, nil)
			}
		}
		put(k, h, content)
	}
	var list [][]byte
	for k := range writers {
		writers[k].Close()
		list = append(list, out[k].Bytes())
	}
	return list
}

// However a layer is compressed, it is the same image.
func TestCompression(t *testing.T) {
	layer := bigLayers(5, 1, 10)[0]
	half := len(layer) / 2
	var want fsverity.Digest
	for name, pack := range map[string]func([]byte) []byte{
		"none":         func(b []byte) []byte { return b },
		"gzip":         gzipped,
		"gzip-members": func(b []byte) []byte { return append(gzipped(b[:half]), gzipped(b[half:])...) },
		"zstd":         zstandard,
		"zstd-frames":  func(b []byte) []byte { return append(zstandard(b[:half]), zstandard(b[half:])...) },
		"zstd-chunked": func(b []byte) []byte {
			return bytes.Join([][]byte{skippable([]byte("before")), zstandard(b[:half]), skippable([]byte("between")), zstandard(b[half:]),
				skippable([]byte("after"))}, nil)
		},
	} {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		result, err := oci.Pull(ctx, r, newSource(func(_ int, b []byte) []byte { return pack(b) }, layer), oci.PullOptions{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := result.Image.Linked[0].Digest
		if want.IsZero() {
			want = got
		}
		if got != want {
			t.Errorf("%s: another image", name)
		}
		var out bytes.Buffer
		if err := oci.WriteLayer(&out, r, oci.DigestOf(layer)); err != nil || !bytes.Equal(out.Bytes(), layer) {
			t.Errorf("%s: the layer does not come back: %v", name, err)
		}
	}
	random := make([]byte, 5000)
	for name, c := range map[string]struct {
		blob []byte
		want string
	}{
		"gzip-truncated":        {gzipped(layer)[:1000], "gzip: unexpected EOF"},
		"gzip-trailing-garbage": {append(gzipped(layer), "garbage"...), "gzip: "},
		"gzip-wrong-sum":        {append(gzipped(layer)[:len(gzipped(layer))-8], 0, 0, 0, 0, 0, 0, 0, 0), "gzip: "},
		"zstd-truncated":        {zstandard(layer)[:1000], "zstd: "},
		"zstd-garbage-frame":    {append(zstandard(layer), 0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff), "zstd: "},
		"zstd-window-2-GiB":     {[]byte{0x28, 0xb5, 0x2f, 0xfd, 0, 21 << 3, 1, 0, 0}, "zstd: "},
		"another-layer":         {bigLayers(6, 1, 10)[0], "the content has digest"},
		"no-archive":            {random, "the content has digest"}, // zeros: an empty archive
		"text":                  {bytes.Repeat([]byte("text"), 1000), "not a tar archive"},
		"empty":                 {nil, "the content has digest"},
	} {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		_, err := oci.Pull(ctx, r, newSource(func(int, []byte) []byte { return c.blob }, layer), oci.PullOptions{Tag: "a"})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if tags, _ := oci.Tags(r); len(tags) > 0 {
			t.Errorf("%s: it has a tag", name)
		}
	}
}

// zeroFile is an archive with one file of zeros, which is never in memory.
func zeroFile(size int64) io.Reader {
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	w.WriteHeader(&tar.Header{Name: "usr/zeros", Size: size, Mode: 0o644, Format: tar.FormatPAX})
	return io.MultiReader(&head, io.LimitReader(zeroReader{}, size+1024))
}

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// A bomb ends at the limit, and memory does not grow with the layer.
func TestLargeLayers(t *testing.T) {
	for name, compress := range map[string]func(io.Writer) io.WriteCloser{
		"gzip": func(w io.Writer) io.WriteCloser { return newGzip(w) },
		"zstd": func(w io.Writer) io.WriteCloser { return newZstd(w) },
	} {
		var bomb bytes.Buffer
		z := compress(&bomb)
		if _, err := io.Copy(z, zeroFile(200<<20)); err != nil {
			t.Fatal(err)
		}
		z.Close()
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		_, err := oci.ImportLayer(ctx, r, &bomb, oci.DigestOf(nil), oci.Limits{Layer: 10 << 20}, repo.LockOptions{})
		if !errors.Is(err, oci.ErrTooLarge) {
			t.Errorf("%s bomb: %v", name, err)
		}
	}
	// Compressed bytes without any content.
	nothing := newSource(func(int, []byte) []byte { return bytes.Repeat(gzipped(nil), 1000) }, archiveOf())
	_, err := oci.Pull(ctx, newRepo(t, fsverity.SHA256, erofs.V1), nothing, oci.PullOptions{Limits: oci.Limits{Layer: 10_000}})
	if !errors.Is(err, oci.ErrTooLarge) || nothing.read.Load() > 10_000 {
		t.Errorf("empty gzip members: %d bytes, %v", nothing.read.Load(), err)
	}
	const size = 512 << 20
	h := oci.Digest("sha256:" + sumOf(t, zeroFile(size)))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.ImportLayer(ctx, r, zeroFile(size), h, oci.Limits{}, repo.LockOptions{}, "big"); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 64<<20 {
		t.Errorf("%d bytes of memory for a layer of %d", grown, size)
	}
	mustBeClean(t, r)
}

// What belongs to an image is kept as long as it has a name, and no longer.
func TestGC(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	layers := bigLayers(8, 3, 20)
	for k, list := range [][][]byte{layers[:2], layers[1:]} {
		if _, err := oci.Pull(ctx, r, newSource(nil, list...), oci.PullOptions{Tag: fmt.Sprint(k)}); err != nil {
			t.Fatal(err)
		}
	}
	gc := func() repo.GCPlan {
		t.Helper()
		plan, err := r.GC(ctx, repo.GCOptions{})
		if err != nil {
			t.Fatal(err)
		}
		report, err := oci.Fsck(ctx, r, oci.FsckOptions{})
		if err != nil || len(report.Findings) > 0 {
			t.Fatal(report.Findings, err)
		}
		mustBeClean(t, r)
		return plan
	}
	if p := gc(); p.Objects > 0 || len(p.Images)+len(p.Streams) > 0 {
		t.Errorf("%+v", p)
	}
	freed, err := oci.UntagFrees(ctx, r, "0", repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if p := gc(); p.Objects > 0 {
		t.Errorf("a question has removed %+v", p)
	}
	if err := oci.Untag(ctx, r, "0", repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if p := gc(); p.Objects != freed.Objects || p.Bytes != freed.Bytes || len(p.Images) != freed.Images || len(p.Streams) != freed.Streams {
		t.Errorf("%+v was foretold, and removed %+v", freed, p)
	} else if p.Objects == 0 || len(p.Images) != 1 || len(p.Streams) != 3 { // manifest, config, one layer
		t.Errorf("%+v", p)
	}
	image, err := oci.Open(r, "1")
	if err != nil {
		t.Fatal(err)
	}
	if freed, err = oci.RemoveFrees(ctx, r, []oci.Digest{image.Digest}, repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := oci.Remove(ctx, r, image.Digest, repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if p := gc(); p.Objects != freed.Objects || len(freed.Tags) != 1 || p.Bytes != freed.Bytes {
		t.Errorf("%+v was foretold, and removed %+v", freed, p)
	}
	if objects, _ := filepath.Glob(filepath.Join(r.Path(), "objects/*/*")); len(objects) > 0 {
		t.Errorf("%d objects are left", len(objects))
	}
}

// Fsck finds what is damaged, and a pull brings it back.
func TestFsckAndPullAgain(t *testing.T) {
	layers := bigLayers(9, 2, 5)
	source := newSource(nil, layers...)
	for _, c := range []struct {
		what string
		want oci.Kind
		path func(r *repo.Repo, i *oci.Image) string // of what is damaged
	}{
		{"manifest", oci.ManifestReadFailed, func(_ *repo.Repo, i *oci.Image) string { return object(i.Stream()) }},
		{"config", oci.ConfigReadFailed, func(_ *repo.Repo, i *oci.Image) string { return object(i.ConfigStream()) }},
		{"layer", oci.LayerCheckFailed, func(_ *repo.Repo, i *oci.Image) string { return object(i.Layers[1]) }},
		{"layer's name", oci.LayerStreamMissing, func(_ *repo.Repo, i *oci.Image) string {
			return "streams/oci-layer-" + string(i.Config.RootFS.DiffIDs[0])
		}},
		{"image's name", oci.ErofsImageMissing, func(_ *repo.Repo, i *oci.Image) string { return "images/" + i.Linked[0].Digest.String() }},
		{"image", oci.ErofsImageMissing, func(_ *repo.Repo, i *oci.Image) string { return object(i.Linked[0].Digest) }},
	} {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		result, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "a"})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(r.Path(), c.path(r, result.Image))
		if !strings.Contains(path, "/objects/") {
			err = os.Remove(path)
		} else {
			err = os.WriteFile(path, []byte("something else"), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		r = openRepo(t, r.Path())
		report, err := oci.Fsck(ctx, r, oci.FsckOptions{})
		if err != nil || len(report.Findings) != 1 || report.Findings[0].Kind != c.want || report.Bad != 1 {
			t.Errorf("%s: %v, %v", c.what, report.Findings, err)
		}
		if _, err := oci.Pull(ctx, r, source, oci.PullOptions{Tag: "a"}); err != nil {
			t.Errorf("%s: pulled again: %v", c.what, err)
		}
		report, err = oci.Fsck(ctx, openRepo(t, r.Path()), oci.FsckOptions{})
		if err != nil || len(report.Findings) > 0 {
			t.Errorf("%s: after another pull: %v, %v", c.what, report.Findings, err)
		}
	}
}

func object(d fsverity.Digest) string { return "objects/" + d.ObjectPath() }

// An artifact that refers to an image is kept as it is.
func TestArtifact(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	image, err := oci.Pull(ctx, r, newSource(nil, bigLayers(1, 1, 2)...), oci.PullOptions{Tag: "os"})
	if err != nil {
		t.Fatal(err)
	}
	signature := &memory{blobs: map[oci.Digest][]byte{}}
	blob := signature.add([]byte("a signature"))
	signature.manifest = fmt.Appendf(nil, `{"schemaVersion": 2, "artifactType": "test", "config": {"mediaType": "application/vnd.oci.empty.v1+json",
		"digest": %q, "size": 2}, "layers": [{"mediaType": "test", "digest": %q, "size": 11}], "subject": {"digest": %q, "size": 1}}`,
		signature.add([]byte("{}")), blob, image.Image.Digest)
	pulled, err := oci.Pull(ctx, r, signature, oci.PullOptions{})
	if err != nil || len(pulled.Image.Linked) > 0 {
		t.Fatal(err)
	}
	list, err := oci.Referrers(r, image.Image.Digest)
	if err != nil || len(list) != 1 || list[0] != pulled.Image.Digest {
		t.Errorf("%v, %v", list, err)
	}
	// Without its name, the image stays for a while, and so does what refers to it.
	if err := oci.Untag(ctx, r, "os", repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if p, err := r.GC(ctx, repo.GCOptions{Follows: oci.Follows, Margins: repo.DefaultMargins}); err != nil || len(p.Refs)+len(p.Streams) > 0 {
		t.Fatal(p, err)
	}
	if err := oci.SetTag(ctx, r, image.Image.Digest, "os", repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.GC(ctx, repo.GCOptions{Follows: oci.Follows}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := oci.WriteLayer(&out, r, blob); err != nil || out.String() != "a signature" {
		t.Errorf("%q, %v", out.String(), err)
	}
	if _, err := pulled.Image.Tree(ctx, r, nil, oci.Limits{}); !errors.Is(err, oci.ErrNotImage) {
		t.Error(err)
	}
	// An artifact that is the same archive as a layer does not stand in the way of the image.
	layer := bigLayers(5, 1, 2)[0]
	same := &memory{blobs: map[oci.Digest][]byte{}}
	same.manifest = fmt.Appendf(nil, `{"config": {"digest": %q, "size": 2}, "layers": [{"digest": %q, "size": %d}]}`,
		same.add([]byte("{}")), same.add(layer), len(layer))
	for _, s := range []*memory{same, newSource(nil, layer), same} {
		if _, err := oci.Pull(ctx, r, s, oci.PullOptions{Tag: string(oci.DigestOf(s.manifest))}); err != nil {
			t.Error(err)
		}
	}
	if report, err := oci.Fsck(ctx, r, oci.FsckOptions{}); err != nil || len(report.Findings) > 0 {
		t.Error(report.Findings, err)
	}
	signature.blobs[blob] = []byte("a signaturf")
	if _, err := oci.Pull(ctx, newRepo(t, fsverity.SHA256, erofs.V1), signature, oci.PullOptions{}); err == nil {
		t.Error("a changed artifact is taken")
	}
}

// Files with holes are objects of their own, and are counted, whenever in a pull they are made.
func TestCountHoles(t *testing.T) {
	sparse, _ := sparseArchive(t)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	for _, c := range []struct {
		layers       [][]byte
		objects, had int
	}{
		{[][]byte{sparse}, 2, 0}, // as it is in the archive, and in the image
		{[][]byte{sparse, archiveOf(file("usr/a", string(noise(1, 100))))}, 1, 1},
		{[][]byte{sparse, archiveOf(file("usr/a", string(noise(1, 100))))}, 0, 0},
	} {
		got, err := oci.Pull(ctx, r, newSource(nil, c.layers...), oci.PullOptions{Tag: "a"})
		if err != nil || got.Stats.Objects != c.objects || got.Stats.Reused != c.had {
			t.Errorf("%+v, want %d and %d: %v", got.Stats, c.objects, c.had, err)
		}
	}
}

func TestCancel(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	ctx, stop := context.WithCancel(ctx)
	stop()
	if _, err := oci.Pull(ctx, r, newSource(nil, bigLayers(1, 2, 2)...), oci.PullOptions{}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
