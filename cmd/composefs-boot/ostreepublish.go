package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/publish"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// ostreeSignResult is what ostree sign prints as JSON.
type ostreeSignResult struct {
	Commit  string   `json:"commit"`
	Schemes []string `json:"schemes"`
}

func (a *app) ostreeSignCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "sign COMMIT",
		Short: "Add signatures to a commit",
		Long: `Add signatures to a commit of the repository. Those that it has stay. ostree export writes them beside the commit.

` + signNames,
		Example: "  composefs-boot --repo r ostree sign --sign-key ed25519=secret.key my-os/stable",
		Args:    exactly(1),
	}
	var f signFlags
	f.add(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		signers, err := f.signers()
		if err != nil {
			return err
		}
		if len(signers) == 0 {
			return usageError{errors.New("want --sign-key SCHEME=FILE")}
		}
		return a.withRepo(func(r *repo.Repo) error { return a.ostreeSign(c.Context(), r, args[0], signers) })
	}
	return c
}

func (a *app) ostreeSign(ctx context.Context, r *repo.Repo, name string, signers []sign.Signer) error {
	s, err := ostree.Open(r, name)
	if err != nil {
		return err
	}
	objects, err := s.Objects(r)
	if err != nil {
		return err
	}
	data, err := objects.Metadata(ostree.ObjectName{Checksum: s.Checksum, Kind: ostree.KindCommit})
	if err != nil {
		return err
	}
	detached, err := s.Detached(r)
	if err == nil {
		detached, err = sign.Add(detached, data, signers...)
	}
	if err != nil {
		return err
	}
	if err := ostree.SetDetached(ctx, r, s, detached, a.lock()); err != nil {
		return err
	}
	result := ostreeSignResult{Commit: s.Checksum.String(), Schemes: schemesOf(signers)}
	if a.json {
		return printJSON(a.out, result)
	}
	fmt.Fprintf(a.out, "signed %s %v\n", result.Commit, result.Schemes)
	return nil
}

func schemesOf(signers []sign.Signer) []string {
	list := []string{}
	for _, s := range signers {
		list = append(list, s.Scheme())
	}
	return list
}

// ostreeExportFlags say where and how commits are written.
type ostreeExportFlags struct {
	init             bool
	mode, collection string
	refs             []string
	publish.Options
}

// ostreeExportResult is what ostree export prints as JSON.
type ostreeExportResult struct {
	Path string            `json:"path"`
	Mode ostree.Mode       `json:"mode"`
	Refs map[string]string `json:"refs"` // to commits
	publish.Result
}

func (a *app) ostreeExportCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "export PATH COMMIT...",
		Short: "Write commits into an OSTree repository",
		Long: `Write commits into the OSTree repository in the directory PATH, of any mode: archive for web servers, bare and bare-split-xattrs (which need
root), bare-user, bare-user-only. A COMMIT that is named by a ref gets that ref there, and others the refs of --ref. Signatures
are written beside the commits.

What the repository has is not written again. An export that is interrupted leaves a sound repository, and the next one goes on from there.
ostree summary tells readers what is new.`,
		Example: `  composefs-boot --repo r ostree export --init --mode archive /srv/ostree my-os/stable
  composefs-boot --repo r ostree export --depth 2 --ref my-os/testing /srv/ostree 6b4bf01e`,
		Args: between(2, 1<<20),
	}
	var f ostreeExportFlags
	flags := c.Flags()
	flags.BoolVar(&f.init, "init", false, "make the repository, if there is none")
	flags.StringVar(&f.mode, "mode", string(ostree.Archive), "`MODE` of a repository that is made")
	flags.StringVar(&f.collection, "collection-id", "", "collection of a repository that is made")
	flags.StringArrayVar(&f.refs, "ref", nil, "`REF` that is to lead to the commit, instead of its name here")
	flags.IntVar(&f.Depth, "depth", 0, "write this `NUMBER` of commits that came before, too, as far as they are here; -1 for all")
	flags.BoolVar(&f.AnyRef, "disable-verify-bindings", false, "write refs that the commits are not meant for, too: readers refuse them")
	flags.BoolVarP(&f.DryRun, "dry-run", "n", false, "count what would be written, and write nothing")
	c.RunE = func(c *cobra.Command, args []string) error {
		if f.Depth < -1 {
			return usageError{fmt.Errorf("--depth %d: want a number of commits, or -1 for all", f.Depth)}
		}
		if len(f.refs) > 0 && len(args) > 2 {
			return usageError{errors.New("--ref goes with one commit")}
		}
		if f.init && f.DryRun {
			return usageError{errors.New("--init makes a repository, and --dry-run nothing")}
		}
		return a.withRepo(func(r *repo.Repo) error { return a.ostreeExport(c.Context(), r, args[0], args[1:], f) })
	}
	return c
}

