package extract

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// TarResult counts what is in an archive.
type TarResult struct {
	Entries int
	Bytes   uint64 // of contents
	Sockets int    // left out: tar has no type for them
}

// Tar writes a tree as a tar archive of PAX format, in the order of names. The same tree gives the same bytes. Memory does not
// grow with the size of files. Errors name the path.
func Tar(ctx context.Context, out io.Writer, tree *fstree.Tree, objects *Objects) (TarResult, error) {
	buffered := bufio.NewWriterSize(out, 1<<16)
	w := &tarWriter{out: tar.NewWriter(buffered), objects: objects, first: map[*fstree.Inode]string{}}
	err := tree.Walk(func(path string, inode *fstree.Inode) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.add(path, inode); err != nil {
			return fmt.Errorf("%s: %w", fstree.Printable(path), err)
		}
		return nil
	})
	if err == nil {
		err = w.out.Close()
	}
	if err == nil {
		err = buffered.Flush()
	}
	return w.result, err
}

// tarWriter writes a tree's files in the order in which it gets them.
type tarWriter struct {
	out     *tar.Writer
	objects *Objects
	first   map[*fstree.Inode]string // the first name of every file
	result  TarResult
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
		f, err := w.objects.Open(c)
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
	return Copy(w.out, content, i.Size())
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
