package remote

import (
	"context"
	"errors"
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// Peek returns the commit that a ref leads to by the word of the server alone: nobody has looked at its signature. Who finds there the
// commit that he has, need not ask for more.
func (r *Remote) Peek(ctx context.Context, name string) (ostree.Checksum, error) {
	if err := summary.CheckRef(name); err != nil {
		return ostree.Checksum{}, err
	}
	return r.ref(ctx, name)
}

// Offer is what a pull of a commit would bring.
type Offer struct {
	Commit  ostree.Checksum
	Signers []string
	Here    bool   // it is in the repository, and nothing is to come
	Known   bool   // it is known what is to come: the commit lists sizes, or there is a delta
	Objects int    // to come one by one, with the commit, if that lists them
	Bytes   int64  // to come, at least; with a delta about, with what its requests cost
	Delta   string // the static delta that is cheaper, ""
}

// Look says what a pull of a ref or checksum would bring, with the same options. The commit has been accepted as in a pull; besides that,
// what tells about sizes is all that is fetched.
func (r *Remote) Look(ctx context.Context, into *repo.Repo, name string, o PullOptions) (Offer, error) {
	offer, err := r.look(ctx, into, name, o)
	if err != nil {
		return offer, fmt.Errorf("remote %q: ref %q: %w", r.config.Name, name, err)
	}
	return offer, nil
}

func (r *Remote) look(ctx context.Context, into *repo.Repo, name string, o PullOptions) (offer Offer, err error) {
	o.Deltas = r.deltasFor(o.Deltas)
	if o.TimestampCheck {
		if err := r.checkTime(ctx, into, name); err != nil {
			return offer, err
		}
	}
	if ostree.IsChecksum(name) {
		offer.Commit, err = ostree.ParseChecksum(name)
	} else {
		offer.Commit, err = r.Ref(ctx, name)
	}
	if err != nil {
		return offer, err
	}
	c, err := r.Commit(ctx, offer.Commit)
	if err != nil {
		return offer, err
	}
	offer.Signers = r.Signers(offer.Commit)
	if _, err := ostree.Open(into, offer.Commit.String()); err == nil {
		offer.Here, offer.Known = true, true
		return offer, nil
	}
	bases := append([]string{name}, o.Base...)
	if !c.Parent.IsZero() {
		bases = append(bases, c.Parent.String())
	}
	has, err := objectsOf(into, bases)
	if err != nil {
		return offer, err
	}
	p := &prefetcher{r: r, into: into, o: o}
	sizes, err := p.sizes(ctx, offer.Commit)
	if err != nil {
		return offer, err
	}
	if sizes != nil {
		read := r.commit(ctx, offer.Commit) // itself it does not list
		offer.Known, offer.Objects, offer.Bytes = true, 1, int64(len(read.data)+len(read.detached))
	}
	for sum, size := range sizes {
		if !has(sum) {
			offer.Objects++
			offer.Bytes += min(size, 1<<40)
		}
	}
	if o.Deltas == DeltasNever {
		return offer, nil
	}
	best, objects, err := p.best(ctx, offer.Commit, has)
	if err != nil || best == nil {
		return offer, err
	}
	best.file.Close()
	if o.Deltas == DeltasAlways || best.bytes < objects {
		offer.Known, offer.Delta, offer.Objects, offer.Bytes = true, best.d.Name.String(), 0, best.size(has)
	}
	return offer, nil
}

// size returns how many bytes are to come with a delta: parts that make something, and what it leaves to be fetched.
func (o *offer) size(has func(ostree.Checksum) bool) int64 {
	n := o.bytes
	for _, f := range o.d.Fallbacks {
		if !has(ostree.Checksum(f.Checksum)) {
			n += clamp(f.Size)
		}
	}
	return n
}

// objectsOf tells which objects the commits of these names have that are here.
func objectsOf(into *repo.Repo, names []string) (func(ostree.Checksum) bool, error) {
	var all []*ostree.Objects
	for _, name := range names {
		s, err := ostree.Open(into, name)
		if errors.Is(err, repo.ErrNotFound) {
			continue
		}
		var o *ostree.Objects
		if err == nil {
			o, err = s.Objects(into)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, o)
	}
	return func(c ostree.Checksum) bool {
		for _, o := range all {
			if o.Has(c) {
				return true
			}
		}
		return false
	}, nil
}
