package ostree

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Progress counts what a pull has done; other goroutines may look at it meanwhile.
type Progress struct {
	Metadata atomic.Int64 // commits, dirtrees and dirmetas that have come
	Files    atomic.Int64 // content objects that have come
	Pending  atomic.Int64 // objects that are known and have not come yet
	Bytes    atomic.Int64 // of contents, inflated
}

// PullOptions says what is pulled, and what is made of it.
type PullOptions struct {
	Formats []erofs.Format // of the composefs images; none: those of the repository
	// Transform makes a tree into one to boot: boot.Transform. If it is not nil, there is a bootable image, too.
	Transform func(*fstree.Tree, fstree.Open) error
	// Depth is how many commits are brought that came before: 0 for none, -1 for all. Where the source has no more of them, that is all.
	Depth int
	// Base names commits of the repository whose objects are not fetched. The parent of a commit, and what the ref led to until now,
	// need not be named.
	Base []string
	// InFlight is how many objects are fetched at a time; 0: as many as there are processors, which is for sources on this machine.
	InFlight int
	// Verify decides whether a commit may come, before anything else of it is fetched. Detached is its detached metadata, nil for none.
	// It is asked again for a commit that is here already. Nil: any commit may come.
	Verify func(c Checksum, commit, detached []byte) error
	// Prefetch brings objects in another way than one by one: by static deltas. What it does not bring is fetched. Nil: nothing.
	Prefetch func(ctx context.Context, c Checksum, in *Collector) error
	Progress *Progress
	Lock     repo.LockOptions
}

// PullStats counts what a pull of a commit has brought.
type PullStats struct {
	Metadata int   `json:"metadata_fetched"`
	Files    int   `json:"files_fetched"`
	Reused   int   `json:"objects_reused"` // of other commits, or of an interrupted pull
	Bytes    int64 `json:"bytes_fetched"`  // of contents, inflated
}

// Pulled is a commit that a pull has brought, or found.
type Pulled struct {
	*Stored
	Ref     string // by which it was named; "" for a checksum
	Stats   PullStats
	Parents []Checksum // that were brought, too, the newest first
}

// Pull brings commits from a source, by refs or by their checksums, and makes their composefs images. A ref becomes a name of the commit,
// when everything is durable. What an interrupted pull has left is used.
func Pull(ctx context.Context, r *repo.Repo, source Source, names []string, o PullOptions) ([]Pulled, error) {
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	if len(o.Formats) == 0 {
		o.Formats = r.Formats()
	}
	i, err := r.Begin(ctx, o.Lock)
	if err != nil {
		return nil, err
	}
	defer i.Abort()
	p := &pull{r: r, i: i, source: source, o: o, done: map[Checksum]*Stored{}}
	for _, name := range o.Base {
		s, err := Open(r, name)
		if err == nil {
			err = p.addBase(s)
		}
		if err != nil {
			return nil, fmt.Errorf("base: %w", err)
		}
	}
	var list []Pulled
	for _, name := range names {
		one, err := p.ref(ctx, name)
		if err != nil {
			return nil, err
		}
		list = append(list, one)
	}
	return list, i.Commit()
}

type pull struct {
	r      *repo.Repo
	i      *repo.Import
	source Source
	o      PullOptions

	bases []*Objects
	done  map[Checksum]*Stored
}

// addBase makes the objects of a commit those that are not fetched.
func (p *pull) addBase(s *Stored) error {
	for _, b := range p.bases {
		if b.Commit == s.Checksum {
			return nil
		}
	}
	o, err := s.Objects(p.r)
	if err == nil {
		p.bases = append(p.bases, o)
	}
	return err
}

// tryBase is addBase for a commit that may be there or not.
func (p *pull) tryBase(c Checksum) error {
	s, err := open(p.r, c)
	if err == nil {
		err = p.addBase(s)
	}
	if lost(err) {
		return nil
	}
	return err
}

// lost tells of something that is not there, or not sound: it is brought again.
func lost(err error) bool {
	for _, reason := range []error{repo.ErrNotFound, repo.ErrCorrupt, repo.ErrNoVerity, repo.ErrContentType} {
		if errors.Is(err, reason) {
			return true
		}
	}
	return false
}

