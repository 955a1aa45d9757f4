package ostree

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// Mode says how a repository keeps content objects.
type Mode string

// The modes. In each, an object is the file objects/xx/yyy.file, but for the archive.
const (
	// Archive: objects/xx/yyy.filez, the header with the size and the content compressed with raw deflate. For web servers.
	Archive Mode = "archive-z2"
	// Bare: a file with the owner, mode and extended attributes that the object says.
	Bare Mode = "bare"
	// BareUser: a file of whoever made the repository, with the metadata in the extended attribute user.ostreemeta, in the form of a
	// dirmeta. The content of a symbolic link is its target.
	BareUser Mode = "bare-user"
	// BareUserOnly: a file with the mode alone. The owner is root, and there are no extended attributes.
	BareUserOnly Mode = "bare-user-only"
	// BareSplitXattrs: a file with owner and mode; beside it, yyy.file-xattrs-link has the extended attributes.
	BareSplitXattrs Mode = "bare-split-xattrs"
)

// ParseMode reads the name of a mode.
func ParseMode(s string) (Mode, error) {
	if s == "archive" {
		return Archive, nil
	}
	for _, m := range []Mode{Archive, Bare, BareUser, BareUserOnly, BareSplitXattrs} {
		if s == string(m) {
			return m, nil
		}
	}
	return "", fmt.Errorf("unknown mode %q of an OSTree repository", s)
}

// maxParents is how many repositories may be behind each other.
const maxParents = 8

// Local is an OSTree repository on this machine, opened for reading. It is a Source.
type Local struct {
	Path   string
	Mode   Mode
	Config Keyfile

	root    *os.Root
	objects *os.File
	parent  *Local // has objects that this one has not; nil: none
}

// OpenLocal opens a repository.
func OpenLocal(path string) (*Local, error) { return openLocal(path, 0) }

