package main

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// exportResult is what export prints as JSON.
type exportResult struct {
	Image   string `json:"image"`
	Output  string `json:"output"`
	Entries int    `json:"entries"`
	Bytes   uint64 `json:"bytes"`   // of contents
	Sockets int    `json:"sockets"` // left out
}

func (a *app) exportCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "export --tar IMAGE",
		Short: "Write an image as a tar archive",
		Long: `Write an image as a tar archive to standard output or a file. IMAGE is an image file, or else a ref or digest of the
repository. The same image gives the same bytes, whoever exports it.

The archive is of PAX format, in the order of names, with nanoseconds, extended attributes (SCHILY.xattr) and hard links;
whiteouts are character devices of number 0. Every content is verified before it is written. tar has no sockets: they are
left out, and counted in a last line.`,
		Example: `  composefs-boot --repo r export --tar my-os | tar -x --xattrs --xattrs-include='*' -C ./tree
  composefs-boot export --tar --objects r/objects -o my-os.tar my-os.erofs`,
		Args: exactly(1),
	}
	isTar := c.Flags().Bool("tar", false, "the format, the only one so far")
	output := c.Flags().StringP("output", "o", "", "write to this `FILE`")
	objects := c.Flags().String("objects", "", "the `DIRECTORY` of objects [default: that of the repository]")
	c.RunE = func(c *cobra.Command, args []string) error {
		switch {
		case !*isTar:
			return usageError{errors.New("no format: give --tar")}
		case *output == "" && a.json:
			return usageError{errors.New("the archive goes to standard output, where --json would print: name a file with -o")}
		case *output == "" && isTerminal(a.out):
			return usageError{errors.New("the archive would go to the terminal: redirect standard output, or name a file with -o")}
		}
		i, err := a.openImage(args[0], *objects)
		if err != nil {
			return err
		}
		defer i.close()
		return a.export(c.Context(), i, *output)
	}
	return c
}

func (a *app) export(ctx context.Context, i *image, output string) error {
	tree, err := i.tree()
	if err != nil {
		return err
	}
	out := a.out
	var file *os.File
	if output != "" {
		if file, err = os.Create(output); err != nil {
			return err
		}
		defer file.Close()
		out = file
	}
	buffered := bufio.NewWriterSize(out, 1<<16)
	w := &tarWriter{out: tar.NewWriter(buffered), objects: &i.objects, first: map[*fstree.Inode]string{}}
	err = tree.Walk(func(path string, inode *fstree.Inode) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.add(path, inode); err != nil {
			return fmt.Errorf("%s: %s: %w", i.name, printable(path), err)
		}
		return nil
	})
	if err == nil {
		err = w.out.Close()
	}
	if err == nil {
		err = buffered.Flush()
	}
	if err == nil && file != nil {
		err = file.Close()
	}
	if err != nil {
		// Half an archive is none. What is no file, as a pipe or /dev/stdout, stays.
		if info, statErr := os.Lstat(output); file != nil && statErr == nil && info.Mode().IsRegular() {
			os.Remove(output)
		}
		return err
	}
	if w.result.Sockets > 0 {
		fmt.Fprintf(a.err, "left out, since tar has no type for them: %d sockets\n", w.result.Sockets)
	}
	if a.json {
		w.result.Image, w.result.Output = i.name, output
		return printJSON(a.out, w.result)
	}
	return nil
}

// tarWriter writes a tree's files in the order in which it gets them.
type tarWriter struct {
	out     *tar.Writer
	objects *objects
	first   map[*fstree.Inode]string // the first name of every file
	result  exportResult
}

func (w *tarWriter) add(path string, i *fstree.Inode) error {
	if _, socket := i.Content.(fstree.Socket); socket {
		w.result.Sockets++
		return nil
	}
	h, err := tarHeader(path, i)
	if err != nil {
		return err
	}
	w.result.Entries++
	if i.Dir() == nil {
		if first, again := w.first[i]; again {
			h.Typeflag, h.Linkname, h.Size, h.PAXRecords = tar.TypeLink, first, 0, nil
			return w.out.WriteHeader(h)
		}
		w.first[i] = h.Name
	}
	var content io.Reader
	switch c := i.Content.(type) {
	case fstree.Inline:
		content = strings.NewReader(string(c))
	case *fstree.Object:
		f, err := w.objects.open(c)
		if err != nil {
			return err
		}
		defer f.Close()
		content = f
	}
	if err := w.out.WriteHeader(h); err != nil {
		return err
	}
	if content == nil {
		return nil
	}
	w.result.Bytes += i.Size()
	return copyContent(w.out, content, i.Size())
}

// xattrEscape is how GNU tar writes names of attributes that would end too early in a PAX record.
var xattrEscape = strings.NewReplacer("%", "%25", "=", "%3D")

// tarHeader returns the header of a file under the first of its names.
func tarHeader(path string, i *fstree.Inode) (*tar.Header, error) {
	h := &tar.Header{
		Format:  tar.FormatPAX,
		Name:    strings.TrimPrefix(path, "/"),
		Mode:    int64(i.Perm),
		Uid:     int(i.UID),
		Gid:     int(i.GID),
		ModTime: time.Unix(i.Mtime.Sec, int64(i.Mtime.Nsec)),
	}
	if h.ModTime.IsZero() {
		return nil, errors.New("a time that archive/tar takes for none: 0001-01-01")
	}
	for _, x := range i.Xattrs {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+xattrEscape.Replace(x.Name)] = string(x.Value)
	}
	switch c := i.Content.(type) {
	case *fstree.Directory:
		h.Typeflag = tar.TypeDir
		if h.Name += "/"; h.Name == "/" {
			h.Name = "./"
		}
	case fstree.Inline, *fstree.Object:
		h.Typeflag, h.Size = tar.TypeReg, int64(i.Size())
	case fstree.Symlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(c)
	case fstree.Device:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(c.Major()), int64(c.Minor())
		if c.Block {
			h.Typeflag = tar.TypeBlock
		}
	case fstree.Fifo:
		h.Typeflag = tar.TypeFifo
	}
	return h, nil
}
