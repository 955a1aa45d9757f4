package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// maxDepth is how deep directories may be nested. Paths are at most 4096 bytes long, so no honest tree is deeper.
const maxDepth = 2048

// Read reads a whole image of size bytes into a tree, and tells its format. It undoes what Write adds, so that writing the
// tree in the same format gives the image again. Errors name the path, or the offset in the image.
func Read(r io.ReaderAt, size int64) (*fstree.Tree, Format, error) {
	img, err := newReader(r, size)
	if err != nil {
		return nil, 0, err
	}
	// Inodes are read in two steps, of which the first is counted twice.
	img.limit, img.budget = true, 2*size
	t := &treeReader{reader: img, inodes: make(map[uint64]*fstree.Inode, img.inodeCount())}
	root, _, err := t.load(img.root)
	if err == nil && root.Dir() == nil {
		err = errors.New("not a directory")
	}
	if err == nil {
		err = t.directory("", img.root, img.root, root, 0)
	}
	if err != nil {
		return nil, 0, inPath("", err)
	}
	return &fstree.Tree{Root: root}, img.format, nil
}

// pathError is an error that has its path.
type pathError struct {
	path string
	err  error
}

func (e *pathError) Error() string { return e.path + ": " + e.err.Error() }
func (e *pathError) Unwrap() error { return e.err }

func inPath(path string, err error) error {
	if _, has := err.(*pathError); has {
		return err
	}
	if path == "" {
		path = "/"
	}
	return &pathError{path, err}
}

type treeReader struct {
	*reader
	inodes  map[uint64]*fstree.Inode
	spare   []fstree.Inode
	objects []fstree.Object
}

// load reads an inode, once.
func (t *treeReader) load(nid uint64) (inode *fstree.Inode, again bool, err error) {
	if inode := t.inodes[nid]; inode != nil {
		return inode, true, nil
	}
	raw, err := t.inode(nid)
	if err != nil {
		return nil, false, err
	}
	// Many at a time; an object that is not used is left for the next inode.
	if len(t.spare) == 0 {
		t.spare, t.objects = make([]fstree.Inode, 128), make([]fstree.Object, 128)
	}
	inode = &t.spare[0]
	t.spare = t.spare[1:]
	object := &t.objects[0]
	if err := t.build(&raw, inode, object); err != nil {
		return nil, false, err
	}
	if inode.Content == fstree.Content(object) {
		t.objects = t.objects[1:]
	} else {
		*object = fstree.Object{}
	}
	t.inodes[nid] = inode
	return inode, false, nil
}

// directory fills a directory with its entries, and those with theirs.
func (t *treeReader) directory(path string, nid, parent uint64, inode *fstree.Inode, depth int) error {
	if depth > maxDepth {
		return inPath(path, fmt.Errorf("directories are nested more than %d deep", maxDepth))
	}
	raw, err := t.inode(nid)
	if err != nil {
		return inPath(path, err)
	}
	entries, err := t.entries(&raw)
	if err != nil {
		return inPath(path, err)
	}
	dir := inode.Dir()
	dir.Entries = make([]fstree.Entry, 0, len(entries))
	dots, subdirs, marked := 0, uint32(0), false
	for _, e := range entries {
		if e.name == "." || e.name == ".." {
			want := nid
			if e.name == ".." {
				want = parent
			}
			if e.nid != want || e.fileType != ftDir {
				return inPath(path, fmt.Errorf("%q is inode %d, want %d", e.name, e.nid, want))
			}
			dots++
			continue
		}
		if err := fstree.CheckName(e.name); err != nil {
			return inPath(path, err)
		}
		child, again, err := t.load(e.nid)
		if err != nil {
			return inPath(path+"/"+e.name, err)
		}
		if child.Dir() != nil {
			if again {
				return inPath(path+"/"+e.name, errors.New("a directory that has another name"))
			}
			subdirs++
			if err := t.directory(path+"/"+e.name, e.nid, nid, child, depth+1); err != nil {
				return err
			}
		}
		whiteout := t.format != V2 && isWhiteout(child) && e.fileType == ftRegular
		n := node{inode: child, escaped: whiteout}
		if want := n.fileType(); want != e.fileType {
			return inPath(path+"/"+e.name, fmt.Errorf("file type %d in the directory, %d in the inode", e.fileType, want))
		}
		if e.fileType == ftChar && t.format != V2 && path == "" && hides(e.name, child, inode) {
			continue
		}
		marked = marked || whiteout && !again
		dir.Entries = append(dir.Entries, fstree.Entry{Name: e.name, Inode: child})
	}
	if dots != 2 {
		return inPath(path, errors.New(`no "." and ".." in the directory`))
	}
	if raw.nlink != 2+subdirs {
		return inPath(path, fmt.Errorf("%d links to a directory with %d subdirectories", raw.nlink, subdirs))
	}
	if marked {
		unmark(inode, t.format)
	}
	return nil
}

// hides reports whether an entry of the root is one of those that hide the object store.
func hides(name string, i, root *fstree.Inode) bool {
	label, _ := root.Xattr(xattrSELinux)
	return len(name) == 2 && strings.Trim(name, "0123456789abcdef") == "" && isWhiteout(i) &&
		i.Perm == 0o644 && i.UID == root.UID && i.GID == root.GID && i.Mtime == root.Mtime &&
		(len(i.Xattrs) == 0 || len(i.Xattrs) == 1 && i.Xattrs[0].Name == xattrSELinux && string(i.Xattrs[0].Value) == string(label))
}

