package oci

import (
	"cmp"
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
	DryRun    bool // only find out what would be done; of the source, manifest and config are read
	Lock      repo.LockOptions
}

// RepairReport is what was wrong, and what is wrong now.
type RepairReport struct {
	Before, After FsckReport
	Steps         []RepairStep     // of a dry run
	Failed        map[string]error // by tag: why an image could not be healed
	Fetched       int64            // bytes that came from the source
}

// RepairStep is something that a repair would bring again.
type RepairStep struct {
	Image  string `json:"image"`  // its tag
	What   string `json:"what"`   // manifest, config, layer, index, or image, which is a composefs image
	Digest string `json:"digest"` // of a layer the diff ID
	From   string `json:"from"`   // FromRepository or FromSource
	Bytes  int64  `json:"bytes"`  // that come from the source
}

// Where something comes from.
const (
	FromRepository = "repository" // what is left in it
	FromSource     = "source"
)

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
	h := &healer{r: r, source: source, o: o, planned: map[Digest]bool{}}
	for _, t := range tags {
		if o.Image != "" && t.Name != o.Image {
			continue
		}
		err, again := done[t.Image]
		if !again {
			err = h.tagged(ctx, t)
			done[t.Image] = err
		}
		if err := ctx.Err(); err != nil {
			return report, err
		}
		if err != nil {
			report.Failed[t.Name] = err
		}
	}
	report.Fetched, report.Steps = h.fetched.Load(), h.steps
	report.After, err = check()
	return report, err
}

// healer heals images one after the other.
type healer struct {
	r       *repo.Repo
	source  Source
	o       RepairOptions
	fetched atomic.Int64
	steps   []RepairStep
	planned map[Digest]bool // in a dry run
	depth   int             // of indexes in each other
}

// tagged heals an image and what refers to it.
func (h *healer) tagged(ctx context.Context, t Tag) error {
	failed := h.image(ctx, t)
	artifacts, err := allReferrers(h.r, t.Image)
	for _, a := range artifacts {
		if err := h.image(ctx, Tag{t.Name, a}); err != nil {
			failed = cmp.Or(failed, fmt.Errorf("referrer %s: %w", a, err))
		}
	}
	return cmp.Or(failed, err)
}

// image heals one image or artifact.
func (h *healer) image(ctx context.Context, t Tag) error {
	if h.planned[t.Image] {
		return nil
	}
	h.planned[t.Image] = h.o.DryRun
	sound, err := isSound(ctx, h.r, t, h.o.Lock)
	if sound || err != nil {
		return err
	}
	left := remains{Stored: NewStored(h.r, ""), source: h.source, fetched: &h.fetched}
	text, err := readManifest(ctx, left, t.Image, h.o.Retry)
	if err != nil {
		return err
	}
	is, err := IsIndex(text)
	switch {
	case err != nil:
	case is:
		err = h.index(ctx, t, text)
	case h.o.DryRun:
		err = h.plan(ctx, t)
	default:
		err = h.bringAgain(ctx, t)
	}
	if err != nil || h.o.DryRun {
		return err
	}
	if sound, err = isSound(ctx, h.r, t, h.o.Lock); err == nil && !sound {
		err = errors.New("it is not sound though everything was brought again")
	}
	return err
}

