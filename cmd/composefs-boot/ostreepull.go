package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

// remoteFlags are those of all commands that ask a web server.
type remoteFlags struct {
	config  string
	headers []string
	retries int
	keys    []string
}

func (f *remoteFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.config, "remote-config", "", "look for the remote in this `FILE` alone; keyrings are beside it")
	c.Flags().StringArrayVar(&f.headers, "http-header", nil, "send this header, `NAME=VALUE`, with each request")
	c.Flags().IntVar(&f.retries, "network-retries", remote.DefaultRetry.Attempts, "ask `N` times again before giving up")
	c.Flags().StringArrayVar(&f.keys, "gpg-key", nil, "trust the GPG keys in this `FILE`, besides those that are configured")
}

// store returns the remotes of the repository.
func (a *app) remotes() (*remote.Store, error) {
	path, err := a.path()
	if err != nil {
		return nil, err
	}
	return remote.NewStore(path, remote.DefaultSystem()), nil
}

// find returns the configuration of a remote, by its name, or its URL.
func (f *remoteFlags) find(s *remote.Store, name string) (*remote.Config, error) {
	switch {
	case strings.Contains(name, "://"):
		return remote.Anonymous(name, f.keys), nil
	case f.config == "":
		c, err := s.Get(name)
		if err == nil {
			c.TrustAlso(f.keys)
		}
		return c, err
	}
	list, err := remote.ParseConfigs(f.config)
	if err != nil {
		return nil, err
	}
	for _, c := range list {
		if c.Name == name {
			c.TrustAlso(f.keys)
			return c, nil
		}
	}
	return nil, fmt.Errorf("%s: remote %q: %w", f.config, name, remote.ErrUnknown)
}

// options returns what the flags say about how a remote is used.
func (f *remoteFlags) options(s *remote.Store, c *remote.Config) (remote.Options, error) {
	o := remote.Options{Headers: f.headers, Cache: s.Cache(c), Retry: remote.DefaultRetry, Counters: &remote.Counters{}}
	if f.retries < 0 {
		return o, usageError{fmt.Errorf("--network-retries %d: want a number of attempts", f.retries)}
	}
	o.Retry.Attempts = f.retries
	return o, nil
}

func (a *app) ostreeRemotePullCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pull REMOTE|URL [REF...]",
		Short: "Pull commits from an OSTree repository on a web server",
		Long: `Pull commits from an OSTree repository on a web server, and make their composefs images. REMOTE is one that ostree remote list shows, or
the URL of a repository in archive mode; of a repository of any mode on this machine, file:///PATH; or of a list of mirrors,
mirrorlist=URL or metalink=URL. REF is a ref, or the checksum of a commit; without any, the branches of the configuration are pulled. A ref
becomes the name of the commit here, when everything is durable.

Who may have signed the commits is configured with the remote: its keyring, or other keys. A remote that has keys has signed commits; all
others are refused. If nothing says whom to trust, say --gpg-key FILE; or --no-verify, which trusts whoever answers; or name the commit by
its checksum, which nobody can forge. A commit must be meant for the ref by which it is pulled, if it says for which it is.

Static deltas are used where they take fewer bytes than the objects. What the repository has of other commits is not fetched. A pull that
was interrupted goes on where it was, in the middle of a large file, too.`,
		Example: `  composefs-boot --repo r ostree remote add --gpg-import key.asc fedora https://ostree.example.org/repo
  composefs-boot --repo r ostree pull --bootable fedora my-os/stable
  composefs-boot --repo r ostree pull --gpg-key key.asc https://ostree.example.org/repo my-os/stable`,
		Args: between(1, 1<<20),
	}
	var f ostreePullFlags
	f.add(c)
	var rf commitFlags
	rf.add(c)
	noBindings := c.Flags().Bool("disable-verify-bindings", false, "take commits that are meant for another ref or collection")
	timestamps := c.Flags().BoolP("timestamp-check", "T", false, "refuse a commit that is older than the one that the ref leads to here")
	noDelta := c.Flags().Bool("no-delta", false, "use no static deltas")
	needDelta := c.Flags().Bool("require-delta", false, "an error if no static delta leads to the commit")
	c.MarkFlagsMutuallyExclusive("no-delta", "require-delta")
	c.RunE = func(c *cobra.Command, args []string) error {
		o := remote.PullOptions{TimestampCheck: *timestamps}
		switch {
		case *noDelta:
			o.Deltas = remote.DeltasNever
		case *needDelta:
			o.Deltas = remote.DeltasAlways
		}
		var err error
		if o.PullOptions, err = f.options(a); err != nil {
			return err
		}
		store, err := a.remotes()
		if err != nil {
			return err
		}
		config, err := rf.find(store, args[0])
		if err != nil {
			return err
		}
		ro, err := rf.options(store, config)
		if err != nil {
			return err
		}
		ro.NoBindings = *noBindings
		if ro.Trust, err = whomToTrust(config, store, rf.noVerify, args[1:]); err != nil {
			return err
		}
		return a.withRepo(func(r *repo.Repo) error { return a.ostreeRemotePull(c.Context(), r, config, args[0], args[1:], ro, o) })
	}
	return c
}

