package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
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
	// them. It costs what was downloaded. Once kept, they stay with the image.
	KeepBlobs bool
	// Resume keeps the bytes of layers in the repository until the layers are durable: a pull that was killed or lost its network
	// goes on in the middle of a layer, and of several pulls that want the same layer one brings it and the others wait. It is for
	// sources that are far away, and hand out blobs as the manifest describes them.
	Resume   bool
	Limits   Limits
	Retry    Retry
	Progress *Progress
	Lock     repo.LockOptions

	asIs bool // a delta is an artifact like others
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
	if err := p.layers(ctx, image); err != nil {
		return nil, err
	}
	if err := p.images(ctx, image); err != nil {
		return nil, err
	}
	return image, p.write(image)
}

// describe reads the manifest and config of the image.
func (p *pull) describe(ctx context.Context) (*Image, error) { return p.describeDigest(ctx, "") }

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
	if image.Manifest.ArtifactType == typeDelta && !p.o.asIs {
		return p.describeDelta(ctx, image)
	}
	config := image.Manifest.Config
	blob := p.open(ctx, config)
	defer blob.Close()
	if image.ConfigJSON, err = readJSON(blob); err == nil {
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
		return p.delta.Manifest(ctx, d)
	}
	return p.source.Manifest(ctx, d)
}

func (p *pull) open(ctx context.Context, d Descriptor) *resuming {
	if p.delta != nil {
		return &resuming{ctx: ctx, source: p.delta, blob: d} // it opens what it needs itself
	}
	return p.fetch(ctx, d)
}

// fetch opens a blob of the source itself.
func (p *pull) fetch(ctx context.Context, d Descriptor) *resuming {
	return &resuming{ctx: ctx, source: p.source, blob: d, retry: p.o.Retry, got: func(n int) { p.o.Progress.Bytes.Add(int64(n)) }}
}

// layers brings the layers that are not there, several at a time, the largest first.
func (p *pull) layers(ctx context.Context, image *Image) error {
	image.Layers = make([]fsverity.Digest, len(image.Manifest.Layers))
	ids := image.layerIDs()
	missing := map[Digest][]int{} // an image may have the same layer twice
	var order []Digest
	for k, id := range ids {
		var err error
		if image.Layers[k], err = present(p.r, id, image.layerContent()); err != nil {
			return err
		}
		lacks, err := p.lacksBlob(image, image.Manifest.Layers[k], id)
		if err != nil {
			return err
		}
		if lacks {
			p.again[id] = true
		}
		if !image.Layers[k].IsZero() && !p.again[id] {
			p.stats.Present++
			if p.o.Resume { // who has brought it was killed before that, perhaps
				if err := p.r.RemovePartial(keptName(image.Manifest.Layers[k].Digest)); err != nil {
					return err
				}
			}
			p.o.Progress.Layers.Add(1)
			continue
		}
		if missing[id] == nil {
			order = append(order, id)
			p.o.Progress.Total.Add(p.toFetch(image.Manifest.Layers[k]))
		}
		missing[id] = append(missing[id], k)
	}
	size := func(id Digest) int64 { return image.Manifest.Layers[missing[id][0]].Size }
	slices.SortStableFunc(order, func(a, b Digest) int { return cmp.Compare(size(b), size(a)) })

	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s := newSplitter(p.i, p.o.Limits)
	defer s.close()
	work := make(chan Digest)
	var workers sync.WaitGroup
	for range min(len(order), max(2, min(runtime.GOMAXPROCS(0), 6))) {
		workers.Go(func() {
			for id := range work {
				k := missing[id]
				d, err := p.layer(ctx, s, image.Manifest.Layers[k[0]], id, image.layerContent())
				if err != nil {
					stop(fmt.Errorf("layer %s: %w", image.Manifest.Layers[k[0]].Digest, err))
					continue
				}
				for _, k := range k {
					image.Layers[k] = d // each index is written by one worker
				}
				p.o.Progress.Layers.Add(int64(len(k)))
			}
		})
	}
	for _, id := range order {
		if !send(ctx, work, id) {
			break
		}
	}
	close(work)
	workers.Wait()
	err := p.checkpoint() // also if one has failed: the others are not brought again
	if err := cmp.Or(context.Cause(ctx), err); err != nil {
		return err
	}
	p.count()
	return nil
}

