package oci

import (
	"fmt"
	"hash"
	"io"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// blobKey is the beginning of the manifest's named references to the blobs of layers that were kept as they came, compressed. Unlike
// others they lead to an object that is no stream; garbage collection, of composefs-rs as well, keeps it like one.
const blobKey = "blob:"

// keeper stores a blob while it is read.
type keeper struct {
	p    *pull
	blob Descriptor
	hash hash.Hash
	in   *io.PipeWriter
	done chan struct{}
	at   fsverity.Digest
	err  error
}

// keeper begins to keep the blob of a layer, and returns nil if it is not to be kept: an archive that is not compressed can be had
// again without that.
func (p *pull) keeper(blob Descriptor, id Digest) *keeper {
	if !p.o.KeepBlobs || blob.Digest == id {
		return nil
	}
	out, in := io.Pipe()
	k := &keeper{p: p, blob: blob, hash: blob.Digest.newHash(), in: in, done: make(chan struct{})}
	go func() {
		defer close(k.done)
		k.at, k.err = p.i.Put(io.LimitReader(out, blob.Size+1), blob.Size)
		io.Copy(io.Discard, out)
	}()
	return k
}

// read returns what reads the blob for the layer.
func (k *keeper) read(blob io.Reader) io.Reader {
	if k == nil {
		return blob
	}
	return io.TeeReader(blob, io.MultiWriter(k.in, k.hash))
}

// end ends it after the blob was read, with an error or without one. A source may give the layer otherwise than the manifest
// describes it, uncompressed: then it is not what was to be kept.
func (k *keeper) end(done *split, err error) {
	if k == nil {
		return
	}
	k.in.CloseWithError(err)
	<-k.done
	if err != nil || k.err != nil || k.blob.Digest.check(k.hash) != nil {
		return
	}
	done.files++
	k.p.mu.Lock()
	defer k.p.mu.Unlock()
	k.p.blobs[k.blob.Digest] = k.at
}

// findBlobs finds the blobs that are to be kept, and are with other images.
func (p *pull) findBlobs(image *Image) error {
	if !p.o.KeepBlobs || p.repair || !image.Manifest.IsImage() {
		return nil
	}
	wanted := map[Digest]bool{}
	for _, l := range image.Manifest.Layers {
		if _, ok := image.Blobs[l.Digest]; !ok {
			wanted[l.Digest] = true
		}
	}
	names, err := p.r.Streams()
	if err != nil || len(wanted) == 0 {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, manifestStream) {
			continue
		}
		at, err := p.r.StreamObject(name)
		if err != nil {
			continue // one that is not sound is for Repair
		}
		s, err := p.r.OpenStream(at, ManifestContent)
		if err != nil {
			continue
		}
		for _, ref := range s.Named {
			if d, ok := strings.CutPrefix(ref.Name, blobKey); ok && wanted[Digest(d)] {
				image.Blobs[Digest(d)] = ref.Stream
			}
		}
		s.Close()
	}
	return nil
}

// lacksBlob reports whether the blob of a layer is to be kept, and is not. A repair has found that out already.
func (p *pull) lacksBlob(image *Image, blob Descriptor, id Digest) (bool, error) {
	if !p.o.KeepBlobs || p.repair || !image.Manifest.IsImage() || blob.Digest == id {
		return false, nil
	}
	if at, ok := image.Blobs[blob.Digest]; ok {
		if sound, err := p.i.Has(at); sound || err != nil {
			return false, err
		}
	}
	if p.delta != nil {
		if err := p.delta.keeps(blob); err != nil {
			return false, fmt.Errorf("layer %s: %w", blob.Digest, err)
		}
	}
	return true, nil
}

// blobRefs returns the named references to the blobs that are kept.
func (i *Image) blobRefs() []splitstream.NamedRef {
	var refs []splitstream.NamedRef
	for _, l := range i.Manifest.Layers {
		if at, ok := i.Blobs[l.Digest]; ok {
			refs = append(refs, splitstream.NamedRef{Name: blobKey + string(l.Digest), Stream: at})
		}
	}
	return refs
}

// blob checks a blob that was kept.
func (c *checker) blob(at fsverity.Digest, d Digest) error {
	f, err := c.r.OpenVerified(at)
	if err != nil {
		return err
	}
	defer f.Close()
	if c.o.MetadataOnly {
		return nil
	}
	h := d.newHash()
	if _, err := io.Copy(h, f); err != nil {
		return fmt.Errorf("object %v: %w", at, err)
	}
	return d.check(h)
}
