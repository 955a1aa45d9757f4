package oci_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

func gzipLayers(_ int, b []byte) []byte { return gzipped(b) }

// keptFiles are what is kept of blobs.
func keptFiles(t *testing.T, repo string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(repo, "tmp/*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// layerBytes is the size of all blobs that the manifest names as layers.
func (m *memory) layerBytes() (n int64) {
	for _, b := range m.blobs {
		if bytes.HasPrefix(b, []byte{0x1f, 0x8b}) {
			n += int64(len(b))
		}
	}
	return n
}

// onlyLayers counts the bytes of layers alone: manifests and configs are small, and come every time.
type onlyLayers struct{ *memory }

func (o onlyLayers) Blob(ctx context.Context, d oci.Descriptor, offset int64) (io.ReadCloser, int64, error) {
	if bytes.HasPrefix(o.blobs[d.Digest], []byte("{")) {
		return io.NopCloser(bytes.NewReader(o.blobs[d.Digest][offset:])), d.Size, nil
	}
	return o.memory.Blob(ctx, d, offset)
}

// Each pull ends with its first lost connection; the next one goes on there, and no byte comes twice.
func TestResumeByTheNextPull(t *testing.T) {
	source := newSource(gzipLayers, bigLayers(21, 4, 40)...)
	random := rand.New(rand.NewPCG(8, 9))
	source.cut = func() int { return 1 + random.IntN(400_000) }
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pulls := 0
	for {
		pulls++
		_, err := oci.Pull(ctx, r, onlyLayers{source}, oci.PullOptions{Tag: "a", Resume: true})
		if err == nil {
			break
		}
		if !strings.Contains(err.Error(), "connection reset") || pulls > 1000 {
			t.Fatal(err)
		}
		if tags, _ := oci.Tags(r); len(tags) > 0 {
			t.Fatalf("tags of an image that is not complete: %v", tags)
		}
		r = openRepo(t, r.Path())
	}
	if got, want := source.read.Load(), source.layerBytes(); got != want || pulls < 10 {
		t.Errorf("%d bytes in %d pulls, want %d", got, pulls, want)
	}
	if files := keptFiles(t, r.Path()); len(files) > 0 {
		t.Errorf("left: %v", files)
	}
	mustBeClean(t, r)
}

// What is kept may be anything after a power cut: it costs bytes, but not the image.
func TestResumeFromGarbage(t *testing.T) {
	for name, spoil := range map[string]func([]byte) []byte{
		"empty":    func([]byte) []byte { return nil },
		"zeros":    func(b []byte) []byte { return append(b[:len(b)/2:len(b)/2], make([]byte, 1000)...) },
		"complete": func(b []byte) []byte { return b },
		"changed":  func(b []byte) []byte { b = bytes.Clone(b); b[len(b)/2] ^= 1; return b },
		"longer":   func(b []byte) []byte { return append(bytes.Clone(b), 0) },
		"text":     func([]byte) []byte { return []byte("text") },
	} {
		source := newSource(gzipLayers, bigLayers(22, 1, 10)...)
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		if err := os.Mkdir(filepath.Join(r.Path(), "tmp"), 0o755); err != nil {
			t.Fatal(err)
		}
		for d, b := range source.blobs {
			file := filepath.Join(r.Path(), "tmp/blob-"+strings.Replace(string(d), ":", "-", 1))
			if err := os.WriteFile(file, spoil(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err := oci.Pull(ctx, r, onlyLayers{source}, oci.PullOptions{Tag: "a", Resume: true})
		got, want := source.read.Load(), source.layerBytes()
		if name == "complete" {
			want = 0
		}
		if err != nil || got < want || got > 2*want {
			t.Errorf("%s: %d bytes, %v", name, got, err)
		}
		mustBeClean(t, r)
	}
	// What has just come and is wrong is not kept: it would be wrong the next time, too.
	source := newSource(func(int, []byte) []byte { return gzipped([]byte("not an archive")) }, bigLayers(22, 1, 1)...)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	if _, err := oci.Pull(ctx, r, source, oci.PullOptions{Resume: true}); err == nil || len(keptFiles(t, r.Path())) > 0 {
		t.Errorf("%v, %v", err, keptFiles(t, r.Path()))
	}
}

// Several pulls at once bring each layer once between them, in whatever order they want them, and none waits for ever.
func TestPullsAtOnce(t *testing.T) {
	layers := bigLayers(23, 6, 15)
	var reversed [][]byte
	for k := range layers {
		reversed = append(reversed, layers[len(layers)-1-k])
	}
	for round := range 5 {
		one, two := newSource(gzipLayers, layers...), newSource(gzipLayers, reversed...)
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		var all sync.WaitGroup
		for k, source := range []*memory{one, two, one, two} {
			all.Go(func() {
				if _, err := oci.Pull(ctx, openRepo(t, r.Path()), onlyLayers{source}, oci.PullOptions{Tag: string(rune('a' + k)), Resume: true}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if got, want := one.read.Load()+two.read.Load(), one.layerBytes(); got != want {
			t.Errorf("round %d: %d bytes, want %d", round, got, want)
		}
		mustBeClean(t, r)
	}
}

// stalling is a source whose connections stop to bring anything, without an end.
type stalling struct {
	*memory
	after int64 // bytes
}

func (s stalling) Blob(ctx context.Context, d oci.Descriptor, offset int64) (io.ReadCloser, int64, error) {
	r, size, err := s.memory.Blob(ctx, d, offset)
	if err != nil {
		return nil, 0, err
	}
	return io.NopCloser(io.MultiReader(io.LimitReader(r, s.after), silence{ctx})), size, nil
}

type silence struct{ ctx context.Context }

func (s silence) Read([]byte) (int, error) {
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

func TestSilence(t *testing.T) {
	source := newSource(gzipLayers, bigLayers(24, 1, 5)...)
	retry := oci.Retry{Attempts: 3, Idle: 100 * time.Millisecond}
	if _, err := oci.Pull(ctx, newRepo(t, fsverity.SHA256, erofs.V1), stalling{source, 100_000}, oci.PullOptions{Retry: retry}); err != nil {
		t.Error(err)
	}
	_, err := oci.Pull(ctx, newRepo(t, fsverity.SHA256, erofs.V1), stalling{source, 0}, oci.PullOptions{Retry: retry})
	if err == nil || !strings.Contains(err.Error(), "brings nothing more") {
		t.Error(err)
	}
}

func TestRetry(t *testing.T) {
	fails := errors.New("fails")
	for name, c := range map[string]struct {
		retry oci.Retry
		err   error
		want  int
	}{
		"none":      {oci.Retry{}, fails, 1},
		"three":     {oci.Retry{Attempts: 3, Wait: time.Microsecond}, fails, 4},
		"permanent": {oci.Retry{Attempts: 3}, oci.Permanent(fails), 1},
	} {
		calls := 0
		err := c.retry.Do(ctx, func() error { calls++; return c.err })
		if !errors.Is(err, fails) || err.Error() != "fails" || calls != c.want {
			t.Errorf("%s: %d calls, %v", name, calls, err)
		}
	}
}
