package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

const commitPrefix = "ostree:"

const commitNames = `An OSTree commit is ostree:PATH:REF, in the repository in the directory PATH; ostree:URL:REF, in one on a web server; or
ostree:REMOTE:REF, in one that ostree remote list shows. REF is a ref or the checksum of a commit; in a directory, REMOTE:REF, too. Commits
from a web server are verified as by ostree pull. Of a commit, /usr/etc becomes /etc, and all extended attributes are kept.`

// isCommit reports whether the name of a source is that of an OSTree commit.
func isCommit(name string) bool { return strings.HasPrefix(name, commitPrefix) }

// commitName is the name of an OSTree commit, taken apart.
type commitName struct {
	local bool
	where string // path of a directory, if it is local, else a URL, or the name of a remote
	ref   string // or the checksum of a commit
}

func (n commitName) String() string { return commitPrefix + n.refspec() }

// refspec is the name as an origin has it.
func (n commitName) refspec() string { return n.where + ":" + n.ref }

// parseCommit takes the name of an OSTree commit apart. A path ends at the first colon, since refs may have one; a URL at the last one
// behind its host, since that may have a port.
func parseCommit(name string) (commitName, error) {
	text := strings.TrimPrefix(name, commitPrefix)
	wrong := usageError{fmt.Errorf("%s: want ostree:PATH:REF, ostree:URL:REF or ostree:REMOTE:REF: an OSTree repository, and a ref or checksum", name)}
	if scheme, rest, ok := strings.Cut(text, "://"); ok && !strings.ContainsAny(scheme, ":/") {
		host := strings.IndexByte(rest, '/')
		colon := strings.LastIndexByte(rest, ':')
		if host < 0 || colon < host || colon == len(rest)-1 {
			return commitName{}, wrong
		}
		return commitName{where: scheme + "://" + rest[:colon], ref: rest[colon+1:]}, nil
	}
	where, ref, ok := strings.Cut(text, ":")
	if !ok || where == "" || ref == "" {
		return commitName{}, wrong
	}
	info, err := os.Stat(where)
	return commitName{err == nil && info.IsDir() || remote.CheckName(where) != nil, where, ref}, nil
}

// rememberedCommit takes a refspec of an origin apart. Only an absolute path is one: what a directory is called that happens to be here,
// says nothing.
func rememberedCommit(refspec string) (commitName, error) {
	where, ref, ok := strings.Cut(refspec, ":")
	if !ok || where == "" || ref == "" {
		return commitName{}, fmt.Errorf("refspec %q in the origin: want REMOTE:REF", refspec)
	}
	return commitName{filepath.IsAbs(where), where, ref}, nil
}

// absolute makes the name one that can be remembered.
func (n commitName) absolute() (commitName, error) {
	if !n.local {
		return n, nil
	}
	path, err := filepath.Abs(n.where)
	n.where = path
	return n, err
}

// commitFlags say how OSTree repositories on web servers are reached, and whom they trust.
type commitFlags struct {
	remoteFlags
	noVerify    bool
	keepSummary bool // in the repository, for the next time
}

func (f *commitFlags) add(c *cobra.Command) {
	f.remoteFlags.add(c)
	c.Flags().BoolVar(&f.noVerify, "no-verify", false, "take commits that nobody whom we know has signed")
}

// remotesFor returns the remotes of the repository that the global flags name, or of r, which may be nil, with those of the machine.
func (a *app) remotesFor(r *repo.Repo) (*remote.Store, error) {
	switch {
	case a.repo != "" || a.user || a.system:
		return a.remotes()
	case r != nil:
		return remote.NewStore(r.Path(), remote.DefaultSystem()), nil
	}
	return remote.NewStore("", remote.DefaultSystem()), nil
}

// commitStore is an OSTree repository that is open.
type commitStore struct {
	a      *app
	name   commitName
	local  *ostree.Local
	remote *remote.Remote // nil: it is local
	config *remote.Config // of the remote
	o      remote.Options
}

// openCommits opens the repository that the commit is in. Remotes are those of the store.
func (a *app) openCommits(ctx context.Context, n commitName, store *remote.Store, f commitFlags) (*commitStore, error) {
	s := &commitStore{a: a, name: n}
	var err error
	if n.local {
		s.local, err = ostree.OpenLocal(n.where)
		return s, err
	}
	if s.config, err = f.find(store, n.where); err != nil {
		return nil, err
	}
	if s.o, err = f.options(store, s.config); err != nil {
		return nil, err
	}
	if !f.keepSummary {
		s.o.Cache = ""
	}
	if s.o.Trust, err = whomToTrust(s.config, store, f.noVerify, []string{n.ref}); err != nil {
		return nil, err
	}
	s.remote, err = remote.Open(ctx, s.config, s.o)
	return s, err
}