// whomToTrust returns who must have signed the commits of these names.
func whomToTrust(c *remote.Config, s *remote.Store, noVerify bool, names []string) (remote.Trust, error) {
	nobody := remote.Trust{Waived: true}
	if noVerify {
		return nobody, nil
	}
	trust, err := c.Trust(s.System())
	if !errors.Is(err, remote.ErrNoKeys) {
		return trust, err
	}
	if onlyChecksums(names) {
		return nobody, nil
	}
	return trust, fmt.Errorf("%w: say --gpg-key FILE, or --no-verify to trust whoever answers", err)
}

// onlyChecksums reports whether nothing but checksums is named, by which commits are known as well as by signatures.
func onlyChecksums(names []string) bool {
	for _, name := range names {
		if !ostree.IsChecksum(name) {
			return false
		}
	}
	return len(names) > 0
}

func (a *app) ostreeRemotePull(ctx context.Context, r *repo.Repo, config *remote.Config, from string, refs []string, ro remote.Options, o remote.PullOptions) error {
	rem, err := remote.Open(ctx, config, ro)
	if err != nil {
		return err
	}
	defer rem.Close()
	result, err := a.bringRemote(ctx, r, rem, from, refs, ro.Counters, o)
	if err != nil {
		return err
	}
	var list []ostree.Pulled
	var more []ostreeOrigin
	for _, c := range result.Commits {
		list = append(list, c.Pulled)
		more = append(more, ostreeOrigin{c.Signers, c.Delta})
	}
	if err := a.printPulled(r, list, more, o.PullOptions); err != nil || a.json {
		return err
	}
	fmt.Fprintf(a.out, "fetched %s in %d requests\n", cfsctlSize(result.Bytes), ro.Counters.Requests.Load())
	return nil
}

// bringRemote is Remote.Pull with progress on the terminal.
func (a *app) bringRemote(ctx context.Context, r *repo.Repo, rem *remote.Remote, from string, refs []string, counters *remote.Counters,
	o remote.PullOptions) (remote.PullResult, error) {
	p := a.startProgress(func() progressEvent {
		return progressEvent{What: fmt.Sprintf("pulling from %s, %d objects to come,", from, o.Progress.Pending.Load()),
			Files: o.Progress.Files.Load(), Bytes: counters.Bytes.Load()}
	})
	defer p.end()
	return rem.Pull(ctx, r, refs, o)
}

// ostreeOrigin is what is known of a commit that was pulled from a web server.
type ostreeOrigin struct {
	Signers []string `json:"signed_by"`       // none: nobody whom we know
	Delta   string   `json:"delta,omitempty"` // that was used
}

func (o ostreeOrigin) print(a *app) {
	if len(o.Signers) == 0 {
		fmt.Fprintln(a.out, "signed  not verified")
	}
	for _, s := range o.Signers {
		fmt.Fprintf(a.out, "signed  by %s\n", s)
	}
	if o.Delta != "" {
		fmt.Fprintf(a.out, "delta   %s\n", o.Delta)
	}
}

func (a *app) ostreeListRefsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "list-refs PATH|REMOTE|URL",
		Short: "List the refs of an OSTree repository",
		Long: `List the refs of the OSTree repository in the directory PATH, or of a remote or the one at a URL by its summary, with the commits that
they lead to. If the summary of a remote must be signed, it is verified.`,
		Example: `  composefs-boot ostree list-refs /ostree/repo
  composefs-boot ostree list-refs https://ostree.example.org/repo`,
		Args: exactly(1),
	}
	var rf remoteFlags
	rf.add(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		info, err := os.Stat(args[0])
		if err == nil && info.IsDir() || strings.HasPrefix(args[0], "/") || strings.HasPrefix(args[0], ".") {
			return a.listLocalRefs(args[0])
		}
		store, err := a.remotes()
		if err != nil {
			return err
		}
		config, err := rf.find(store, args[0])
		if err != nil {
			return err
		}
		o, err := rf.options(store, config)
		if err != nil {
			return err
		}
		// Nobody need have signed the commits, whose names alone are listed.
		if o.Trust, err = config.Trust(store.System()); err != nil && !errors.Is(err, remote.ErrNoKeys) {
			return err
		}
		o.Trust.Waived = true
		rem, err := remote.Open(c.Context(), config, o)
		if err != nil {
			return err
		}
		defer rem.Close()
		refs, err := rem.Refs(c.Context())
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		return a.printRefs(refs)
	}
	return c
}