func (a *app) ostreeExport(ctx context.Context, r *repo.Repo, path string, names []string, f ostreeExportFlags) error {
	result := ostreeExportResult{Path: path, Refs: map[string]string{}}
	var items []publish.Item
	for _, name := range names {
		s, err := ostree.Open(r, name)
		if err != nil {
			return err
		}
		one := publish.Item{Commit: s, Refs: f.refs}
		if len(f.refs) == 0 && isTag(r, name) {
			one.Refs = []string{name}
		}
		for _, ref := range one.Refs {
			result.Refs[ref] = s.Checksum.String()
		}
		items = append(items, one)
	}
	if f.init {
		mode, err := ostree.ParseMode(f.mode)
		if err != nil {
			return usageError{err}
		}
		if _, err := publish.Init(path, mode, f.collection); err != nil {
			return err
		}
	}
	to, err := publish.Open(ctx, path, a.lock())
	if err != nil {
		return err
	}
	defer to.Close()
	f.Progress, f.Lock = &publish.Progress{}, a.lock()
	p := a.startProgress(func() progressEvent {
		return progressEvent{What: "writing to " + path, Files: f.Progress.Objects.Load(), Bytes: f.Progress.Bytes.Load()}
	})
	result.Result, err = to.Export(ctx, r, items, f.Options)
	p.end()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	result.Mode = to.Mode
	if a.json {
		return printJSON(a.out, result)
	}
	for _, c := range result.Commits {
		fmt.Fprintf(a.out, "commit  %v\n", c)
	}
	for _, item := range items {
		for _, ref := range item.Refs {
			fmt.Fprintf(a.out, "ref     %s -> %v\n", ref, item.Commit.Checksum)
		}
	}
	fmt.Fprintf(a.out, "objects %d metadata + %d files written, %d were there\n", result.Metadata, result.Files, result.Present)
	return nil
}

// isTag reports whether a commit was named by a name that it was given, and not by its checksum.
func isTag(r *repo.Repo, name string) bool {
	tags, err := ostree.Tags(r)
	for _, t := range tags {
		if t.Name == name {
			return err == nil
		}
	}
	return false
}

// ostreeSummaryResult is what ostree summary prints as JSON.
type ostreeSummaryResult struct {
	Path    string      `json:"path"`
	Refs    []ostreeRef `json:"refs"`
	Deltas  int         `json:"deltas"`
	Index   []string    `json:"index,omitempty"` // names of subsummaries
	Schemes []string    `json:"signed_with"`
}

func (a *app) ostreeSummaryCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "summary PATH",
		Short: "Write the summary of an OSTree repository",
		Long: `Write the file summary of the OSTree repository in the directory PATH: its refs and static deltas, by which readers on the network find
them. Without --sign-key, signatures of an older summary are removed: they are not of this one.

With --index, summary.idx and a smaller summary for each architecture that refs name are written besides, as flatpak reads them: who wants
the refs of one fetches no others, and who has had an earlier one fetches what has changed. Once it is there, it is kept in step.

` + signNames,
		Example: `  composefs-boot ostree summary --sign-key gpg=secret.gpg /srv/ostree
  composefs-boot ostree summary --index --sign-key gpg=secret.gpg /srv/flatpak`,
		Args: exactly(1),
	}
	var f signFlags
	f.add(c)
	index := c.Flags().Bool("index", false, "write an index of smaller summaries, too")
	dry := c.Flags().BoolP("dry-run", "n", false, "print what would be in it, and write nothing")
	c.RunE = func(c *cobra.Command, args []string) error {
		signers, err := f.signers()
		if err != nil {
			return err
		}
		return a.ostreeSummary(c.Context(), args[0], signers, *index, *dry)
	}
	return c
}

func (a *app) ostreeSummary(ctx context.Context, path string, signers []sign.Signer, index, dry bool) error {
	to, err := publish.Open(ctx, path, a.lock())
	if err != nil {
		return err
	}
	defer to.Close()
	now, err := sourceDate(time.Now())
	if err != nil {
		return err
	}
	s, err := to.Summarize(ctx, now)
	result := ostreeSummaryResult{Path: path, Refs: []ostreeRef{}, Schemes: schemesOf(signers)}
	if err == nil && !dry {
		result.Index, err = writeSummary(to, s, signers, index)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	result.Deltas = len(s.Deltas)
	for _, r := range s.Refs {
		c := ostree.Checksum(r.Commit).String()
		result.Refs = append(result.Refs, ostreeRef{r.Name, c})
		if !a.json {
			fmt.Fprintf(a.out, "%s %s\n", c, r.Name)
		}
	}
	if a.json {
		return printJSON(a.out, result)
	}
	fmt.Fprintf(a.out, "%d refs, %d static deltas\n", len(result.Refs), result.Deltas)
	if len(result.Index) > 0 {
		fmt.Fprintf(a.out, "index for %s\n", strings.Join(result.Index, ", "))
	}
	return nil
}

// writeSummary writes a summary, and the index if it is wanted or there is one. It returns the names of the subsummaries.
func writeSummary(to *publish.Repository, s *summary.Summary, signers []sign.Signer, index bool) ([]string, error) {
	if err := to.WriteSummary(s, signers...); err != nil {
		return nil, err
	}
	there, err := to.Indexed()
	if err != nil || !there && !index {
		return nil, err
	}
	x, err := to.WriteIndex(s, signers...)
	if err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(x.Subsummaries)), nil
}
