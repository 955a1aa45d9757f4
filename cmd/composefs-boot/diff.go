package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// diffResult is what diff prints as JSON. Paths and values are escaped as in the text.
type diffResult struct {
	A           string         `json:"a"`
	B           string         `json:"b"`
	Same        bool           `json:"same"`
	Added       int            `json:"added"`
	Removed     int            `json:"removed"`
	Changed     map[string]int `json:"changed"`               // by the first attribute that differs
	Differences []difference   `json:"differences,omitempty"` // not with --stat
	SizesOnly   bool           `json:"sizes_only,omitempty"`  // the digests of the contents could not be compared
	Download    *oci.Download  `json:"download,omitempty"`    // of oci diff
}

type difference struct {
	Path      string      `json:"path"`
	Kind      fstree.Kind `json:"kind"`
	Attribute string      `json:"attribute,omitempty"`
	Xattr     string      `json:"xattr,omitempty"`
	Old       string      `json:"old"`
	New       string      `json:"new"`
}

func (a *app) diffCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "diff A B",
		Short: "Compare two trees: directories, images, dumpfiles",
		Long: `Compare two trees and print "same", or a line for each path that differs, with exit code 1:

  - PATH                         only in A
  + PATH                         only in B
  ~ PATH: mode 0644 -> 0755      the first that differs of type, mode, owner, mtime, xattr NAME, content, target, device,
                                 link (the other names of the file), nlink (their number)

Each of A and B is what is found under the name: a directory, an image file, a dumpfile, or else a ref or digest of the
repository. A directory is read as create-image would, with the same flags; two directories are read as they are, unless one
of these flags is given.

Contents are compared by digest: a directory is read with the algorithm of the other side. If two images have different
algorithms, only the sizes of contents are compared.`,
		Example: `  composefs-boot --repo r diff my-os ./tree --bootable
  composefs-boot diff old.erofs new.erofs --stat
  composefs-boot --json diff tree.dump ./tree --no-propagate-usr-to-root`,
		Args: exactly(2),
	}
	var t treeFlags
	t.add(c, true)
	stat := c.Flags().Bool("stat", false, "print numbers alone")
	c.RunE = func(c *cobra.Command, args []string) error {
		given := slices.ContainsFunc([]string{"bootable", "no-propagate-usr-to-root", "xattrs"}, c.Flags().Changed)
		one, two := &side{name: args[0]}, &side{name: args[1]}
		if err := a.readSides(c.Context(), one, two, t, given); err != nil {
			return err
		}
		return a.diff(one, two, *stat, nil)
	}
	return c
}

// anyTree is what a side may be, besides an image of the repository.
const anyTree = "directory, image file or dumpfile"

// side is one of the two trees.
type side struct {
	name string
	dir  bool // its tree is read when the algorithm is known
	tree *fstree.Tree
}

