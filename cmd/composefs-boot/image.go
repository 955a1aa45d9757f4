package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/digestcache"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// treeFlags say what becomes of a directory that is read.
type treeFlags struct {
	bootable bool
	asIs     bool
	xattrs   string
	noCache  bool
	image    sourceFlags
}

func (t *treeFlags) add(c *cobra.Command, bootable bool) {
	if bootable {
		c.Flags().BoolVar(&t.bootable, "bootable", false, "make it bootable: SELinux labels, empty /boot and /sysroot")
	}
	c.Flags().BoolVar(&t.asIs, "no-propagate-usr-to-root", false,
		"take the tree as it is, with all extended attributes: do not make the root like /usr")
	c.Flags().StringVar(&t.xattrs, "xattrs", fstree.XattrsAllowlist.String(),
		"extended attributes that are kept: allowlist-only, keep-user-xattrs or all")
	c.Flags().BoolVar(&t.noCache, "no-cache", false, "read every file, also those that have not changed since they were read last")
}

// xattrMode returns which extended attributes are kept.
func (t *treeFlags) xattrMode() (fstree.XattrMode, error) {
	mode, err := fstree.ParseXattrMode(t.xattrs)
	if err != nil {
		return mode, usageError{err}
	}
	if t.asIs {
		mode = fstree.XattrsAll
	}
	return mode, nil
}

// cache returns the digests of the files below a directory that earlier runs have left, nil if there is no place for them.
func (t *treeFlags) cache(dir string, alg fsverity.Algorithm) *digestcache.Cache {
	home, err := os.UserCacheDir()
	var st unix.Stat_t
	if t.noCache || err != nil || unix.Stat(dir, &st) != nil {
		return nil
	}
	return digestcache.Open(filepath.Join(home, "composefs-boot", fmt.Sprintf("digests-%v-%x-%x", alg, st.Dev, st.Ino)), alg)
}

// read reads a directory, and hands contents to the sink.
func (a *app) read(ctx context.Context, dir string, sink fstree.Sink, cache *digestcache.Cache, t treeFlags) (*fstree.Tree, error) {
	mode, err := t.xattrMode()
	if err != nil {
		return nil, err
	}
	var counts scan.Progress
	p := a.startProgress(func() progressEvent {
		return progressEvent{What: "reading " + dir, Files: counts.Files.Load(), Bytes: counts.Bytes.Load()}
	})
	defer p.end()
	tree, err := scan.Dir(ctx, dir, sink, scan.Options{Xattrs: mode, Progress: &counts, Cache: cache})
	if err != nil {
		return nil, err
	}
	cache.Save() // without it the next run takes longer, no more
	if !t.asIs {
		if err := tree.MakeContainerRoot(mode); err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
	}
	return tree, nil
}

// bootable makes the tree bootable, if that is asked for.
func bootable(tree *fstree.Tree, open fstree.Open, dir string, t treeFlags) error {
	if !t.bootable {
		return nil
	}
	if err := boot.Transform(tree, open); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return nil
}

// compute returns the digest that the image of a directory or OCI image has; nothing is stored.
func (a *app) compute(ctx context.Context, name string, t treeFlags) (fsverity.Digest, erofs.Format, error) {
	r, err := a.openIfThere()
	if err != nil {
		return fsverity.Digest{}, 0, err
	}
	if r != nil {
		defer r.Close()
	}
	alg, err := a.algorithm(r)
	if err != nil {
		return fsverity.Digest{}, 0, usageError{err}
	}
	format, err := a.erofsFormat(r)
	if err != nil {
		return fsverity.Digest{}, 0, usageError{err}
	}
	source, err := a.openTree(ctx, name, nil, alg, t.image, "")
	if err != nil {
		return fsverity.Digest{}, 0, err
	}
	defer source.end()
	tree, err := source.readBootable(ctx, scan.Digests(alg), alg, t)
	if err != nil {
		return fsverity.Digest{}, 0, err
	}
	d, err := imageDigest(tree, format, alg)
	if err != nil {
		return d, 0, fmt.Errorf("%s: %w", name, err)
	}
	return d, format, nil
}

// imageDigest returns the digest that a tree's image has.
func imageDigest(tree *fstree.Tree, f erofs.Format, alg fsverity.Algorithm) (fsverity.Digest, error) {
	d := fsverity.NewDigester(alg)
	if err := erofs.Write(d, tree, f); err != nil {
		return fsverity.Digest{}, err
	}
	return d.Sum(), nil
}