// unmark removes the attributes of a directory with escaped whiteouts. They have been unescaped, as all others.
func unmark(dir *fstree.Inode, f Format) {
	names := []string{overlayPrefix + "whiteouts", xattrWhiteoutsUser}
	if f == V1 {
		names = append(names, xattrOpaque, xattrOpaqueUser)
	}
	for _, name := range names {
		dir.RemoveXattr(name)
	}
}

// build makes an inode of a tree; directories are empty.
func (img *reader) build(raw *rawInode, i *fstree.Inode, object *fstree.Object) error {
	i.Perm, i.UID, i.GID, i.Nlink, i.Mtime = raw.mode&0o7777, raw.uid, raw.gid, raw.nlink, raw.mtime
	object.Size = raw.size
	var redirect []byte
	hasRedirect := false
	var xattrs []fstree.Xattr
	err := img.attributes(raw, func(name attrName, value []byte) (err error) {
		switch {
		case name.is(xattrMetacopy):
			object.Digest, err = parseMetacopy(value)
			return err
		case name.is(xattrRedirect):
			redirect, hasRedirect = append(img.redirect[:0], value...), true
			img.redirect = redirect
			return nil
		}
		x := fstree.Xattr{Name: name.whole, Value: value}
		if name.rest != nil {
			x = fstree.Xattr{Name: name.String(), Value: bytes.Clone(value)}
		}
		if escaped, ok := strings.CutPrefix(x.Name, escapedPrefix); ok {
			x.Name = overlayPrefix + escaped
		} else if strings.HasPrefix(x.Name, overlayPrefix) {
			return nil // the root's opaque, and what overlayfs alone reads
		}
		xattrs = append(xattrs, x)
		return nil
	})
	if err != nil {
		return err
	}
	slices.SortFunc(xattrs, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	for k := range xattrs[min(1, len(xattrs)):] {
		if xattrs[k].Name == xattrs[k+1].Name {
			return fmt.Errorf("attribute %q twice", xattrs[k].Name)
		}
	}
	i.Xattrs = img.sameList(xattrs)
	if i.Content, err = img.content(raw, object, redirect, hasRedirect && len(redirect) > 0); err != nil {
		return err
	}
	if img.format != V2 && escapedWhiteout(i) {
		i.RemoveXattr(overlayPrefix + "whiteout")
		i.RemoveXattr(xattrWhiteoutUser)
		i.Content = fstree.Device{}
	}
	return nil
}

// sameList returns the list that the last inode had, if it is the same: most inodes have one label, and their neighbour's.
func (img *reader) sameList(list []fstree.Xattr) []fstree.Xattr {
	same := slices.EqualFunc(list, img.lastList, func(a, b fstree.Xattr) bool { return a.Name == b.Name && bytes.Equal(a.Value, b.Value) })
	if !same {
		img.lastList = list
	}
	return img.lastList
}

func escapedWhiteout(i *fstree.Inode) bool {
	_, one := i.Xattr(overlayPrefix + "whiteout")
	_, two := i.Xattr(xattrWhiteoutUser)
	inline, empty := i.Content.(fstree.Inline)
	return one && two && empty && len(inline) == 0
}

func (img *reader) content(raw *rawInode, object *fstree.Object, redirect []byte, hasRedirect bool) (fstree.Content, error) {
	switch raw.mode & fstree.TypeMask {
	case fstree.TypeDir:
		return &fstree.Directory{}, nil
	case fstree.TypeRegular:
		if raw.layout != layoutChunks {
			if hasRedirect || !object.Digest.IsZero() {
				return nil, errors.New("a file with data in the image and outside of it")
			}
			data, err := img.data(raw, maxInline)
			return fstree.Inline(data), err
		}
		if raw.size == 0 || chunkCount(raw.size) > maxChunks {
			return nil, fmt.Errorf("a list of chunks for a file of %d bytes", raw.size)
		}
		if hasRedirect {
			var room [2*64 + 2]byte
			if !object.Digest.IsZero() && string(redirect) == string(appendRedirect(room[:0], object.Digest)) {
				return object, nil
			}
			path, ok := strings.CutPrefix(string(redirect), "/")
			if !ok || path == "" {
				return nil, fmt.Errorf("redirect to %q: want an absolute path", redirect)
			}
			object.Path = path
		} else if !object.Digest.IsZero() {
			return nil, errors.New("a digest without the path of an object")
		}
		return object, nil
	case fstree.TypeSymlink:
		target, err := img.data(raw, fstree.MaxSymlink)
		if err == nil && len(target) == 0 {
			err = errors.New("a symlink without target")
		}
		return fstree.Symlink(target), err
	case fstree.TypeBlock, fstree.TypeChar:
		return fstree.Device{Block: raw.mode&fstree.TypeMask == fstree.TypeBlock, Rdev: raw.union}, nil
	case fstree.TypeFifo:
		return fstree.Fifo{}, nil
	case fstree.TypeSocket:
		return fstree.Socket{}, nil
	}
	return nil, fmt.Errorf("mode %o has no file type", raw.mode)
}

// parseMetacopy reads the digest from the attribute trusted.overlay.metacopy: version 0, length, flags 0, algorithm,
// digest (struct ovl_metacopy of the kernel). An empty one stands for a file without digest.
func parseMetacopy(b []byte) (fsverity.Digest, error) {
	if len(b) == 0 {
		return fsverity.Digest{}, nil
	}
	if len(b) < 4 || b[0] != 0 || int(b[1]) != len(b) || b[2] != 0 || len(b) > math.MaxUint8 {
		return fsverity.Digest{}, fmt.Errorf("attribute %s: not a digest", xattrMetacopy)
	}
	d, err := fsverity.MakeDigest(fsverity.Algorithm(b[3]), b[4:])
	if err != nil {
		return d, fmt.Errorf("attribute %s: %w", xattrMetacopy, err)
	}
	return d, nil
}
