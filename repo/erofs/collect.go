package erofs

import (
	"errors"
	"fmt"
	"math/bits"
	"path"
	"slices"
	"strings"
	"unsafe"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// node is an inode on its way into an image. There may be millions, so they are small.
type node struct {
	inode *fstree.Inode
	attrs *attrSet
	dir   *listing // of a directory

	pos      uint64 // of the inode, from the start of the image
	block    uint32 // number of the first whole block
	blocks   uint32 // number of whole blocks
	tail     uint32 // bytes that follow the inode and its attributes
	nlink    uint32
	escaped  bool // a whiteout of the tree, written as a regular file with attributes that mark it
	whiteout bool // a directory that has escaped whiteouts
	compact  bool
}

// listing is what a directory of the image has: the entries of the tree with the numbers of their nodes, and "." and "..",
// which are sorted like all other names.
type listing struct {
	entries     []fstree.Entry
	nodes       []int32
	me, parent  int32
	dot, dotdot int // where they stand
}

// dirent is a name and the number of its node.
type dirent struct {
	name string
	node int32
}

func newListing(entries []fstree.Entry, me, parent int32) *listing {
	before := func(name string) int {
		k, _ := slices.BinarySearchFunc(entries, name, func(e fstree.Entry, name string) int { return strings.Compare(e.Name, name) })
		return k
	}
	return &listing{entries, make([]int32, 0, len(entries)), me, parent, before("."), before("..") + 1}
}

func (l *listing) len() int { return len(l.entries) + 2 }

func (l *listing) at(k int) dirent {
	switch {
	case k == l.dot:
		return dirent{".", l.me}
	case k == l.dotdot:
		return dirent{"..", l.parent}
	case k > l.dotdot:
		k -= 2
	case k > l.dot:
		k--
	}
	return dirent{l.entries[k].Name, l.nodes[k]}
}

// block returns the end of the entries that fit in one block with the one at start, and the bytes they take.
func (l *listing) block(start int) (end, size int) {
	for k := start; k < l.len(); k++ {
		n := direntSize + len(l.at(k).name)
		if size+n > blockSize {
			return k, size
		}
		size += n
	}
	return l.len(), size
}

func (n *node) mode() uint32 {
	if n.escaped {
		return fstree.TypeRegular | n.inode.Perm
	}
	return n.inode.Mode()
}

func (n *node) fileType() byte {
	switch n.mode() & fstree.TypeMask {
	case fstree.TypeDir:
		return ftDir
	case fstree.TypeChar:
		return ftChar
	case fstree.TypeBlock:
		return ftBlock
	case fstree.TypeFifo:
		return ftFifo
	case fstree.TypeSocket:
		return ftSocket
	case fstree.TypeSymlink:
		return ftSymlink
	}
	return ftRegular
}

// object returns the content of a regular file whose data is outside the image, nil for all other inodes.
func (n *node) object() *fstree.Object {
	if o, ok := n.inode.Content.(*fstree.Object); ok && o.Size > 0 {
		return o
	}
	return nil
}

// data returns the bytes that a file or symlink has in the image.
func (n *node) data() []byte {
	switch c := n.inode.Content.(type) {
	case fstree.Inline:
		return c
	case fstree.Symlink:
		return []byte(c)
	}
	return nil
}

func isWhiteout(i *fstree.Inode) bool {
	d, ok := i.Content.(fstree.Device)
	return ok && !d.Block && d.Rdev == 0
}

// collector makes the flat list of inodes of a tree, in the order of the format.
type collector struct {
	format Format
	nodes  []node
	// Inodes with several names: the directory of the first of them in depth-first order, where the node is made, and
	// the node's number, -1 until then.
	home  map[*fstree.Inode]*fstree.Directory
	name  map[*fstree.Inode]string // the path there, for inodes that do not belong to the first of their names
	index map[*fstree.Inode]int32
}

func collect(t *fstree.Tree, f Format) ([]node, error) {
	root := t.Root.Dir()
	if root == nil {
		return nil, errors.New("the root of the tree is not a directory")
	}
	c := &collector{format: f}
	c.nodes = make([]node, 0, c.findLinks(root)+257)
	if f != V2 {
		c.findHomes(t)
	}
	if _, err := c.add("", "/", t.Root); err != nil {
		return nil, err
	}
	var err error
	if f == V2 {
		err = c.depthFirst("", root, 0, 0)
	} else {
		err = c.breadthFirst(t.Root)
	}
	return c.nodes, err
}

// findLinks finds the inodes with several names, and returns the number of names below the root. Nlink is not asked: it is
// whatever somebody wrote.
func (c *collector) findLinks(root *fstree.Directory) int {
	names := 0
	var count func(d *fstree.Directory)
	count = func(d *fstree.Directory) {
		names += len(d.Entries)
		for _, e := range d.Entries {
			if sub := e.Inode.Dir(); sub != nil {
				count(sub)
			}
		}
	}
	count(root)
	seen := newSet(names)
	c.index = map[*fstree.Inode]int32{}
	c.home = map[*fstree.Inode]*fstree.Directory{}
	var find func(d *fstree.Directory)
	find = func(d *fstree.Directory) {
		for _, e := range d.Entries {
			if sub := e.Inode.Dir(); sub != nil {
				find(sub)
			} else if !seen.add(uint64(uintptr(unsafe.Pointer(e.Inode)))) {
				c.index[e.Inode] = -1
			}
		}
	}
	find(root)
	if len(c.index) == 0 {
		return names
	}
	var homes func(d *fstree.Directory)
	homes = func(d *fstree.Directory) {
		for _, e := range d.Entries {
			if sub := e.Inode.Dir(); sub != nil {
				homes(sub)
			} else if _, several := c.index[e.Inode]; several && c.home[e.Inode] == nil {
				c.home[e.Inode] = d
			}
		}
	}
	homes(root)
	return names
}

// findHomes takes over what the tree says about where inodes belong.
func (c *collector) findHomes(t *fstree.Tree) {
	c.name = map[*fstree.Inode]string{}
	for inode, name := range t.Home {
		parent := t.Lookup(path.Dir(name))
		if c.home[inode] != nil && parent != nil && t.Lookup(name) == inode {
			c.home[inode], c.name[inode] = parent.Dir(), name
		}
	}
}

// set is a set of numbers that are spread evenly, but for their lowest bits. It takes 16 bytes for each, a third of what a map
// takes.
type set struct {
	slots []uint64
	zero  bool
}

// newSet returns a set for at most n numbers.
func newSet(n int) *set { return &set{slots: make([]uint64, 1<<bits.Len(uint(2*n)))} }

// add adds a number and reports whether it is new.
func (s *set) add(x uint64) bool {
	if x == 0 {
		was := s.zero
		s.zero = true
		return !was
	}
	// Addresses are multiples of a power of two; the multiplication brings what differs to the top.
	for k := x * 0x9e3779b97f4a7c15 >> (64 - bits.Len(uint(len(s.slots)-1))); ; k = (k + 1) & uint64(len(s.slots)-1) {
		switch s.slots[k] {
		case 0:
			s.slots[k] = x
			return true
		case x:
			return false
		}
	}
}

// add makes the node of an inode and returns its number. The path is for errors.
func (c *collector) add(dir, name string, i *fstree.Inode) (int32, error) {
	if err := check(i); err != nil {
		return 0, fmt.Errorf("%s%s: %w", dir, name, err)
	}
	n := node{inode: i, nlink: i.Nlink}
	if i.Dir() != nil {
		n.nlink = 2 // and one for each subdirectory, when they are added
	}
	c.nodes = append(c.nodes, n)
	return int32(len(c.nodes) - 1), nil
}

// check tells what cannot be in an image.
func check(i *fstree.Inode) error {
	switch content := i.Content.(type) {
	case fstree.Inline:
		if len(content) > maxInline {
			return fmt.Errorf("inline content of %d bytes, at most %d fit", len(content), maxInline)
		}
	case fstree.Symlink:
		if len(content) == 0 || len(content) > fstree.MaxSymlink {
			return fmt.Errorf("symlink target of %d bytes, want 1 to %d", len(content), fstree.MaxSymlink)
		}
	case *fstree.Object:
		if chunkCount(content.Size) > maxChunks {
			return fmt.Errorf("a file of %d bytes is too large for an image", content.Size)
		}
	case nil:
		return errors.New("an inode without content")
	}
	return nil
}

// addEntry makes the node of a directory entry, unless the node belongs to another name, or has been made. A number of -1
// means that the other name comes later.
func (c *collector) addEntry(path string, dir *fstree.Directory, parent int32, e fstree.Entry) (k int32, made bool, err error) {
	links := false
	if len(c.index) > 0 {
		k, links = c.index[e.Inode]
	}
	if links && (k >= 0 || c.home[e.Inode] != dir || c.name[e.Inode] != "" && c.name[e.Inode] != path+"/"+e.Name) {
		return k, false, nil
	}
	if k, err = c.add(path+"/", e.Name, e.Inode); err != nil {
		return 0, false, err
	}
	if links {
		c.index[e.Inode] = k
	}
	if e.Inode.Dir() != nil {
		c.nodes[parent].nlink++
	}
	return k, true, nil
}

// breadthFirst adds what is below the root for V0 and V1.
func (c *collector) breadthFirst(rootInode *fstree.Inode) error {
	type pending struct {
		path       string
		dir        *fstree.Directory
		me, parent int32
	}
	type later struct {
		at    *int32
		inode *fstree.Inode
	}
	var laters []later
	queue := []pending{{dir: withHidden(rootInode)}}
	for ; len(queue) > 0; queue = queue[1:] {
		p := queue[0]
		home := p.dir
		if p.me == 0 {
			home = rootInode.Dir()
		}
		list := newListing(p.dir.Entries, p.me, p.parent)
		c.nodes[p.me].dir = list
		for _, e := range p.dir.Entries {
			k, made, err := c.addEntry(p.path, home, p.me, e)
			if err != nil {
				return err
			}
			list.nodes = append(list.nodes, k)
			if k < 0 {
				laters = append(laters, later{&list.nodes[len(list.nodes)-1], e.Inode})
			}
			if sub := e.Inode.Dir(); sub != nil {
				queue = append(queue, pending{p.path + "/" + e.Name, sub, k, p.me})
			}
			// A whiteout is escaped unless it is one of those that hide the object store.
			if made && isWhiteout(e.Inode) && home.Lookup(e.Name) != nil {
				c.nodes[k].escaped = true
				c.nodes[p.me].whiteout = true
			}
		}
	}
	for _, l := range laters {
		*l.at = c.index[l.inode]
	}
	return nil
}

// withHidden returns the entries of the root directory together with the whiteouts that hide the directories of the
// object store.
func withHidden(root *fstree.Inode) *fstree.Directory {
	hidden := &fstree.Inode{Perm: 0o644, UID: root.UID, GID: root.GID, Nlink: 1, Mtime: root.Mtime, Content: fstree.Device{}}
	if label, ok := root.Xattr(xattrSELinux); ok {
		hidden.Xattrs = []fstree.Xattr{{Name: xattrSELinux, Value: label}}
	}
	all := &fstree.Directory{Entries: slices.Clone(root.Dir().Entries)}
	for k := range 256 {
		if name := fmt.Sprintf("%02x", k); root.Dir().Lookup(name) == nil {
			all.Entries = append(all.Entries, fstree.Entry{Name: name, Inode: hidden})
		}
	}
	slices.SortFunc(all.Entries, func(a, b fstree.Entry) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// depthFirst adds what is below a directory for V2.
func (c *collector) depthFirst(path string, dir *fstree.Directory, me, parent int32) error {
	list := newListing(dir.Entries, me, parent)
	c.nodes[me].dir = list
	for _, e := range dir.Entries {
		k, _, err := c.addEntry(path, dir, me, e)
		if err != nil {
			return err
		}
		list.nodes = append(list.nodes, k)
		if sub := e.Inode.Dir(); sub != nil {
			if err := c.depthFirst(path+"/"+e.Name, sub, k, me); err != nil {
				return err
			}
		}
	}
	return nil
}
