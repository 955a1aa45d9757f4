package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// ociImagesResult is what oci images prints as JSON.
type ociImagesResult struct {
	Images []ociImageEntry `json:"images"`
}

type ociImageEntry struct {
	Name         string  `json:"name"`
	Manifest     string  `json:"manifest_digest"`
	IsContainer  bool    `json:"is_container"`
	Architecture string  `json:"architecture"`
	OS           string  `json:"os"`
	Created      *string `json:"created"`
	Layers       int     `json:"layer_count"`
	Referrers    int     `json:"referrer_count"`
}

func (a *app) ociImagesCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "images",
		Short:   "List the tagged images",
		Long:    "List the tagged images, how many layers each has, and how many artifacts refer to it.",
		Example: "  composefs-boot --repo r oci images --json",
		Args:    exactly(0),
		RunE: func(*cobra.Command, []string) error {
			return a.withRepo(func(r *repo.Repo) error {
				list, err := oci.List(r)
				if err != nil {
					return err
				}
				result := ociImagesResult{Images: []ociImageEntry{}}
				var rows [][]string
				for _, i := range list {
					if i.Err != nil {
						fmt.Fprintf(a.err, "%s: %v\n", i.Name, i.Err)
						continue
					}
					e := ociImageEntry{Name: i.Name, Manifest: string(i.Image.Digest), IsContainer: i.Manifest.IsImage(),
						Architecture: i.Config.Architecture, OS: i.Config.OS, Layers: len(i.Manifest.Layers), Referrers: i.Referrers}
					if i.Config.Created != "" {
						e.Created = &i.Config.Created
					}
					result.Images = append(result.Images, e)
					architecture := e.Architecture
					if architecture == "" {
						architecture = "artifact"
					}
					digest := strings.TrimPrefix(e.Manifest, "sha256:")
					rows = append(rows, []string{e.Name, digest[:12], architecture, strconv.Itoa(e.Layers), strconv.Itoa(e.Referrers)})
				}
				if a.json {
					return printJSON(a.out, result)
				}
				if len(rows) == 0 {
					fmt.Fprintln(a.out, "No images found")
					return nil
				}
				printTable(a.out, []string{"NAME", "DIGEST", "ARCH", "LAYERS", "REFS"}, rows)
				return nil
			})
		},
	}
}

// ociInspectResult is what oci inspect prints. Manifest and config are texts, since their digests are those of the texts.
type ociInspectResult struct {
	Manifest  string   `json:"manifest"`
	Config    string   `json:"config"`
	Referrers []string `json:"referrers"`
	Erofs     *string  `json:"composefs_erofs"`
	BootErofs *string  `json:"composefs_boot_erofs"`
}

func (a *app) ociInspectCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "inspect IMAGE",
		Short: "Print manifest and config of an image",
		Long: `Print manifest, config, referrers and composefs images of an image as JSON, or of an artifact that is an index what is in it. IMAGE is
a tag, or the digest of a manifest with "@" before it; referrers are named by their digests.`,
		Example: `  composefs-boot --repo r oci inspect my-os
  composefs-boot --repo r oci inspect --config my-os | jq .rootfs`,
		Args: exactly(1),
	}
	manifest := c.Flags().Bool("manifest", false, "print the manifest alone, as it was pulled")
	config := c.Flags().Bool("config", false, "print the config alone, as it was pulled")
	c.MarkFlagsMutuallyExclusive("manifest", "config")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			i, err := oci.Open(r, args[0])
			if errors.Is(err, oci.ErrIndex) && !*config {
				return a.inspectIndex(r, args[0], *manifest)
			}
			if err != nil {
				return err
			}
			if *manifest || *config {
				text := i.ManifestJSON
				if *config {
					text = i.ConfigJSON
				}
				_, err := fmt.Fprintf(a.out, "%s\n", text)
				return err
			}
			referrers, err := referrersOf(r, i.Digest)
			if err != nil {
				return err
			}
			result := ociInspectResult{Manifest: string(i.ManifestJSON), Config: string(i.ConfigJSON), Referrers: referrers}
			format, err := a.erofsFormat(r)
			if err != nil {
				return usageError{err}
			}
			for _, l := range []struct {
				bootable bool
				to       **string
			}{{false, &result.Erofs}, {true, &result.BootErofs}} {
				if d, ok := i.Find(l.bootable, format, fstree.XattrsAllowlist); ok {
					text := d.String()
					*l.to = &text
				}
			}
			return printJSON(a.out, result)
		})
	}
	return c
}

// ociIndexResult is what oci inspect prints of an artifact that is an index.
type ociIndexResult struct {
	Index        string   `json:"index"`
	ArtifactType string   `json:"artifact_type"`
	Manifests    []string `json:"manifests"`
	Referrers    []string `json:"referrers"`
}

