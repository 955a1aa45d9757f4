//go:build bench

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
)

// oci compares pulls of an image of six layers, 8,500 files and 250 MB, 130 MB compressed, from a layout.
func (b *bench) oci(t *testing.T) {
	first, second := filepath.Join(b.dir, "layout-1"), filepath.Join(b.dir, "layout-2")
	makeLayout(t, first, []uint64{1, 2, 3, 4, 5, 6})
	makeLayout(t, second, []uint64{1, 2, 3, 4, 5, 7})
	const runs = 5
	pull := func(program func(...string) invocation, repo, layout string) sample {
		return program("--repo", repo, "oci", "pull", "oci:"+layout, "os").measure(t)
	}
	fresh := func(program func(...string) invocation, name string, k int) (sample, string) {
		repo := b.initRepo(t, "sha512", fmt.Sprintf("oci-%s-%d", name, k))
		return pull(program, repo, first), repo
	}
	peers := []rival{rival{name: "cfsctl", run: func(k int) sample {
		s, _ := fresh(b.them, "theirs", k)
		return s
	}}.atMost(0.6)}
	if b.cfsctl != "" {
		// What is there after a power cut: ours is, when it ends.
		peers = append(peers, rival{name: "cfsctl and sync", run: func(k int) sample {
			repo := b.initRepo(t, "sha512", fmt.Sprintf("oci-synced-%d", k))
			return withSync(b.them("--repo", repo, "oci", "pull", "oci:"+first, "os"), repo).measure(t)
		}})
	}
	for _, name := range []string{"skopeo", "umoci"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%v: run \"internal/setup rivals\"", err)
		}
	}
	peers = append(peers, rival{name: "skopeo, umoci", run: func(k int) sample {
		dir := filepath.Join(b.dir, fmt.Sprintf("oci-unpacked-%d", k))
		c := invocation{args: []string{"sh", "-c", `skopeo copy -q --insecure-policy oci:"$1" oci:"$2":os && umoci unpack --image "$2":os "$3"`,
			"sh", first, dir + "-copy", dir}}
		return c.measure(t)
	}}.atMost(0.25))
	b.compare("an OCI image of six layers into a fresh repository", 0, runs, func(k int) sample {
		s, _ := fresh(b.us, "ours", k)
		return s
	}, peers...)
	ours, theirs := filepath.Join(b.dir, "oci-ours-0"), filepath.Join(b.dir, "oci-theirs-0")
	b.same(t, b.us("--repo", ours, "oci", "compute-id", "os"), b.them("--repo", theirs, "oci", "compute-id", "os"))
	b.compare("the same again", 0, runs, func(int) sample { return pull(b.us, ours, first) },
		rival{name: "cfsctl", run: func(int) sample { return pull(b.them, theirs, first) }}.atMost(0.3))
	b.compare("another version, of which one layer is new", 0, runs, func(k int) sample {
		return pull(b.us, filepath.Join(b.dir, fmt.Sprintf("oci-ours-%d", k)), second)
	}, rival{name: "all of it", run: func(k int) sample {
		s, _ := fresh(b.us, "whole", k)
		return s
	}}.atMost(0.25))
}

// withSync has a program's file system written to the disk after it.
func withSync(c invocation, dir string) invocation {
	c.args = append([]string{"sh", "-c", `dir=$1; shift; "$@" && sync -f "$dir"`, "sh", dir}, c.args...)
	return c
}

// makeLayout makes an OCI layout. Each layer depends on nothing but its seed.
func makeLayout(t *testing.T, dir string, seeds []uint64) {
	t.Helper()
	blobs := filepath.Join(dir, "blobs/sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int64  `json:"size"`
	}
	const prefix = "application/vnd.oci.image."
	write := func(kind string, content any) descriptor {
		text, err := json.Marshal(content)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(text)
		d := descriptor{prefix + kind, "sha256:" + hex.EncodeToString(sum[:]), int64(len(text))}
		if err := os.WriteFile(filepath.Join(blobs, hex.EncodeToString(sum[:])), text, 0o644); err != nil {
			t.Fatal(err)
		}
		return d
	}
	var ids []string
	var layers []descriptor
	for _, seed := range seeds {
		var out bytes.Buffer
		plain, packed := sha256.New(), sha256.New()
		z := gzip.NewWriter(io.MultiWriter(&out, packed))
		writeLayer(t, io.MultiWriter(z, plain), seed)
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		sum := func(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }
		ids = append(ids, sum(plain))
		layers = append(layers, descriptor{prefix + "layer.v1.tar+gzip", sum(packed), int64(out.Len())})
		if err := os.WriteFile(filepath.Join(blobs, strings.TrimPrefix(sum(packed), "sha256:")), out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	config := write("config.v1+json", map[string]any{"architecture": "amd64", "os": "linux",
		"config": map[string]any{}, "rootfs": map[string]any{"type": "layers", "diff_ids": ids}})
	manifest := write("manifest.v1+json", map[string]any{"schemaVersion": 2, "mediaType": prefix + "manifest.v1+json",
		"config": config, "layers": layers})
	for name, content := range map[string]any{
		"index.json": map[string]any{"schemaVersion": 2, "manifests": []any{manifest}},
		"oci-layout": map[string]any{"imageLayoutVersion": "1.0.0"},
	} {
		text, err := json.Marshal(content)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// writeLayer writes a sixth of the image: most files are small, a few have most of the bytes.
func writeLayer(t *testing.T, w io.Writer, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 17))
	archive := tar.NewWriter(w)
	put := func(name string, kind byte, content []byte) {
		h := &tar.Header{Name: name, Typeflag: kind, Mode: 0o755, Size: int64(len(content))}
		err := archive.WriteHeader(h)
		if err == nil {
			_, err = archive.Write(content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	put("usr/", tar.TypeDir, nil)
	put(fmt.Sprintf("usr/layer%d/", seed), tar.TypeDir, nil)
	const files, bytes = 8500 / 6, 250e6 / 6
	var sizes [files]float64
	sum := 0.0
	for k := range sizes {
		sizes[k] = math.Exp(8 + 2*random.NormFloat64())
		sizes[k] = min(sizes[k], 8e6)
		sum += sizes[k]
	}
	for k, size := range sizes {
		content := make([]byte, int(size*bytes/sum))
		for k := range content {
			content[k] = byte(random.Uint32() & 15) // half of it is compressed away
		}
		if k%50 == 0 {
			put(fmt.Sprintf("usr/layer%d/%02d/", seed, k/50), tar.TypeDir, nil)
		}
		put(fmt.Sprintf("usr/layer%d/%02d/file%d", seed, k/50, k), tar.TypeReg, content)
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
}
