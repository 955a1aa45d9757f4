package oci

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
)

// PushOptions says how an image is given away.
type PushOptions struct {
	Exact    bool  // it is an error if a layer cannot be had with its digest
	Retry    Retry // of blobs, which come again from the beginning
	Progress *Progress
	Lock     repo.LockOptions
}

// PushResult is what was given away.
type PushResult struct {
	Digest    Digest // of the manifest: another one than the image's if a layer was compressed anew
	Layers    []PushedLayer
	Bytes     int64    // that the target did not have
	Referrers []Digest // artifacts that went along
	Left      []Digest // artifacts that did not go along, since they, or what they refer to, would have another digest
}

// PushedLayer is a layer as it was given away.
type PushedLayer struct {
	Was  Descriptor // as the manifest of the repository has it
	Blob Descriptor // as it was given
	How  string     // HowPresent, HowKept, HowRebuilt, HowRemade, or the name of the compressor that gave the same bytes
}

// Where the bytes of a layer come from, unless from a compressor.
const (
	HowPresent = "present" // the target has it already
	HowKept    = "kept"    // see PullOptions.KeepBlobs
	HowRebuilt = "rebuilt" // it is not compressed
	HowRemade  = "remade"  // compressed anew: other bytes, another digest
)

// ErrRemade tells that a layer can only be given with another digest.
var ErrRemade = errors.New("no known compressor gives the bytes that it had: keep them when the image is pulled, or give it with another digest")

// Push gives an image of the repository to a target, and the artifacts that refer to it. All that is given is verified. The manifest
// comes when all that it names is there.
func Push(ctx context.Context, r *repo.Repo, image *Image, t Target, o PushOptions) (PushResult, error) {
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	release, err := r.LockShared(ctx, o.Lock)
	if err != nil {
		return PushResult{}, err
	}
	defer release()
	p := &push{r: r, target: t, o: o, order: slices.Clone(compressors), given: map[Digest]error{}}
	result, err := p.image(ctx, image, KnownByName)
	if err != nil {
		return result, err
	}
	if result.Digest != image.Digest {
		result.Left, err = Referrers(r, image.Digest)
		return result, err
	}
	err = p.referrers(ctx, image.Digest, &result)
	result.Bytes = p.bytes
	return result, err
}

type push struct {
	r      *repo.Repo
	target Target
	o      PushOptions
	order  []compressor // the one that fitted last is tried first: the layers of an image are often made by one program
	bytes  int64
	given  map[Digest]error // manifests of indexes: nil, or why they could not be given
}

// referrers gives the artifacts that refer to an image, and those that refer to them.
func (p *push) referrers(ctx context.Context, image Digest, result *PushResult) error {
	seen := map[Digest]bool{}
	for subjects := []Digest{image}; len(subjects) > 0; subjects = subjects[1:] {
		list, err := Referrers(p.r, subjects[0])
		if err != nil {
			return err
		}
		for _, d := range list {
			if seen[d] {
				continue
			}
			seen[d] = true
			given, err := p.artifact(ctx, d, KnownByDigest)
			if errors.Is(err, ErrRemade) && !p.o.Exact {
				result.Left = append(result.Left, d)
				continue
			}
			if err != nil {
				return fmt.Errorf("referrer %s: %w", d, err)
			}
			result.Referrers = append(result.Referrers, d)
			subjects = append(subjects, given...)
		}
	}
	return nil
}

// artifact gives an artifact with its digest, of an index the manifests first. It returns what it has given, to all of which others may
// refer.
func (p *push) artifact(ctx context.Context, d Digest, as Known) ([]Digest, error) {
	image, err := open(p.r, d)
	if !errors.Is(err, ErrIndex) {
		if err == nil {
			_, err = p.image(ctx, image, as)
		}
		return []Digest{d}, err
	}
	x, err := OpenIndex(p.r, d)
	if err != nil {
		return nil, err
	}
	given := []Digest{d}
	for _, m := range x.Manifests {
		err, tried := p.given[m.Digest]
		var more []Digest
		if !tried {
			more, err = p.artifact(ctx, m.Digest, KnownByIndex)
			p.given[m.Digest] = err
		}
		if err != nil {
			return nil, fmt.Errorf("manifest %s: %w", m.Digest, err)
		}
		given = append(given, more...)
	}
	p.bytes += int64(len(x.JSON))
	named := Descriptor{MediaType: x.MediaType, Digest: d, Size: int64(len(x.JSON)), ArtifactType: x.ArtifactType}
	return given, p.target.PutManifest(ctx, named, x.JSON, as)
}

