// Package fstree is the file tree in memory: what every source (directory, dumpfile, EROFS image, OCI layers, OSTree
// commit) produces and every writer consumes.
//
// A [Tree] is a root directory. A directory has entries: a name and an [Inode]. An inode has metadata (permissions,
// owner, modification time, extended attributes) and one [Content], which also says what type of file it is. A hard
// link is a second entry that points to the same inode. File contents of more than [MaxInline] bytes are not here: they
// are objects, named by their fs-verity digest and kept elsewhere.
//
// Nothing in this package does I/O.
package fstree

import (
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Limits of what an image can hold.
const (
	// MaxInline is the size in bytes up to which sources keep a file's content in the tree. Dumpfiles may hold more.
	MaxInline = 64
	// MaxName is the length of the longest file name, in bytes.
	MaxName = 255
	// MaxSymlink is the length of the longest symlink target, in bytes.
	MaxSymlink = 1024
)

// File type bits of a mode, as in stat(2).
const (
	TypeMask    = 0o170000
	TypeDir     = 0o040000
	TypeRegular = 0o100000
	TypeSymlink = 0o120000
	TypeBlock   = 0o060000
	TypeChar    = 0o020000
	TypeFifo    = 0o010000
	TypeSocket  = 0o140000
)

// Tree is a whole file system. Root's content is a *Directory.
type Tree struct {
	Root *Inode
	// Home is the path of the name that an inode with several names belongs to. Only a dumpfile can say that, and only the
	// place of the inode in an image of V0 or V1 depends on it. Inodes that are not in it belong to the first of their names.
	Home map[*Inode]string
}

// New returns a tree with an empty root directory: mode 0755, owned by root, time 0.
func New() *Tree {
	return &Tree{Root: NewDir(0o755)}
}

// NewDir returns an inode of an empty directory with these permissions, owned by root, time 0.
func NewDir(perm uint32) *Inode {
	return &Inode{Perm: perm, Content: &Directory{}}
}

// Inode is a file of any type: its metadata and its content. Several directory entries may point to the same inode, if
// it is not a directory.
type Inode struct {
	Perm    uint32 // permission bits with setuid, setgid and sticky: mode & 07777
	UID     uint32
	GID     uint32
	Nlink   uint32 // number of names, see Tree.CountLinks; ignored for directories, where it follows from the entries
	Mtime   Time
	Xattrs  []Xattr // sorted by name, no name twice; other inodes may have the same slice: it is replaced, never changed
	Content Content
}

// Time is a moment as file systems store it: seconds since 1970 and the nanoseconds after that second.
type Time struct {
	Sec  int64
	Nsec uint32
}

// Before reports whether t is earlier than u.
func (t Time) Before(u Time) bool {
	return t.Sec < u.Sec || t.Sec == u.Sec && t.Nsec < u.Nsec
}

// Xattr is an extended attribute with its whole name, "security.selinux".
type Xattr struct {
	Name  string
	Value []byte
}

// Content is what an inode holds. It is one of *Directory, Inline, *Object, Symlink, Device, Fifo, Socket.
type Content interface {
	typeBits() uint32
}

// Directory is the content of a directory: its entries, sorted by the bytes of their names, without "." and "..".
type Directory struct {
	Entries []Entry
}

// Entry is a name in a directory.
type Entry struct {
	Name  string
	Inode *Inode
}

// Inline is the content of a regular file that is kept in the image itself. An empty file is an empty Inline.
type Inline []byte

// Object is the content of a regular file that is kept outside the image.
type Object struct {
	Digest fsverity.Digest // zero where a dumpfile or image names no digest: such a file cannot be verified
	Size   uint64
	Path   string // where a dumpfile or image names a path that is not Digest.ObjectPath(); "" otherwise
}

// Payload returns the path of the object below the objects directory, "" if there is none.
func (o *Object) Payload() string {
	if o.Path != "" {
		return o.Path
	}
	return o.Digest.ObjectPath()
}

// Symlink is the target of a symbolic link.
type Symlink string

// Device is a block or character device. A character device with number 0 is an overlayfs whiteout.
type Device struct {
	Block bool
	Rdev  uint32 // as Linux encodes it for 32 bits: new_encode_dev
}

// Fifo is a named pipe.
type Fifo struct{}

// Socket is a Unix domain socket.
type Socket struct{}

func (*Directory) typeBits() uint32 { return TypeDir }
func (Inline) typeBits() uint32     { return TypeRegular }
func (*Object) typeBits() uint32    { return TypeRegular }
func (Symlink) typeBits() uint32    { return TypeSymlink }
func (Fifo) typeBits() uint32       { return TypeFifo }
func (Socket) typeBits() uint32     { return TypeSocket }
func (d Device) typeBits() uint32 {
	if d.Block {
		return TypeBlock
	}
	return TypeChar
}

// Type returns the file type bits of the inode's mode.
func (i *Inode) Type() uint32 { return i.Content.typeBits() }

// Mode returns the st_mode of the inode: file type and permissions.
func (i *Inode) Mode() uint32 { return i.Content.typeBits() | i.Perm }

// Size returns the st_size of the inode: the length of a regular file or of a symlink's target, 0 otherwise.
func (i *Inode) Size() uint64 {
	switch c := i.Content.(type) {
	case Inline:
		return uint64(len(c))
	case *Object:
		return c.Size
	case Symlink:
		return uint64(len(c))
	}
	return 0
}

// Dir returns the content of a directory, nil for any other inode.
func (i *Inode) Dir() *Directory {
	d, _ := i.Content.(*Directory)
	return d
}

// Xattr returns the value of an extended attribute and whether it is there.
func (i *Inode) Xattr(name string) ([]byte, bool) {
	k, ok := i.findXattr(name)
	if !ok {
		return nil, false
	}
	return i.Xattrs[k].Value, true
}

// SetXattr sets an extended attribute, replacing an older value.
func (i *Inode) SetXattr(name string, value []byte) {
	k, ok := i.findXattr(name)
	rest := i.Xattrs[k:]
	if ok {
		rest = rest[1:]
	}
	list := make([]Xattr, 0, k+1+len(rest))
	i.Xattrs = append(append(append(list, i.Xattrs[:k]...), Xattr{name, value}), rest...)
}

// RemoveXattr removes an extended attribute, if it is there.
func (i *Inode) RemoveXattr(name string) {
	if k, ok := i.findXattr(name); ok {
		i.Xattrs = slices.Concat(i.Xattrs[:k], i.Xattrs[k+1:])
	}
}

func (i *Inode) findXattr(name string) (int, bool) {
	return slices.BinarySearchFunc(i.Xattrs, name, func(x Xattr, n string) int { return strings.Compare(x.Name, n) })
}

// Lookup returns the inode with this name, nil if there is none.
func (d *Directory) Lookup(name string) *Inode {
	if k, ok := d.find(name); ok {
		return d.Entries[k].Inode
	}
	return nil
}

// Set makes name point to the inode, replacing an older entry. Adding names in their order is cheap.
func (d *Directory) Set(name string, inode *Inode) {
	if n := len(d.Entries); n == 0 || d.Entries[n-1].Name < name {
		d.Entries = append(d.Entries, Entry{name, inode})
		return
	}
	k, ok := d.find(name)
	if ok {
		d.Entries[k].Inode = inode
		return
	}
	d.Entries = slices.Insert(d.Entries, k, Entry{name, inode})
}

// Remove removes a name, if it is there.
func (d *Directory) Remove(name string) {
	if k, ok := d.find(name); ok {
		d.Entries = slices.Delete(d.Entries, k, k+1)
	}
}

func (d *Directory) find(name string) (int, bool) {
	k := sort.Search(len(d.Entries), func(k int) bool { return d.Entries[k].Name >= name })
	return k, k < len(d.Entries) && d.Entries[k].Name == name
}

// CheckName tells why a name cannot stand in a directory: it is empty, "." or "..", longer than MaxName, or has a slash
// or a NUL in it.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("empty file name")
	case name == "." || name == "..":
		return fmt.Errorf("file name %q", name)
	case len(name) > MaxName:
		return fmt.Errorf("file name %.40q...: %d bytes, at most %d fit", name, len(name), MaxName)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("file name %q has a slash or a NUL in it", name)
	}
	return nil
}

