package main

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/extract"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// lsResult is what ls prints as JSON. Paths and targets are escaped as in the text.
type lsResult struct {
	Image   string    `json:"image"`
	Entries []lsEntry `json:"entries"`
}

type lsEntry struct {
	Path   string `json:"path"`
	Type   string `json:"type"`
	Mode   string `json:"mode"` // octal, permissions alone
	Nlink  uint32 `json:"nlink"`
	UID    uint32 `json:"uid"`
	GID    uint32 `json:"gid"`
	Size   uint64 `json:"size"`
	Device string `json:"device,omitempty"` // MAJOR:MINOR
	Mtime  string `json:"mtime"`
	Target string `json:"target,omitempty"`
	Object string `json:"object,omitempty"` // digest of a content that is not in the image

	name string
	kind uint32 // the whole mode
}

// lister lists directories of an image.
type lister struct {
	fsys      *erofs.FS
	out       *bufio.Writer
	names     bool
	recursive bool
	json      bool
	entries   []lsEntry // for JSON
}

func (a *app) lsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "ls IMAGE [PATH]",
		Short: "List a directory of an image",
		Long: `List a directory of an image, or a file, without mounting it. IMAGE is an image file, or else a ref or digest of the
repository. A line has the type and permissions, the number of links, the owner and group, the size or the device number, the
time, and the name. Symbolic links in PATH lead to files of the image.

Bytes of names that are not printable are shown as \xHH, a backslash as \\.`,
		Example: `  composefs-boot ls my-os.erofs /usr/bin
  composefs-boot --repo r ls -R --names my-os
  composefs-boot --repo r ls --json refs/my-os /etc`,
		Args: between(1, 2),
	}
	recursive := c.Flags().BoolP("recursive", "R", false, "list what is below, too; with --names, whole paths")
	names := c.Flags().Bool("names", false, "print names alone")
	c.RunE = func(_ *cobra.Command, args []string) error {
		i, err := a.openImage(args[0], "")
		if err != nil {
			return err
		}
		defer i.close()
		dir := "."
		if len(args) == 2 {
			dir = inImage(args[1])
		}
		if *recursive {
			// Only a whole tree is known to have an end: a directory of a bad image may be in itself.
			if _, err := i.tree(); err != nil {
				return err
			}
		}
		fsys, err := i.fs()
		if err != nil {
			return err
		}
		l := &lister{fsys: fsys, out: bufio.NewWriter(a.out), names: *names, recursive: *recursive, json: a.json, entries: []lsEntry{}}
		defer l.out.Flush() // what was printed before an error stays
		if err := l.list(dir); err != nil {
			return i.pathError(err)
		}
		if a.json {
			if err := printJSON(l.out, lsResult{i.name, l.entries}); err != nil {
				return err
			}
		}
		return l.out.Flush()
	}
	return c
}

// inImage returns a path as erofs.FS wants it. What leads out of the image ends at its root.
func inImage(name string) string {
	if name = path.Clean("/" + name)[1:]; name == "" {
		return "."
	}
	return name
}

// fs returns the image as a file system, in which contents are verified when they are opened.
func (i *image) fs() (*erofs.FS, error) {
	fsys, err := erofs.NewFS(i.file, i.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.name, err)
	}
	fsys.Objects = func(o *fstree.Object) (io.ReadCloser, error) { return i.objects.Open(o) }
	return fsys, nil
}

// pathError names the image and the path that an error of its file system is about.
func (i *image) pathError(err error) error {
	if e, ok := err.(*fs.PathError); ok {
		return fmt.Errorf("%s: %s: %w", i.name, fstree.Printable("/"+strings.TrimPrefix(e.Path, ".")), e.Err)
	}
	return fmt.Errorf("%s: %w", i.name, err)
}

// list lists a directory, or a file that is none.
func (l *lister) list(name string) error {
	info, err := l.fsys.Lstat(name)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		// A link to a directory stands for it, another one for itself.
		if target, err := l.fsys.Stat(name); err == nil && target.IsDir() {
			info = target
		}
	}
	if !info.IsDir() {
		return l.print([]lsEntry{newEntry(name, path.Base(name), info.Sys().(*fstree.Inode))})
	}
	return l.directory(name, true)
}

