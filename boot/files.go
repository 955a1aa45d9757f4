package boot

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"path"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Files returns the system's directories and regular files as an io/fs.FS. There are no symbolic links in it: nothing follows one, and
// who opens one finds nothing.
func (s System) Files() fs.FS { return treeFiles{s.Tree, s.Open} }

type treeFiles struct {
	tree *fstree.Tree
	open fstree.Open
}

// Open opens a file. A directory has metadata only.
func (t treeFiles) Open(name string) (fs.File, error) {
	failed := func(err error) error { return &fs.PathError{Op: "open", Path: name, Err: err} }
	if !fs.ValidPath(name) {
		return nil, failed(fs.ErrInvalid)
	}
	inode := t.tree.Lookup(name)
	if inode == nil {
		return nil, failed(fs.ErrNotExist)
	}
	f := &treeFile{inode: inode, name: path.Base(name)}
	switch inode.Type() {
	case fstree.TypeDir:
	case fstree.TypeRegular:
		if inline, ok := inode.Content.(fstree.Inline); ok {
			f.ReadCloser = io.NopCloser(bytes.NewReader(inline))
			break
		}
		var err error
		if f.ReadCloser, err = t.open("/"+name, inode); err != nil {
			return nil, failed(err)
		}
	default:
		return nil, failed(fs.ErrNotExist)
	}
	return f, nil
}

type treeFile struct {
	io.ReadCloser // nil for a directory
	inode         *fstree.Inode
	name          string
}

func (f *treeFile) Stat() (fs.FileInfo, error) { return f, nil }

func (f *treeFile) Read(b []byte) (int, error) {
	if f.ReadCloser == nil {
		return 0, &fs.PathError{Op: "read", Path: f.name, Err: errors.New("is a directory")}
	}
	return f.ReadCloser.Read(b)
}

func (f *treeFile) Close() error {
	if f.ReadCloser == nil {
		return nil
	}
	return f.ReadCloser.Close()
}

func (f *treeFile) Name() string { return f.name }
func (f *treeFile) Size() int64  { return int64(f.inode.Size()) }
func (f *treeFile) ModTime() time.Time {
	return time.Unix(f.inode.Mtime.Sec, int64(f.inode.Mtime.Nsec))
}
func (f *treeFile) IsDir() bool { return f.ReadCloser == nil }
func (f *treeFile) Sys() any    { return f.inode }

func (f *treeFile) Mode() fs.FileMode {
	if f.IsDir() {
		return fs.ModeDir | fs.FileMode(f.inode.Perm&0o777)
	}
	return fs.FileMode(f.inode.Perm & 0o777)
}