// Lookup returns the inode at a path, nil if there is none. The path is relative to the root, with or without a leading
// slash; "" and "/" are the root. Symbolic links are not followed.
func (t *Tree) Lookup(path string) *Inode {
	inode := t.Root
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if name == "" {
			continue
		}
		d := inode.Dir()
		if d == nil {
			return nil
		}
		if inode = d.Lookup(name); inode == nil {
			return nil
		}
	}
	return inode
}

// Walk calls f for every name in the tree, a directory before its entries, entries in the order of their names. Paths
// are absolute; the root is "/". A hard-linked inode is seen once for each of its names. An error from f ends the walk
// and is returned.
func (t *Tree) Walk(f func(path string, inode *Inode) error) error {
	if err := f("/", t.Root); err != nil {
		return err
	}
	return walk("/", t.Root.Dir(), f)
}

func walk(prefix string, d *Directory, f func(string, *Inode) error) error {
	for _, e := range d.Entries {
		path := prefix + e.Name
		if err := f(path, e.Inode); err != nil {
			return err
		}
		if sub := e.Inode.Dir(); sub != nil {
			if err := walk(path+"/", sub, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// CountLinks sets the Nlink of every inode that is not a directory to the number of its names in the tree.
func (t *Tree) CountLinks() {
	each := func(f func(*Inode)) {
		t.Walk(func(_ string, i *Inode) error {
			if i.Dir() == nil {
				f(i)
			}
			return nil
		})
	}
	each(func(i *Inode) { i.Nlink = 0 })
	each(func(i *Inode) { i.Nlink++ })
}
