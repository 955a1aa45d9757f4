package fstree

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"unsafe"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Kind says what became of a path from one tree to another.
type Kind string

// The kinds of differences.
const (
	Removed Kind = "removed"
	Added   Kind = "added"
	Changed Kind = "changed"
)

// What two files of the same path may differ in, in the order in which it is looked at.
const (
	AttrType    = "type"
	AttrMode    = "mode"
	AttrOwner   = "owner"
	AttrMtime   = "mtime"
	AttrXattr   = "xattr"
	AttrContent = "content"
	AttrTarget  = "target"
	AttrDevice  = "device"
	AttrLink    = "link"  // which other names lead to the same inode
	AttrNlink   = "nlink" // the number of names that the inode says it has
)

// Difference is what is different at one path.
type Difference struct {
	Path      string // absolute; the root is "/"
	Kind      Kind
	Attribute string // the first that differs; of what was added or removed, ""
	Xattr     string // the name of an extended attribute, if Attribute is AttrXattr
	Old, New  string // the values of that attribute for people, "-" for none; of what was added or removed, its type
}

// Diff compares two trees and reports every path that is not the same in both, in the order of Walk. Of a path that is in
// both, the first attribute that differs is reported; of a directory that is in one of them only, everything below it, too.
// An error from report ends the comparison and is returned.
//
// Contents are compared by their digests. Where the digests are of two algorithms, only the sizes are.
func Diff(a, b *Tree, report func(Difference) error) error {
	d := differ{a: severalNames(a), b: severalNames(b), report: report}
	return d.both("/", "", a.Root, b.Root)
}

type differ struct {
	a, b   links
	report func(Difference) error
}

// links has the inodes of a tree that have several names.
type links map[*Inode]*link

type link struct {
	first string // the first of the names that is in both trees
	peer  *Inode // what has that name in the other tree
}

// severalNames finds them by what leads where. Nlink is not asked: it is whatever somebody wrote.
func severalNames(t *Tree) links {
	var all []uintptr
	var collect func(d *Directory)
	collect = func(d *Directory) {
		for _, e := range d.Entries {
			if sub := e.Inode.Dir(); sub != nil {
				collect(sub)
			} else {
				all = append(all, uintptr(unsafe.Pointer(e.Inode)))
			}
		}
	}
	collect(t.Root.Dir())
	slices.Sort(all)
	several := map[uintptr]bool{}
	for k := 1; k < len(all); k++ {
		if all[k] == all[k-1] {
			several[all[k]] = true
		}
	}
	found := links{}
	if len(several) == 0 {
		return found
	}
	t.Walk(func(_ string, i *Inode) error {
		if several[uintptr(unsafe.Pointer(i))] {
			found[i] = &link{}
		}
		return nil
	})
	return found
}

// both compares what has the same path in both trees: a name in a directory, whose path ends in a slash.
func (d *differ) both(dir, name string, a, b *Inode) error {
	c := compare(a, b)
	if other := d.compareLinks(dir, name, a, b); c.Attribute == "" {
		c = other
	}
	if c.Attribute == "" && a.Dir() == nil && a.Nlink != b.Nlink {
		c = Difference{Attribute: AttrNlink, Old: fmt.Sprint(a.Nlink), New: fmt.Sprint(b.Nlink)}
	}
	if c.Attribute != "" {
		c.Path, c.Kind = dir+name, Changed
		if err := d.report(c); err != nil {
			return err
		}
	}
	var none Directory
	one, two := a.Dir(), b.Dir()
	if one == nil && two == nil {
		return nil
	}
	if one == nil {
		one = &none
	}
	if two == nil {
		two = &none
	}
	if name != "" {
		dir += name + "/"
	}
	return d.entries(dir, one.Entries, two.Entries)
}