// image gives one image or artifact.
func (p *push) image(ctx context.Context, image *Image, as Known) (PushResult, error) {
	result := PushResult{Digest: image.Digest}
	for _, l := range image.Manifest.Layers {
		p.o.Progress.Total.Add(l.Size)
	}
	done := map[Digest]PushedLayer{}
	for k, id := range image.layerIDs() {
		l, ok := done[id]
		if !ok {
			var err error
			// Artifacts are known by their digests alone.
			if l, err = p.layer(ctx, image, k, id, p.o.Exact || as != KnownByName); err != nil {
				return result, fmt.Errorf("layer %s: %w", image.Manifest.Layers[k].Digest, err)
			}
			done[id] = l
		}
		p.o.Progress.Layers.Add(1)
		result.Layers = append(result.Layers, l)
	}
	config := image.Manifest.Config
	config.Size = int64(len(image.ConfigJSON))
	have, err := p.target.Has(ctx, config)
	if !have && err == nil {
		err = p.give(ctx, config, func() io.ReadCloser { return io.NopCloser(bytes.NewReader(image.ConfigJSON)) })
	}
	if err != nil {
		return result, fmt.Errorf("config %s: %w", config.Digest, err)
	}
	manifest, err := image.manifestWith(result.Layers)
	if err != nil {
		return result, fmt.Errorf("manifest %s: %w", image.Digest, err)
	}
	if image.Digest.verify(manifest) != nil {
		result.Digest = DigestOf(manifest)
	}
	d := Descriptor{MediaType: image.Manifest.mediaType(), Digest: result.Digest, Size: int64(len(manifest))}
	if image.Manifest.IsImage() {
		if image.Config.OS != "" && image.Config.Architecture != "" {
			d.Platform = &image.Config.Platform
		}
	} else {
		d.ArtifactType = image.Manifest.kind()
	}
	p.bytes += d.Size
	result.Bytes = p.bytes
	return result, p.target.PutManifest(ctx, d, manifest, as)
}

// layer gives a layer in the best way that there is.
func (p *push) layer(ctx context.Context, image *Image, k int, id Digest, exact bool) (PushedLayer, error) {
	blob := image.Manifest.Layers[k]
	l := PushedLayer{Was: blob, Blob: blob}
	if have, err := p.target.Has(ctx, blob); have || err != nil {
		l.How = HowPresent
		return l, err
	}
	if at, ok := image.Blobs[blob.Digest]; ok {
		if f, err := p.r.OpenVerified(at); err == nil { // otherwise perhaps it can be made
			defer f.Close()
			l.How = HowKept
			return l, p.give(ctx, blob, func() io.ReadCloser { return io.NopCloser(io.NewSectionReader(f, 0, blob.Size)) })
		}
	}
	archive := func(w io.Writer) error {
		s, err := p.r.OpenStream(image.Layers[k], image.layerContent())
		if err != nil {
			return err
		}
		defer s.Close()
		return s.WriteTo(writerUntil{ctx, w}, p.r)
	}
	if blob.Digest == id {
		l.How = HowRebuilt
		return l, p.give(ctx, blob, func() io.ReadCloser { return piped(archive) })
	}
	for _, c := range likely(blob.MediaType, p.order) {
		fits, err := c.makes(blob, archive)
		if err != nil {
			return l, err
		}
		if fits {
			l.How = c.name
			p.order = slices.DeleteFunc(p.order, func(have compressor) bool { return have.name == c.name })
			p.order = slices.Insert(p.order, 0, c)
			return l, p.give(ctx, blob, func() io.ReadCloser { return c.compressed(archive) })
		}
	}
	if exact {
		return l, ErrRemade
	}
	l.How = HowRemade
	open := func() io.ReadCloser { return piped(archive) }
	if ways := likely(blob.MediaType, compressors); len(ways) > 0 {
		open = func() io.ReadCloser { return ways[0].compressed(archive) }
	}
	var err error
	if l.Blob, err = describe(blob, open()); err == nil {
		var have bool
		if have, err = p.target.Has(ctx, l.Blob); !have && err == nil {
			err = p.give(ctx, l.Blob, open)
		}
	}
	return l, err
}

