package transport_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	godigest "github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/transports/alltransports"
	containers "go.podman.io/image/v5/types"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// save writes an image with the writers of the library.
func save(t testing.TB, to string, image v1.Image) {
	t.Helper()
	ref, err := alltransports.ParseImageName(to)
	if err != nil {
		t.Fatal(err)
	}
	out, err := ref.NewImageDestination(ctx, &containers.SystemContext{})
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	blobs := blobsOf(t, image)
	for k := range blobs {
		b := blobs[(k+1)%len(blobs)] // the config comes last
		info := containers.BlobInfo{Digest: godigest.Digest(b.digest), Size: int64(len(b.content))}
		if _, err := out.PutBlob(ctx, bytes.NewReader(b.content), info, none.NoCache, k == len(blobs)-1); err != nil {
			t.Fatalf("%s: %v", to, err)
		}
	}
	m, err := image.RawManifest()
	if err == nil {
		err = out.PutManifest(ctx, m, nil)
	}
	if err == nil {
		err = out.Commit(ctx, saved{ref, m})
	}
	if err != nil {
		t.Fatalf("%s: %v", to, err)
	}
}

// saved is the image that is written, as Commit wants it.
type saved struct {
	ref      containers.ImageReference
	manifest []byte
}

func (s saved) Reference() containers.ImageReference { return s.ref }
func (s saved) Manifest(context.Context) ([]byte, string, error) {
	return s.manifest, string(types.OCIManifestSchema1), nil
}
func (s saved) Signatures(context.Context) ([][]byte, error) { return nil, nil }

// saveAll writes an image with every transport that is no registry, and returns the names.
func saveAll(t testing.TB, image v1.Image) []string {
	t.Helper()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	storage := "containers-storage:[vfs@" + in("graph") + "+" + in("run") + "]localhost/os:1"
	names := []string{"oci:" + in("layout") + ":1", "oci-archive:" + in("archive.tar") + ":1", "dir:" + in("dir"), storage}
	for _, name := range names {
		save(t, name, image)
	}
	archive := "docker-archive:" + in("docker.tar") + ":localhost/os:1"
	save(t, archive, uncompressed(t, image))
	content, err := os.ReadFile(in("archive.tar"))
	if err != nil {
		t.Fatal(err)
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(content)
	w.Close()
	write(t, in("archive.tar.gz"), z.String(), 0o644)
	e, _ := zstd.NewWriter(nil)
	write(t, in("archive.tar.zst"), string(e.EncodeAll(content, nil)), 0o644)
	return append(names, archive, "oci-archive:"+in("archive.tar.gz")+":1", "oci-archive:"+in("archive.tar.zst")+":1")
}

// uncompressed is an image with the same layers, uncompressed.
func uncompressed(t testing.TB, image v1.Image) v1.Image {
	t.Helper()
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var archives [][]byte
	for _, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, b)
	}
	return dockerImageOf(t, archives...)
}

// An image is the same from every transport, and nothing is left of what was unpacked.
func TestTransports(t *testing.T) {
	image := imageOf(t, "amd64", layer(51, 5), layer(52, 5))
	scratch := t.TempDir()
	var want fsverity.Digest
	for _, name := range saveAll(t, image) {
		result, err := pull(t, newRepo(t), name, transport.Options{Scratch: scratch}, oci.PullOptions{Tag: "a"})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if want.IsZero() {
			want = digestOf(t, result)
		}
		if got := digestOf(t, result); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
	if left, _ := os.ReadDir(scratch); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestNames(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"os":                                  "want TRANSPORT:REFERENCE",
		"ostree:x":                            "want TRANSPORT:REFERENCE",
		"docker:os":                           "//",
		"docker://UPPER/os":                   "lowercase",
		"oci:" + dir + "/nothing":             "no such file",
		"oci-archive:" + dir + "/nothing.tar": "nothing.tar",
		"docker-archive:" + dir + "/nothing":  "no such file",
		"dir:" + dir:                          "no such file",
		"containers-storage:[vfs@" + dir + "/g+" + dir + "/r]os:1": "skopeo copy",
	} {
		_, err := pull(t, newRepo(t), name, transport.Options{}, oci.PullOptions{})
		if !contains(err, text) {
			t.Errorf("%s: %v, want %q", name, err, text)
		}
	}
}

// The program of the initramfs, and whoever reads layouts only, has nothing to do with networks.
func TestWhoLinksThis(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "github.com/composefs-boot/composefs-boot/cmd/composefs-setup-root",
		"github.com/composefs-boot/composefs-boot/repo/oci").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range strings.Fields(string(out)) {
		if p == "net/http" || strings.HasPrefix(p, "go.podman.io/") || strings.HasSuffix(p, "/transport") {
			t.Errorf("%s is linked", p)
		}
	}
}
