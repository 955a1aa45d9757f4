package oci_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// newShortLived returns a function that returns a repository, another one from time to time. It is in memory, where that is to be had: a
// disk would have its share of every execution, and fill up.
func newShortLived(f *testing.F) func(testing.TB) *repo.Repo {
	dir, err := os.MkdirTemp("/dev/shm", "fuzz-")
	if err != nil {
		dir = f.TempDir()
	}
	f.Cleanup(func() { os.RemoveAll(dir) })
	var r *repo.Repo
	uses := 0
	return func(t testing.TB) *repo.Repo {
		if uses++; r != nil && uses%1000 != 0 {
			return r
		}
		path := filepath.Join(dir, "repo")
		if r != nil {
			r.Close()
		}
		err := os.RemoveAll(path)
		if err == nil {
			_, err = repo.Init(path, repo.Config{Algorithm: fsverity.SHA256, Format: erofs.V1, Insecure: true})
		}
		if err == nil {
			r, err = repo.Open(path, repo.Options{})
		}
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
}

// Whatever a layer is: if it is taken, it comes back bit for bit, and its tree, if it has one, makes an image that reads back.
func FuzzLayer(f *testing.F) {
	for _, c := range corpus {
		if len(c.layer) < 1<<14 {
			f.Add(c.layer)
		}
	}
	fresh := newShortLived(f)
	limits := oci.Limits{Layer: 1 << 20}
	f.Fuzz(func(t *testing.T, layer []byte) {
		r := fresh(t)
		content, err := oci.Decompress(layer, 1<<20)
		if err != nil {
			return
		}
		id := oci.DigestOf(content)
		if _, err := oci.ImportLayer(ctx, r, bytes.NewReader(layer), id, limits, repo.LockOptions{}); err != nil {
			if strings.Contains(err.Error(), "the content has digest") {
				t.Fatal(err)
			}
			return
		}
		var out bytes.Buffer
		if err := oci.WriteLayer(&out, r, id); err != nil || !bytes.Equal(out.Bytes(), content) {
			t.Fatalf("%d bytes of %d come back: %v", out.Len(), len(content), err)
		}
		tree, err := oci.TreeOf(ctx, r, []oci.Digest{id, id}, scan.Digests(fsverity.SHA256), limits)
		if err != nil {
			return
		}
		tree.CountLinks()
		var image bytes.Buffer
		if err := erofs.Write(&image, tree, erofs.V1); err != nil {
			return
		}
		again, _, err := erofs.Read(bytes.NewReader(image.Bytes()), int64(image.Len()))
		if err != nil {
			t.Fatal(err)
		}
		if err := fstree.Diff(tree, again, func(d fstree.Difference) error { return fmt.Errorf("%v", d) }); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzManifest: a manifest is an error or an image, and the same one every time.
func FuzzManifest(f *testing.F) {
	m := newSource(nil, archiveOf(dirOf("usr")))
	config := m.blobs[configOf(m)]
	f.Add(m.manifest, config)
	m.index(2, "amd64")
	f.Add(m.manifest, config)
	layers := m.blobs
	fresh := newShortLived(f)
	f.Fuzz(func(t *testing.T, manifest, config []byte) {
		r := fresh(t)
		m := &memory{manifest: manifest, blobs: map[oci.Digest][]byte{}}
		for d, b := range layers {
			m.blobs[d] = b
		}
		m.add(config)
		result, err := oci.Pull(ctx, r, m, oci.PullOptions{Tag: "a"})
		if err != nil {
			return
		}
		again, err := oci.Open(r, "a")
		if err != nil || again.Digest != result.Image.Digest {
			t.Fatal(again, err)
		}
	})
}
