package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// Limits are what is taken from an image at most. Zero values are the defaults.
type Limits struct {
	Layer int64 // bytes of one layer, decompressed; 64 GiB
}

func (l Limits) orDefault() Limits {
	if l.Layer <= 0 {
		l.Layer = 64 << 30
	}
	return l
}

// Progress counts what a pull has done; other goroutines may look at it meanwhile.
type Progress struct {
	Bytes  atomic.Int64 // of blobs, as they came
	Total  atomic.Int64 // bytes of the blobs that are to come
	Layers atomic.Int64 // that are done
}

// PullOptions says what is pulled, and what is made of it.
type PullOptions struct {
	Tag      string         // the name that the image gets; "" for none: garbage collection may remove it
	Platform Platform       // which image of an index; zero: ThisPlatform
	Formats  []erofs.Format // of the composefs images; none: those of the repository
	// Transform makes a tree into one to boot: boot.Transform. If it is not nil, there is a bootable image, too.
	Transform func(*fstree.Tree, fstree.Open) error
	// Expected is the digest of an image to boot that was made otherwise than by default: with Transform, it is looked for among
	// the formats and the extended attributes that are kept, and it is an error if it is not found. Zero: none.
	Expected fsverity.Digest
	// KeepBlobs keeps layers as they come, too, if they are compressed: they are given back with their digests, whoever compressed
	// them. It costs what was downloaded. Once kept, they stay with the image. Of a delta it is an error, ErrDifference, if a layer
	// has to be made.
	KeepBlobs bool
	// Resume keeps the bytes of layers in the repository until the layers are durable: a pull that was killed or lost its network
	// goes on in the middle of a layer, and of several pulls that want the same layer one brings it and the others wait. It is for
	// sources that are far away, and hand out blobs as the manifest describes them.
	Resume   bool
	Limits   Limits
	Retry    Retry
	Progress *Progress
	Lock     repo.LockOptions

	digest Digest // of the manifest that is wanted as it is: a delta is an artifact like others; "": whatever the source was opened for
}

// PullResult is what a pull has brought.
type PullResult struct {
	Image *Image
	Stats PullStats
}

// PullStats counts what was new.
type PullStats struct {
	Layers  int   `json:"layers"`         // of the image
	Present int   `json:"layers_present"` // of them, there already
	Objects int   `json:"objects_new"`
	Reused  int   `json:"objects_present"`
	Bytes   int64 `json:"bytes_new"`    // of new objects
	Inline  int64 `json:"bytes_inline"` // of new layers, in their streams
	Fetched int64 `json:"bytes_fetched"`
}

// checkpoint is how many bytes of new objects are made durable at once, with the layers that are complete.
const checkpoint = 128 << 20

// Pull brings an image into the repository and makes its composefs images. Layers that are there are not read. If the source has the
// difference between two images, an oci-delta artifact, the new one of them is made of the old one, which has to be there. The tag is set
// when everything that it leads to is durable. What an interrupted pull has left is used by the next one.
func Pull(ctx context.Context, r *repo.Repo, source Source, o PullOptions) (PullResult, error) {
	if o.Tag != "" {
		if err := checkTag(o.Tag); err != nil {
			return PullResult{}, err
		}
	}
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	if len(o.Formats) == 0 {
		o.Formats = r.Formats()
	}
	if o.Platform == (Platform{}) {
		o.Platform = ThisPlatform()
	}
	o.Limits = o.Limits.orDefault()
	i, err := r.Begin(ctx, o.Lock)
	if err != nil {
		return PullResult{}, err
	}
	defer i.Abort()
	p := &pull{r: r, i: i, source: source, o: o, blobs: map[Digest]fsverity.Digest{}, again: map[Digest]bool{}}
	image, err := p.run(ctx)
	for _, k := range p.kept {
		k.Close()
	}
	if err != nil {
		return PullResult{}, err
	}
	p.stats.Layers = len(image.Layers)
	p.stats.Fetched = o.Progress.Bytes.Load()
	return PullResult{image, p.stats}, nil
}

