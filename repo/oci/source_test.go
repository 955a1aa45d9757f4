package oci_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// memory is a source whose blobs are in memory.
type memory struct {
	manifest []byte
	blobs    map[oci.Digest][]byte
	read     atomic.Int64 // bytes of blobs
	cut      func() int   // after how many bytes a connection breaks; nil: never
}

func (m *memory) Manifest(_ context.Context, d oci.Digest) ([]byte, error) {
	if d == "" {
		return m.manifest, nil
	}
	return m.blobs[d], nil
}

func (m *memory) Blob(_ context.Context, d oci.Descriptor, offset int64) (io.ReadCloser, int64, error) {
	b, ok := m.blobs[d.Digest]
	if !ok {
		return nil, 0, fmt.Errorf("%s: %w", d.Digest, oci.ErrPermanent)
	}
	r := io.Reader(bytes.NewReader(b[offset:]))
	if m.cut != nil {
		r = io.MultiReader(io.LimitReader(r, int64(m.cut())), broken{})
	}
	return io.NopCloser(counting{r, &m.read}), int64(len(b)), nil
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("connection reset") }

type counting struct {
	io.Reader
	n *atomic.Int64
}

func (c counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func (m *memory) add(b []byte) oci.Digest {
	d := oci.DigestOf(b)
	m.blobs[d] = b
	return d
}

// newSource makes an image whose layers are archives, compressed as pack says.
func newSource(pack func(int, []byte) []byte, layers ...[]byte) *memory {
	m := &memory{blobs: map[oci.Digest][]byte{}}
	var ids, descriptors []any
	for k, l := range layers {
		ids = append(ids, oci.DigestOf(l))
		if pack != nil {
			l = pack(k, l)
		}
		descriptors = append(descriptors, map[string]any{
			"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": m.add(l), "size": len(l)})
	}
	m.describe(map[string]any{"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"type": "layers", "diff_ids": ids}}, descriptors)
	return m
}

func (m *memory) describe(config, layers any) {
	c, _ := json.Marshal(config)
	m.manifest, _ = json.Marshal(map[string]any{"schemaVersion": 2, "layers": layers, "config": map[string]any{
		"mediaType": "application/vnd.oci.image.config.v1+json", "digest": m.add(c), "size": len(c)}})
}

// save writes the image as a layout.
func (m *memory) save(t testing.TB, dir string) {
	t.Helper()
	blobs := filepath.Join(dir, "blobs/sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	d := m.add(m.manifest)
	for d, b := range m.blobs {
		if err := os.WriteFile(filepath.Join(blobs, strings.TrimPrefix(string(d), "sha256:")), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	index, _ := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": []any{map[string]any{"digest": d, "size": len(m.manifest),
		"mediaType": "application/vnd.oci.image.manifest.v1+json"}}})
	if err := os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644); err != nil {
		t.Fatal(err)
	}
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	z.Write(b)
	z.Close()
	return out.Bytes()
}

func zstandard(b []byte) []byte {
	z, _ := zstd.NewWriter(nil)
	return z.EncodeAll(b, nil)
}

func skippable(b []byte) []byte {
	n := len(b)
	return append([]byte{0x5a, 0x2a, 0x4d, 0x18, byte(n), byte(n >> 8), byte(n >> 16), 0}, b...)
}

// archiveOf makes an archive of files that archive/tar can write. Those without a type are regular.
func archiveOf(files ...tar.Header) []byte {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range files {
		content := h.Uname // there is no better place for it
		h.Uname = ""
		if h.Typeflag == 0 {
			h.Typeflag, h.Size = tar.TypeReg, int64(len(content))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			panic(err)
		}
		io.WriteString(w, content)
	}
	w.Close()
	return out.Bytes()
}

func file(name, content string) tar.Header { return tar.Header{Name: name, Uname: content} }
func dirOf(name string) tar.Header         { return tar.Header{Name: name, Typeflag: tar.TypeDir} }
func linkTo(name, to string) tar.Header {
	return tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeLink}
}
func symlink(name, to string) tar.Header {
	return tar.Header{Name: name, Linkname: to, Typeflag: tar.TypeSymlink}
}

// bigLayers makes layers with many files of all sizes.
func bigLayers(seed uint64, layers, files int) [][]byte {
	r := rand.New(rand.NewPCG(seed, 7))
	list := make([][]byte, layers)
	for k := range list {
		headers := []tar.Header{dirOf("usr/")}
		for n := range files {
			content := make([]byte, []int{10, 64, 65, 4096, 100_000, 300_000}[r.IntN(6)])
			for k := range content {
				content[k] = byte(r.Uint32() & 0x3f)
			}
			headers = append(headers, file(fmt.Sprintf("usr/d%d/f%d", k, n), string(content)))
		}
		list[k] = archiveOf(headers...)
	}
	return list
}

func newGzip(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }

func newZstd(w io.Writer) io.WriteCloser {
	z, _ := zstd.NewWriter(w)
	return z
}

func sumOf(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// layersOf are the layers that a manifest names.
func layersOf(manifest []byte) (list []oci.Digest) {
	var m oci.Manifest
	json.Unmarshal(manifest, &m)
	for _, l := range m.Layers {
		list = append(list, l.Digest)
	}
	return list
}