// index heals an index, whose manifests come first.
func (h *healer) index(ctx context.Context, t Tag, text []byte) error {
	x, err := ParseIndex(t.Image, text)
	if err != nil {
		return err
	}
	if h.depth++; h.depth > maxIndexDepth {
		err = fmt.Errorf("index %s: more than %d indexes in each other", t.Image, maxIndexDepth)
	}
	defer func() { h.depth-- }()
	if err != nil {
		return err
	}
	for _, d := range x.lacks(h.r) {
		if err := h.image(ctx, Tag{t.Name, d}); err != nil {
			return fmt.Errorf("manifest %s: %w", d, err)
		}
	}
	if !h.o.DryRun {
		return x.store(ctx, h.r, h.o.Lock)
	}
	step := RepairStep{t.Name, "index", string(t.Image), FromSource, int64(len(text))}
	if _, err := OpenIndex(h.r, t.Image); err == nil {
		step.From, step.Bytes = FromRepository, 0
	}
	h.steps = append(h.steps, step)
	return nil
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
	if errors.Is(err, ErrIndex) {
		return true, nil
	}
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

// again describes an image, and finds out which of its layers are to be brought again. The bool tells whether it is known which composefs
// images were made of it.
func (h *healer) again(ctx context.Context, t Tag) (*pull, *Image, bool, error) {
	again := map[Digest]bool{}
	p := &pull{r: h.r, blobs: map[Digest]fsverity.Digest{}, again: again, repair: true,
		source: remains{NewStored(h.r, ""), h.source, again, &h.fetched},
		o:      PullOptions{Transform: h.o.Transform, Limits: h.o.Limits.orDefault(), Retry: h.o.Retry, Progress: h.o.Progress, digest: t.Image}}
	image, err := p.describe(ctx)
	if err != nil {
		return nil, nil, false, err
	}
	linksKnown := true
	if known, err := open(h.r, t.Image); err == nil {
		image = known
		p.o.KeepBlobs = len(known.Blobs) > 0
	} else if known, err := OpenConfig(h.r, image.ConfigDigest()); err == nil {
		image.Linked = known.Linked
	} else {
		linksKnown = false
	}
	c := &checker{r: h.r, layers: map[Digest]string{}}
	for k, id := range image.layerIDs() {
		if err := ctx.Err(); err != nil {
			return nil, nil, false, err
		}
		stream, err := h.r.StreamObject(layerStream + string(id))
		blob := image.Manifest.Layers[k].Digest
		at, isKept := image.Blobs[blob]
		again[id] = err != nil || c.layer(stream, id, image.layerContent()) != "" || isKept && c.blob(at, blob) != nil
	}
	return p, image, linksKnown, nil
}

// plan finds out where everything would come from.
func (h *healer) plan(ctx context.Context, t Tag) error {
	release, err := h.r.LockShared(ctx, h.o.Lock)
	if err != nil {
		return err
	}
	defer release()
	p, image, _, err := h.again(ctx, t)
	if err != nil {
		return err
	}
	left := remains{NewStored(h.r, ""), h.source, p.again, &h.fetched}
	before := len(h.steps)
	add := func(what, digest string, size int64, from string) {
		if from == FromRepository {
			size = 0
		}
		h.steps = append(h.steps, RepairStep{t.Name, what, digest, from, size})
	}
	if _, err := left.Stored.Manifest(ctx, image.Digest); err != nil {
		add("manifest", string(image.Digest), int64(len(image.ManifestJSON)), FromSource)
	}
	config := image.ConfigDigest()
	if _, _, err := left.config(config); err != nil {
		add("config", string(config), int64(len(image.ConfigJSON)), FromSource)
	} else if _, err := h.r.StreamObject(configStream + string(config)); err != nil {
		add("config", string(config), 0, FromRepository)
	}
	for k, id := range image.layerIDs() {
		if !p.again[id] {
			continue
		}
		from, err := left.origin(ctx, image.Manifest.Layers[k])
		if err != nil {
			return fmt.Errorf("layer %s: %w", image.Manifest.Layers[k].Digest, err)
		}
		add("layer", string(id), image.Manifest.Layers[k].Size, from)
	}
	known := len(h.steps) > before
	for _, l := range image.Linked {
		f, _, err := h.r.OpenImage(l.Digest.String())
		if err == nil {
			f.Close()
		}
		if err == nil && !known { // an object that is in no layer as it is in the image, of a file with holes
			var v repo.VerifyReport
			if v, err = h.r.VerifyImage(ctx, l.Digest.String(), repo.VerifyOptions{}); err == nil && len(v.Findings) > 0 {
				err = repo.ErrCorrupt
			}
		}
		if err != nil {
			add("image", l.Digest.String(), 0, FromRepository)
		}
	}
	return nil
}

// bringAgain is a pull of what is not sound.
func (h *healer) bringAgain(ctx context.Context, t Tag) error {
	i, err := h.r.Begin(ctx, h.o.Lock)
	if err != nil {
		return err
	}
	defer i.Abort()
	p, image, linksKnown, err := h.again(ctx, t)
	if err != nil {
		return err
	}
	p.i = i
	if err := p.layers(ctx, image, nil); err != nil {
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
	tree, err := p.tree(ctx, image, fstree.XattrsAllowlist)
	if err != nil {
		return err
	}
	return p.make(image, tree, usual)
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

// origin tells where a blob would come from, without reading it from there.
func (m remains) origin(ctx context.Context, d Descriptor) (string, error) {
	r, _, err := m.Stored.sound(d, 0, m.usable)
	if err == nil {
		return FromRepository, r.Close()
	}
	if m.source == nil {
		return "", noSource(err)
	}
	if r, _, err = m.source.Blob(ctx, d, 0); err == nil {
		err = r.Close()
	}
	return FromSource, err
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