// describe returns the descriptor that a layer gets with another content.
func describe(d Descriptor, content io.ReadCloser) (Descriptor, error) {
	defer content.Close()
	h := sha256.New()
	n, err := io.Copy(h, content)
	d.Digest, d.Size = Digest(fmt.Sprintf("sha256:%x", h.Sum(nil))), n
	return d, err
}

// give gives a blob that the target has not. If the connection breaks it comes again, but not if it is not what it should be.
func (p *push) give(ctx context.Context, d Descriptor, open func() io.ReadCloser) error {
	err := p.o.Retry.Do(ctx, func() error {
		content := open()
		defer content.Close()
		proven := &proven{r: readerUntil{ctx, content}, d: d, h: d.Digest.newHash(), progress: p.o.Progress}
		err := p.target.PutBlob(ctx, d, proven)
		if err != nil {
			p.o.Progress.Bytes.Add(-proven.n)
		}
		if err != nil && proven.wrong != nil {
			err = Permanent(err)
		}
		return err
	})
	if err == nil {
		p.bytes += d.Size
	}
	return err
}

// proven reads a blob, and ends with an error if it is not what its descriptor says.
type proven struct {
	r        io.Reader
	d        Descriptor
	h        hash.Hash
	n        int64
	wrong    error // why it could not be read
	progress *Progress
}

func (p *proven) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.h.Write(b[:n])
	p.n += int64(n)
	p.progress.Bytes.Add(int64(n))
	if err == io.EOF {
		p.wrong = p.d.Digest.check(p.h)
		if p.wrong == nil && p.n != p.d.Size {
			p.wrong = fmt.Errorf("%d bytes, %d were expected", p.n, p.d.Size)
		}
		return n, cmp.Or(p.wrong, err)
	}
	p.wrong = err
	return n, err
}

// readerUntil and writerUntil end with the context.
type readerUntil struct {
	ctx context.Context
	r   io.Reader
}

func (r readerUntil) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(b)
}

type writerUntil struct {
	ctx context.Context
	w   io.Writer
}

func (w writerUntil) Write(b []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(b)
}

// mediaType is what the manifest is; older ones do not say it themselves.
func (m Manifest) mediaType() string {
	if m.MediaType == "" && m.Config.MediaType == typeDocker {
		return typeDockerImage
	}
	return cmp.Or(m.MediaType, typeOCIManifest)
}

// chunkedPrefix begins annotations of zstd:chunked layers, which tell where in the compressed bytes the files are.
const chunkedPrefix = "io.github.containers.zstd-chunked."

// manifestWith returns the manifest with layers as they were given, and as it is if none is another one.
func (i *Image) manifestWith(layers []PushedLayer) ([]byte, error) {
	if !slices.ContainsFunc(layers, func(l PushedLayer) bool { return l.Blob.Digest != l.Was.Digest }) {
		return i.ManifestJSON, nil
	}
	// What this program does not know stays in it.
	var m map[string]json.RawMessage
	var list []map[string]any
	if err := json.Unmarshal(i.ManifestJSON, &m); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(m["layers"], &list); err != nil {
		return nil, err
	}
	if len(list) != len(layers) {
		return nil, fmt.Errorf("%d layers, %d were given", len(list), len(layers)) // an error of this program
	}
	for k, l := range layers {
		if l.Blob.Digest == l.Was.Digest {
			continue
		}
		list[k]["digest"], list[k]["size"] = l.Blob.Digest, l.Blob.Size
		if annotations, ok := list[k]["annotations"].(map[string]any); ok {
			maps.DeleteFunc(annotations, func(name string, _ any) bool { return strings.HasPrefix(name, chunkedPrefix) })
		}
	}
	var err error
	if m["layers"], err = json.Marshal(list); err != nil {
		return nil, err
	}
	return json.Marshal(m)
}
