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

// imageOrder knows how often each attribute occurs in an image: those that occur more than once stand last.
type imageOrder struct {
	style  Style
	counts map[countKey]int
	marked map[*fstree.Inode]bool // directories with whiteouts
}

type countKey struct{ name, value string }

func newImageOrder(t *fstree.Tree, s Style) *imageOrder {
	o := &imageOrder{style: s, counts: map[countKey]int{}, marked: map[*fstree.Inode]bool{}}
	seen := map[*fstree.Inode]bool{}
	t.Walk(func(_ string, i *fstree.Inode) error {
		dir := i.Dir()
		if dir == nil {
			if seen[i] {
				return nil
			}
			seen[i] = true
		}
		if dir != nil && s == InfoV1 {
			for _, e := range dir.Entries {
				// The inode of a whiteout is where its first name is; only that directory is marked.
				if isWhiteout(e.Inode) && !seen[e.Inode] {
					o.marked[i] = true
				}
			}
		}
		for _, x := range o.inImage(i) {
			o.counts[countKey{x.Name, string(x.Value)}]++
		}
		return nil
	})
	if label, ok := t.Root.Xattr("security.selinux"); ok && s != InfoV2 {
		o.counts[countKey{"security.selinux", string(label)}] += 256 // of the hidden names, see withHidden
	}
	return o
}

func isWhiteout(i *fstree.Inode) bool {
	d, ok := i.Content.(fstree.Device)
	return ok && !d.Block && d.Rdev == 0
}

// inImage returns an inode's attributes by the names that they have in an image, in its order: sorted, but for a V2, which
// sorts before it escapes.
func (o *imageOrder) inImage(i *fstree.Inode) []fstree.Xattr {
	xattrs := slices.Clone(i.Xattrs)
	if o.marked[i] {
		marked := fstree.Inode{Xattrs: xattrs}
		marked.SetXattr("trusted.overlay.opaque", []byte("x"))
		marked.SetXattr("user.overlay.opaque", []byte("x"))
		xattrs = marked.Xattrs
	}
	for k, x := range xattrs {
		if rest, ok := strings.CutPrefix(x.Name, "trusted.overlay."); ok {
			xattrs[k].Name = "trusted.overlay.overlay." + rest
		}
	}
	if o.style != InfoV2 {
		slices.SortFunc(xattrs, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	}
	return xattrs
}

func (o *imageOrder) xattrs(i *fstree.Inode) []fstree.Xattr {
	most := maxShared
	if o.style == InfoV2 {
		most = maxSharedV2
	}
	var shared, own []fstree.Xattr
	for _, x := range o.inImage(i) {
		escaped := x.Name
		if rest, ok := strings.CutPrefix(x.Name, "trusted.overlay.overlay."); ok {
			x.Name = "trusted.overlay." + rest
		}
		if o.counts[countKey{escaped, string(x.Value)}] > 1 && len(shared) < most {
			shared = append(shared, x)
		} else {
			own = append(own, x)
		}
	}
	return append(own, shared...)
}

// imageSize returns the size of a directory in an image: entries of 12 bytes and a name, packed into blocks of
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
