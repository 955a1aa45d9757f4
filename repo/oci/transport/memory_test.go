package transport_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// hugeLayer is an archive of 4 GiB that is never anywhere as a whole: many times the same file, which is one object.
type hugeLayer struct {
	parts  [][]byte // gzip members; the last one ends the archive
	diffID string
	digest string
	size   int64
}

func newHugeLayer(t *testing.T) *hugeLayer {
	const files, fileSize = 64, 64 << 20
	zip := func(b []byte) []byte {
		var out bytes.Buffer
		z, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed)
		z.Write(b)
		z.Close()
		return out.Bytes()
	}
	content := bytes.Repeat([]byte("0123456789abcdef"), fileSize/16)
	zipped := zip(content)
	l := &hugeLayer{}
	plain, packed := sha256.New(), sha256.New()
	add := func(b, z []byte) {
		plain.Write(b)
		packed.Write(z)
		l.parts = append(l.parts, z)
		l.size += int64(len(z))
	}
	for k := range files {
		var head bytes.Buffer
		if err := tar.NewWriter(&head).WriteHeader(&tar.Header{Name: fmt.Sprintf("usr-%d", k), Mode: 0o644, Size: fileSize}); err != nil {
			t.Fatal(err)
		}
		add(head.Bytes(), zip(head.Bytes()))
		add(content, zipped)
	}
	add(make([]byte, 1024), zip(make([]byte, 1024)))
	l.diffID = "sha256:" + hex.EncodeToString(plain.Sum(nil))
	l.digest = "sha256:" + hex.EncodeToString(packed.Sum(nil))
	return l
}

func (l *hugeLayer) open() io.Reader {
	var readers []io.Reader
	for _, p := range l.parts {
		readers = append(readers, bytes.NewReader(p))
	}
	return io.MultiReader(readers...)
}

// The memory of a pull does not grow with the layer.
func TestHugeLayer(t *testing.T) {
	l := newHugeLayer(t)
	small := layer(61, 20)
	config, err := json.Marshal(map[string]any{"os": "linux", "architecture": "amd64",
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{string(oci.DigestOf(small)), l.diffID}}})
	if err != nil {
		t.Fatal(err)
	}
	descriptor := func(mediaType, digest string, size int64) map[string]any {
		return map[string]any{"mediaType": mediaType, "digest": digest, "size": size}
	}
	const gz = "application/vnd.oci.image.layer.v1.tar+gzip"
	m, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": descriptor("application/vnd.oci.image.config.v1+json", string(oci.DigestOf(config)), int64(len(config))),
		"layers": []any{descriptor(gz, string(oci.DigestOf(small)), int64(len(small))), descriptor(gz, l.digest, l.size)}})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/v2/":
		case strings.HasSuffix(r.URL.Path, "/manifests/1"):
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			w.Write(m)
		case strings.HasSuffix(r.URL.Path, string(oci.DigestOf(config))):
			w.Write(config)
		case strings.HasSuffix(r.URL.Path, string(oci.DigestOf(small))):
			w.Write(small)
		case strings.HasSuffix(r.URL.Path, l.digest):
			io.Copy(w, l.open())
		default:
			http.NotFound(w, r)
		}
	}))
	defer s.Close()
	r := newRepo(t)
	cmd := alone("docker://"+s.Listener.Addr().String()+"/os:1", r)
	out, err := cmd.CombinedOutput()
	var memory int64
	if _, scanErr := fmt.Sscanf(string(out), "VmHWM: %d kB", &memory); err != nil || scanErr != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%d MiB of memory", memory>>10)
	if memory > 150<<10 {
		t.Errorf("%d MiB of memory", memory>>10)
	}
	report, err := r.Fsck(ctx, repo.FsckOptions{})
	if err != nil || !report.OK() {
		t.Errorf("%v, %v", report.Findings, err)
	}
}