// ref brings what a name leads to.
func (p *pull) ref(ctx context.Context, name string) (Pulled, error) {
	c, err := resolve(ctx, p.source, name)
	if err != nil {
		return Pulled{}, err
	}
	result := Pulled{Ref: name}
	var tags []string
	if IsChecksum(name) {
		result.Ref = ""
	} else {
		if err := CheckTag(name); err != nil {
			return result, err
		}
		tags = append(tags, TagRef(name))
		if old, err := Resolve(p.r, name); err == nil && old != c {
			if err := p.tryBase(old); err != nil {
				return result, err
			}
		}
	}
	chain, err := p.chain(ctx, c)
	if err != nil {
		return result, err
	}
	if slices.ContainsFunc(chain, func(l link) bool { return l.here == nil }) {
		for _, l := range chain {
			if l.here != nil {
				if err := p.tryBase(l.c); err != nil {
					return result, err
				}
			}
		}
	}
	// The oldest first: each is the base of the next, which leads to it.
	var before *Stored
	for k := len(chain) - 1; k >= 0; k-- {
		if before, err = p.commit(ctx, chain[k], before, &result.Stats); err != nil {
			return result, fmt.Errorf("commit %v: %w", chain[k].c, err)
		}
	}
	result.Stored = before
	for _, link := range chain[1:] {
		result.Parents = append(result.Parents, link.c)
	}
	return result, p.i.NameStream(commitStream+c.String(), before.stream, tags...)
}

// link is a commit that is to come: its object, and its detached metadata.
type link struct {
	c        Checksum
	commit   []byte
	detached []byte
	here     *Stored // nil: it is not here yet
}

// chain reads a commit and as many of those before it as are wanted.
func (p *pull) chain(ctx context.Context, c Checksum) ([]link, error) {
	var chain []link
	for {
		l, err := p.describe(ctx, c)
		if errors.Is(err, ErrNotFound) && len(chain) > 0 {
			return chain, nil
		}
		if err != nil {
			return nil, fmt.Errorf("commit %v: %w", c, err)
		}
		chain = append(chain, l)
		if p.o.Depth >= 0 && len(chain) > p.o.Depth {
			return chain, nil
		}
		parsed, err := ParseCommit(l.commit)
		if err != nil {
			return nil, fmt.Errorf("commit %v: %w", c, err)
		}
		if c = parsed.Parent; c.IsZero() {
			return chain, nil
		}
	}
}

// describe reads a commit object and its detached metadata, and decides whether it may come.
func (p *pull) describe(ctx context.Context, c Checksum) (l link, err error) {
	l.c = c
	n := ObjectName{c, KindCommit}
	l.here, err = open(p.r, c)
	if err != nil {
		if !lost(err) {
			return l, err
		}
		l.here = nil
	}
	if l.here != nil && p.o.Verify == nil && p.o.Depth == 0 {
		return l, nil // nothing of it is wanted
	}
	if l.commit, err = p.source.Metadata(ctx, n); err == nil {
		err = n.Verify(l.commit)
	}
	if err == nil {
		_, err = ParseCommit(l.commit)
	}
	if err != nil {
		return l, err
	}
	l.detached, err = p.source.Metadata(ctx, ObjectName{c, KindCommitMeta})
	if err != nil && !errors.Is(err, ErrNotFound) {
		return l, err
	}
	if p.o.Verify != nil {
		return l, p.o.Verify(c, l.commit, l.detached)
	}
	return l, nil
}

// commit brings one commit, and what is to be made of it. Before is the one before it, if that is kept with it.
func (p *pull) commit(ctx context.Context, l link, before *Stored, stats *PullStats) (*Stored, error) {
	if s := p.done[l.c]; s != nil {
		return s, nil
	}
	s, err := p.bring(ctx, l, before, stats)
	if err != nil {
		return nil, err
	}
	p.done[l.c] = s
	return s, nil
}