// openIfThere opens the repository for its algorithm and format, for a command that does without one, too.
func (a *app) openIfThere() (*repo.Repo, error) {
	if a.noRepo || a.repo == "" && !a.user && !a.system {
		return nil, nil
	}
	return a.open()
}

// imageResult is what the commands print as JSON that make an image or its name.
type imageResult struct {
	Digest string `json:"digest"`
	Karg   string `json:"karg,omitempty"`
	Format string `json:"format,omitempty"`
	Name   string `json:"name,omitempty"`

	Objects *int   `json:"objects_new,omitempty"`
	Reused  *int   `json:"objects_reused,omitempty"`
	Bytes   *int64 `json:"bytes_new,omitempty"`
}

func newImageResult(d fsverity.Digest, f erofs.Format) imageResult {
	return imageResult{Digest: d.String(), Karg: argument(d, f), Format: f.String()}
}

func argument(d fsverity.Digest, f erofs.Format) string {
	if f == erofs.V2 {
		return karg.Make(d, 2, false).String()
	}
	return karg.Make(d, 1, false).String()
}

func (a *app) imageCommands() []*cobra.Command {
	var id, arg, dump, create treeFlags
	computeID := &cobra.Command{
		Use:   "compute-id PATH|IMAGE",
		Short: "Print the digest of a directory's image",
		Long: `Print the digest that the composefs image of a directory, an OCI image or an OSTree commit has. No repository is needed, and nothing
is stored; an OCI image or commit is unpacked to a temporary directory ($TMPDIR).

` + imageNames + "\n\n" + commitNames,
		Example: `  composefs-boot --no-repo compute-id --bootable ./tree
  composefs-boot --no-repo compute-id --bootable docker://registry.example/os:1
  composefs-boot --hash sha256 --erofs-version 2 compute-id ./tree`,
		Args: exactly(1),
		RunE: func(c *cobra.Command, args []string) error {
			d, f, err := a.compute(c.Context(), args[0], id)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, newImageResult(d, f))
			}
			fmt.Fprintln(a.out, d)
			return nil
		},
	}
	id.add(computeID, true)
	id.image.add(computeID)
	computeKarg := &cobra.Command{
		Use:   "compute-karg PATH|IMAGE",
		Short: "Print the kernel argument that boots a directory's image",
		Long: `Print the kernel argument that boots a directory's image. The image is always that of the bootable tree.

V0 and V1: composefs.digest=v1-sha512-12:DIGEST; V2: composefs=DIGEST.`,
		Example: "  composefs-boot --no-repo compute-karg ./tree > tree-cmdline",
		Args:    exactly(1),
		RunE: func(c *cobra.Command, args []string) error {
			arg.bootable = true
			d, f, err := a.compute(c.Context(), args[0], arg)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, newImageResult(d, f))
			}
			fmt.Fprintln(a.out, argument(d, f))
			return nil
		},
	}
	arg.add(computeKarg, false)
	arg.image.add(computeKarg)
	createDump := &cobra.Command{
		Use:     "create-dumpfile PATH|IMAGE",
		Short:   "Print a directory as a composefs dumpfile",
		Example: "  composefs-boot --no-repo create-dumpfile --bootable ./tree > tree.dump",
		Args:    exactly(1),
		RunE: func(c *cobra.Command, args []string) error {
			alg, err := a.algorithm(nil)
			if err != nil {
				return usageError{err}
			}
			if r, err := a.openIfThere(); err != nil {
				return err
			} else if r != nil {
				alg = r.Algorithm()
				r.Close()
			}
			source, err := a.openTree(c.Context(), args[0], nil, alg, dump.image, "")
			if err != nil {
				return err
			}
			defer source.end()
			tree, err := source.readBootable(c.Context(), scan.Digests(alg), alg, dump)
			if err != nil {
				return err
			}
			return dumpfile.Write(a.out, tree, dumpfile.Cfsctl)
		},
	}
	dump.add(createDump, true)
	dump.image.add(createDump)
	createImage := &cobra.Command{
		Use:   "create-image PATH|IMAGE [NAME]",
		Short: "Bring a directory into the repository and make its image",
		Long: `Bring the files of a directory, an OCI image or an OSTree commit into the repository, make the composefs image, and print its digest.

With a name the image stays when garbage is collected. An interrupted run leaves whole objects; the next one uses them. Of an OCI
image nothing but this is kept: oci pull also keeps its layers, manifest and config. Of a commit neither: see ostree pull-local.

` + imageNames + "\n\n" + commitNames,
		Example: `  composefs-boot --repo r create-image --bootable ./tree my-os
  composefs-boot --repo r --json create-image ./tree`,
		Args: between(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			name := ""
			if len(args) == 2 {
				name = args[1]
			}
			return a.createImage(c.Context(), args[0], name, create)
		},
	}
	create.add(createImage, true)
	create.image.add(createImage)
	importImage := &cobra.Command{
		Use:   "import-image NAME",
		Short: "Bring an image that is made already into the repository",
		Long: `Read an image from standard input and store it under a name. Its objects are not looked for: see fsck.

With --from-dumpfile standard input is a composefs dumpfile, and the image is made from it.`,
		Example: `  composefs-boot --repo r import-image my-os < image.erofs`,
		Args:    exactly(1),
	}
	fromDump := importImage.Flags().Bool("from-dumpfile", false, "standard input is a dumpfile")
	importImage.RunE = func(c *cobra.Command, args []string) error {
		return a.importImage(c.Context(), args[0], *fromDump)
	}
	return []*cobra.Command{computeID, computeKarg, createDump, createImage, importImage, a.dumpToImage(),
		a.imagesCommand(), a.imageObjectsCommand(), a.dumpFilesCommand()}
}

