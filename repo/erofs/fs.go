package erofs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"path"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// FS is an image as an io/fs.FS. A path is looked up in the image itself: nothing but the directories on its way is read.
// Symbolic links lead to other files of the image, absolute ones from its root. It implements fs.ReadDirFS, fs.StatFS and
// fs.ReadLinkFS and may be used from several goroutines.
type FS struct {
	img *reader
	// Objects opens the content of a file that is not in the image. While it is nil, such files can be opened but not
	// read.
	Objects func(*fstree.Object) (io.ReadCloser, error)
}

// ErrNoObjects tells that a file's content is not in the image, and that nobody said where it is.
var ErrNoObjects = errors.New("the content is an object outside of the image, and no object store was given")

// NewFS returns the file system of an image of size bytes.
func NewFS(r io.ReaderAt, size int64) (*FS, error) {
	img, err := newReader(r, size)
	if err != nil {
		return nil, err
	}
	return &FS{img: img}, nil
}

func (f *FS) inode(nid uint64) (*rawInode, error) {
	raw, err := f.img.inode(nid)
	return &raw, err
}

func (f *FS) build(raw *rawInode) (*fstree.Inode, error) {
	inode := &fstree.Inode{}
	return inode, f.img.build(raw, inode, &fstree.Object{})
}

// lookup finds the inode of a path. Symbolic links on its way are followed inside of the image, and the last one if
// follow is set. The caller holds the lock.
func (f *FS) lookup(name string, follow bool) (*rawInode, error) {
	rest := strings.Split(name, "/")
	at := "." // where raw is: a path without symbolic links
	raw, err := f.inode(f.img.root)
	for links := 0; err == nil && len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		if part == "" || part == "." {
			continue
		}
		var child *rawInode
		if child, err = f.child(raw, part); err != nil {
			return nil, err
		}
		if child.mode&fstree.TypeMask != fstree.TypeSymlink || len(rest) == 0 && !follow {
			raw, at = child, path.Join(at, part)
			continue
		}
		if links++; links > 40 {
			return nil, errors.New("too many symbolic links")
		}
		target, err := f.img.data(child, fstree.MaxSymlink)
		if err != nil {
			return nil, err
		}
		way := path.Join("/", at, string(target))
		if strings.HasPrefix(string(target), "/") {
			way = path.Clean(string(target))
		}
		rest = append(strings.Split(way, "/"), rest...)
		at = "."
		if raw, err = f.inode(f.img.root); err != nil {
			return nil, err
		}
	}
	return raw, err
}

func (f *FS) child(dir *rawInode, name string) (*rawInode, error) {
	if dir.mode&fstree.TypeMask != fstree.TypeDir {
		return nil, errors.New("not a directory")
	}
	entries, err := f.img.entries(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.name == name {
			return f.inode(e.nid)
		}
	}
	return nil, fs.ErrNotExist
}

func (f *FS) stat(op, name string, follow bool) (*fileInfo, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	f.img.mu.Lock()
	defer f.img.mu.Unlock()
	raw, err := f.lookup(name, follow)
	if err == nil {
		var inode *fstree.Inode
		if inode, err = f.build(raw); err == nil {
			return &fileInfo{path.Base(name), inode, raw}, nil
		}
	}
	return nil, &fs.PathError{Op: op, Path: name, Err: err}
}

// Stat returns a file's metadata. Sys is the *fstree.Inode, without the entries of a
// directory.
func (f *FS) Stat(name string) (fs.FileInfo, error) {
	info, err := f.stat("stat", name, true)
	if err != nil {
		return nil, err
	}
	return info, nil
}

// Lstat is Stat for a symbolic link itself.
func (f *FS) Lstat(name string) (fs.FileInfo, error) {
	info, err := f.stat("lstat", name, false)
	if err != nil {
		return nil, err
	}
	return info, nil
}

