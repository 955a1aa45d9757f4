package main

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// ostreeFsckResult is what ostree fsck prints as JSON.
type ostreeFsckResult struct {
	OK             bool              `json:"ok"`
	CommitsChecked int               `json:"commits_checked"`
	CommitsCorrupt int               `json:"commits_corrupted"`
	Errors         []string          `json:"errors"`
	Repo           fsckResult        `json:"repo"`
	Findings       []ostree.Finding  `json:"findings"`
	Partial        []ostree.Checksum `json:"partial"` // pulls of these have not come to an end
}

func (a *app) ostreeFsckCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "fsck [COMMIT]",
		Short: "Check the repository and the commits in it",
		Long: `Check the repository as fsck does, and that every commit that has a name, or the one that is named, has what it needs: commit, trees and
files with their checksums, composefs images. What is wrong is brought again by a pull of the commit, after its names are taken away.

The exit code is 1 if something is wrong; with --json it is 0 if the check itself could be done, and "ok" tells the outcome.`,
		Example: `  composefs-boot --repo r ostree fsck
  composefs-boot --repo r ostree fsck --metadata-only my-os/stable`,
		Args: between(0, 1),
	}
	metadataOnly := c.Flags().Bool("metadata-only", false, "do not look at the content of files")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			return a.ostreeFsck(c.Context(), r, ostree.FsckOptions{Ref: strings.Join(args, ""), MetadataOnly: *metadataOnly, Lock: a.lock()})
		})
	}
	return c
}

func (a *app) ostreeFsck(ctx context.Context, r *repo.Repo, o ostree.FsckOptions) error {
	var checked atomic.Int64
	p := a.startProgress(func() progressEvent { return progressEvent{What: "checking", Files: checked.Load()} })
	report, err := r.Fsck(ctx, repo.FsckOptions{MetadataOnly: o.MetadataOnly, Checked: &checked, Lock: o.Lock})
	var commits ostree.FsckReport
	if err == nil {
		commits, err = ostree.Fsck(ctx, r, o)
	}
	p.end()
	if err != nil {
		return err
	}
	errs := []string{}
	for _, f := range commits.Findings {
		errs = append(errs, f.String())
	}
	if a.json {
		return printJSON(a.out, ostreeFsckResult{report.OK() && len(errs) == 0, commits.Commits, commits.Bad, errs,
			newFsckResult(r, report, o.MetadataOnly), append([]ostree.Finding{}, commits.Findings...), append([]ostree.Checksum{}, commits.Partial...)})
	}
	err = a.printFsck(r, report, o.MetadataOnly, nil)
	fmt.Fprintf(a.out, "ostree commits: %d/%d ok\n", commits.Commits-commits.Bad, commits.Commits)
	for _, c := range commits.Partial {
		fmt.Fprintf(a.out, "partial: %v: a pull of it was interrupted; the next one goes on\n", c)
	}
	if len(errs) > 0 {
		fmt.Fprintf(a.out, "ostree errors: %d\n", len(errs))
		for _, e := range errs {
			fmt.Fprintln(a.out, "  -", e)
		}
		err = fmt.Errorf("%s: %w", r.Path(), errCorrupt)
	}
	return err
}
