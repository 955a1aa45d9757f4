package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// RepairOptions says what is repaired, and with what.
type RepairOptions struct {
	Image string // only the one with this tag, if it is not ""
	// Transform makes images to boot again, see PullOptions. They cannot be made again without it.
	Transform func(*fstree.Tree, fstree.Open) error
	Limits    Limits
	Retry     Retry
	Progress  *Progress
	Lock      repo.LockOptions
}

// RepairReport is what was wrong, and what is wrong now.
type RepairReport struct {
	Before, After FsckReport
	Failed        map[string]error // by tag: why an image could not be healed
	Fetched       int64            // bytes that came from the source
}

// Healed returns what was wrong, and is not any more.
func (r RepairReport) Healed() []Finding {
	left := map[Finding]bool{}
	for _, f := range r.After.Findings {
		f.Detail = ""
		left[f] = true
	}
	var list []Finding
	for _, f := range r.Before.Findings {
		key := f
		if key.Detail = ""; !left[key] {
			list = append(list, f)
		}
	}
	return list
}

// ErrNoSource tells that something cannot be made again from what the repository has.
var ErrNoSource = errors.New("it is not in the repository any more")

// Repair brings again what Fsck finds missing or changed, and what the composefs images of an image need. It takes what is sound in the
// repository, and the rest from the source, which may be nil: images are made of the layers, a layer of its blob if that was kept. An
// image is asked for by the digest that its tag leads to; whatever comes is compared with the digests, as in a pull, and what is made
// has the digest that it had. What is not sound is replaced when the sound one is complete.
func Repair(ctx context.Context, r *repo.Repo, source Source, o RepairOptions) (RepairReport, error) {
	report := RepairReport{Failed: map[string]error{}}
	check := func() (FsckReport, error) {
		return Fsck(ctx, r, FsckOptions{Image: o.Image, Lock: o.Lock})
	}
	var err error
	if report.Before, err = check(); err != nil {
		return report, err
	}
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	tags, err := Tags(r)
	if err != nil {
		return report, err
	}
	done := map[Digest]error{}
	var fetched atomic.Int64
	for _, t := range tags {
		if o.Image != "" && t.Name != o.Image {
			continue
		}
		err, again := done[t.Image]
		if !again {
			err = repairImage(ctx, r, source, t, &fetched, o)
			done[t.Image] = err
		}
		if err := ctx.Err(); err != nil {
			return report, err
		}
		if err != nil {
			report.Failed[t.Name] = err
		}
	}
	report.Fetched = fetched.Load()
	report.After, err = check()
	return report, err
}

// repairImage heals one image.
func repairImage(ctx context.Context, r *repo.Repo, source Source, t Tag, fetched *atomic.Int64, o RepairOptions) error {
	sound, err := isSound(ctx, r, t, o.Lock)
	if sound || err != nil {
		return err
	}
	if err := bringAgain(ctx, r, source, t, fetched, o); err != nil {
		return err
	}
	if sound, err = isSound(ctx, r, t, o.Lock); err == nil && !sound {
		err = errors.New("it is not sound though everything was brought again")
	}
	return err
}

// isSound reports whether an image lacks nothing, and its composefs images neither.
func isSound(ctx context.Context, r *repo.Repo, t Tag, l repo.LockOptions) (bool, error) {
	release, err := r.LockShared(ctx, l)
	if err != nil {
		return false, err
	}
	defer release()
	c := &checker{r: r, layers: map[Digest]string{}}
	if err := c.image(ctx, t.Image); err != nil || len(c.findings) > 0 {
		return false, err
	}
	i, err := open(r, t.Image)
	if err != nil {
		return false, err
	}
	for _, l := range i.Linked {
		if v, err := r.VerifyImage(ctx, l.Digest.String(), repo.VerifyOptions{}); err != nil || len(v.Findings) > 0 {
			return false, err
		}
	}
	return true, nil
}

// bringAgain is a pull of what is not sound.
func bringAgain(ctx context.Context, r *repo.Repo, source Source, t Tag, fetched *atomic.Int64, o RepairOptions) error {
	i, err := r.Begin(ctx, o.Lock)
	if err != nil {
		return err
	}
	defer i.Abort()
	again := map[Digest]bool{}
	p := &pull{r: r, i: i, blobs: map[Digest]fsverity.Digest{}, again: again, repair: true,
		source: pinned{remains{NewStored(r, ""), source, again, fetched}, t.Image},
		o:      PullOptions{Transform: o.Transform, Limits: o.Limits.orDefault(), Retry: o.Retry, Progress: o.Progress}}
	image, err := p.describe(ctx)
	if err != nil {
		return err
	}
	linksKnown := true
	if known, err := open(r, t.Image); err == nil {
		image = known
		p.o.KeepBlobs = len(known.Blobs) > 0
	} else if known, err := OpenConfig(r, image.ConfigDigest()); err == nil {
		image.Linked = known.Linked
	} else {
		linksKnown = false
	}
	c := &checker{r: r, layers: map[Digest]string{}}
	for k, id := range image.layerIDs() {
		if err := ctx.Err(); err != nil {
			return err
		}
		stream, err := r.StreamObject(layerStream + string(id))
		blob := image.Manifest.Layers[k].Digest
		at, isKept := image.Blobs[blob]
		again[id] = err != nil || c.layer(stream, id, image.layerContent()) != "" || isKept && c.blob(at, blob) != nil
	}
	if err := p.layers(ctx, image); err != nil {
		return err
	}
	if image.Manifest.IsImage() {
		if linksKnown {
			err = p.makeLinked(ctx, image)
		} else {
			err = p.findLinked(ctx, image)
		}
		if err != nil {
			return err
		}
	}
	return p.write(image)
}