func (a *app) createImage(ctx context.Context, name, ref string, t treeFlags) error {
	return a.withRepo(func(r *repo.Repo) error {
		format, err := a.erofsFormat(r)
		if err != nil {
			return usageError{err}
		}
		i, err := r.Begin(ctx, a.lock())
		if err != nil {
			return err
		}
		defer i.Abort()
		known := t.cache(filepath.Join(r.Path(), "objects"), r.Algorithm())
		i.UseCache(known)
		source, err := a.openTree(ctx, name, r, r.Algorithm(), t.image, "")
		if err != nil {
			return err
		}
		defer source.end()
		tree, err := source.readBootable(ctx, i, r.Algorithm(), t)
		if err != nil {
			return err
		}
		d, err := i.PutImage(tree, format, ref)
		if err != nil {
			return err
		}
		if err := i.Commit(); err != nil {
			return err
		}
		known.Save()
		if a.json {
			result := newImageResult(d, format)
			stats := i.Stats()
			result.Name, result.Objects, result.Reused, result.Bytes = ref, &stats.Objects, &stats.Reused, &stats.Bytes
			return printJSON(a.out, result)
		}
		fmt.Fprintf(a.out, "%v:%v\n", d.Algorithm(), d)
		return nil
	})
}

func (a *app) importImage(ctx context.Context, name string, fromDump bool) error {
	return a.withRepo(func(r *repo.Repo) error {
		i, err := r.Begin(ctx, a.lock())
		if err != nil {
			return err
		}
		defer i.Abort()
		var d fsverity.Digest
		if fromDump {
			tree, err := dumpfile.Read(a.in)
			if err != nil {
				return err
			}
			format, err := a.erofsFormat(r)
			if err != nil {
				return usageError{err}
			}
			if d, err = i.PutImage(tree, format, name); err != nil {
				return err
			}
		} else if d, err = i.PutImageFile(a.in, name); err != nil {
			return err
		}
		if err := i.Commit(); err != nil {
			return err
		}
		if a.json {
			return printJSON(a.out, imageResult{Digest: d.String(), Name: name})
		}
		fmt.Fprintf(a.out, "%v:%v\n", d.Algorithm(), d)
		return nil
	})
}

// dumpToImage is the way from a dumpfile to an image without any repository.
func (a *app) dumpToImage() *cobra.Command {
	return &cobra.Command{
		Use:     "dump-to-image",
		Short:   "Make an image from a dumpfile, from standard input to standard output",
		Example: "  composefs-boot --erofs-version 1 dump-to-image < tree.dump > tree.erofs",
		Args:    exactly(0),
		RunE: func(c *cobra.Command, args []string) error {
			if isTerminal(a.out) {
				return usageError{errors.New("the image would go to the terminal: send standard output to a file")}
			}
			format, err := a.erofsFormat(nil)
			if err != nil {
				return usageError{err}
			}
			tree, err := dumpfile.Read(a.in)
			if err != nil {
				return err
			}
			return erofs.Write(a.out, tree, format)
		},
	}
}