// toFetch is how many bytes come for a layer.
func (p *pull) toFetch(layer Descriptor) int64 {
	if p.delta != nil {
		return p.delta.layers[layer.Digest].Size
	}
	return layer.Size
}

// checkpoint makes the layers durable that are complete. Then nothing has to be kept of their blobs any more.
func (p *pull) checkpoint() error {
	p.mu.Lock()
	kept := p.kept
	p.kept = nil
	p.mu.Unlock()
	err := p.i.Checkpoint()
	for _, k := range kept {
		if err == nil {
			k.Remove()
		} else {
			k.Close()
		}
	}
	return err
}

// layerIDs returns the digests by which the layers are known in the repository: diff IDs, or the blobs' own for artifacts.
func (i *Image) layerIDs() []Digest {
	if i.Manifest.IsImage() {
		return i.Config.RootFS.DiffIDs
	}
	ids := make([]Digest, len(i.Manifest.Layers))
	for k, l := range i.Manifest.Layers {
		ids[k] = l.Digest
	}
	return ids
}

func (i *Image) layerContent() uint64 {
	if i.Manifest.IsImage() {
		return LayerContent
	}
	return BlobContent
}

// present returns the stream of a layer that is there already, zero if there is none. A damaged one is made anew.
func present(r *repo.Repo, id Digest, contentType uint64) (fsverity.Digest, error) {
	d, err := r.StreamObject(layerStream + string(id))
	if err == nil {
		var s *repo.Stream
		if s, err = r.OpenStream(d, contentType); err == nil {
			return d, s.Close()
		}
	}
	if lost(err) {
		err = nil
	}
	return fsverity.Digest{}, err
}

// lost tells of something that is not there, or not sound, or something else of the same digest, an artifact that is an archive: it
// is brought again.
func lost(err error) bool {
	for _, reason := range []error{repo.ErrNotFound, repo.ErrCorrupt, repo.ErrNoVerity, repo.ErrContentType} {
		if errors.Is(err, reason) {
			return true
		}
	}
	return false
}

// layer brings one layer, and makes it durable if there is enough to be so.
func (p *pull) layer(ctx context.Context, s *splitter, blob Descriptor, id Digest, content uint64) (fsverity.Digest, error) {
	// Else it could be endless: a compressed stream may have any number of bytes for an empty content.
	if blob.Size > p.o.Limits.Layer {
		return fsverity.Digest{}, fmt.Errorf("more than %d bytes: %w", p.o.Limits.Layer, ErrTooLarge)
	}
	var kept *repo.Partial
	if p.o.Resume {
		var err error
		if kept, err = p.openKept(ctx, blob.Digest); err != nil {
			return fsverity.Digest{}, err
		}
		// Who had it until now has brought it, perhaps.
		if d, err := present(p.r, id, content); err != nil || !d.IsZero() && !p.again[id] {
			kept.Remove()
			return d, err
		}
	}
	done, err := p.read(ctx, s, blob, id, content, kept)
	if err != nil {
		return done.stream, err
	}
	if err := p.i.NameStream(layerStream+string(id), done.stream); err != nil {
		return done.stream, err
	}
	p.mu.Lock()
	p.stats.Reused += done.files
	p.stats.Inline += done.inline
	if done.added > 0 {
		p.own.Objects++
		p.own.Bytes += done.added
	}
	if kept != nil {
		p.kept = append(p.kept, kept)
	}
	all := p.i.Stats().Bytes
	save := all-p.saved >= checkpoint || p.waiting > 0
	if save {
		p.saved = all
	}
	p.mu.Unlock()
	if save {
		err = p.checkpoint()
	}
	return done.stream, err
}