func (p *pull) bring(ctx context.Context, l link, before *Stored, stats *PullStats) (*Stored, error) {
	s := l.here
	var objects *Objects
	var j *journal
	if s == nil {
		var have *Objects
		var err error
		if j, have, err = openJournal(ctx, p.r, l.c, p.o.Lock); err != nil {
			return nil, err
		}
		if s, err = open(p.r, l.c); err != nil && !lost(err) {
			j.close()
			return nil, err
		} else if err != nil { // who had the journal until now has not brought it
			if objects, err = p.fetch(ctx, l, j, have, stats); err != nil {
				j.close()
				if known, ok := p.source.(interface{ Partial(Checksum) bool }); ok && errors.Is(err, ErrNotFound) && known.Partial(l.c) {
					err = fmt.Errorf("the commit is partial in its repository: %w", err)
				}
				return nil, err
			}
			s = &Stored{Checksum: l.c}
		}
	}
	if err := p.complete(ctx, s, l, before, objects); err != nil {
		if j != nil {
			j.close()
		}
		return nil, err
	}
	if j == nil {
		return s, nil
	}
	if err := p.i.Checkpoint(); err != nil {
		j.close()
		return nil, err
	}
	return s, j.remove()
}

// complete makes the composefs images of a commit that are not there yet, and the stream that leads to all. The objects are read if
// they are nil and needed.
func (p *pull) complete(ctx context.Context, s *Stored, l link, before *Stored, objects *Objects) error {
	changed := objects != nil
	if l.detached != nil {
		d, err := p.i.PutAll([][]byte{l.detached})
		if err != nil {
			return err
		}
		changed, s.detached = changed || s.detached != d[0], d[0]
	}
	if before != nil {
		changed, s.parent, s.before = changed || s.before != before.stream, before.Checksum, before.stream
	}
	missing, err := p.missing(s)
	if err != nil {
		return err
	}
	if !changed && len(missing) == 0 {
		return nil
	}
	if objects == nil {
		if objects, err = s.Objects(p.r); err != nil {
			return err
		}
	}
	if err := p.images(s, objects, missing); err != nil {
		return err
	}
	if err := s.put(p.i, objects); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return p.i.NameStream(commitStream+s.Checksum.String(), s.stream)
}

// missing returns the images that are wanted and not there.
func (p *pull) missing(s *Stored) (list []LinkedImage, err error) {
	kinds := []bool{false}
	if p.o.Transform != nil {
		kinds = append(kinds, true)
	}
	there := func(d fsverity.Digest) (bool, error) {
		f, _, err := p.r.OpenImage(d.String())
		if err == nil {
			return true, f.Close()
		}
		if lost(err) {
			err = nil
		}
		return false, err
	}
	for _, bootable := range kinds {
		for _, f := range p.o.Formats {
			d, ok := s.Find(bootable, f)
			if ok {
				if ok, err = there(d); err != nil {
					return nil, err
				}
			}
			if !ok {
				list = append(list, LinkedImage{Bootable: bootable, Format: f})
			}
		}
	}
	return list, nil
}

// images makes images, the plain ones first.
func (p *pull) images(s *Stored, objects *Objects, list []LinkedImage) error {
	var trees [2]*fstree.Tree
	for _, l := range list {
		kind := map[bool]int{true: 1}[l.Bootable]
		if trees[kind] == nil {
			var err error
			if trees[kind], err = p.tree(objects, l.Bootable); err != nil {
				return err
			}
		}
		var err error
		if l.Digest, err = p.i.PutImage(trees[kind], l.Format, ""); err != nil {
			return err
		}
		s.link(l)
	}
	if s.image.IsZero() {
		s.image, _ = s.Find(false, p.o.Formats[0])
	}
	return nil
}

func (p *pull) tree(objects *Objects, bootable bool) (*fstree.Tree, error) {
	if !bootable {
		return objects.Tree(CfsctlNames)
	}
	if err := p.i.Checkpoint(); err != nil { // the contents can be read when they have names
		return nil, err
	}
	return BootTree(objects, p.r, p.o.Transform)
}

// BootTree makes the tree to boot of a commit: with /etc in its place, and transformed.
func BootTree(o *Objects, r *repo.Repo, transform func(*fstree.Tree, fstree.Open) error) (*fstree.Tree, error) {
	tree, err := o.Tree(RightNames)
	if err == nil {
		err = PlaceEtc(tree)
	}
	if err == nil {
		err = transform(tree, Files(r))
	}
	if err != nil {
		return nil, err
	}
	tree.CountLinks()
	return tree, nil
}
