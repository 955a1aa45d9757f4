package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// ociPushResult is what oci push prints as JSON.
type ociPushResult struct {
	Manifest  string         `json:"manifest"`
	Same      bool           `json:"same_manifest"` // as in the repository
	Layers    []ociPushLayer `json:"layers"`
	Bytes     int64          `json:"bytes_new"`
	Referrers []oci.Digest   `json:"referrers"`
	Left      []oci.Digest   `json:"referrers_left"`
}

type ociPushLayer struct {
	Digest oci.Digest `json:"digest"`
	Was    oci.Digest `json:"digest_in_repository"`
	Size   int64      `json:"size"`
	How    string     `json:"how"`
}

func (a *app) ociPushCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "push IMAGE DEST",
		Aliases: []string{"export"},
		Short:   "Give an image back, with the digests that it had",
		Long: `Give an image to a registry or an OCI layout, and the artifacts that refer to it. DEST is docker://HOST/NAME:TAG or oci:DIR[:TAG];
other images in a layout stay. What is there is not given again. All that is given is verified, and its name comes last.

The digests are those that the image was pulled with. Layers that were not compressed are put together again bit for bit. Compressed
ones are given as they came if pull --keep-blobs has kept them. Otherwise they are compressed again, in the ways of the usual programs;
if none of them gives the bytes that the layer had, it is said that it becomes another blob, and the image gets another manifest,
whose digest is printed. Diff IDs and config, and so the composefs images, are the same then, but signatures are not valid for it, and
artifacts that refer to the image are left out. With --exact that is an error.`,
		Example: `  composefs-boot --repo r oci push my-os docker://registry.example/os:1
  composefs-boot --repo r oci push my-os oci:./layout:stable
  composefs-boot --repo r oci push --exact my-os oci:./layout`,
		Args: exactly(2),
	}
	var o oci.PushOptions
	var reached imageFlags
	reached.add(c)
	c.Flags().MarkHidden("platform") // there is one image
	c.Flags().BoolVar(&o.Exact, "exact", false, "give up rather than give the image another manifest")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			o.Lock = a.lock()
			return a.ociPush(c.Context(), r, args[0], args[1], reached, o)
		})
	}
	return c
}

func (a *app) ociPush(ctx context.Context, r *repo.Repo, name, dest string, f imageFlags, o oci.PushOptions) error {
	i, err := oci.Open(r, name)
	if err != nil {
		return err
	}
	target, err := transport.OpenTarget(ctx, dest, f.options())
	if err != nil {
		return err
	}
	defer target.Close()
	o.Progress, o.Retry = &oci.Progress{}, oci.DefaultRetry
	p := a.startProgress(func() progressEvent {
		return progressEvent{What: "pushing " + name, Bytes: o.Progress.Bytes.Load(), Total: o.Progress.Total.Load()}
	})
	result, err := oci.Push(ctx, r, i, target, o)
	p.end()
	if err != nil {
		return fmt.Errorf("%s to %s: %w", name, dest, err)
	}
	out := ociPushResult{Manifest: string(result.Digest), Same: result.Digest == i.Digest, Layers: []ociPushLayer{}, Bytes: result.Bytes,
		Referrers: append([]oci.Digest{}, result.Referrers...), Left: append([]oci.Digest{}, result.Left...)}
	for _, l := range result.Layers {
		out.Layers = append(out.Layers, ociPushLayer{l.Blob.Digest, l.Was.Digest, l.Blob.Size, l.How})
	}
	if a.json {
		return printJSON(a.out, out)
	}
	for _, l := range out.Layers {
		fmt.Fprintf(a.out, "layer    %s %s (%s)\n", l.Digest, size(l.Size), l.How)
	}
	for _, d := range out.Referrers {
		fmt.Fprintf(a.out, "referrer %s\n", d)
	}
	for _, d := range out.Left {
		fmt.Fprintf(a.out, "left out %s\n", d)
	}
	fmt.Fprintf(a.out, "manifest %s\n%s written to %s\n", out.Manifest, size(out.Bytes), dest)
	if !out.Same {
		fmt.Fprintf(a.out, "The manifest is another one: it was %s, but layers had to be made again with other bytes (oci pull --keep-blobs keeps them)\n", i.Digest)
	}
	if len(out.Left) > 0 {
		what := "the image that they refer to has another digest now"
		if out.Same {
			what = "they could be given with other digests only"
		}
		fmt.Fprintf(a.out, "%d artifacts were left out: %s\n", len(out.Left), what)
	}
	return nil
}

