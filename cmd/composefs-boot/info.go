package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func (a *app) infoCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "composefs-info",
		Short: "Print what is in images, as the program composefs-info does",
		Long: `Print what is in composefs images, as composefs-info 1.0.8 does.

  ls               all names, with the targets of symlinks and the objects of files
  objects          the objects of all the images, sorted
  missing-objects  those of them that are not in the directory that --basedir names
  dump             the images as dumpfiles
  measure-file     the sha256 fs-verity digests of files of any kind

  --basedir=PATH   the directory of objects
  --filter=NAME    look at this entry of the root directory only; may be given several times`,
		Example: `  composefs-info ls tree.cfs
  composefs-info --basedir=objects missing-objects tree.cfs
  composefs-info --filter=etc dump tree.cfs
  composefs-info measure-file tree.cfs`,
	}
	return a.dropIn(c, "composefs-info [OPTION]... ls|objects|missing-objects|dump|measure-file FILE...",
		func(_ *cobra.Command, args []string, common []option) error { return a.info(args, common) })
}

func (a *app) info(args []string, common []option) error {
	basedir, filter := "", map[string]bool{}
	operands, err := getopt(args, append(common,
		option{"basedir", true, func(s string) error { basedir = s; return nil }},
		option{"filter", true, func(s string) error {
			filter[s] = true
			if strings.Contains(s, "/") {
				return fmt.Errorf("--filter %s: want the name of an entry of the root directory, without slashes", s)
			}
			return nil
		}},
	))
	if err != nil {
		return err
	}
	if len(operands) == 0 {
		return errors.New("no command: give ls, objects, missing-objects, dump or measure-file")
	}
	keep := func(name string) bool { return len(filter) == 0 || filter[name] }
	out := bufio.NewWriter(a.out)
	defer out.Flush() // what was printed before an error stays
	objects := map[string]bool{}
	each := func(*fstree.Tree, erofs.Format) error { return nil }
	switch operands[0] {
	case "ls":
		each = func(t *fstree.Tree, f erofs.Format) error { return list(out, t, f, keep) }
	case "dump":
		each = func(t *fstree.Tree, f erofs.Format) error {
			style := [...]dumpfile.Style{erofs.V0: dumpfile.InfoV0, erofs.V1: dumpfile.InfoV1, erofs.V2: dumpfile.InfoV2}[f]
			return dumpfile.WriteSome(out, t, style, keep)
		}
	case "objects", "missing-objects":
		each = func(t *fstree.Tree, _ erofs.Format) error { return addObjects(objects, t, keep) }
	case "measure-file":
	default:
		return fmt.Errorf("unknown command %q: want ls, objects, missing-objects, dump or measure-file", operands[0])
	}
	if len(operands) == 1 {
		return fmt.Errorf("%s: no file: give one or more", operands[0])
	}
	if operands[0] == "measure-file" {
		return measureFiles(out, operands[1:])
	}
	var store *os.File // nil: nothing is there
	if basedir != "" {
		if store, err = os.OpenFile(basedir, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			return fmt.Errorf("--basedir: %w", err)
		}
		defer store.Close()
	}
	for _, path := range operands[1:] {
		tree, format, err := readImage(path)
		if err == nil {
			err = each(tree, format)
		}
		if err != nil {
			return err
		}
	}
	for _, o := range slices.Sorted(maps.Keys(objects)) {
		if operands[0] == "objects" || !inStore(store, o) {
			fmt.Fprintln(out, o)
		}
	}
	return out.Flush()
}

func readImage(path string) (*fstree.Tree, erofs.Format, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	tree, format, err := erofs.Read(f, info.Size())
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", path, err)
	}
	return tree, format, nil
}

// walkSome is Tree.Walk for some entries of the root directory, without the root itself.
func walkSome(t *fstree.Tree, keep func(string) bool, f func(path string, i *fstree.Inode) error) error {
	return t.Walk(func(path string, i *fstree.Inode) error {
		if top, _, _ := strings.Cut(path[1:], "/"); top == "" || !keep(top) {
			return nil
		}
		return f(path, i)
	})
}

// list prints a name a line. What a file holds is told for the first of its names only. A V2 has no way to tell whiteouts
// from those that hide the object store: they are left out.
func list(w io.Writer, t *fstree.Tree, f erofs.Format, keep func(string) bool) error {
	seen := map[*fstree.Inode]bool{}
	var line []byte
	return walkSome(t, keep, func(path string, i *fstree.Inode) error {
		line = line[:0]
		for k, part := range strings.Split(path, " ") { // blanks stay what they are
			if k > 0 {
				line = append(line, ' ')
			}
			line = dumpfile.AppendEscaped(line, part)
		}
		switch c := i.Content.(type) {
		case fstree.Device:
			if f == erofs.V2 && !c.Block && c.Rdev == 0 {
				return nil
			}
		case *fstree.Directory:
			line = append(line, "/\t"...)
		case fstree.Symlink:
			if !seen[i] {
				line = dumpfile.AppendEscaped(append(line, "\t-> "...), string(c))
			}
		case *fstree.Object:
			if p := c.Payload(); p != "" && !seen[i] {
				line = dumpfile.AppendEscaped(append(line, "\t@ "...), p)
			}
		}
		seen[i] = true
		_, err := w.Write(append(line, '\n'))
		return err
	})
}

func addObjects(to map[string]bool, t *fstree.Tree, keep func(string) bool) error {
	return walkSome(t, keep, func(_ string, i *fstree.Inode) error {
		if o, ok := i.Content.(*fstree.Object); ok && o.Payload() != "" {
			to[o.Payload()] = true
		}
		return nil
	})
}

func inStore(store *os.File, object string) bool {
	var st unix.Stat_t
	return store != nil && unix.Fstatat(int(store.Fd()), strings.TrimLeft(object, "/"), &st, unix.AT_EMPTY_PATH) == nil
}

func measureFiles(w io.Writer, paths []string) error {
	for _, path := range paths {
		d, err := measureFile(path)
		if err != nil {
			return err
		}
		fmt.Fprintln(w, d)
	}
	return nil
}

// measureFile returns the digest that the kernel knows, or else the one that the kernel would make.
func measureFile(path string) (fsverity.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer f.Close()
	d, err := fsverity.Measure(f)
	switch {
	case errors.Is(err, fsverity.ErrNotEnabled), errors.Is(err, fsverity.ErrNotSupported):
		d, _, err = fsverity.OfReader(fsverity.SHA256, f)
	case err == nil && d.Algorithm() != fsverity.SHA256:
		err = fmt.Errorf("%s: fs-verity is enabled with a %v digest, and composefs-info knows sha256 alone", path, d.Algorithm())
	}
	return d, err
}