// ReadLink returns the target of a symbolic link.
func (f *FS) ReadLink(name string) (string, error) {
	info, err := f.stat("readlink", name, false)
	if err != nil {
		return "", err
	}
	target, ok := info.inode.Content.(fstree.Symlink)
	if !ok {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return string(target), nil
}

// ReadDir returns the entries of a directory, sorted, without those that hide the object store.
func (f *FS) ReadDir(name string) ([]fs.DirEntry, error) {
	info, err := f.stat("readdir", name, true)
	if err != nil {
		return nil, err
	}
	if info.inode.Dir() == nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: errors.New("not a directory")}
	}
	f.img.mu.Lock()
	defer f.img.mu.Unlock()
	entries, err := f.img.entries(info.raw)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	var list []fs.DirEntry
	for _, e := range entries {
		if e.name == "." || e.name == ".." {
			continue
		}
		raw, err := f.inode(e.nid)
		if err != nil {
			return nil, &fs.PathError{Op: "readdir", Path: path.Join(name, e.name), Err: err}
		}
		child, err := f.build(raw)
		if err != nil {
			return nil, &fs.PathError{Op: "readdir", Path: path.Join(name, e.name), Err: err}
		}
		if name == "." && f.img.format != V2 && e.fileType == ftChar && hides(e.name, child, info.inode) {
			continue
		}
		list = append(list, fs.FileInfoToDirEntry(&fileInfo{e.name, child, raw}))
	}
	return list, nil
}

// Open opens a file or directory.
func (f *FS) Open(name string) (fs.File, error) {
	info, err := f.stat("open", name, true)
	if err != nil {
		return nil, err
	}
	switch c := info.inode.Content.(type) {
	case *fstree.Directory:
		entries, err := f.ReadDir(name)
		return &openDirectory{info, entries}, err
	case fstree.Inline:
		return &openFile{info, io.NopCloser(bytes.NewReader(c))}, nil
	case *fstree.Object:
		if f.Objects == nil {
			return &openFile{info, nil}, nil
		}
		r, err := f.Objects(c)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return &openFile{info, r}, nil
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("neither a file nor a directory")}
}

type fileInfo struct {
	name  string
	inode *fstree.Inode
	raw   *rawInode
}

func (i *fileInfo) Name() string { return i.name }
func (i *fileInfo) Size() int64  { return int64(i.inode.Size()) }
func (i *fileInfo) ModTime() time.Time {
	return time.Unix(i.inode.Mtime.Sec, int64(i.inode.Mtime.Nsec))
}
func (i *fileInfo) IsDir() bool { return i.inode.Dir() != nil }
func (i *fileInfo) Sys() any    { return i.inode }
func (i *fileInfo) Mode() fs.FileMode {
	mode := fs.FileMode(i.inode.Perm & 0o777)
	for bit, flag := range map[uint32]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if i.inode.Perm&bit != 0 {
			mode |= flag
		}
	}
	switch i.inode.Type() {
	case fstree.TypeDir:
		mode |= fs.ModeDir
	case fstree.TypeSymlink:
		mode |= fs.ModeSymlink
	case fstree.TypeBlock:
		mode |= fs.ModeDevice
	case fstree.TypeChar:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case fstree.TypeFifo:
		mode |= fs.ModeNamedPipe
	case fstree.TypeSocket:
		mode |= fs.ModeSocket
	}
	return mode
}

type openFile struct {
	info *fileInfo
	r    io.ReadCloser
}

func (f *openFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *openFile) Read(b []byte) (int, error) {
	if f.r == nil {
		return 0, &fs.PathError{Op: "read", Path: f.info.name, Err: ErrNoObjects}
	}
	return f.r.Read(b)
}
func (f *openFile) Close() error {
	if f.r == nil {
		return nil
	}
	return f.r.Close()
}

type openDirectory struct {
	info *fileInfo
	rest []fs.DirEntry
}

func (d *openDirectory) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *openDirectory) Close() error               { return nil }
func (d *openDirectory) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.info.name, Err: errors.New("is a directory")}
}
func (d *openDirectory) ReadDir(n int) ([]fs.DirEntry, error) {
	if n <= 0 {
		list := d.rest
		d.rest = nil
		return list, nil
	}
	if len(d.rest) == 0 {
		return nil, io.EOF
	}
	list := d.rest[:min(n, len(d.rest))]
	d.rest = d.rest[len(list):]
	return list, nil
}