// inspectIndex prints an index that is named by its digest.
func (a *app) inspectIndex(r *repo.Repo, name string, textOnly bool) error {
	x, err := oci.OpenIndex(r, oci.Digest(strings.TrimPrefix(name, "@")))
	if err != nil {
		return err
	}
	if textOnly {
		_, err := fmt.Fprintf(a.out, "%s\n", x.JSON)
		return err
	}
	result := ociIndexResult{Index: string(x.JSON), ArtifactType: x.ArtifactType, Manifests: []string{}}
	for _, m := range x.Manifests {
		result.Manifests = append(result.Manifests, string(m.Digest))
	}
	if result.Referrers, err = referrersOf(r, x.Digest); err != nil {
		return err
	}
	return printJSON(a.out, result)
}

// referrersOf returns the digests of the artifacts that refer to an image.
func referrersOf(r *repo.Repo, image oci.Digest) ([]string, error) {
	list := []string{}
	referrers, err := oci.Referrers(r, image)
	for _, d := range referrers {
		list = append(list, string(d))
	}
	return list, err
}

// ociLayerResult is what oci layer --json prints.
type ociLayerResult struct {
	DiffID      string `json:"diffId"`
	Verity      string `json:"verity"`
	Size        int64  `json:"size"`
	Entries     int    `json:"entryCount"`
	Splitstream struct {
		Objects int   `json:"externalObjects"`
		Outside int64 `json:"externalSize"`
		Inline  int64 `json:"inlineSize"`
	} `json:"splitstream"`
}

func (a *app) ociLayerCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "layer DIFFID",
		Short: "Print a layer as the archive that it was",
		Long: `Print a layer as the archive that it was, uncompressed and bit for bit; or what is in it, as a composefs dumpfile; or, with
--json, how it is kept. DIFFID is the digest of the uncompressed archive, which the config names.`,
		Example: `  composefs-boot --repo r oci layer sha256:DIGEST | tar -tv
  composefs-boot --repo r oci layer --dumpfile sha256:DIGEST`,
		Args: exactly(1),
	}
	dump := c.Flags().Bool("dumpfile", false, "print the entries as a composefs dumpfile")
	c.RunE = func(_ *cobra.Command, args []string) error {
		id, err := oci.ParseDigest(args[0])
		if err != nil {
			return usageError{err}
		}
		return a.withRepo(func(r *repo.Repo) error {
			switch {
			case *dump && a.json:
				return usageError{errors.New("--dumpfile is no JSON: leave one of them out")}
			case a.json:
				info, err := oci.Layer(r, id, scan.Digests(r.Algorithm()))
				if err != nil {
					return err
				}
				result := ociLayerResult{DiffID: string(info.DiffID), Verity: info.Stream.String(), Size: info.Size, Entries: info.Entries}
				result.Splitstream.Objects, result.Splitstream.Outside = info.Objects, info.Outside
				result.Splitstream.Inline = info.Size - info.Outside
				return printJSON(a.out, result)
			case *dump:
				out := bufio.NewWriter(a.out)
				defer out.Flush()
				return oci.EachFile(r, id, scan.Digests(r.Algorithm()), func(path string, i *fstree.Inode, link string) error {
					i.Nlink = 1
					_, err := out.Write(dumpfile.AppendEntry(nil, path, i, link))
					return err
				})
			case isTerminal(a.out):
				return usageError{errors.New("the archive would go to the terminal: send standard output to a file or to tar")}
			}
			return oci.WriteLayer(a.out, r, id)
		})
	}
	return c
}

// ociTreeFlags say what becomes of the tree of an image.
type ociTreeFlags struct {
	bootable bool
	xattrs   string
}

func (o *ociTreeFlags) add(c *cobra.Command) {
	c.Flags().BoolVar(&o.bootable, "bootable", false, "make it bootable: SELinux labels, empty /boot and /sysroot")
	c.Flags().StringVar(&o.xattrs, "xattrs", fstree.XattrsAllowlist.String(),
		"extended attributes that are kept: allowlist-only, keep-user-xattrs or all")
}