func openLocal(path string, depth int) (*Local, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	l := &Local{Path: path, root: root}
	if err := l.open(depth); err != nil {
		l.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return l, nil
}

func (l *Local) open(depth int) error {
	text, err := l.root.ReadFile("config")
	if errors.Is(err, os.ErrNotExist) {
		return errors.New("not an OSTree repository: no file config in it")
	}
	if err != nil {
		return err
	}
	if l.Config, err = ParseKeyfile(text); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if version, _ := l.Config.Get("core", "repo_version"); version != "1" {
		return fmt.Errorf("config: repo_version=%.20s: want 1", version)
	}
	mode, _ := l.Config.Get("core", "mode")
	if mode == "" {
		mode = string(Bare)
	}
	if l.Mode, err = ParseMode(mode); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if l.objects, err = l.root.Open("objects"); err != nil {
		return err
	}
	if up, ok := l.Config.Get("core", "parent"); ok && up != "" {
		if depth == maxParents {
			return fmt.Errorf("config: parent=%s: more than %d repositories behind each other", up, maxParents)
		}
		if !filepath.IsAbs(up) {
			up = filepath.Join(l.Path, up)
		}
		l.parent, err = openLocal(up, depth+1)
	}
	return err
}

// Close closes the repository.
func (l *Local) Close() error {
	if l.parent != nil {
		l.parent.Close()
	}
	if l.objects != nil {
		l.objects.Close()
	}
	return l.root.Close()
}

// openObject opens a file below objects/, with more flags.
func (l *Local) openObject(path string, flags int) (*os.File, error) {
	fd, err := l.descriptor(path, flags)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (l *Local) descriptor(path string, flags int) (int, error) {
	path = strings.TrimPrefix(path, "objects/")
	for {
		fd, err := unix.Openat(int(l.objects.Fd()), path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		switch err {
		case unix.EINTR:
			continue
		case nil:
			return fd, nil
		case unix.ENOENT:
			return -1, fmt.Errorf("%s: objects/%s: %w", l.Path, path, ErrNotFound)
		}
		return -1, &os.PathError{Op: "open", Path: filepath.Join(l.Path, "objects", path), Err: err}
	}
}

// Metadata reads a commit, dirtree, dirmeta or detached metadata.
func (l *Local) Metadata(ctx context.Context, n ObjectName) ([]byte, error) {
	f, err := l.openObject(n.Path(false), unix.O_RDONLY)
	if errors.Is(err, ErrNotFound) && l.parent != nil {
		return l.parent.Metadata(ctx, n)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, MaxMetadata)
}

func readAll(f *os.File, limit int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s: %d bytes: want a regular file of at most %d", f.Name(), info.Size(), limit)
	}
	b := make([]byte, info.Size())
	_, err = io.ReadFull(f, b)
	return b, err
}

// Partial reports whether a commit is known to lack objects: a pull of it has not ended.
func (l *Local) Partial(c Checksum) bool {
	_, err := l.root.Lstat("state/" + c.String() + ".commitpartial")
	return err == nil
}

// File opens a content object.
func (l *Local) File(ctx context.Context, c Checksum) (*File, error) {
	f, err := l.file(c)
	if errors.Is(err, ErrNotFound) && l.parent != nil {
		return l.parent.File(ctx, c)
	}
	return f, err
}

func (l *Local) file(c Checksum) (*File, error) {
	path := ObjectName{c, KindFile}.Path(l.Mode == Archive)
	if l.Mode == Archive {
		fd, err := l.descriptor(path, unix.O_RDONLY)
		if err != nil {
			return nil, err
		}
		z, err := openFilez(fd)
		if err != nil {
			return nil, err
		}
		return OpenFilez(z)
	}
	f, err := l.openObject(path, unix.O_RDONLY)
	if errors.Is(err, unix.ELOOP) { // a symbolic link
		f, err = l.openObject(path, unix.O_PATH)
	}
	if err != nil {
		return nil, err
	}
	h, err := l.header(f, path)
	if err == nil {
		err = h.check()
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %s: %w", l.Path, path, err)
	}
	if h.IsSymlink() {
		f.Close()
		return &File{h, io.NopCloser(bytes.NewReader(nil)), false}, nil
	}
	return &File{h, f, false}, nil
}

// header makes the header of an open object of one of the bare modes.
func (l *Local) header(f *os.File, path string) (h FileHeader, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return h, os.NewSyscallError("fstat", err)
	}
	h.UID, h.GID, h.Mode, h.Size = st.Uid, st.Gid, st.Mode, st.Size
	switch l.Mode {
	case Bare:
		h.Xattrs, err = readXattrs(f)
	case BareUser:
		var b []byte
		if b, err = readXattr(f, "user.ostreemeta"); err == nil {
			h.Meta, err = parseMeta(b)
		}
		if err == nil && h.IsSymlink() {
			b, err = readAll(f, fstree.MaxSymlink+1)
			h.Target, h.Size = strings.TrimSuffix(string(b), "\x00"), 0
		}
		return h, err
	case BareUserOnly:
		h.UID, h.GID = 0, 0
	case BareSplitXattrs:
		h.Xattrs, err = l.splitXattrs(path)
	}
	if err == nil && h.IsSymlink() {
		h.Size = 0
		h.Target, err = readLink(f)
	}
	return h, err
}

// splitXattrs reads the extended attributes that are beside an object.
func (l *Local) splitXattrs(path string) ([]fstree.Xattr, error) {
	f, err := l.openObject(path+"-xattrs-link", unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := readAll(f, maxFileHeader)
	if err != nil {
		return nil, err
	}
	v, err := gvariant.New(xattrsType, b)
	if err == nil {
		err = v.Check()
	}
	if err != nil {
		return nil, err
	}
	return parseXattrs(v)
}

// readLink reads the target of a symbolic link that is open as a path.
func readLink(f *os.File) (string, error) {
	b := make([]byte, fstree.MaxSymlink+1)
	n, err := unix.Readlinkat(int(f.Fd()), "", b)
	if err != nil {
		return "", os.NewSyscallError("readlink", err)
	}
	return string(b[:n]), nil
}

// procPath leads to an open file, a symbolic link itself included.
func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func readXattrs(f *os.File) (list []fstree.Xattr, err error) {
	names, err := growing(func(b []byte) (int, error) { return unix.Listxattr(procPath(f), b) })
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("listxattr", err)
	}
	for name := range bytes.SplitSeq(names, []byte{0}) {
		if len(name) == 0 {
			continue
		}
		value, err := readXattr(f, string(name))
		if err != nil {
			return nil, err
		}
		list = append(list, fstree.Xattr{Name: string(name), Value: value})
	}
	slices.SortFunc(list, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return list, nil
}

func readXattr(f *os.File, name string) ([]byte, error) {
	value, err := growing(func(b []byte) (int, error) { return unix.Getxattr(procPath(f), name, b) })
	if err != nil {
		return nil, fmt.Errorf("extended attribute %s: %w", name, err)
	}
	return value, nil
}

// growing reads into a buffer that is large enough; the kernel's limit is 64 KiB.
func growing(read func([]byte) (int, error)) ([]byte, error) {
	var small [256]byte
	b := small[:]
	n, err := read(b)
	if errors.Is(err, unix.ERANGE) {
		b = make([]byte, 1<<16)
		n, err = read(b)
	}
	if err != nil {
		return nil, err
	}
	return bytes.Clone(b[:n]), nil
}