// entries goes along the entries of two directories at once.
func (d *differ) entries(dir string, a, b []Entry) error {
	for len(a) > 0 || len(b) > 0 {
		var err error
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].Name < b[0].Name:
			err = d.only(Removed, dir+a[0].Name, a[0].Inode)
			a = a[1:]
		case len(a) == 0 || b[0].Name < a[0].Name:
			err = d.only(Added, dir+b[0].Name, b[0].Inode)
			b = b[1:]
		default:
			err = d.both(dir, a[0].Name, a[0].Inode, b[0].Inode)
			a, b = a[1:], b[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// only reports what is in one of the trees.
func (d *differ) only(kind Kind, path string, i *Inode) error {
	c := Difference{Path: path, Kind: kind, Old: "-", New: "-"}
	if kind == Removed {
		c.Old = TypeName(i.Type())
	} else {
		c.New = TypeName(i.Type())
	}
	if err := d.report(c); err != nil {
		return err
	}
	if dir := i.Dir(); dir != nil {
		for _, e := range dir.Entries {
			if err := d.only(kind, path+"/"+e.Name, e.Inode); err != nil {
				return err
			}
		}
	}
	return nil
}

// compareLinks pairs the inodes with several names by the first of these. Another name that leads to the inode of one pair
// here and to that of another one there makes the difference.
func (d *differ) compareLinks(dir, name string, a, b *Inode) Difference {
	one, two := d.a[a], d.b[b]
	if one == nil && two == nil {
		return Difference{}
	}
	differs := one.pair(dir+name, b)
	differs = two.pair(dir+name, a) || differs
	if !differs {
		return Difference{}
	}
	return Difference{Attribute: AttrLink, Old: one.other(dir + name), New: two.other(dir + name)}
}

// pair reports whether the inode is in another pair already.
func (l *link) pair(path string, peer *Inode) bool {
	if l == nil {
		return false
	}
	if l.peer == nil {
		l.first, l.peer = path, peer
	}
	return l.peer != peer
}

func (l *link) other(path string) string {
	if l == nil || l.first == path {
		return "-"
	}
	return l.first
}

// compare returns the first attribute of two inodes that differs, without their names and the entries of directories.
func compare(a, b *Inode) Difference {
	differ := func(attribute, old, new string) Difference {
		return Difference{Attribute: attribute, Old: old, New: new}
	}
	switch {
	case a.Type() != b.Type():
		return differ(AttrType, TypeName(a.Type()), TypeName(b.Type()))
	case a.Perm != b.Perm:
		return differ(AttrMode, fmt.Sprintf("%04o", a.Perm), fmt.Sprintf("%04o", b.Perm))
	case a.UID != b.UID || a.GID != b.GID:
		return differ(AttrOwner, fmt.Sprintf("%d:%d", a.UID, a.GID), fmt.Sprintf("%d:%d", b.UID, b.GID))
	case a.Mtime != b.Mtime:
		return differ(AttrMtime, a.Mtime.String(), b.Mtime.String())
	}
	if c := compareXattrs(a.Xattrs, b.Xattrs); c.Attribute != "" {
		return c
	}
	switch one := a.Content.(type) {
	case Inline, *Object:
		if !sameContent(a.Content, b.Content) {
			return differ(AttrContent, contentText(a.Content), contentText(b.Content))
		}
	case Symlink:
		if two := b.Content.(Symlink); one != two {
			return differ(AttrTarget, strconv.Quote(string(one)), strconv.Quote(string(two)))
		}
	case Device:
		if two := b.Content.(Device); one != two {
			return differ(AttrDevice, one.String(), two.String())
		}
	}
	return Difference{}
}

func compareXattrs(a, b []Xattr) Difference {
	for k := 0; ; k++ {
		c := Difference{Attribute: AttrXattr, Old: "-", New: "-"}
		switch {
		case k == len(a) && k == len(b):
			return Difference{}
		case k == len(b) || k < len(a) && a[k].Name < b[k].Name:
			c.Xattr, c.Old = a[k].Name, quote(a[k].Value)
		case k == len(a) || b[k].Name < a[k].Name:
			c.Xattr, c.New = b[k].Name, quote(b[k].Value)
		case !bytes.Equal(a[k].Value, b[k].Value):
			c.Xattr, c.Old, c.New = a[k].Name, quote(a[k].Value), quote(b[k].Value)
		default:
			continue
		}
		return c
	}
}

func sameContent(a, b Content) bool {
	switch a := a.(type) {
	case Inline:
		b, ok := b.(Inline)
		return ok && bytes.Equal(a, b)
	case *Object:
		b, ok := b.(*Object)
		if !ok || a.Size != b.Size {
			return false
		}
		if one, two := a.Digest.Algorithm(), b.Digest.Algorithm(); one != two && one != 0 && two != 0 {
			return true // as far as can be told
		}
		return a.Digest == b.Digest && a.Path == b.Path
	}
	return false
}

func contentText(c Content) string {
	o, ok := c.(*Object)
	switch {
	case !ok:
		return quote(c.(Inline))
	case o.Digest.IsZero():
		return fmt.Sprintf("%q without digest, %d bytes", o.Path, o.Size)
	case o.Path != "":
		return fmt.Sprintf("%v:%v at %q, %d bytes", o.Digest.Algorithm(), o.Digest, o.Path, o.Size)
	}
	return fmt.Sprintf("%v:%v, %d bytes", o.Digest.Algorithm(), o.Digest, o.Size)
}

// quote cuts what is long.
func quote(b []byte) string {
	if len(b) > MaxInline {
		return fmt.Sprintf("%q... (%d bytes)", b[:MaxInline], len(b))
	}
	return strconv.Quote(string(b))
}

// String returns the seconds since 1970, a dot and nine digits of nanoseconds.
func (t Time) String() string { return fmt.Sprintf("%d.%09d", t.Sec, t.Nsec) }

// Major returns the major number.
func (d Device) Major() uint32 { return d.Rdev >> 8 & 0xfff }

// Minor returns the minor number.
func (d Device) Minor() uint32 { return d.Rdev&0xff | d.Rdev>>12&0xfff00 }

// String returns the major number, a colon and the minor number.
func (d Device) String() string { return fmt.Sprintf("%d:%d", d.Major(), d.Minor()) }

// TypeName returns what people call a file type: "file", "directory", "symlink", ...
func TypeName(t uint32) string {
	switch t {
	case TypeDir:
		return "directory"
	case TypeRegular:
		return "file"
	case TypeSymlink:
		return "symlink"
	case TypeBlock:
		return "block device"
	case TypeChar:
		return "character device"
	case TypeFifo:
		return "fifo"
	case TypeSocket:
		return "socket"
	}
	return "unknown"
}

// Algorithms returns the algorithms of the digests in a tree, in the order in which they occur first.
func (t *Tree) Algorithms() []fsverity.Algorithm {
	var list []fsverity.Algorithm
	t.Walk(func(_ string, i *Inode) error {
		if o, ok := i.Content.(*Object); ok && !o.Digest.IsZero() && !slices.Contains(list, o.Digest.Algorithm()) {
			list = append(list, o.Digest.Algorithm())
		}
		return nil
	})
	return list
}