func (s *commitStore) close() {
	if s.remote != nil {
		s.remote.Close()
	} else {
		s.local.Close()
	}
}

// peek returns the commit that the name leads to, which nobody has verified yet.
func (s *commitStore) peek(ctx context.Context) (c ostree.Checksum, err error) {
	switch {
	case ostree.IsChecksum(s.name.ref):
		return ostree.ParseChecksum(s.name.ref)
	case s.remote != nil:
		c, err = s.remote.Peek(ctx, s.name.ref)
	default:
		c, err = s.local.Ref(ctx, s.name.ref)
	}
	if err != nil {
		err = fmt.Errorf("%v: %w", s.name, err)
	}
	return c, err
}

// pull brings the commit. It gets the name of the ref, if it is to stay.
func (s *commitStore) pull(ctx context.Context, r *repo.Repo, stay bool, o remote.PullOptions) (remote.Pulled, error) {
	fail := func(err error) (remote.Pulled, error) { return remote.Pulled{}, err }
	o.Lock, o.Progress = s.a.lock(), &ostree.Progress{}
	ref := s.name.ref
	if !stay && !ostree.IsChecksum(ref) {
		var c ostree.Checksum
		var err error
		if s.remote != nil {
			c, err = s.remote.Ref(ctx, ref)
		} else {
			c, err = s.local.Ref(ctx, ref)
		}
		if err != nil {
			return fail(fmt.Errorf("%v: %w", s.name, err))
		}
		ref = c.String()
	}
	if s.remote == nil {
		list, err := s.a.bringCommits(ctx, r, s.local, s.name.where, []string{ref}, o.PullOptions)
		if err != nil {
			return fail(err)
		}
		return remote.Pulled{Pulled: list[0]}, nil
	}
	result, err := s.a.bringRemote(ctx, r, s.remote, s.name.where, []string{ref}, s.o.Counters, o)
	if err != nil {
		return fail(err)
	}
	return result.Commits[0], nil
}

// upgradesFrom is where a machine gets its commits from.
type upgradesFrom struct {
	config *remote.Config
	ref    string
}

// targetCommit reads what --target-image names: it is not pulled, but whom to trust must be known now.
func (a *app) targetCommit(name string, r *repo.Repo, f commitFlags) (*upgradesFrom, error) {
	n, err := parseCommit(name)
	if err != nil {
		return nil, err
	}
	if n.local {
		return nil, usageError{fmt.Errorf("--target-image %s: want the URL of a repository, or a remote, which another machine can reach", name)}
	}
	store, err := a.remotesFor(r)
	if err != nil {
		return nil, err
	}
	config, err := f.find(store, n.where)
	if err != nil {
		return nil, err
	}
	if _, err := whomToTrust(config, store, f.noVerify, []string{n.ref}); err != nil {
		return nil, fmt.Errorf("--target-image: %w", err)
	}
	return &upgradesFrom{config, n.ref}, nil
}

// remember configures the remote in the repository of an installed system, and returns the refspec by which that upgrades. In a dry run
// nothing is written, and the repository may be nil. What is configured on the other machine itself is not known here.
func (u *upgradesFrom) remember(r *repo.Repo, dry bool) (string, error) {
	path := ""
	if r != nil {
		path = r.Path()
	}
	store := remote.NewStore(path, remote.System{})
	adopt := func() (string, error) { return store.Adopt(u.config, remote.DefaultSystem()) }
	if dry {
		adopt = func() (string, error) { return store.NameFor(u.config) }
	}
	name, err := adopt()
	return commitName{where: name, ref: u.ref}.refspec(), err
}

// readCommit makes the tree of the commit.
func (s *treeSource) readCommit(t treeFlags) (*fstree.Tree, error) {
	o, err := s.commit.Objects(s.repo)
	if err != nil {
		return nil, err
	}
	tree, err := o.Tree(ostree.RightNames)
	if err == nil && !t.asIs {
		err = ostree.PlaceEtc(tree)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return tree, nil
}