type pull struct {
	r      *repo.Repo
	i      *repo.Import
	source Source
	o      PullOptions

	mu      sync.Mutex
	saved   int64            // bytes of new objects at the last checkpoint
	own     repo.ImportStats // of layers' streams
	stats   PullStats
	kept    []*repo.Partial            // of layers that are complete, but not yet durable
	waiting int                        // workers that want a layer which another pull brings
	blobs   map[Digest]fsverity.Digest // that were kept, see PullOptions.KeepBlobs
	again   map[Digest]bool            // layers that are brought though they are there
	repair  bool                       // again is known beforehand
	delta   *delta                     // what the image is made of, if it is one
}

func (p *pull) run(ctx context.Context) (*Image, error) {
	image, err := p.describe(ctx)
	if err != nil {
		return nil, err
	}
	known, err := open(p.r, image.Digest)
	if err == nil {
		image = known // with the composefs images that were made of it
	} else if !lost(err) {
		return nil, err
	}
	// Other images have the same config, perhaps: its name leads to one stream alone, which must lead to all that was made of it.
	if c, err := OpenConfig(p.r, image.ConfigDigest()); err == nil {
		for _, l := range c.Linked {
			if _, ok := image.Find(l.Bootable, l.Format, l.Xattrs); !ok {
				image.link(l)
			}
		}
	}
	lacking, err := p.lacking(image)
	if err != nil {
		return nil, err
	}
	var g *growing
	if len(lacking) > 0 {
		g = p.grow(ctx, image)
		defer g.end()
	}
	if err := p.layers(ctx, image, g); err != nil {
		return nil, err
	}
	g.wait()
	p.count()
	if err := p.images(ctx, image, g, lacking); err != nil {
		p.checkpoint() // the layers are good, and are not brought again
		return nil, err
	}
	return image, p.write(image)
}

// images makes the composefs images that the image lacks, and the one that is to be found.
func (p *pull) images(ctx context.Context, image *Image, g *growing, lacking []LinkedImage) error {
	if g != nil {
		tree, err := g.tree()
		if err == nil {
			err = p.make(image, tree, lacking)
		}
		if err != nil {
			return err
		}
	}
	if p.o.Expected.IsZero() || !image.Manifest.IsImage() {
		return nil
	}
	return p.search(ctx, image)
}

// describe reads the manifest and config of the image.
func (p *pull) describe(ctx context.Context) (*Image, error) {
	return p.describeDigest(ctx, p.o.digest)
}

// describeDigest reads those of an image that something else has named, or of the one of the source.
func (p *pull) describeDigest(ctx context.Context, d Digest) (*Image, error) {
	image := &Image{Blobs: map[Digest]fsverity.Digest{}}
	for depth := 0; ; depth++ {
		var b []byte
		err := p.o.Retry.Do(ctx, func() (err error) {
			b, err = p.manifest(ctx, d)
			return err
		})
		if err != nil {
			return nil, err
		}
		if d != "" {
			if err := d.verify(b); err != nil {
				return nil, fmt.Errorf("manifest: %w", err)
			}
		}
		index, is, err := isIndex(b)
		if err != nil {
			return nil, fmt.Errorf("manifest: %w", err)
		}
		if !is {
			image.ManifestJSON, image.Digest = b, cmp.Or(d, DigestOf(b))
			break
		}
		if depth > 3 {
			return nil, errors.New("index in an index, too deep")
		}
		chosen, err := index.choose(p.o.Platform)
		if err != nil {
			return nil, err
		}
		d = chosen.Digest
	}
	var err error
	if image.Manifest, err = parseManifest(image.ManifestJSON); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", image.Digest, err)
	}
	if image.Manifest.ArtifactType == typeDelta && p.o.digest == "" && p.delta == nil {
		return p.describeDelta(ctx, image)
	}
	config := image.Manifest.Config
	from, err := p.origin(config)
	if err == nil {
		blob := p.fetch(ctx, from)
		defer blob.Close()
		image.ConfigJSON, err = readJSON(blob)
	}
	if err == nil {
		err = config.Digest.verify(image.ConfigJSON)
	}
	if err == nil && image.Manifest.IsImage() {
		image.Config, err = parseConfig(image.ConfigJSON, len(image.Manifest.Layers))
	}
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", config.Digest, err)
	}
	return image, nil
}

func (p *pull) manifest(ctx context.Context, d Digest) ([]byte, error) {
	if p.delta != nil {
		return p.delta.Manifest(d)
	}
	return p.source.Manifest(ctx, d)
}

