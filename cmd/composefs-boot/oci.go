package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

func (a *app) ociCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "oci",
		Short: "Pull OCI images into the repository, look at them, give them back",
		Long: `Pull OCI images into the repository, look at them, and give them back. An image is named by its tag, or by a digest with "@" before it.

The repository keeps the manifest, the config and every layer, from which each can be had again bit for bit.`,
		Example: `  composefs-boot --repo r oci pull --bootable docker://registry.example/os:1 my-os
  composefs-boot --repo r oci images`,
	}
	c.AddCommand(a.ociPullCommand(), a.ociImagesCommand(), a.ociInspectCommand(), a.ociLayerCommand(), a.ociDumpCommand(),
		a.ociComputeIDCommand(), a.ociLinkedCommand(), a.ociTagCommand(), a.ociUntagCommand(), a.ociRemoveCommand(), a.ociFsckCommand(),
		a.ociImportLayerCommand(), a.ociMountCommand(), a.ociPrepareBootCommand(), a.ociPushCommand(), a.ociCopyCommand(),
		a.ociHistoryCommand(), a.ociDiffCommand())
	return c
}

// ociPullResult is what oci pull prints as JSON.
type ociPullResult struct {
	Manifest  string        `json:"manifest"`
	Config    string        `json:"config"`
	Verity    string        `json:"verity"` // of the manifest's stream
	Tag       string        `json:"tag"`
	Stats     oci.PullStats `json:"stats"`
	Images    []linkedImage `json:"images"`
	Karg      string        `json:"karg,omitempty"` // of the image to boot
	Referrers []oci.Digest  `json:"referrers"`
}

func (a *app) ociPullCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pull IMAGE [NAME]",
		Short: "Pull an image into the repository",
		Long: `Pull an image into the repository, make its composefs image, and tag it with a name, which is IMAGE if there is no other.

` + imageNames + `

Layers that are there are not read again. A pull from a registry that was interrupted goes on where it was, in the middle of a layer,
and of several pulls that want the same layer one brings it. The tag is set when everything is durable.

Artifacts that refer to the image, signatures for example, come along from a layout, and with --referrers from a registry; an index
comes with all its manifests. With --artifact-type, only those of one type do. They stay as long as the image. The signature policy of
the machine may reject them; that they are signed themselves it is not asked.

IMAGE may be the difference between two images, as oci-delta makes it: the new one is made of the old one, which has to be in the
repository. A pull that was interrupted goes on with the layers that are not complete.

With --keep-blobs, compressed layers are kept as they come, too, which takes as much space as was downloaded: then oci push gives them
back with the same digests, whoever compressed them. Layers that are there, but were not kept with any image, are read again for that;
of layers that a delta has no more of than the difference it is an error. If cfsctl pulls the same image into
the repository, it does not know of them: gc removes them, and another pull with --keep-blobs brings them again.

With --expected-digest the image to boot is looked for that has this digest, among the formats and the extended attributes that may
have been kept when it was made; it is an error if there is none, and the image gets no tag.`,
		Example: `  composefs-boot --repo r oci pull --bootable oci:./layout my-os
  composefs-boot --repo r oci pull docker://registry.example/os:1
  composefs-boot --repo r oci pull --platform linux/arm64 oci:./layout:latest my-os`,
		Args: between(1, 2),
	}
	bootable := c.Flags().Bool("bootable", false, "make an image to boot, too: SELinux labels, empty /boot and /sysroot")
	expected := c.Flags().String("expected-digest", "", "the `DIGEST` that the image to boot is to have (with --bootable)")
	keep := c.Flags().Bool("keep-blobs", false, "keep compressed layers as they come, too, so that oci push has their digests")
	var reached imageFlags
	reached.add(c)
	c.Flags().BoolVar(&reached.referrers, "referrers", false, "bring the artifacts that refer to the image from a registry, too")
	c.Flags().StringVar(&reached.artifactType, "artifact-type", "", "bring the artifacts of this `TYPE` that refer to the image, and no others")
	limit := c.Flags().Int64("max-layer-size", 64<<30, "give up when a layer has more than this number of `BYTES`, decompressed")
	c.RunE = func(c *cobra.Command, args []string) error {
		reached.referrers = reached.referrers || reached.artifactType != ""
		o := oci.PullOptions{Tag: args[len(args)-1], KeepBlobs: *keep, Limits: oci.Limits{Layer: *limit}}
		if a.format != "" {
			f, err := erofs.ParseFormat(a.format)
			if err != nil {
				return usageError{err}
			}
			o.Formats = []erofs.Format{f}
		}
		if *bootable {
			o.Transform = boot.Transform
		}
		if *expected != "" {
			if !*bootable {
				return usageError{errors.New("--expected-digest goes with --bootable")}
			}
			var err error
			if o.Expected, err = fsverity.ParseHex(*expected); err != nil {
				return usageError{fmt.Errorf("--expected-digest: %w", err)}
			}
		}
		return a.withRepo(func(r *repo.Repo) error { return a.ociPull(c.Context(), r, args[0], reached, o) })
	}
	return c
}