// openOCI opens an image. It may be named by the digest of its config as well; then the layers are verified, unless verity, the second
// argument, names the config's stream, which vouches for them.
func openOCI(ctx context.Context, r *repo.Repo, args []string) (*oci.Image, error) {
	var i *oci.Image
	var err error
	digest, byDigest := strings.CutPrefix(args[0], "@")
	if byDigest {
		d, err := oci.ParseDigest(digest)
		if err != nil {
			return nil, usageError{err}
		}
		i, err = oci.OpenConfig(r, d)
		if errors.Is(err, repo.ErrNotFound) {
			i, err = oci.Open(r, args[0])
		}
		if err != nil {
			return nil, err
		}
	} else if i, err = oci.Open(r, args[0]); err != nil {
		return nil, err
	}
	switch {
	case len(args) == 2 && i.ConfigStream().String() != strings.ToLower(args[1]):
		return nil, fmt.Errorf("image %s: the stream of its config has digest %v, not %s", args[0], i.ConfigStream(), args[1])
	case len(args) == 1 && byDigest:
		if err := i.VerifyLayers(ctx, r); err != nil {
			return nil, err
		}
	}
	return i, nil
}

// ociTree makes the tree of an image from its layers, see openOCI.
func (a *app) ociTree(c *cobra.Command, r *repo.Repo, args []string, o ociTreeFlags) (*fstree.Tree, error) {
	mode, err := fstree.ParseXattrMode(o.xattrs)
	if err != nil {
		return nil, usageError{err}
	}
	i, err := openOCI(c.Context(), r, args)
	if err != nil {
		return nil, err
	}
	tree, err := i.Tree(c.Context(), r, scan.Digests(r.Algorithm()), oci.Limits{})
	if err == nil {
		err = tree.MakeContainerRoot(mode)
	}
	if err == nil && o.bootable {
		err = boot.Transform(tree, oci.Files(r))
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", args[0], err)
	}
	return tree, nil
}

func (a *app) ociDumpCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dump IMAGE [VERITY]",
		Short: "Print the file tree of an image as a composefs dumpfile",
		Long: `Print the file tree of an image as a composefs dumpfile. IMAGE is a tag, or the digest of a config or manifest with "@" before it;
VERITY is the digest that the stream of the config is to have.`,
		Example: "  composefs-boot --repo r oci dump --bootable my-os",
		Args:    between(1, 2),
	}
	var o ociTreeFlags
	o.add(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			tree, err := a.ociTree(c, r, args, o)
			if err != nil {
				return err
			}
			return dumpfile.Write(a.out, tree, dumpfile.Cfsctl)
		})
	}
	return c
}

func (a *app) ociComputeIDCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "compute-id IMAGE [VERITY]",
		Short: "Print the digest of an image's composefs image",
		Long: `Print the digest of an image's composefs image, which is computed from the layers; nothing is stored. IMAGE is a tag, or the digest
of a config or manifest with "@" before it; VERITY is the digest that the stream of the config is to have.`,
		Example: "  composefs-boot --repo r --erofs-version 2 oci compute-id --bootable my-os",
		Args:    between(1, 2),
	}
	var o ociTreeFlags
	o.add(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			return a.printDigest(r, func() (*fstree.Tree, error) { return a.ociTree(c, r, args, o) })
		})
	}
	return c
}

// printDigest prints the digest of the image of a tree that the repository keeps in another form.
func (a *app) printDigest(r *repo.Repo, make func() (*fstree.Tree, error)) error {
	format, err := a.erofsFormat(r)
	if err != nil {
		return usageError{err}
	}
	tree, err := make()
	if err != nil {
		return err
	}
	d, err := imageDigest(tree, format, r.Algorithm())
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(a.out, newImageResult(d, format))
	}
	fmt.Fprintln(a.out, d)
	return nil
}

// linkedImage is a composefs image as oci linked-erofs-images and oci pull print it.
type linkedImage struct {
	ID       string  `json:"id"`
	Bootable bool    `json:"bootable"`
	Version  int     `json:"version"`
	Xattrs   *string `json:"xattrMode"`
}

func linkedImages(i *oci.Image) []linkedImage {
	list := []linkedImage{}
	for _, l := range i.Linked {
		e := linkedImage{ID: l.Digest.String(), Bootable: l.Bootable, Version: 1}
		if l.Format == erofs.V2 {
			e.Version = 2
		}
		if l.Bootable {
			mode := l.Xattrs.String()
			e.Xattrs = &mode
		}
		list = append(list, e)
	}
	return list
}

func (a *app) ociLinkedCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "linked-erofs-images DIGEST",
		Short: "List the composefs images of the image that a composefs image was made of",
		Long: `List, as JSON, all composefs images that were made of the same image as the one with this digest. The image need not have a tag
any more.`,
		Example: "  composefs-boot --repo r oci linked-erofs-images DIGEST",
		Args:    exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			d, err := fsverity.ParseHex(args[0])
			if err != nil {
				return err
			}
			return a.withRepo(func(r *repo.Repo) error {
				i, err := oci.FindLinked(r, d)
				if err != nil {
					return err
				}
				return printJSON(a.out, linkedImages(i))
			})
		},
	}
}