// keptName is the name of the file with what was received of a blob.
func keptName(blob Digest) string { return "blob-" + strings.Replace(string(blob), ":", "-", 1) }

// openKept opens the file for the bytes of a blob. While it waits for another pull, that one may wait for a layer which is complete
// here: so that neither waits for ever, nobody who waits holds anything, and what becomes complete meanwhile is let go at once.
func (p *pull) openKept(ctx context.Context, blob Digest) (*repo.Partial, error) {
	waited := false
	kept, err := p.r.OpenPartial(ctx, keptName(blob), repo.LockOptions{
		Timeout: p.o.Lock.Timeout,
		Waiting: func(holder string) {
			waited = true
			p.mu.Lock()
			p.waiting++
			p.mu.Unlock()
			p.checkpoint() // an error will come again
			if p.o.Lock.Waiting != nil {
				p.o.Lock.Waiting(holder)
			}
		},
	})
	if waited {
		p.mu.Lock()
		p.waiting--
		p.mu.Unlock()
	}
	return kept, err
}

// read makes a layer of a blob, of which something may have been kept. What was kept is not believed more than what comes: if it
// leads to nothing good, it is brought from the beginning.
func (p *pull) read(ctx context.Context, s *splitter, blob Descriptor, id Digest, content uint64, kept *repo.Partial) (split, error) {
	for {
		in := p.open(ctx, blob)
		if kept != nil {
			info, err := kept.Stat()
			if err == nil && info.Size() > blob.Size {
				err = kept.Truncate(0)
			} else if err == nil {
				in.have = info.Size()
				p.o.Progress.Total.Add(-in.have)
			}
			if err != nil {
				kept.Close()
				return split{}, err
			}
			in.kept = kept
		}
		var done split
		var err error
		if content == LayerContent {
			keeper := p.keeper(blob, id)
			done, err = s.layer(ctx, keeper.read(in), id)
			keeper.end(&done, err)
		} else {
			done, err = p.artifact(in, blob)
		}
		in.Close()
		switch {
		case err == nil || kept == nil:
			return done, err
		case in.broken != nil || ctx.Err() != nil:
			kept.Close() // for the next pull
			return done, err
		case in.have == 0:
			kept.Remove() // it would not be better with what has come
			return done, err
		}
		if err := kept.Truncate(0); err != nil {
			kept.Close()
			return done, err
		}
		p.o.Progress.Total.Add(in.have)
	}
}

// count computes how many objects were new: until now the import has had the layers' objects, and their streams.
func (p *pull) count() {
	all := p.i.Stats()
	p.stats.Objects, p.stats.Bytes = all.Objects-p.own.Objects, all.Bytes-p.own.Bytes
	p.stats.Reused -= p.stats.Objects
}

// artifact stores a blob as it is.
func (p *pull) artifact(in io.Reader, blob Descriptor) (split, error) {
	h := blob.Digest.newHash()
	d, err := p.i.Put(io.TeeReader(in, h), blob.Size)
	if err == nil {
		err = blob.Digest.check(h)
	}
	if err != nil {
		return split{}, err
	}
	w := splitstream.NewWriter(p.i.Algorithm(), BlobContent)
	if err := w.Object(d, uint64(blob.Size)); err != nil {
		return split{}, err
	}
	done := split{files: 1}
	return done.put(p.i, w)
}

// write stores the streams of config and manifest, and sets the tag.
func (p *pull) write(image *Image) error {
	ids := image.layerIDs()
	var layers, linked []splitstream.NamedRef
	for k, d := range image.Layers {
		layers = append(layers, splitstream.NamedRef{Name: string(ids[k]), Stream: d})
	}
	for _, l := range image.Linked {
		linked = append(linked, splitstream.NamedRef{Name: l.key(), Stream: l.Digest})
	}
	config, err := writeExternal(p.i, ConfigContent, image.ConfigJSON, append(layers, linked...))
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
		tags = append(tags, tagRef(p.o.Tag))
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