// readSides reads both trees; given tells that the flags say how to read directories.
func (a *app) readSides(ctx context.Context, one, two *side, t treeFlags, given bool) error {
	var wait sync.WaitGroup
	errs := make([]error, 2)
	for k, s := range []*side{one, two} {
		wait.Go(func() { errs[k] = a.readSide(s) })
	}
	wait.Wait()
	if err := cmp.Or(errs...); err != nil {
		return err
	}
	alg, err := a.directoryAlgorithm(one, two)
	if err != nil {
		return err
	}
	if one.dir && two.dir && !given {
		t.asIs = true
	}
	for _, s := range []*side{one, two} {
		if !s.dir {
			continue
		}
		if s.tree, err = a.read(ctx, s.name, scan.Digests(alg), t.cache(s.name, alg), t); err == nil {
			err = bootable(s.tree, scan.Files(s.name), s.name, t)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// readSide reads a side that is no directory.
func (a *app) readSide(s *side) error {
	info, err := os.Stat(s.name)
	switch {
	case errors.Is(err, os.ErrNotExist):
		r, err := a.repositoryWith(s.name, anyTree)
		if err != nil {
			return err
		}
		defer r.Close()
		f, err := openNamed(r, s.name, anyTree)
		if err != nil {
			return err
		}
		defer f.Close()
		return s.readFile(f)
	case err != nil:
		return err
	case info.IsDir():
		s.dir = true
		return nil
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s: neither a directory nor a regular file: want a directory, an image, a dumpfile, a ref or a digest", s.name)
	}
	f, err := os.Open(s.name)
	if err != nil {
		return err
	}
	defer f.Close()
	return s.readFile(f)
}

// readFile reads an image or a dumpfile.
func (s *side) readFile(f *os.File) error {
	var start [2]byte
	n, err := f.ReadAt(start[:], 0)
	if err != nil && err != io.EOF {
		return err
	}
	if string(start[:n]) == "/ " {
		if s.tree, err = dumpfile.Read(f); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		return nil
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if s.tree, _, err = erofs.Read(f, info.Size()); err != nil {
		return fmt.Errorf("%s: no dumpfile, which begins with \"/ \", and read as an image: %w", s.name, err)
	}
	return nil
}

// directoryAlgorithm is that of the side that is no directory, or else what flags and repository say.
func (a *app) directoryAlgorithm(one, two *side) (fsverity.Algorithm, error) {
	for _, s := range []*side{one, two} {
		if s.tree != nil {
			if list := s.tree.Algorithms(); len(list) > 0 {
				return list[0], nil
			}
		}
	}
	r, err := a.openIfThere()
	if err != nil {
		return 0, err
	}
	if r != nil {
		defer r.Close()
	}
	alg, err := a.algorithm(r)
	if err != nil {
		return 0, usageError{err}
	}
	return alg, nil
}

// diff compares the trees and prints what differs. Of OCI images it is known what is to be downloaded.
func (a *app) diff(one, two *side, stat bool, download *oci.Download) error {
	result := diffResult{A: one.name, B: two.name, Changed: map[string]int{}, Download: download}
	if x, y := one.tree.Algorithms(), two.tree.Algorithms(); len(x) > 0 && len(y) > 0 && !(len(x) == 1 && slices.Equal(x, y)) {
		result.SizesOnly = true
		fmt.Fprintf(a.err, "%s has digests of %v, %s of %v: contents with two algorithms are compared by size alone\n", one.name, x, two.name, y)
	}
	out := bufio.NewWriter(a.out)
	defer out.Flush()
	err := fstree.Diff(one.tree, two.tree, func(d fstree.Difference) error {
		path := fstree.Printable(d.Path)
		if d.Attribute == fstree.AttrLink {
			d.Old, d.New = fstree.Printable(d.Old), fstree.Printable(d.New)
		}
		sign := ""
		switch d.Kind {
		case fstree.Added:
			result.Added++
			sign = "+"
		case fstree.Removed:
			result.Removed++
			sign = "-"
		default:
			result.Changed[d.Attribute]++
		}
		switch {
		case stat:
		case a.json:
			result.Differences = append(result.Differences,
				difference{path, d.Kind, d.Attribute, fstree.Printable(d.Xattr), d.Old, d.New})
		case sign != "":
			fmt.Fprintf(out, "%s %s\n", sign, path)
		default:
			what := d.Attribute
			if d.Xattr != "" {
				what += " " + fstree.Printable(d.Xattr)
			}
			fmt.Fprintf(out, "~ %s: %s %s -> %s\n", path, what, d.Old, d.New)
		}
		return nil
	})
	if err != nil {
		return err
	}
	changed := 0
	for _, n := range result.Changed {
		changed += n
	}
	paths := result.Added + result.Removed + changed
	result.Same = paths == 0
	switch {
	case a.json:
		err = printJSON(out, result)
	case result.Same:
		_, err = fmt.Fprintln(out, "same")
	case stat:
		result.printStat(out, changed)
	}
	if err == nil {
		err = out.Flush()
	}
	if err == nil && !result.Same {
		err = fmt.Errorf("%s and %s differ in %d paths", one.name, two.name, paths)
	}
	return err
}

func (r *diffResult) printStat(w io.Writer, changed int) {
	fmt.Fprintf(w, "added %d\nremoved %d\nchanged %d\n", r.Added, r.Removed, changed)
	for _, attribute := range slices.Sorted(maps.Keys(r.Changed)) {
		fmt.Fprintf(w, "  %s %d\n", attribute, r.Changed[attribute])
	}
}
