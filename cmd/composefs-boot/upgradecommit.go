package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

// commitUpgrade is what upgrade and switch print of an OSTree commit as JSON.
type commitUpgrade struct {
	Checksum string         `json:"checksum"`
	Signers  []string       `json:"signed_by"` // none: nobody whom we know, or it is not known yet
	Download *commitOffer   `json:"download,omitempty"`
	Pulled   *commitFetched `json:"pulled,omitempty"`
}

// commitOffer is what would be downloaded. Without sizes in the commit, and without a delta, that is not known.
type commitOffer struct {
	Known   bool   `json:"known"`
	Objects int    `json:"objects"`
	Bytes   int64  `json:"bytes"`
	Delta   string `json:"delta,omitempty"`
}

// commitFetched is what was downloaded.
type commitFetched struct {
	ostree.PullStats
	Bytes    int64  `json:"downloaded"` // of everything, as it came
	Requests int64  `json:"requests"`
	Delta    string `json:"delta,omitempty"`
}

// openCommits opens the repository of the commit. Remotes are those of the machine.
func (u *upgrade) openCommits(ctx context.Context, n commitName) (err error) {
	u.remotes = remote.NewStore(u.r.Path(), remote.System{})
	if u.h.flags.root == systemRoot {
		u.remotes = remote.NewStore(u.r.Path(), remote.DefaultSystem())
	}
	u.f.image.keepSummary = true
	u.commits, err = u.a.openCommits(ctx, n, u.remotes, u.f.image.commitFlags)
	return err
}

// lookCommit asks what is new. If that is nothing, nothing but the ref is fetched.
func (u *upgrade) lookCommit(ctx context.Context) error {
	from := u.commits
	to, err := from.peek(ctx)
	if err != nil {
		return err
	}
	if from.remote == nil {
		u.refspec = from.name.refspec()
	} else if u.refspec, err = u.refspecOf(u.remotes.NameFor); err != nil {
		return err
	}
	u.result.Commit = &commitUpgrade{Checksum: to.String()}
	next := u.h.Next()
	u.result.Same = next != nil && next.Origin.Commit == to.String() && next.Origin.Refspec == u.refspec
	if u.result.Same || from.remote == nil || !u.f.check && !u.f.dry {
		return nil
	}
	offer, err := from.remote.Look(ctx, u.r, from.name.ref, u.pullOptions())
	if err != nil {
		return u.older(err)
	}
	u.result.Commit = &commitUpgrade{Checksum: offer.Commit.String(), Signers: offer.Signers,
		Download: &commitOffer{offer.Known, offer.Objects, offer.Bytes, offer.Delta}}
	return nil
}

func (u *upgrade) refspecOf(name func(*remote.Config) (string, error)) (string, error) {
	where, err := name(u.commits.config)
	return commitName{where: where, ref: u.commits.name.ref}.refspec(), err
}

// pullOptions say how the commit is pulled. An upgrade does not go back: a server, or whoever answers in its place, could hand out a commit
// that was signed before its flaws were known. The booted system has what need not be fetched.
func (u *upgrade) pullOptions() remote.PullOptions {
	o := remote.PullOptions{TimestampCheck: u.again}
	if booted := u.booted.Origin.Commit; booted != "" {
		if _, err := ostree.Open(u.r, booted); err == nil {
			o.Base = []string{booted}
		}
	}
	return o
}

// older names the way out of a commit that is older.
func (u *upgrade) older(err error) error {
	if errors.Is(err, remote.ErrOlder) {
		return fmt.Errorf("%w: composefs-boot switch %v takes it", err, u.commits.name)
	}
	return err
}

// pullCommit brings the commit. The machine keeps what later upgrades need.
func (u *upgrade) pullCommit(ctx context.Context, from *treeSource) error {
	s := u.commits
	pulled, err := s.pull(ctx, u.r, !u.f.dry, u.pullOptions())
	if err != nil {
		return u.older(err)
	}
	from.commit = pulled.Stored
	c := u.result.Commit
	c.Checksum, c.Signers, c.Pulled = from.checksum(), pulled.Signers, &commitFetched{PullStats: pulled.Stats, Delta: pulled.Delta}
	if s.remote == nil {
		return nil
	}
	c.Pulled.Bytes, c.Pulled.Requests = s.o.Counters.Bytes.Load(), s.o.Counters.Requests.Load()
	if u.f.dry {
		return nil
	}
	u.refspec, err = u.refspecOf(func(c *remote.Config) (string, error) { return u.remotes.Adopt(c, remote.DefaultSystem()) })
	return err
}

func (a *app) printCommitUpgrade(c commitUpgrade) {
	fmt.Fprintf(a.out, "commit   %s\n", c.Checksum)
	for _, s := range c.Signers {
		fmt.Fprintf(a.out, "signed   by %s\n", s)
	}
	switch d := c.Download; {
	case d == nil:
	case !d.Known:
		fmt.Fprintln(a.out, "new      the commit, which does not say the sizes of its objects")
	case d.Delta != "":
		fmt.Fprintf(a.out, "new      %s, the delta %s\n", size(d.Bytes), d.Delta)
	default:
		fmt.Fprintf(a.out, "new      %s, %d objects\n", size(d.Bytes), d.Objects)
	}
	p := c.Pulled
	if p == nil {
		return
	}
	if p.Delta != "" {
		fmt.Fprintf(a.out, "delta    %s\n", p.Delta)
	}
	if p.Requests > 0 {
		fmt.Fprintf(a.out, "fetched  %s in %d requests\n", size(p.Bytes), p.Requests)
	}
	fmt.Fprintf(a.out, "pulled   %d new objects, %d metadata + %d files of %s\n", p.Metadata+p.Files, p.Metadata, p.Files, size(p.PullStats.Bytes))
}
