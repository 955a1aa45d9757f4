package oci

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// Stored is a repository as a Source: what is sound of its images, even if not all of an image is. Layers are given as they were
// compressed if that was kept, see PullOptions.KeepBlobs, and uncompressed otherwise.
type Stored struct {
	r     *repo.Repo
	image Digest // "": there is no image to begin with

	mu      sync.Mutex
	configs map[Digest]fsverity.Digest // streams
	blobs   map[Digest]fsverity.Digest // kept ones
	layers  map[Digest]layerPlace      // by the digest of the blob
}

type layerPlace struct {
	id     Digest
	stream fsverity.Digest
}

// NewStored makes a source of the images of a repository, opened for one of them if the digest is not "".
func NewStored(r *repo.Repo, image Digest) *Stored {
	return &Stored{r: r, image: image, configs: map[Digest]fsverity.Digest{}, blobs: map[Digest]fsverity.Digest{},
		layers: map[Digest]layerPlace{}}
}

// Manifest returns the manifest of an image, see Source.
func (s *Stored) Manifest(_ context.Context, d Digest) ([]byte, error) {
	if d == "" {
		d = s.image
	}
	at, err := s.r.StreamObject(manifestStream + string(d))
	if err != nil {
		return nil, Permanent(err)
	}
	content, refs, err := readExternal(s.r, at, ManifestContent, d)
	if x, wrong := OpenIndex(s.r, d); err != nil && wrong == nil {
		return x.JSON, nil
	}
	if err != nil {
		return nil, Permanent(fmt.Errorf("manifest: %w", err))
	}
	m, err := parseManifest(content)
	if err != nil {
		return nil, Permanent(fmt.Errorf("manifest %s: %w", d, err))
	}
	i := &Image{Manifest: m}
	if at, ok := find(refs, "config:"+string(m.Config.Digest)); ok {
		s.mu.Lock()
		s.configs[m.Config.Digest] = at
		s.mu.Unlock()
	}
	if m.IsImage() {
		text, configRefs, err := s.config(m.Config.Digest)
		if err == nil {
			i.Config, err = parseConfig(text, len(m.Layers))
		}
		if err != nil {
			return content, nil // then it is not known which layers these are
		}
		refs = append(refs, configRefs...)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, id := range i.layerIDs() {
		if stream, ok := find(refs, string(id)); ok {
			s.layers[m.Layers[k].Digest] = layerPlace{id, stream}
		}
		if blob, ok := find(refs, blobKey+string(m.Layers[k].Digest)); ok {
			s.blobs[m.Layers[k].Digest] = blob
		}
	}
	return content, nil
}

// config reads a config, to which a manifest or its own name leads.
func (s *Stored) config(d Digest) ([]byte, []splitstream.NamedRef, error) {
	s.mu.Lock()
	at, ok := s.configs[d]
	s.mu.Unlock()
	var err error
	if !ok {
		at, err = s.r.StreamObject(configStream + string(d))
	}
	if err != nil {
		return nil, nil, Permanent(err)
	}
	content, refs, err := readExternal(s.r, at, ConfigContent, d)
	if err != nil {
		err = Permanent(fmt.Errorf("config: %w", err))
	}
	return content, refs, err
}

// Blob opens a config or layer, see Source.
func (s *Stored) Blob(_ context.Context, d Descriptor, offset int64) (io.ReadCloser, int64, error) {
	return s.sound(d, offset, nil)
}

// sound takes only layers that are usable, if that is not nil.
func (s *Stored) sound(d Descriptor, offset int64, usable func(id Digest, stream fsverity.Digest) bool) (io.ReadCloser, int64, error) {
	s.mu.Lock()
	kept, isKept := s.blobs[d.Digest]
	place, isLayer := s.layers[d.Digest]
	s.mu.Unlock()
	if isKept {
		if f, err := s.r.OpenVerified(kept); err == nil {
			if _, err = f.Seek(offset, io.SeekStart); err != nil {
				f.Close()
			}
			return f, d.Size, err
		}
	}
	if isLayer && usable != nil && !usable(place.id, place.stream) {
		return nil, 0, Permanent(fmt.Errorf("layer %s: %w", place.id, repo.ErrCorrupt))
	}
	if isLayer {
		stream, err := s.r.OpenStream(place.stream, 0)
		if err != nil {
			return nil, 0, Permanent(fmt.Errorf("layer %s: %w", place.id, err))
		}
		content := piped(func(w io.Writer) error {
			defer stream.Close()
			if err := stream.WriteTo(w, s.r); err != nil {
				return Permanent(fmt.Errorf("layer %s: %w", place.id, err))
			}
			return nil
		})
		_, err = io.CopyN(io.Discard, content, offset)
		return content, int64(stream.Size), err
	}
	content, _, err := s.config(d.Digest)
	if err != nil {
		return nil, 0, err
	}
	return io.NopCloser(bytes.NewReader(content[min(offset, int64(len(content))):])), int64(len(content)), nil
}

// ShareObjects brings the objects of an image's layers from one repository into another of the same algorithm, where they share the data
// on disk if the file system can do that. A pull from the repository, see NewStored, then writes none of them again.
func (i *Image) ShareObjects(ctx context.Context, from, to *repo.Repo, l repo.LockOptions) error {
	if from.Algorithm() != to.Algorithm() {
		return fmt.Errorf("%s has digests of %v, %s of %v: they have no objects in common", from.Path(), from.Algorithm(), to.Path(), to.Algorithm())
	}
	in, err := to.Begin(ctx, l)
	if err != nil {
		return err
	}
	defer in.Abort()
	for k := range i.Layers {
		s, err := from.OpenStream(i.Layers[k], i.layerContent())
		if err != nil {
			return fmt.Errorf("layer %s: %w", i.layerIDs()[k], err)
		}
		objects := s.Objects
		s.Close()
		for _, d := range objects {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := share(from, in, d); err != nil {
				return fmt.Errorf("layer %s: %w", i.layerIDs()[k], err)
			}
		}
	}
	return in.Commit()
}

func share(from *repo.Repo, in *repo.Import, d fsverity.Digest) error {
	if have, err := in.Has(d); have || err != nil {
		return err
	}
	f, err := from.OpenObject(d)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	got, err := in.Put(f, info.Size())
	if err == nil && got != d {
		err = fmt.Errorf("object %v: %w", d, repo.ErrCorrupt)
	}
	return err
}
