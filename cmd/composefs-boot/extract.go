package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo/extract"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// extractResult is what extract prints as JSON.
type extractResult struct {
	Image       string `json:"image"`
	Directory   string `json:"directory"`
	DryRun      bool   `json:"dry_run"`
	Directories int    `json:"directories"`
	Files       int    `json:"files"`
	Bytes       uint64 `json:"bytes"`
	Symlinks    int    `json:"symlinks"`
	Devices     int    `json:"devices"` // whiteouts included
	Others      int    `json:"others"`  // pipes and sockets
	HardLinks   int    `json:"hard_links"`

	Cloned  int64         `json:"files_sharing_data"` // with their objects
	LeftOut extractMissed `json:"left_out"`
}

// extractMissed counts what could not be made as it is in the image.
type extractMissed struct {
	Owners  int64 `json:"owners"`
	SetID   int64 `json:"set_id_bits"`
	Devices int64 `json:"devices"`
	Xattrs  int64 `json:"xattrs"`
}

func (a *app) extractCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "extract IMAGE DIRECTORY [PATH...]",
		Short: "Write the files of an image into a directory",
		Long: `Write the files of an image into a directory that is new or empty, without mounting it. IMAGE is an image file, or else a ref
or digest of the repository. With paths, only these files, what is below them, and the directories they are in.

Every content is verified. Where the file system can, files share their data with their objects. Owners, devices, set-id
bits and the attributes trusted.* and security.* are for root alone: for others they are left out, and counted in a last line.
No symbolic link below the directory is followed, whatever is there.`,
		Example: `  composefs-boot --repo r extract my-os ./tree
  composefs-boot extract --objects r/objects my-os.erofs ./etc /etc
  composefs-boot --repo r extract --dry-run my-os ./tree`,
		Args: between(2, 1<<20),
	}
	objects := c.Flags().String("objects", "", "the `DIRECTORY` of objects [default: that of the repository]")
	force := c.Flags().Bool("force", false, "write into a directory that is not empty: files of the same names are replaced, others stay")
	dry := c.Flags().BoolP("dry-run", "n", false, "count, and write nothing")
	c.RunE = func(c *cobra.Command, args []string) error {
		i, err := a.openImage(args[0], *objects)
		if err != nil {
			return err
		}
		defer i.close()
		tree, err := i.tree()
		if err == nil && len(args) > 2 {
			tree, err = extract.Only(tree, args[2:])
			if err != nil {
				err = fmt.Errorf("%s: %w", i.name, err)
			}
		}
		if err != nil {
			return err
		}
		return a.extract(c.Context(), i, tree, args[1], *force, *dry)
	}
	return c
}

func (a *app) extract(ctx context.Context, i *image, tree *fstree.Tree, dir string, force, dry bool) error {
	there, err := checkTarget(dir, force)
	if err != nil {
		return err
	}
	result := countFiles(tree)
	result.Image, result.Directory, result.DryRun = i.name, dir, dry
	if !dry {
		if !there {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
		}
		x := &extract.Extraction{Objects: &i.objects, Root: os.Geteuid() == 0, Force: force}
		p := a.startProgress(func() progressEvent {
			return progressEvent{What: "writing " + dir, Files: x.Files.Load(), Bytes: x.Bytes.Load(), Total: int64(result.Bytes)}
		})
		err := x.Run(ctx, tree, dir)
		p.end()
		if err != nil {
			return err
		}
		result.Cloned = x.Cloned.Load()
		result.LeftOut = extractMissed{x.Owners.Load(), x.SetID.Load(), x.Devices.Load(), x.Xattrs.Load()}
	}
	if missed := result.LeftOut.String(); missed != "" {
		fmt.Fprintf(a.err, "left out, for want of privilege or of support by the file system: %s\n", missed)
	}
	if a.json {
		return printJSON(a.out, result)
	}
	fmt.Fprintln(a.out, result)
	return nil
}

func (r extractResult) String() string {
	verb := "wrote"
	if r.DryRun {
		verb = "would write"
	}
	return fmt.Sprintf("%s %d directories, %d files (%s), %d symlinks, %d devices, %d pipes and sockets, %d hard links",
		verb, r.Directories, r.Files, size(int64(r.Bytes)), r.Symlinks, r.Devices, r.Others, r.HardLinks)
}

func (m extractMissed) String() string {
	var parts []string
	for _, part := range []struct {
		n    int64
		what string
	}{{m.Owners, "the owners of %d files"}, {m.SetID, "the set-id bits of %d files"}, {m.Devices, "%d devices"}, {m.Xattrs, "%d extended attributes"}} {
		if part.n > 0 {
			parts = append(parts, fmt.Sprintf(part.what, part.n))
		}
	}
	return strings.Join(parts, ", ")
}

// checkTarget tells whether a directory is there, and refuses one that is not empty, unless it is to be written into.
func checkTarget(dir string, force bool) (there bool, err error) {
	f, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	names, err := f.Readdirnames(1)
	if err != nil && err != io.EOF {
		return false, fmt.Errorf("%s: %w", dir, errors.Unwrap(err))
	}
	if len(names) > 0 && !force {
		return false, fmt.Errorf("%s: not empty: name a new directory, or write into this one with --force", dir)
	}
	return true, nil
}

func countFiles(tree *fstree.Tree) extractResult {
	var r extractResult
	seen := map[*fstree.Inode]bool{}
	tree.Walk(func(_ string, i *fstree.Inode) error {
		if i.Dir() == nil {
			if seen[i] {
				r.HardLinks++
				return nil
			}
			seen[i] = true
		}
		switch i.Type() {
		case fstree.TypeDir:
			r.Directories++
		case fstree.TypeRegular:
			r.Files++
			r.Bytes += i.Size()
		case fstree.TypeSymlink:
			r.Symlinks++
		case fstree.TypeBlock, fstree.TypeChar:
			r.Devices++
		default:
			r.Others++
		}
		return nil
	})
	return r
}