func (a *app) ociPull(ctx context.Context, r *repo.Repo, image string, f imageFlags, o oci.PullOptions) error {
	result, err := a.pull(ctx, r, image, f, o)
	if err != nil {
		return err
	}
	i, s := result.Image, result.Stats
	format := r.Format()
	if len(o.Formats) > 0 {
		format = o.Formats[0]
	}
	bootable, hasBoot := i.Find(true, format, fstree.XattrsAllowlist)
	hasBoot = hasBoot && o.Transform != nil
	for _, l := range i.Linked {
		if !o.Expected.IsZero() && l.Digest == o.Expected && l.Bootable {
			bootable, hasBoot, format = l.Digest, true, l.Format
		}
	}
	if a.json {
		out := ociPullResult{string(i.Digest), string(i.ConfigDigest()), i.Stream().String(), o.Tag, s, linkedImages(i), "",
			append([]oci.Digest{}, result.Referrers...)}
		if hasBoot {
			out.Karg = argument(bootable, format)
		}
		return printJSON(a.out, out)
	}
	fmt.Fprintf(a.out, "manifest %s\nconfig   %s\nverity   %v\ntagged   %s\n", i.Digest, i.ConfigDigest(), i.Stream(), o.Tag)
	fmt.Fprintf(a.out, "objects  %d new + %d already present objects; %s stored, %s inlined\n",
		s.Objects, s.Reused, cfsctlSize(s.Bytes), cfsctlSize(s.Inline))
	if hasBoot && o.Expected.IsZero() {
		fmt.Fprintf(a.out, "Boot image: %v\n", bootable)
	}
	for _, l := range i.Linked {
		if !o.Expected.IsZero() && l.Digest == o.Expected && l.Bootable {
			fmt.Fprintf(a.out, "Boot image: %v (xattr-mode=%v, format-version=%v)\n", l.Digest, l.Xattrs, strings.ToUpper(l.Format.String()))
		}
	}
	for _, d := range result.Referrers {
		fmt.Fprintf(a.out, "referrer %s\n", d)
	}
	return nil
}

// cfsctlSize prints a number of bytes as cfsctl does.
func cfsctlSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, k := float64(n)/1024, 0
	for f >= 1024 && k < 5 {
		f, k = f/1024, k+1
	}
	return fmt.Sprintf("%.2f %ciB", f, "KMGTPE"[k])
}

func (a *app) ociTagCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "tag DIGEST NAME",
		Short:   "Give an image another name",
		Long:    "Give an image another name, by the digest of its manifest. If another image has the name, it loses it.",
		Example: "  composefs-boot --repo r oci tag sha256:DIGEST my-os:stable",
		Args:    exactly(2),
		RunE: func(c *cobra.Command, args []string) error {
			d, err := oci.ParseDigest(strings.TrimPrefix(args[0], "@"))
			if err != nil {
				return usageError{err}
			}
			return a.withRepo(func(r *repo.Repo) error {
				if err := oci.SetTag(c.Context(), r, d, args[1], a.lock()); err != nil {
					return err
				}
				fmt.Fprintf(a.out, "Tagged %s as %s\n", d, args[1])
				return nil
			})
		},
	}
}

func (a *app) ociImportLayerCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "import-layer DIFFID [NAME]",
		Short: "Bring one layer into the repository",
		Long: `Read a layer from standard input and keep it under its diff ID, the digest of the uncompressed archive. It may be compressed with
gzip or zstd. With a name it stays when garbage is collected.`,
		Example: "  composefs-boot --repo r oci import-layer sha256:DIGEST base < layer.tar",
		Args:    between(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := oci.ParseDigest(args[0])
			if err != nil {
				return usageError{err}
			}
			return a.withRepo(func(r *repo.Repo) error {
				d, err := oci.ImportLayer(c.Context(), r, a.in, id, oci.Limits{}, a.lock(), args[1:]...)
				if err != nil {
					return err
				}
				fmt.Fprintf(a.out, "%v:%v\n", d.Algorithm(), d)
				return nil
			})
		},
	}
}

func (a *app) ociMountCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "mount IMAGE MOUNTPOINT",
		Short: "Mount the composefs image of an image",
		Long: `Mount the composefs image of an image, by its tag or the digest of its manifest. See composefs-boot mount for how it is mounted
and verified.`,
		Example: `  composefs-boot --repo r oci mount my-os /mnt
  composefs-boot --repo r oci mount --bootable --fuse yes my-os ~/my-os`,
		Args: exactly(2),
	}
	var o mountFlags
	o.add(c, a.name)
	bootable := c.Flags().Bool("bootable", false, "mount the image to boot")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := o.check(); err != nil {
			return err
		}
		return a.withRepo(func(r *repo.Repo) error {
			name := args[0]
			if _, err := oci.ParseDigest(name); err == nil {
				name = "@" + name
			}
			i, err := oci.Open(r, name)
			if err != nil {
				return err
			}
			format, err := a.erofsFormat(r)
			if err != nil {
				return usageError{err}
			}
			d, ok := i.Find(*bootable, format, fstree.XattrsAllowlist)
			if !ok {
				return fmt.Errorf("image %s has no composefs image of this kind: make it with oci pull%s", name,
					map[bool]string{true: " --bootable"}[*bootable])
			}
			return a.mount(c.Context(), r, d.String(), args[1], o)
		})
	}
	return c
}