// ociCopyResult is what oci copy prints as JSON.
type ociCopyResult struct {
	Manifest       string   `json:"manifest"`
	ManifestVerity string   `json:"manifest_verity"`
	Config         string   `json:"config"`
	ConfigVerity   string   `json:"config_verity"`
	Tag            string   `json:"tag,omitempty"`
	Referrers      []string `json:"referrers"`
}

func (a *app) ociCopyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "copy IMAGE",
		Short: "Copy an image from another repository",
		Long: `Copy an image from another repository into this one, with the artifacts that refer to it, and make its composefs images: the one to
boot, too, if the other repository has it. The repositories may have different algorithms. Without --name the image has no tag, and is
removed by gc.`,
		Example: "  composefs-boot --repo r oci copy --from /other/repository my-os --name my-os",
		Args:    exactly(1),
	}
	from := c.Flags().String("from", "", "the other repository, by `PATH`")
	name := c.Flags().String("name", "", "tag the image with this `NAME`")
	share := c.Flags().Bool("zerocopy", false, "share the data of files with the other repository, where the file system can")
	c.MarkFlagRequired("from")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			other, err := repo.Open(*from, repo.Options{Upgrade: !a.noUpgrade})
			if err != nil {
				return err
			}
			defer other.Close()
			return a.ociCopy(c.Context(), other, r, args[0], *name, *share)
		})
	}
	return c
}

func (a *app) ociCopy(ctx context.Context, from, to *repo.Repo, image, name string, share bool) error {
	release, err := from.LockShared(ctx, a.lock())
	if err != nil {
		return err
	}
	defer release()
	i, err := oci.Open(from, image)
	if err != nil {
		return fmt.Errorf("%s: %w", from.Path(), err)
	}
	if share {
		if err := i.ShareObjects(ctx, from, to, a.lock()); err != nil {
			return err
		}
	}
	source := oci.NewStored(from, i.Digest)
	o := oci.PullOptions{Tag: name, KeepBlobs: len(i.Blobs) > 0, Lock: a.lock()}
	for _, l := range i.Linked {
		if l.Bootable {
			o.Transform = boot.Transform
		}
	}
	result, err := oci.Pull(ctx, to, source, o)
	if err != nil {
		return fmt.Errorf("%s: %w", from.Path(), err)
	}
	referrers, err := oci.PullReferrers(ctx, to, source, i.Digest, "", o)
	if err != nil {
		return fmt.Errorf("%s: %w", from.Path(), err)
	}
	copied := result.Image
	if a.json {
		out := ociCopyResult{string(copied.Digest), copied.Stream().String(), string(copied.ConfigDigest()), copied.ConfigStream().String(), name, []string{}}
		for _, d := range referrers {
			out.Referrers = append(out.Referrers, string(d))
		}
		return printJSON(a.out, out)
	}
	tagged := ""
	if name != "" {
		tagged = ", tagged as " + name
	}
	fmt.Fprintf(a.out, "Copied image %s from %s to destination repo%s\nManifest digest: %s\nManifest verity: %v\nConfig digest:   %s\nConfig verity:   %v\n",
		image, from.Path(), tagged, copied.Digest, copied.Stream(), copied.ConfigDigest(), copied.ConfigStream())
	return nil
}
