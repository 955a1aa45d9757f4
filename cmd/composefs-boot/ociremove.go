package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// ociRemoveResult is what oci rm and oci untag print as JSON.
type ociRemoveResult struct {
	DryRun bool       `json:"dry_run"`
	Tags   []string   `json:"tags"`
	Frees  *oci.Freed `json:"frees,omitempty"` // of a dry run
}

// printRemoved says which tags are gone, or what would be free without them.
func (a *app) printRemoved(tags []string, frees *oci.Freed) error {
	if a.json {
		return printJSON(a.out, ociRemoveResult{frees != nil, append([]string{}, tags...), frees})
	}
	word := "Removed tag"
	if frees != nil {
		word = "Would remove tag"
	}
	for _, tag := range tags {
		fmt.Fprintln(a.out, word, tag)
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
				return a.printRemoved(frees.Tags, &frees)
			}
			if err := oci.Untag(c.Context(), r, args[0], a.lock()); err != nil {
				return err
			}
			return a.printRemoved(args, nil)
		})
	}
	return c
}

func (a *app) ociRemoveCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rm IMAGE...",
		Short: "Take all names of images away",
		Long: `Take all names of images away, and let go of the artifacts that refer to them. What nobody else needs is removed by gc. With
--dry-run nothing is done but to say what gc would free then, besides what it would free now.`,
		Example: `  composefs-boot --repo r oci rm my-os && composefs-boot --repo r gc
  composefs-boot --repo r oci rm --dry-run my-os`,
		Args: between(1, 1<<20),
	}
	dry := c.Flags().BoolP("dry-run", "n", false, "only say what would be free without the images")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			var images []oci.Digest
			for _, name := range args {
				i, err := oci.Open(r, name)
				if err != nil {
					return err
				}
				if !slices.Contains(images, i.Digest) {
					images = append(images, i.Digest)
				}
			}
			if *dry {
				frees, err := oci.RemoveFrees(c.Context(), r, images, a.lock())
				if err != nil {
					return err
				}
				return a.printRemoved(frees.Tags, &frees)
			}
			var removed []string
			for _, image := range images {
				tags, err := oci.Remove(c.Context(), r, image, a.lock())
				removed = append(removed, tags...)
				if err != nil {
					a.printRemoved(removed, nil)
					return err
				}
			}
			return a.printRemoved(removed, nil)
		})
	}
	return c
}
