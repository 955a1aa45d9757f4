package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

func (a *app) ostreeTagCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "tag COMMIT NAME",
		Short:   "Give a commit another name",
		Long:    "Give a commit another name. If another commit has the name, it loses it.",
		Example: "  composefs-boot --repo r ostree tag my-os/stable known-good",
		Args:    exactly(2),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRepo(func(r *repo.Repo) error {
				commit, err := ostree.Resolve(r, args[0])
				if err == nil {
					err = ostree.SetTag(c.Context(), r, commit, args[1], a.lock())
				}
				if err != nil {
					return err
				}
				fmt.Fprintf(a.out, "Tagged %s as %s\n", args[0], args[1])
				return nil
			})
		},
	}
}

// ostreeRemoveResult is what ostree rm and ostree untag print as JSON.
type ostreeRemoveResult struct {
	DryRun bool          `json:"dry_run"`
	Names  []string      `json:"names"`
	Frees  *ostree.Freed `json:"frees,omitempty"` // of a dry run
}

// printUntagged says which names are gone, or what would be free without them. cfsctl untag prints nothing.
func (a *app) printUntagged(names []string, frees *ostree.Freed) error {
	if a.json {
		return printJSON(a.out, ostreeRemoveResult{frees != nil, append([]string{}, names...), frees})
	}
	word := "Removed name"
	if frees != nil {
		word = "Would remove name"
	}
	if a.name != "cfsctl" {
		for _, name := range names {
			fmt.Fprintln(a.out, word, name)
		}
	}
	if frees != nil {
		fmt.Fprintf(a.out, "Then gc frees %s: %d objects, %d images, %d streams\n", size(frees.Bytes), frees.Objects, frees.Images, frees.Streams)
	}
	return nil
}

func (a *app) ostreeUntagCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "untag NAME",
		Short: "Take a name away",
		Long: `Take a name away. A commit that has no other name is removed by gc. With --dry-run nothing is done but to say what gc would free
then, besides what it would free now.`,
		Example: `  composefs-boot --repo r ostree untag my-os/old && composefs-boot --repo r gc
  composefs-boot --repo r ostree untag --dry-run my-os/old`,
		Args: exactly(1),
	}
	dry := c.Flags().BoolP("dry-run", "n", false, "only say what would be free without the name")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			if *dry {
				frees, err := ostree.UntagFrees(c.Context(), r, args, a.lock())
				if err != nil {
					return err
				}
				return a.printUntagged(frees.Tags, &frees)
			}
			if err := ostree.Untag(c.Context(), r, args[0], a.lock()); err != nil {
				return err
			}
			return a.printUntagged(args, nil)
		})
	}
	return c
}

func (a *app) ostreeRemoveCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm COMMIT...",
		Short: "Take all names of commits away",
		Long: `Take all names of commits away. What nobody else needs is removed by gc. With --dry-run nothing is done but to say what gc would free
then, besides what it would free now.`,
		Example: `  composefs-boot --repo r ostree rm my-os/old && composefs-boot --repo r gc
  composefs-boot --repo r ostree rm --dry-run my-os/old`,
		Args: between(1, 1<<20),
	}
	dry := c.Flags().BoolP("dry-run", "n", false, "only say what would be free without the commits")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			var commits []ostree.Checksum
			for _, name := range args {
				commit, err := ostree.Resolve(r, name)
				if err != nil {
					return err
				}
				if !slices.Contains(commits, commit) {
					commits = append(commits, commit)
				}
			}
			if *dry {
				frees, err := ostree.RemoveFrees(c.Context(), r, commits, a.lock())
				if err != nil {
					return err
				}
				return a.printUntagged(frees.Tags, &frees)
			}
			var removed []string
			for _, commit := range commits {
				names, err := ostree.Remove(c.Context(), r, commit, a.lock())
				removed = append(removed, names...)
				if err != nil {
					a.printUntagged(removed, nil)
					return err
				}
			}
			return a.printUntagged(removed, nil)
		})
	}
	return c
}
