package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// ociRemoveResult is what oci rm and oci untag print as JSON.
type ociRemoveResult struct {
	DryRun    bool         `json:"dry_run"`
	Tags      []string     `json:"tags"`
	Referrers []oci.Digest `json:"referrers"`
	Frees     *oci.Freed   `json:"frees,omitempty"` // of a dry run
}

// printRemoved says which names are gone, or what would be free without them.
func (a *app) printRemoved(n oci.Names, frees *oci.Freed) error {
	result := ociRemoveResult{frees != nil, append([]string{}, n.Tags...), []oci.Digest{}, frees}
	for _, r := range n.Referred {
		if !slices.Contains(result.Referrers, r.Artifact) {
			result.Referrers = append(result.Referrers, r.Artifact)
		}
	}
	if a.json {
		return printJSON(a.out, result)
	}
	word := "Removed"
	if frees != nil {
		word = "Would remove"
	}
	for _, tag := range result.Tags {
		fmt.Fprintln(a.out, word, "tag", tag)
	}
	for _, d := range result.Referrers {
		fmt.Fprintln(a.out, word, "referrer", d)
	}
	if frees != nil {
		fmt.Fprintf(a.out, "Then gc frees %s: %d objects, %d images, %d streams\n", size(frees.Bytes), frees.Objects, frees.Images, frees.Streams)
	}
	return nil
}

func (a *app) ociUntagCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "untag NAME",
		Short: "Take a name away",
		Long: `Take a name away. An image that has no other name is removed by gc, with the artifacts that refer to it. With --dry-run nothing is
done but to say what gc would free then, besides what it would free now.`,
		Example: `  composefs-boot --repo r oci untag my-os:old && composefs-boot --repo r gc
  composefs-boot --repo r oci untag --dry-run my-os:old`,
		Args: exactly(1),
	}
	dry := c.Flags().BoolP("dry-run", "n", false, "only say what would be free without the name")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			if *dry {
				frees, err := oci.UntagFrees(c.Context(), r, args[0], a.lock())
				if err != nil {
					return err
				}
				return a.printRemoved(frees.Names, &frees)
			}
			if err := oci.Untag(c.Context(), r, args[0], a.lock()); err != nil {
				return err
			}
			return a.printRemoved(oci.Names{Tags: args}, nil)
		})
	}
	return c
}

func (a *app) ociRemoveCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm IMAGE...",
		Short: "Take all names of images away",
		Long: `Take all names of images away, and let go of the artifacts that refer to them. What nobody else needs is removed by gc. An artifact,
by its digest with "@" before it, is let go by the image that it refers to. With --dry-run nothing is done but to say what gc would free
then, besides what it would free now.`,
		Example: `  composefs-boot --repo r oci rm my-os && composefs-boot --repo r gc
  composefs-boot --repo r oci rm --dry-run my-os`,
		Args: between(1, 1<<20),
	}
	dry := c.Flags().BoolP("dry-run", "n", false, "only say what would be free without the images")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			var images []oci.Digest
			for _, name := range args {
				d, err := oci.Resolve(r, name)
				if err != nil {
					return err
				}
				if !slices.Contains(images, d) {
					images = append(images, d)
				}
			}
			if *dry {
				frees, err := oci.RemoveFrees(c.Context(), r, images, a.lock())
				if err != nil {
					return err
				}
				return a.printRemoved(frees.Names, &frees)
			}
			var removed oci.Names
			for _, image := range images {
				gone, err := oci.Remove(c.Context(), r, image, a.lock())
				removed.Tags, removed.Referred = append(removed.Tags, gone.Tags...), append(removed.Referred, gone.Referred...)
				if err != nil {
					a.printRemoved(removed, nil)
					return err
				}
			}
			if len(removed.Tags)+len(removed.Referred) == 0 {
				return fmt.Errorf("%s: it has no name, and refers to nothing here: gc removes it, unless an index has it", strings.Join(args, " "))
			}
			return a.printRemoved(removed, nil)
		})
	}
	return c
}
