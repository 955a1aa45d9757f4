package erofs

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// node is an inode on its way into an image. The first half says what it is, the second half where it goes.
type node struct {
	inode    *fstree.Inode
	entries  []dirent // of a directory, with "." and "..", sorted
	attrs    []*attr  // in the order in which they are written
	escaped  bool     // a whiteout of the tree, written as a regular file with attributes that mark it
	whiteout bool     // a directory that has escaped whiteouts

	pos       uint64 // of the inode, from the start of the image
	block     uint32 // number of the first whole block
	blocks    uint32 // number of whole blocks
	tail      uint32 // bytes that follow the inode and its attributes
	xattrSize uint32
	shared    uint32 // how many of attrs are references into the shared table
	nlink     uint32
	compact   bool
}

// dirent is a name and the number of its node.
type dirent struct {
	name string
	node int32
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
	c.findLinks(root)
	if f != V2 {
		c.findHomes(t)
	}
	if _, err := c.add("/", t.Root); err != nil {
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

func (c *collector) findLinks(root *fstree.Directory) {
	first := map[*fstree.Inode]*fstree.Directory{}
	c.index = map[*fstree.Inode]int32{}
	c.home = map[*fstree.Inode]*fstree.Directory{}
	var visit func(d *fstree.Directory)
	visit = func(d *fstree.Directory) {
		for _, e := range d.Entries {
			if sub := e.Inode.Dir(); sub != nil {
				visit(sub)
			} else if dir, again := first[e.Inode]; again {
				c.index[e.Inode] = -1
				c.home[e.Inode] = dir
			} else {
				first[e.Inode] = d
			}
		}
	}
	visit(root)
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

// add makes the node of an inode and returns its number.
func (c *collector) add(path string, i *fstree.Inode) (int32, error) {
	if err := check(i); err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
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
	k, links := c.index[e.Inode]
	if links && (k >= 0 || c.home[e.Inode] != dir || c.name[e.Inode] != "" && c.name[e.Inode] != path+"/"+e.Name) {
		return k, false, nil
	}
	if k, err = c.add(path+"/"+e.Name, e.Inode); err != nil {
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
		dir   int32
		entry int
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
		entries := make([]dirent, 0, len(p.dir.Entries)+2)
		for _, e := range p.dir.Entries {
			k, made, err := c.addEntry(p.path, home, p.me, e)
			if err != nil {
				return err
			}
			entries = append(entries, dirent{e.Name, k})
			if sub := e.Inode.Dir(); sub != nil {
				queue = append(queue, pending{p.path + "/" + e.Name, sub, k, p.me})
			}
			// A whiteout is escaped unless it is one of those that hide the object store.
			if made && isWhiteout(e.Inode) && home.Lookup(e.Name) != nil {
				c.nodes[k].escaped = true
				c.nodes[p.me].whiteout = true
			}
		}
		entries = withDots(entries, p.me, p.parent)
		for k, e := range entries {
			if e.node < 0 {
				laters = append(laters, later{p.me, k, home.Lookup(e.name)})
			}
		}
		c.nodes[p.me].entries = entries
	}
	for _, l := range laters {
		c.nodes[l.dir].entries[l.entry].node = c.index[l.inode]
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
	entries := make([]dirent, 0, len(dir.Entries)+2)
	for _, e := range dir.Entries {
		k, _, err := c.addEntry(path, dir, me, e)
		if err != nil {
			return err
		}
		entries = append(entries, dirent{e.Name, k})
		if sub := e.Inode.Dir(); sub != nil {
			if err := c.depthFirst(path+"/"+e.Name, sub, k, me); err != nil {
				return err
			}
		}
	}
	c.nodes[me].entries = withDots(entries, me, parent)
	return nil
}

// withDots adds "." and "..", which are sorted like all other names.
func withDots(entries []dirent, me, parent int32) []dirent {
	for _, dot := range []dirent{{".", me}, {"..", parent}} {
		k, _ := slices.BinarySearchFunc(entries, dot.name, func(e dirent, name string) int {
			return strings.Compare(e.name, name)
		})
		entries = slices.Insert(entries, k, dot)
	}
	return entries
}
