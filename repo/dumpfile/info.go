package dumpfile

import (
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// composefs-info prints what it finds in an image, and the image shows through: the sizes of directories, the order of
// attributes, and in V1 the marks of directories that have whiteouts. repo/erofs knows why an image has them.

// How many attributes of an inode refer to the image's table.
const (
	maxShared   = 128
	maxSharedV2 = 255
)

// overlay begins the names of what overlayfs reads, escaped those that stand for them in an image.
const (
	overlay = "trusted.overlay."
	escaped = "trusted.overlay.overlay."
)

// imageOrder knows how often each attribute occurs in an image: those that occur more than once stand last.
type imageOrder struct {
	style  Style
	counts map[countKey]int
	marked map[*fstree.Inode]bool // directories with whiteouts
}

type countKey struct{ name, value string }

func newImageOrder(t *fstree.Tree, s Style) *imageOrder {
	o := &imageOrder{style: s, counts: map[countKey]int{}, marked: map[*fstree.Inode]bool{}}
	// A whiteout is where its first name is; only that directory is marked, which must be known before attributes are counted.
	seen := map[*fstree.Inode]bool{}
	var all []*fstree.Inode
	var visit func(parent, i *fstree.Inode)
	visit = func(parent, i *fstree.Inode) {
		dir := i.Dir()
		if dir == nil {
			if seen[i] {
				return
			}
			seen[i] = true
		}
		all = append(all, i)
		if isWhiteout(i) {
			o.marked[parent] = true
		}
		if dir != nil {
			for _, e := range dir.Entries {
				visit(i, e.Inode)
			}
		}
	}
	visit(nil, t.Root)
	for _, i := range all {
		for _, x := range o.inImage(i) {
			o.counts[countKey{x.Name, string(x.Value)}]++
		}
	}
	if label, ok := t.Root.Xattr("security.selinux"); ok && s != InfoV2 {
		o.counts[countKey{"security.selinux", string(label)}] += 256 // of the hidden names, see withHidden
	}
	return o
}

// inImage returns an inode's attributes by the names that they have in an image and in its order: sorted, but in V2 what leads
// to the object comes first, and the rest is sorted before it is escaped. V2 has no escaped whiteouts.
func (o *imageOrder) inImage(i *fstree.Inode) []fstree.Xattr {
	var list []fstree.Xattr
	add := func(name, value string) { list = append(list, fstree.Xattr{Name: name, Value: []byte(value)}) }
	if c, ok := i.Content.(*fstree.Object); ok {
		add(overlay+"metacopy", c.Digest.String())
		if path := c.Payload(); path != "" {
			add(overlay+"redirect", path)
		}
	}
	for _, x := range i.Xattrs {
		if rest, ok := strings.CutPrefix(x.Name, overlay); ok {
			x.Name = escaped + rest
		}
		list = append(list, x)
	}
	if o.style == InfoV2 {
		return list
	}
	slices.SortFunc(list, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	marks := fstree.Inode{Xattrs: list} // replace what has their names
	if o.marked[i] {
		marks.SetXattr(escaped+"whiteouts", nil)
		marks.SetXattr("user.overlay.whiteouts", nil)
		if o.style == InfoV1 {
			marks.SetXattr(escaped+"opaque", []byte("x"))
			marks.SetXattr("user.overlay.opaque", []byte("x"))
		}
	}
	if isWhiteout(i) {
		marks.SetXattr(escaped+"whiteout", nil)
		marks.SetXattr("user.overlay.whiteout", nil)
	}
	return marks.Xattrs
}

func (o *imageOrder) xattrs(i *fstree.Inode) []fstree.Xattr {
	most := maxShared
	if o.style == InfoV2 {
		most = maxSharedV2
	}
	var shared, own []fstree.Xattr
	refs := 0
	for _, x := range o.inImage(i) {
		isShared := o.counts[countKey{x.Name, string(x.Value)}] > 1 && refs < most
		if isShared {
			refs++
		}
		if rest, ok := strings.CutPrefix(x.Name, escaped); ok {
			x.Name = overlay + rest
		} else if strings.HasPrefix(x.Name, overlay) {
			continue
		}
		switch x.Name {
		case overlay + "whiteout", overlay + "whiteouts", "user.overlay.whiteout", "user.overlay.whiteouts":
			continue // the tools take them for the marks of whiteouts, wherever they are
		}
		if isShared {
			shared = append(shared, x)
		} else {
			own = append(own, x)
		}
	}
	return append(own, shared...)
}

func isWhiteout(i *fstree.Inode) bool {
	d, ok := i.Content.(fstree.Device)
	return ok && !d.Block && d.Rdev == 0
}

// imageSize returns the size of a directory in an image of V0 or V1: entries of 12 bytes and a name, packed into blocks of
// 4096, the last one cut off where it ends if it is at most half full.
func imageSize(dir *fstree.Directory, root bool) uint64 {
	names := append([]fstree.Entry{{Name: "."}, {Name: ".."}}, dir.Entries...)
	if root { // of V0 or V1
		names = withHidden(names, dir)
	}
	// The order decides where blocks end.
	d := &fstree.Directory{}
	for _, e := range names {
		d.Set(e.Name, e.Inode)
	}
	var blocks, used uint64
	for _, e := range d.Entries {
		n := uint64(12 + len(e.Name))
		if used+n > 4096 {
			blocks, used = blocks+1, 0
		}
		used += n
	}
	if used > 2048 {
		blocks, used = blocks+1, 0
	}
	return blocks*4096 + used
}

// withHidden adds the names 00 to ff, which the root directory of an image always has.
func withHidden(names []fstree.Entry, dir *fstree.Directory) []fstree.Entry {
	const digits = "0123456789abcdef"
	for k := range 256 {
		if name := string([]byte{digits[k>>4], digits[k&15]}); dir.Lookup(name) == nil {
			names = append(names, fstree.Entry{Name: name})
		}
	}
	return names
}