func (l *lister) directory(name string, first bool) error {
	list, err := l.fsys.ReadDir(name)
	if err != nil {
		return err
	}
	entries := make([]lsEntry, 0, len(list))
	for _, e := range list {
		if err := fstree.CheckName(e.Name()); err != nil {
			return &fs.PathError{Op: "readdir", Path: name, Err: err}
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		entries = append(entries, newEntry(path.Join(name, e.Name()), e.Name(), info.Sys().(*fstree.Inode)))
	}
	// Whole paths stand each before what is below them; other lines of a directory stand together.
	each := l.recursive && (l.names || l.json)
	if l.recursive && !each {
		if !first {
			l.out.WriteByte('\n')
		}
		fmt.Fprintf(l.out, "%s:\n", fstree.Printable("/"+strings.TrimPrefix(name, ".")))
	}
	if !each {
		if err := l.print(entries); err != nil || !l.recursive {
			return err
		}
	}
	for k, e := range list {
		if each {
			if err := l.print(entries[k : k+1]); err != nil {
				return err
			}
		}
		if e.IsDir() {
			if err := l.directory(path.Join(name, e.Name()), false); err != nil {
				return err
			}
		}
	}
	return nil
}

func newEntry(name, base string, i *fstree.Inode) lsEntry {
	e := lsEntry{
		Path: fstree.Printable("/" + name), Type: fstree.TypeName(i.Type()), Mode: fmt.Sprintf("%04o", i.Perm), Nlink: i.Nlink, UID: i.UID, GID: i.GID,
		Size: i.Size(), Mtime: time.Unix(i.Mtime.Sec, int64(i.Mtime.Nsec)).UTC().Format("2006-01-02T15:04:05.000000000Z07:00"),
		name: fstree.Printable(base), kind: i.Mode(),
	}
	switch c := i.Content.(type) {
	case fstree.Symlink:
		e.Target = fstree.Printable(string(c))
	case fstree.Device:
		e.Device = c.String()
	case *fstree.Object:
		e.Object = c.Digest.String()
	}
	return e
}

// print prints entries in columns.
func (l *lister) print(entries []lsEntry) error {
	if l.json {
		l.entries = append(l.entries, entries...)
		return nil
	}
	if l.names {
		for _, e := range entries {
			if l.recursive {
				e.name = e.Path
			}
			if _, err := fmt.Fprintln(l.out, e.name); err != nil {
				return err
			}
		}
		return nil
	}
	columns := func(e lsEntry) [4]string {
		return [4]string{number(e.Nlink), number(e.UID), number(e.GID), e.sizeOrDevice()}
	}
	var width [4]int
	for _, e := range entries {
		for k, text := range columns(e) {
			width[k] = max(width[k], len(text))
		}
	}
	for _, e := range entries {
		text := columns(e)
		name := e.name
		if e.kind&fstree.TypeMask == fstree.TypeSymlink {
			name += " -> " + e.Target
		}
		_, err := fmt.Fprintf(l.out, "%s %*s %*s %*s %*s %s %s\n", modeString(e.kind), width[0], text[0], width[1], text[1],
			width[2], text[2], width[3], text[3], e.Mtime, name)
		if err != nil {
			return err
		}
	}
	return nil
}

func number(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

func (e *lsEntry) sizeOrDevice() string {
	if e.Device != "" {
		return strings.Replace(e.Device, ":", ", ", 1)
	}
	return strconv.FormatUint(e.Size, 10)
}

// modeString returns type and permissions as ls does: "-rwsr-xr-x".
func modeString(mode uint32) string {
	s := []byte("?rwxrwxrwx")
	switch mode & fstree.TypeMask {
	case fstree.TypeDir:
		s[0] = 'd'
	case fstree.TypeRegular:
		s[0] = '-'
	case fstree.TypeSymlink:
		s[0] = 'l'
	case fstree.TypeBlock:
		s[0] = 'b'
	case fstree.TypeChar:
		s[0] = 'c'
	case fstree.TypeFifo:
		s[0] = 'p'
	case fstree.TypeSocket:
		s[0] = 's'
	}
	for k := range 9 {
		if mode>>(8-k)&1 == 0 {
			s[1+k] = '-'
		}
	}
	// Setuid, setgid and sticky stand where "x" does, in upper case where there is none.
	for k, letter := range [3]byte{'s', 's', 't'} {
		if mode>>(11-k)&1 == 1 {
			at := 3 + 3*k
			if s[at] == '-' {
				letter -= 'a' - 'A'
			}
			s[at] = letter
		}
	}
	return string(s)
}

// catFiles prints files of an image.
func (a *app) catFiles(name, objectsDir string, paths []string) error {
	i, err := a.openImage(name, objectsDir)
	if err != nil {
		return err
	}
	defer i.close()
	fsys, err := i.fs()
	if err != nil {
		return err
	}
	for _, p := range paths {
		if err := catFile(a.out, fsys, inImage(p)); err != nil {
			return i.pathError(err)
		}
	}
	return nil
}

func catFile(w io.Writer, fsys *erofs.FS, name string) error {
	f, err := fsys.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("is a directory (list it with: ls)")
	}
	if err == nil {
		err = extract.Copy(w, f, uint64(info.Size()))
	}
	if err != nil {
		return &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return nil
}
