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

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// layers brings the layers that are not there, several at a time, the largest first. Who makes the tree, if anybody does, hears of each.
func (p *pull) layers(ctx context.Context, image *Image, g *growing) error {
	image.Layers = make([]fsverity.Digest, len(image.Manifest.Layers))
	if err := p.findBlobs(image); err != nil {
		return err
	}
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
			g.has(k)
			if from, err := p.origin(image.Manifest.Layers[k]); p.o.Resume && err == nil { // who has brought it was killed before that, perhaps
				if err := p.r.RemovePartial(keptName(from.Digest)); err != nil {
					return err
				}
			}
			p.o.Progress.Layers.Add(1)
			continue
		}
		if missing[id] == nil {
			from, err := p.origin(image.Manifest.Layers[k])
			if err != nil {
				return fmt.Errorf("layer %s: %w", image.Manifest.Layers[k].Digest, err)
			}
			order = append(order, id)
			p.o.Progress.Total.Add(from.Size)
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
					g.has(k)
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
	err := context.Cause(ctx)
	// Layers that were expensive are not brought again, nor are those that are complete when another one has failed. Otherwise the image
	// becomes durable with them.
	if err != nil || p.o.Resume || p.delta != nil || p.repair {
		err = cmp.Or(err, p.checkpoint())
	}
	return err
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
	from, err := p.origin(blob)
	if err != nil {
		return fsverity.Digest{}, err
	}
	// Else it could be endless: a compressed stream may have any number of bytes for an empty content.
	if max(from.Size, blob.Size) > p.o.Limits.Layer {
		return fsverity.Digest{}, fmt.Errorf("more than %d bytes: %w", p.o.Limits.Layer, ErrTooLarge)
	}
	if from.MediaType == typeTarDiff && p.delta != nil {
		if err := p.delta.readOld(ctx); err != nil {
			return fsverity.Digest{}, err
		}
	}
	var kept *repo.Partial
	if p.o.Resume {
		if kept, err = p.openKept(ctx, from.Digest); err != nil {
			return fsverity.Digest{}, err
		}
		// Who had it until now has brought it, perhaps.
		if d, err := present(p.r, id, content); err != nil || !d.IsZero() && !p.again[id] {
			kept.Remove()
			return d, err
		}
	}
	done, err := p.read(ctx, s, blob, from, id, content, kept)
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
	save := all-p.saved >= checkpoint || p.waiting > 0 || p.delta != nil // which would have to be applied again
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

// read makes a layer of a blob, or of what there is instead, of which something may have been kept. What was kept is not believed more
// than what comes: if it leads to nothing good, it is brought from the beginning.
func (p *pull) read(ctx context.Context, s *splitter, blob, from Descriptor, id Digest, content uint64, kept *repo.Partial) (split, error) {
	for {
		in := p.fetch(ctx, from)
		if kept != nil {
			info, err := kept.Stat()
			if err == nil && info.Size() > from.Size {
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
		switch {
		case content != LayerContent:
			done, err = p.artifact(in, blob)
		case p.delta != nil && from.MediaType == typeTarDiff:
			archive, end := p.delta.archive(in)
			done, err = s.layer(ctx, archive, id)
			end()
		default:
			keeper := p.keeper(blob, id)
			done, err = s.layer(ctx, keeper.read(in), id)
			keeper.end(&done, err)
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

// count computes how many objects were new: until now the import has had the layers' objects, and their streams, and files with holes.
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
