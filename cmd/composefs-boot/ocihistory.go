package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// ociHistoryResult is what oci history prints as JSON: the newest step first.
type ociHistoryResult struct {
	Manifest string     `json:"manifest"`
	History  []oci.Step `json:"history"`
}

func (a *app) ociHistoryCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "history IMAGE",
		Short: "Print the steps by which an image was made",
		Long: `Print the steps by which an image was made, as its config tells them, the newest first, with the layers that they added: the size of
the archive, and of the blob that is downloaded. IMAGE is a tag, or the digest of a manifest with "@" before it.`,
		Example: `  composefs-boot --repo r oci history my-os
  composefs-boot --repo r --json oci history my-os | jq -r .history[].created_by`,
		Args: exactly(1),
	}
	full := c.Flags().Bool("no-trunc", false, "print whole digests and commands")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			i, err := oci.Open(r, args[0])
			if err != nil {
				return err
			}
			steps, err := i.History(r)
			if err != nil {
				return fmt.Errorf("image %s: %w", args[0], err)
			}
			slices.Reverse(steps)
			if a.json {
				return printJSON(a.out, ociHistoryResult{string(i.Digest), append([]oci.Step{}, steps...)})
			}
			var rows [][]string
			for _, s := range steps {
				digest, unpacked, blob := "", "", ""
				if s.Layer != nil {
					digest, unpacked, blob = string(s.Layer.DiffID), size(s.Layer.Size), size(s.Layer.Blob)
				}
				by := fstree.Printable(strings.Join(strings.Fields(s.CreatedBy), " "))
				if !*full {
					_, digest, _ = strings.Cut(digest, ":")
					digest = digest[:min(12, len(digest))]
					if text := []rune(by); len(text) > 60 {
						by = string(text[:59]) + "…"
					}
				}
				rows = append(rows, []string{fstree.Printable(s.Created), by, digest, unpacked, blob, fstree.Printable(s.Comment)})
			}
			printTable(a.out, []string{"CREATED", "CREATED BY", "LAYER", "SIZE", "BLOB", "COMMENT"}, rows)
			return nil
		})
	}
	return c
}

func (a *app) ociDiffCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "diff IMAGE IMAGE",
		Short: "Compare two images, and say what is to be downloaded for the second one",
		Long: `Compare the file trees of two images as diff does, with a line for each path that differs, and say what is to be downloaded for the
second one where the first one has been pulled: its layers, config and manifest that the first one does not have. Both images are in
the repository, named by tags or by digests with "@" before them. The exit code is 1 if the trees differ.`,
		Example: `  composefs-boot --repo r oci diff my-os:1 my-os:2
  composefs-boot --repo r oci diff --bootable --stat my-os:1 my-os:2`,
		Args: exactly(2),
	}
	var o ociTreeFlags
	o.add(c)
	stat := c.Flags().Bool("stat", false, "print numbers alone")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			images, sides := make([]*oci.Image, 2), make([]*side, 2)
			for k, name := range args {
				var err error
				if images[k], err = oci.Open(r, name); err != nil {
					return err
				}
				sides[k] = &side{name: name}
				if sides[k].tree, err = a.ociTree(c, r, []string{name}, o); err != nil {
					return err
				}
			}
			download := images[1].DownloadFrom(images[0])
			err := a.diff(sides[0], sides[1], *stat, &download)
			if !a.json {
				fmt.Fprintf(a.out, "download %s of %s, %d of %d layers\n", size(download.Bytes), size(download.Total), download.Layers, download.Of)
			}
			return err
		})
	}
	return c
}
