package remote

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// Deltas says whether a pull uses static deltas.
type Deltas int

// By default, a delta is used if it takes fewer bytes than the objects.
const (
	DeltasIfCheaper Deltas = iota
	DeltasNever
	DeltasAlways // it is an error if there is none
)

// PullOptions say what is pulled from a remote, beyond what ostree.Pull knows.
type PullOptions struct {
	ostree.PullOptions
	Deltas Deltas
	// TimestampCheck refuses a commit that was made before the one that the ref led to until now.
	TimestampCheck bool
}

// PullResult is what a pull has brought.
type PullResult struct {
	Commits []Pulled
	Bytes   int64 // that came, of everything
}

// Pulled is a commit that was pulled.
type Pulled struct {
	ostree.Pulled
	Signers []string // who has signed it, of those who are trusted
	Delta   string   // the name of the static delta that was used, ""
}

// Pull brings commits from the remote, by refs or by their checksums; without any, the branches of the configuration. Every commit is
// accepted by the trust of the remote, those before it included, whether it is here already or not.
func (r *Remote) Pull(ctx context.Context, into *repo.Repo, names []string, o PullOptions) (PullResult, error) {
	fail := func(err error) (PullResult, error) {
		return PullResult{}, fmt.Errorf("remote %q: %w", r.config.Name, err)
	}
	if len(names) == 0 {
		names = r.config.Branches
	}
	if len(names) == 0 {
		return fail(errors.New("say which refs are wanted: ostree list-refs names those that there are"))
	}
	o.Deltas = r.deltasFor(o.Deltas)
	if o.TimestampCheck {
		for _, name := range names {
			if err := r.checkTime(ctx, into, name); err != nil {
				return fail(fmt.Errorf("ref %q: %w", name, err))
			}
		}
	}
	r.keep = newKeeper(into)
	d := &prefetcher{r: r, into: into, names: names, o: o, used: map[ostree.Checksum]string{}}
	p := o.PullOptions
	p.InFlight = inFlight
	// What Metadata has handed out is accepted. It is asked for because this is set, also of a commit that is here.
	p.Verify = func(ostree.Checksum, []byte, []byte) error { return nil }
	if o.Deltas != DeltasNever {
		p.Prefetch = d.prefetch
		// What a delta does not make is in the commit that it begins with.
		for _, name := range names {
			bases, err := d.bases(ctx, name)
			if err != nil {
				return fail(err)
			}
			p.Base = append(slices.Clone(p.Base), bases...)
		}
	}
	list, err := ostree.Pull(ctx, into, r, names, p)
	if err != nil {
		return fail(err)
	}
	result := PullResult{Bytes: r.c.counters.Bytes.Load()}
	for _, one := range list {
		result.Commits = append(result.Commits, Pulled{one, r.Signers(one.Checksum), d.used[one.Checksum]})
	}
	return result, nil
}

// deltasFor returns whether deltas are used: not of this machine, where an object costs nothing to fetch, unless they must be.
func (r *Remote) deltasFor(d Deltas) Deltas {
	if r.local != nil && d == DeltasIfCheaper {
		return DeltasNever
	}
	return d
}

// checkTime compares the commit of a ref with the one that it leads to here.
func (r *Remote) checkTime(ctx context.Context, into *repo.Repo, name string) error {
	if ostree.IsChecksum(name) {
		return nil
	}
	old, err := ostree.Open(into, name)
	if errors.Is(err, repo.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	before, err := old.Commit(into)
	if err != nil {
		return err
	}
	sum, err := r.Ref(ctx, name)
	if err != nil {
		return err
	}
	c, err := r.Commit(ctx, sum)
	if err == nil {
		err = NotBefore(c, time.Unix(int64(before.Time), 0))
	}
	if err != nil {
		return fmt.Errorf("commit %v: %w", sum, err)
	}
	return nil
}
