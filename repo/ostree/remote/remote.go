// Package remote pulls OSTree commits from web servers: what they have, who has signed it, and how to get it when the network is bad.
//
// A repository in archive mode is files, so any web server will do: summary and refs/heads/REF say which commits there are;
// objects/xx/yyy.TYPE are the objects; deltas/ has static deltas. [Config] says where a remote is and whom it trusts, [Store] where
// that is kept, [Open] connects to it. A Remote is an [ostree.Source].
//
// # What is believed
//
// Nothing that comes is believed before it has its checksum, which ostree.Pull compares, and nothing leads to a checksum but a commit
// whose signature is good: Metadata hands out no commit that the Trust does not accept, parents included. A ref's commit must say
// that it is meant for the ref (ostree.ref-binding), if it says anything, and for the collection of the remote, if that has one:
// else a server could hand out a signed commit of another system, or of another branch.
//
// An old commit that is signed is still signed. NotBefore refuses those that are older than what is there.
//
// # The network
//
// Connections are used again, with HTTP/2 where the server knows it. What fails by chance is asked for again, with longer and longer
// waits: lost and silent connections, 5xx, 408, 429; Retry-After holds back all requests. A file that breaks off goes on where it
// broke, by range. Of several mirrors the first that has a file gives it; the one that works is asked first from then on. Sizes are
// bounded: a server may send without an end. The summary is kept, and comes again only when it has changed. A metalink says what the
// summary must be: a mirror that has another one is passed over.
//
// A repository on this machine, of any mode, is a remote by a URL of file, with the same trust: a disk that somebody has brought, say.
package remote

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// Options say how a remote is used.
type Options struct {
	Trust      Trust
	NoBindings bool     // commits may be meant for other refs and collections
	Headers    []string // of requests, NAME=VALUE
	Cache      string   // directory for the summary, see Store.Cache; "": it is not kept
	Retry      Retry
	Counters   *Counters // nil: nobody counts
}

// Remote is an OSTree repository on a web server. It is an ostree.Source.
type Remote struct {
	config *Config
	o      Options
	c      *client
	local  *ostree.Local // that has the contents, of a URL of file; nil: a server has them
	keep   *keeper       // nil: nothing is kept

	summaryOnce sync.Once
	summary     *summary.Summary
	summaryErr  error

	mu      sync.Mutex
	commits map[ostree.Checksum]*commit
	refs    map[string]ostree.Checksum // that were resolved: they stay what they were
}

// commit is a commit that has been verified.
type commit struct {
	once     sync.Once
	data     []byte
	detached []byte // nil: none
	signers  []string
	err      error
}

// Open connects to a remote. If it has a list of mirrors, that is read.
func Open(ctx context.Context, config *Config, o Options) (*Remote, error) {
	if err := config.Usable(); err != nil {
		return nil, err
	}
	fail := func(err error) (*Remote, error) { return nil, fmt.Errorf("remote %q: %w", config.Name, err) }
	if len(o.Trust.Commits) == 0 && !o.Trust.Waived {
		return fail(ErrNoKeys) // rather than to trust everybody because nobody has thought of it
	}
	c, err := newClient(config, o)
	if err != nil {
		return fail(err)
	}
	if c.meta, err = c.resolveMirrors(ctx, config.URL); err != nil {
		return fail(err)
	}
	c.content = c.meta
	if config.ContentURL != "" {
		if c.content, err = c.resolveMirrors(ctx, config.ContentURL); err != nil {
			return fail(err)
		}
	}
	r := &Remote{config: config, o: o, c: c, commits: map[ostree.Checksum]*commit{}, refs: map[string]ostree.Checksum{}}
	if u := c.content.urls[0]; u.Scheme == "file" {
		if r.local, err = ostree.OpenLocal(u.Path); err != nil {
			return fail(err)
		}
	}
	if c.meta.urls[0].Scheme == "file" {
		r.o.Cache = "" // it is here
	}
	return r, nil
}

// Close lets go of connections.
func (r *Remote) Close() {
	r.c.http.CloseIdleConnections()
	if r.local != nil {
		r.local.Close()
	}
}

