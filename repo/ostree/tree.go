package ostree

import (
	"errors"
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

const (
	// maxEntries limits the names of a tree: a directory may be in many places, and that in many places again. maxDepth limits the
	// directories in each other: a path has at most 4096 bytes.
	maxEntries = 16 << 20
	maxDepth   = 2048
)

// XattrNames says how the names of extended attributes are in a tree.
type XattrNames int

const (
	// RightNames are those that the kernel knows.
	RightNames XattrNames = iota
	// CfsctlNames have a NUL at their end, as composefs-rs 0.9.4 makes images of commits.
	CfsctlNames
)

// Tree makes the file tree of the commit, which must be complete. Nothing is transformed; there are no times. Content objects that
// are in it more than once are hard links.
func (o *Objects) Tree(names XattrNames) (*fstree.Tree, error) {
	b := &treeBuilder{o: o, names: names, files: map[Checksum]*fstree.Inode{}, metas: map[Checksum]*fstree.Inode{}, trees: map[Checksum]*DirTree{}, sizes: map[Checksum]treeSize{}}
	t, err := b.tree()
	if err != nil {
		return nil, fmt.Errorf("commit %v: %w", o.Commit, err)
	}
	return t, nil
}

type treeBuilder struct {
	o     *Objects
	names XattrNames
	files map[Checksum]*fstree.Inode
	metas map[Checksum]*fstree.Inode // with the metadata alone
	trees map[Checksum]*DirTree
	sizes map[Checksum]treeSize // of trees that have been measured
}

func (b *treeBuilder) tree() (*fstree.Tree, error) {
	c, err := b.o.commit()
	if err != nil {
		return nil, err
	}
	if _, err := b.measure("/", c.RootTree, 0); err != nil {
		return nil, err
	}
	root, err := b.dir("/", c.RootTree, c.RootMeta)
	if err != nil {
		return nil, err
	}
	t := &fstree.Tree{Root: root}
	t.CountLinks()
	return t, nil
}

// treeSize is how large a directory is with all that is below.
type treeSize struct{ names, height int }

// measure finds out how large a directory is, so that what is too large is not made at all.
func (b *treeBuilder) measure(path string, tree Checksum, depth int) (treeSize, error) {
	if s, ok := b.sizes[tree]; ok {
		return s, nil
	}
	list, err := b.list(tree)
	if err != nil {
		return treeSize{}, fmt.Errorf("%s: %w", path, err)
	}
	s := treeSize{names: len(list.Files) + len(list.Dirs)}
	for _, d := range list.Dirs {
		if s.height > maxDepth || depth > maxDepth {
			return s, fmt.Errorf("%.60s...: more than %d directories in each other", path, maxDepth)
		}
		below, err := b.measure(path+d.Name+"/", d.Tree, depth+1)
		if err != nil {
			return s, err
		}
		s.names, s.height = s.names+below.names, max(s.height, below.height+1)
		if s.names > maxEntries {
			return s, fmt.Errorf("%.1000s: more than %d files in the tree", path, maxEntries)
		}
	}
	b.sizes[tree] = s
	return s, nil
}

func (b *treeBuilder) dir(path string, tree, meta Checksum) (*fstree.Inode, error) {
	inode, err := b.meta(meta)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	list, err := b.list(tree)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	d := &fstree.Directory{Entries: make([]fstree.Entry, 0, len(list.Files)+len(list.Dirs))}
	files, dirs := list.Files, list.Dirs
	for len(files)+len(dirs) > 0 {
		var e fstree.Entry
		if len(dirs) == 0 || len(files) > 0 && files[0].Name < dirs[0].Name {
			e.Name = files[0].Name
			e.Inode, err = b.file(files[0].File)
			files = files[1:]
			if err != nil {
				return nil, fmt.Errorf("%s%s: %w", path, e.Name, err)
			}
		} else {
			e.Name = dirs[0].Name
			e.Inode, err = b.dir(path+e.Name+"/", dirs[0].Tree, dirs[0].Meta)
			dirs = dirs[1:]
			if err != nil {
				return nil, err
			}
		}
		d.Entries = append(d.Entries, e)
	}
	inode.Content = d
	return inode, nil
}

func (b *treeBuilder) list(c Checksum) (*DirTree, error) {
	if t := b.trees[c]; t != nil {
		return t, nil
	}
	n := ObjectName{c, KindDirTree}
	data, err := b.o.Metadata(n)
	if err != nil {
		return nil, err
	}
	t, err := ParseDirTree(data)
	if err != nil {
		return nil, fmt.Errorf("object %v: %w", n, err)
	}
	b.trees[c] = t
	return t, nil
}

// meta returns a new inode with the metadata of a directory.
func (b *treeBuilder) meta(c Checksum) (*fstree.Inode, error) {
	have := b.metas[c]
	if have == nil {
		n := ObjectName{c, KindDirMeta}
		data, err := b.o.Metadata(n)
		if err != nil {
			return nil, err
		}
		m, err := ParseDirMeta(data)
		if err != nil {
			return nil, fmt.Errorf("object %v: %w", n, err)
		}
		have = b.inode(m)
		b.metas[c] = have
	}
	inode := *have
	return &inode, nil
}

func (b *treeBuilder) file(c Checksum) (*fstree.Inode, error) {
	if inode := b.files[c]; inode != nil {
		return inode, nil
	}
	f, err := b.o.File(c)
	if err != nil {
		return nil, err
	}
	inode := b.inode(f.Meta)
	switch {
	case f.IsSymlink():
		inode.Content = fstree.Symlink(f.Target)
	case f.Object.IsZero():
		inode.Content = fstree.Inline(f.Inline)
	default:
		inode.Content = &fstree.Object{Digest: f.Object, Size: uint64(f.Size)}
	}
	b.files[c] = inode
	return inode, nil
}

func (b *treeBuilder) inode(m Meta) *fstree.Inode {
	inode := &fstree.Inode{Perm: m.Mode & 0o7777, UID: m.UID, GID: m.GID, Xattrs: m.Xattrs}
	if b.names == CfsctlNames {
		inode.Xattrs = nil
		for _, x := range m.Xattrs {
			inode.Xattrs = append(inode.Xattrs, fstree.Xattr{Name: x.Name + "\x00", Value: x.Value})
		}
	}
	return inode
}

// PlaceEtc makes /usr/etc, where a commit has the configuration as it was built, /etc, where a system that boots from the tree has it. A
// tree that has /etc alone is left as it is.
func PlaceEtc(t *fstree.Tree) error {
	root := t.Root.Dir()
	usr := root.Lookup("usr")
	if usr == nil || usr.Dir() == nil || usr.Dir().Lookup("etc") == nil {
		return nil
	}
	etc := usr.Dir().Lookup("etc")
	if etc.Dir() == nil {
		return errors.New("/usr/etc: not a directory")
	}
	if have := root.Lookup("etc"); have != nil && (have.Dir() == nil || len(have.Dir().Entries) > 0) {
		return errors.New("both /etc and /usr/etc are in the tree: an OSTree commit has only one of them")
	}
	usr.Dir().Remove("etc")
	root.Set("etc", etc)
	return nil
}