// origin returns what of the source a blob of the image comes from.
func (p *pull) origin(blob Descriptor) (Descriptor, error) {
	if p.delta != nil {
		return p.delta.origin(blob)
	}
	return blob, nil
}

// fetch opens a blob of the source.
func (p *pull) fetch(ctx context.Context, d Descriptor) *resuming {
	return &resuming{ctx: ctx, source: p.source, blob: d, retry: p.o.Retry, got: func(n int) { p.o.Progress.Bytes.Add(int64(n)) }}
}

// write stores the streams of config and manifest, and sets the tag.
func (p *pull) write(image *Image) error {
	config, err := p.writeConfig(image)
	if err != nil {
		return err
	}
	for d, at := range p.blobs {
		image.Blobs[d] = at
	}
	image.config = config
	if image.manifest, err = writeExternal(p.i, ManifestContent, image.ManifestJSON, image.manifestRefs()); err != nil {
		return err
	}
	named, err := p.r.StreamObject(configStream + string(image.ConfigDigest()))
	moved := err == nil && named != config
	var tags []string
	if p.o.Tag != "" {
		tags = append(tags, TagRef(p.o.Tag))
	}
	if s := image.Manifest.Subject; s != nil {
		tags = append(tags, referrerRef(s.Digest, image.Digest))
	}
	if err := p.i.NameStream(configStream+string(image.ConfigDigest()), config); err != nil {
		return err
	}
	if moved {
		if err := p.leadHere(image); err != nil {
			return err
		}
	}
	if err := p.i.NameStream(manifestStream+string(image.Digest), image.manifest, tags...); err != nil {
		return err
	}
	return p.i.Commit()
}

// writeConfig stores the config.
func (p *pull) writeConfig(image *Image) (fsverity.Digest, error) {
	if !image.Manifest.IsImage() {
		// Most artifacts have the same one, the empty object. Nothing is to be had of it but its content.
		at, err := p.r.StreamObject(configStream + string(image.ConfigDigest()))
		if err == nil {
			_, _, err = readExternal(p.r, at, ConfigContent, image.ConfigDigest())
		}
		if err == nil || !lost(err) {
			return at, err
		}
	}
	ids := image.layerIDs()
	var layers, linked []splitstream.NamedRef
	for k, d := range image.Layers {
		layers = append(layers, splitstream.NamedRef{Name: string(ids[k]), Stream: d})
	}
	for _, l := range image.Linked {
		linked = append(linked, splitstream.NamedRef{Name: l.key(), Stream: l.Digest})
	}
	return writeExternal(p.i, ConfigContent, image.ConfigJSON, append(layers, linked...))
}

// manifestRefs returns what the stream of the manifest leads to.
func (i *Image) manifestRefs() []splitstream.NamedRef {
	refs := []splitstream.NamedRef{{Name: "config:" + string(i.ConfigDigest()), Stream: i.config}}
	for k, id := range i.layerIDs() {
		refs = append(refs, splitstream.NamedRef{Name: string(id), Stream: i.Layers[k]})
	}
	if i.Manifest.Config.MediaType == typeDocker {
		// composefs-rs takes images in Docker's format for artifacts, whose layers it looks up by the digests of the blobs.
		for k, l := range i.Manifest.Layers {
			refs = append(refs, splitstream.NamedRef{Name: string(l.Digest), Stream: i.Layers[k]})
		}
	}
	return append(refs, i.blobRefs()...)
}

// leadHere makes other manifests with the same config lead to its new stream. Garbage collection of composefs-rs goes from name to name,
// and the config has one name.
func (p *pull) leadHere(image *Image) error {
	names, err := p.r.Streams()
	if err != nil {
		return err
	}
	for _, name := range names {
		digest, ok := strings.CutPrefix(name, manifestStream)
		d, err := ParseDigest(digest)
		if !ok || err != nil || d == image.Digest {
			continue
		}
		other, err := open(p.r, d)
		if err != nil || other.ConfigDigest() != image.ConfigDigest() {
			continue // one that is not sound is for Repair
		}
		other.config = image.config
		stream, err := writeExternal(p.i, ManifestContent, other.ManifestJSON, other.manifestRefs())
		if err == nil {
			err = p.i.NameStream(name, stream)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