// Ref returns the commit that a ref leads to, by the summary, or by the ref's own file. The commit has been verified, and is meant for
// the ref.
func (r *Remote) Ref(ctx context.Context, name string) (ostree.Checksum, error) {
	if err := summary.CheckRef(name); err != nil {
		return ostree.Checksum{}, err
	}
	r.mu.Lock()
	sum, ok := r.refs[name]
	r.mu.Unlock()
	if ok {
		return sum, nil
	}
	sum, err := r.ref(ctx, name)
	if err != nil {
		return sum, err
	}
	c, err := r.Commit(ctx, sum)
	if err == nil && !r.o.NoBindings {
		err = c.CheckBinding(name, r.config.CollectionID)
	}
	if err != nil {
		return sum, fmt.Errorf("commit %v: %w", sum, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refs[name] = sum
	return sum, nil
}

func (r *Remote) ref(ctx context.Context, name string) (ostree.Checksum, error) {
	s, err := r.Summary(ctx)
	if err != nil {
		return ostree.Checksum{}, err
	}
	if s != nil {
		if ref, ok := s.Lookup(r.config.CollectionID, name); ok {
			return ref.Commit, nil
		}
		if len(r.o.Trust.Summary) > 0 {
			return ostree.Checksum{}, fmt.Errorf("it is not in the summary: %w", ostree.ErrNotFound)
		}
	}
	text, err := r.c.get(ctx, r.c.meta, "refs/heads/"+name, 1<<10)
	if err != nil {
		return ostree.Checksum{}, err
	}
	return ostree.ParseChecksum(strings.TrimSpace(string(text)))
}

// Metadata implements ostree.Source. Of commits, it hands out those that the trust accepts.
func (r *Remote) Metadata(ctx context.Context, n ostree.ObjectName) ([]byte, error) {
	switch n.Kind {
	case ostree.KindCommit:
		c := r.commit(ctx, n.Checksum)
		return c.data, c.err
	case ostree.KindCommitMeta:
		c := r.commit(ctx, n.Checksum)
		if c.err == nil && c.detached == nil {
			return nil, fmt.Errorf("object %v: %w", n, ostree.ErrNotFound)
		}
		return c.detached, c.err
	}
	return r.c.get(ctx, r.c.meta, n.Path(true), ostree.MaxMetadata)
}

// File implements ostree.Source.
func (r *Remote) File(ctx context.Context, c ostree.Checksum) (*ostree.File, error) {
	if r.local != nil {
		return r.local.File(ctx, c)
	}
	b, err := r.keep.open(ctx, r.c, c)
	if err != nil {
		return nil, err
	}
	return ostree.OpenFilez(b)
}

// commit fetches and verifies a commit, once.
func (r *Remote) commit(ctx context.Context, sum ostree.Checksum) *commit {
	r.mu.Lock()
	c := r.commits[sum]
	if c == nil {
		c = &commit{}
		r.commits[sum] = c
	}
	r.mu.Unlock()
	c.once.Do(func() { c.err = r.fetchCommit(ctx, sum, c) })
	return c
}

func (r *Remote) fetchCommit(ctx context.Context, sum ostree.Checksum, c *commit) error {
	var missing error
	var both sync.WaitGroup
	both.Go(func() {
		path := ostree.ObjectName{Checksum: sum, Kind: ostree.KindCommitMeta}.Path(true)
		c.detached, missing = r.c.get(ctx, r.c.meta, path, ostree.MaxMetadata)
	})
	n := ostree.ObjectName{Checksum: sum, Kind: ostree.KindCommit}
	var err error
	c.data, err = r.c.get(ctx, r.c.meta, n.Path(true), ostree.MaxMetadata)
	both.Wait()
	if err == nil {
		err = n.Verify(c.data)
	}
	if errors.Is(missing, ostree.ErrNotFound) {
		c.detached, missing = nil, nil
	}
	if err = errors.Join(err, missing); err != nil {
		return err
	}
	return r.accept(sum, c)
}

// accept verifies a commit.
func (r *Remote) accept(sum ostree.Checksum, c *commit) error {
	s, err := sign.Parse(c.detached)
	if err == nil {
		c.signers, err = r.o.Trust.Commits.Verify(c.data, s)
	}
	if err != nil {
		return fmt.Errorf("commit %v of remote %q: %w", sum, r.config.Name, err)
	}
	return nil
}

// Commit returns a commit that the trust accepts.
func (r *Remote) Commit(ctx context.Context, sum ostree.Checksum) (*ostree.Commit, error) {
	c := r.commit(ctx, sum)
	if c.err != nil {
		return nil, c.err
	}
	return ostree.ParseCommit(c.data)
}

// Signers returns who has signed a commit, of those who are trusted: "gpg FINGERPRINT". There is none if nobody must have.
func (r *Remote) Signers(sum ostree.Checksum) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.commits[sum]; c != nil {
		return c.signers
	}
	return nil
}

// ErrOlder tells that a commit is older than the one that is there.
var ErrOlder = errors.New("older than what is there")

// NotBefore refuses a commit that was made before another one.
func NotBefore(c *ostree.Commit, t time.Time) error {
	if made := time.Unix(int64(c.Time), 0); made.Before(t) {
		return fmt.Errorf("it is of %s, %w, of %s", made.UTC().Format(time.RFC3339), ErrOlder, t.UTC().Format(time.RFC3339))
	}
	return nil
}
