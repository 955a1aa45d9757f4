package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/oci/tardiff"
)

// An oci-delta artifact is the difference between two images, see https://github.com/containers/oci-delta. An annotation names the config
// of the old one. Its blobs are manifest and config of the new one as they are, and of each layer that the old one does not have either
// the layer itself, or its difference to the files of the old one, see repo/oci/tardiff.
const (
	typeDelta   = "application/vnd.io.github.containers.oci-delta.v1"
	typeTarDiff = "application/vnd.tar-diff"

	deltaFrom     = "io.github.containers.delta.source-config" // of the artifact: the digest of the old config
	deltaContent  = "io.github.containers.delta.content"       // of a blob: one of the following
	deltaManifest = "image-manifest"
	deltaConfig   = "image-config"
	deltaLayer    = "image-layer"
	deltaTo       = "io.github.containers.delta.to" // of a layer: the digest of the new image's blob
)

// delta is what a new image is made of.
type delta struct {
	p        *pull
	manifest []byte
	digest   Digest // of the manifest
	config   Descriptor
	layers   map[Digest]Descriptor // by the digests of the new image's layers
	from     Digest                // config of the old image

	once sync.Once
	old  *fstree.Tree
	err  error // why there is none
}

// describeDelta goes on with the image that a delta leads to. What the artifact says is linked to it by digests.
func (p *pull) describeDelta(ctx context.Context, artifact *Image) (*Image, error) {
	d := &delta{p: p, layers: map[Digest]Descriptor{}}
	image, err := d.describe(ctx, artifact.Manifest)
	if err != nil {
		return nil, fmt.Errorf("delta %s: %w", artifact.Digest, err)
	}
	return image, nil
}

func (d *delta) describe(ctx context.Context, m Manifest) (*Image, error) {
	var err error
	if d.from, err = ParseDigest(m.Annotations[deltaFrom]); err != nil {
		return nil, fmt.Errorf("annotation %s: %w", deltaFrom, err)
	}
	var manifest Descriptor
	for _, blob := range m.Layers {
		switch blob.Annotations[deltaContent] {
		case deltaManifest:
			manifest = blob
		case deltaConfig:
			d.config = blob
		case deltaLayer:
			to := blob.Annotations[deltaTo]
			if to == "" {
				continue // for nobody
			}
			layer, err := ParseDigest(to)
			if err != nil {
				return nil, fmt.Errorf("blob %s: annotation %s: %w", blob.Digest, deltaTo, err)
			}
			d.layers[layer] = blob
		}
	}
	if manifest.Digest == "" || d.config.Digest == "" {
		return nil, errors.New("manifest or config of the new image are not in it")
	}
	in := d.p.fetch(ctx, manifest)
	defer in.Close()
	if d.manifest, err = readJSON(in); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", manifest.Digest, err)
	}
	d.digest = manifest.Digest
	d.p.delta = d
	image, err := d.p.describeDigest(ctx, d.digest)
	if err != nil {
		return nil, err
	}
	if !image.Manifest.IsImage() {
		return nil, ErrNotImage
	}
	known := map[Digest]bool{}
	for _, l := range image.Manifest.Layers {
		known[l.Digest] = true
	}
	for to := range d.layers {
		if !known[to] {
			return nil, fmt.Errorf("layer %s is not one of the new image", to)
		}
	}
	return image, d.needsOld(image)
}

// needsOld is an error if the old image is not there, and neither is everything that is to be made of it.
func (d *delta) needsOld(image *Image) error {
	_, err := d.p.r.StreamObject(configStream + string(d.from))
	if !errors.Is(err, repo.ErrNotFound) {
		return err
	}
	for _, id := range image.layerIDs() {
		stream, err := present(d.p.r, id, LayerContent)
		if err != nil {
			return err
		}
		if stream.IsZero() {
			return fmt.Errorf("it is to the image with config %s, which is not in the repository: pull that first", d.from)
		}
	}
	return nil
}

// Manifest returns the manifest of the new image.
func (d *delta) Manifest(digest Digest) ([]byte, error) {
	if digest != d.digest {
		return nil, Permanent(fmt.Errorf("manifest %s: %w", digest, repo.ErrNotFound))
	}
	return d.manifest, nil
}

// origin returns the blob of the delta from which the config or a layer of the new image comes: that itself, or a difference.
func (d *delta) origin(blob Descriptor) (Descriptor, error) {
	if blob.Digest == d.config.Digest {
		return d.config, nil
	}
	from, ok := d.layers[blob.Digest]
	if !ok {
		return from, errors.New("it is not in the delta, since the old image has it, and not in the repository")
	}
	return from, nil
}

// ErrDifference tells that a layer that is made here cannot be kept as it was compressed.
var ErrDifference = errors.New("the delta has not the layer as it was compressed, which was to be kept: pull the image itself, or keep no blobs")

// keeps is an error if a layer of the new image cannot be kept as it came.
func (d *delta) keeps(blob Descriptor) error {
	if from, ok := d.layers[blob.Digest]; !ok || from.Digest != blob.Digest {
		return ErrDifference
	}
	return nil
}

// archive makes a layer of its difference to the old image. Who has called end reads from the difference alone.
func (d *delta) archive(diff io.Reader) (archive io.Reader, end func()) {
	out, in := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		in.CloseWithError(tardiff.Apply(in, diff, d.open, d.p.o.Limits.Layer))
	}()
	return out, func() {
		out.Close()
		<-done
	}
}

// readOld makes the tree of the old image, as its layers have it.
func (d *delta) readOld(ctx context.Context) error {
	d.once.Do(func() {
		var image *Image
		if image, d.err = OpenConfig(d.p.r, d.from); d.err == nil {
			if d.old, d.err = image.Tree(ctx, d.p.r, d.p.i, d.p.o.Limits); d.err == nil {
				d.err = d.p.i.Checkpoint() // files with holes
			}
		}
		if d.err != nil {
			d.err = fmt.Errorf("image with config %s: %w", d.from, d.err)
		}
	})
	return d.err
}

// open opens a file of the old image.
func (d *delta) open(path string) (tardiff.File, error) {
	inode := d.old.Lookup(path)
	if inode == nil {
		return nil, fmt.Errorf("the old image has no such file: %w", repo.ErrNotFound)
	}
	switch c := inode.Content.(type) {
	case fstree.Inline:
		return inlineFile{bytes.NewReader(c)}, nil
	case *fstree.Object:
		f, err := d.p.r.OpenVerified(c.Digest)
		if err != nil {
			return nil, err
		}
		return objectFile{f, int64(c.Size)}, nil
	}
	return nil, errors.New("not a regular file in the old image")
}

type inlineFile struct{ *bytes.Reader }

func (inlineFile) Close() error { return nil }

type objectFile struct {
	*os.File
	size int64
}

func (f objectFile) Size() int64 { return f.size }