// makeLinked makes the composefs images again that are not there, and the files with holes that they need: those are in no layer as
// they are in the image.
func (p *pull) makeLinked(ctx context.Context, image *Image) error {
	if _, err := p.tree(ctx, image, fstree.XattrsAllowlist); err != nil {
		return err
	}
	for _, l := range image.Linked {
		if f, _, err := p.r.OpenImage(l.Digest.String()); err == nil {
			f.Close()
			continue
		}
		tree, err := p.linkedTree(ctx, image, l)
		if err == nil {
			err = p.makeAgain(tree, l)
		}
		if err != nil {
			return fmt.Errorf("composefs image %v: %w", l.Digest, err)
		}
	}
	return nil
}

// linkedTree makes the tree of a composefs image.
func (p *pull) linkedTree(ctx context.Context, image *Image, l LinkedImage) (*fstree.Tree, error) {
	tree, err := p.tree(ctx, image, l.Xattrs)
	if err == nil && l.Bootable {
		if p.o.Transform == nil {
			return nil, errors.New("an image to boot cannot be made here")
		}
		err = p.transform(tree)
	}
	return tree, err
}

// formats returns the formats that a composefs image of a kind may have.
func (l LinkedImage) formats() []erofs.Format {
	if l.Format == erofs.V2 {
		return []erofs.Format{erofs.V2}
	}
	return []erofs.Format{erofs.V1, erofs.V0}
}

func (p *pull) makeAgain(tree *fstree.Tree, l LinkedImage) error {
	for _, f := range l.formats() {
		d, err := digestOf(tree, f, p.r.Algorithm())
		if err != nil {
			return err
		}
		if d == l.Digest {
			_, err := p.i.PutImage(tree, f, "")
			return err
		}
	}
	return errors.New("made of the layers, it has another digest: somebody else made it otherwise")
}

func digestOf(tree *fstree.Tree, f erofs.Format, a fsverity.Algorithm) (fsverity.Digest, error) {
	d := fsverity.NewDigester(a)
	err := erofs.Write(d, tree, f)
	return d.Sum(), err
}

// findLinked finds out which composefs images were made of an image whose config has lost its references to them: those that would be
// made of it, and are there. If there is none, the usual ones are made.
func (p *pull) findLinked(ctx context.Context, image *Image) error {
	kinds := []LinkedImage{{Format: erofs.V1}, {Format: erofs.V2}}
	if p.o.Transform != nil {
		for _, mode := range []fstree.XattrMode{fstree.XattrsAllowlist, fstree.XattrsKeepUser} {
			for _, f := range []erofs.Format{erofs.V1, erofs.V2} {
				kinds = append(kinds, LinkedImage{Format: f, Bootable: true, Xattrs: mode})
			}
		}
	}
	there, err := p.r.ImageNames()
	if err != nil {
		return err
	}
	for _, l := range kinds {
		tree, err := p.linkedTree(ctx, image, l)
		if l.Bootable && err != nil {
			continue // it was not made to boot
		}
		if err != nil {
			return err
		}
		for _, f := range l.formats() {
			if l.Digest, err = digestOf(tree, f, p.r.Algorithm()); err != nil {
				return err
			}
			file, _, err := p.r.OpenImage(l.Digest.String())
			if err == nil {
				file.Close()
			} else if !slices.Contains(there, l.Digest.String()) {
				continue
			} else if _, err := p.i.PutImage(tree, f, ""); err != nil {
				return err
			}
			image.link(l)
			break
		}
	}
	if len(image.Linked) > 0 {
		return nil
	}
	var usual []LinkedImage
	for _, f := range p.r.Formats() {
		usual = append(usual, LinkedImage{Format: f})
	}
	return p.make(ctx, image, usual)
}

// remains is what is left in a repository, and a source for the rest.
type remains struct {
	*Stored
	source  Source          // may be nil
	again   map[Digest]bool // layers, by diff ID, that are not sound under their names
	fetched *atomic.Int64   // bytes from the source
}

func (m remains) Manifest(ctx context.Context, d Digest) ([]byte, error) {
	b, err := m.Stored.Manifest(ctx, d)
	if err == nil || m.source == nil {
		return b, noSource(err)
	}
	return m.source.Manifest(ctx, d)
}

func (m remains) Blob(ctx context.Context, d Descriptor, offset int64) (io.ReadCloser, int64, error) {
	r, size, err := m.Stored.sound(d, offset, m.usable)
	if err == nil || m.source == nil {
		return r, size, noSource(err)
	}
	if r, size, err = m.source.Blob(ctx, d, offset); err == nil {
		r = fetching{r, m.fetched}
	}
	return r, size, err
}

// usable reports whether a layer can be read from the stream to which its image leads: perhaps it has only lost its name.
func (m remains) usable(id Digest, stream fsverity.Digest) bool {
	if named, err := m.r.StreamObject(layerStream + string(id)); err == nil && named == stream && m.again[id] {
		return false
	}
	c := &checker{r: m.r, layers: map[Digest]string{}}
	return c.layer(stream, id, 0) == ""
}

func noSource(err error) error {
	if err == nil {
		return nil
	}
	return Permanent(fmt.Errorf("%w (--from names an image or a repository that has it): %w", ErrNoSource, err))
}

type fetching struct {
	io.ReadCloser
	n *atomic.Int64
}

func (f fetching) Read(b []byte) (int, error) {
	n, err := f.ReadCloser.Read(b)
	f.n.Add(int64(n))
	return n, err
}