// imagesResult is what images prints as JSON.
type imagesResult struct {
	Images []imageRef `json:"images"`
}

type imageRef struct {
	Name   string `json:"name"`
	Digest string `json:"digest"`
}

func (a *app) imagesCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "images",
		Short:   "List the named images",
		Example: "  composefs-boot --repo r images --json",
		Args:    exactly(0),
	}
	whole := c.Flags().Bool("no-trunc", false, "print whole digests")
	c.RunE = func(*cobra.Command, []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			refs, err := r.Images()
			if err != nil {
				return err
			}
			result := imagesResult{Images: []imageRef{}}
			var rows [][]string
			for _, ref := range refs {
				result.Images = append(result.Images, imageRef{ref.Name, ref.Target})
				digest := ref.Target
				if !*whole && len(digest) > 12 {
					digest = digest[:12]
				}
				rows = append(rows, []string{ref.Name, digest})
			}
			if a.json {
				return printJSON(a.out, result)
			}
			if len(rows) == 0 {
				fmt.Fprintln(a.out, "No images found")
				return nil
			}
			printTable(a.out, []string{"NAME", "DIGEST"}, rows)
			return nil
		})
	}
	return c
}

// imageObjectsResult is what image-objects prints as JSON.
type imageObjectsResult struct {
	Image   string   `json:"image"`
	Objects []string `json:"objects"`
}

func (a *app) imageObjectsCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "image-objects NAME",
		Short:   "List the objects of an image",
		Long:    "List the objects of an image, by its digest or by the name of a ref, with or without \"refs/\" before it.",
		Example: "  composefs-boot --repo r image-objects refs/my-os",
		Args:    exactly(1),
		RunE: func(c *cobra.Command, args []string) error {
			return a.withRepo(func(r *repo.Repo) error {
				tree, _, err := r.ReadImage(args[0])
				if err != nil {
					return err
				}
				out := bufio.NewWriter(a.out)
				defer out.Flush()
				result := imageObjectsResult{Image: args[0], Objects: []string{}}
				for _, d := range repo.Objects(tree) {
					result.Objects = append(result.Objects, d.String())
					if !a.json {
						fmt.Fprintf(out, "%v:%v\n", d.Algorithm(), d)
					}
				}
				if a.json {
					return printJSON(out, result)
				}
				return nil
			})
		},
	}
}

func (a *app) dumpFilesCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dump-files NAME [FILE...]",
		Short: "Print files of an image as a dumpfile does",
		Long:  "Print files of an image as a dumpfile does. Of a directory, everything below it is printed.",
		Example: `  composefs-boot --repo r dump-files refs/my-os /usr/lib/os-release
  composefs-boot --repo r dump-files --backing-path-only refs/my-os /usr/bin/bash`,
		Args: func(c *cobra.Command, args []string) error { return between(1, 1<<20)(c, args) },
	}
	backing := c.Flags().Bool("backing-path-only", false, "print where the content is: \"inline\", or the path of the object")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			tree, _, err := r.ReadImage(args[0])
			if err != nil {
				return err
			}
			out := bufio.NewWriter(a.out)
			defer out.Flush()
			for _, name := range args[1:] {
				if err := dumpFiles(out, tree, name, *backing); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return c
}

func dumpFiles(out io.Writer, tree *fstree.Tree, name string, backing bool) error {
	start := tree.Lookup(name)
	if start == nil {
		return fmt.Errorf("%s: no such file in the image", name)
	}
	name = "/" + strings.Trim(name, "/")
	first := map[*fstree.Inode]string{}
	one := func(path string, i *fstree.Inode) error {
		var line []byte
		switch content := i.Content.(type) {
		case fstree.Inline:
			line = fmt.Appendf(nil, "%s inline\n", path)
		case *fstree.Object:
			line = fmt.Appendf(nil, "%s %s\n", path, content.Payload())
		}
		if !backing {
			line = dumpfile.AppendEntry(nil, path, i, first[i])
		}
		if i.Dir() == nil && first[i] == "" {
			first[i] = path
		}
		_, err := out.Write(line)
		return err
	}
	if start.Dir() == nil {
		return one(name, start)
	}
	sub := &fstree.Tree{Root: start}
	return sub.Walk(func(path string, i *fstree.Inode) error {
		if path = strings.TrimSuffix(strings.TrimSuffix(name, "/")+path, "/"); path == "" {
			path = "/"
		}
		return one(path, i)
	})
}
