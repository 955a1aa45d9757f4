package extract

import (
	"fmt"
	"path"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// selection is a part of a tree: everything, or some names of a directory and a part of each of them.
type selection struct {
	whole bool
	names map[string]*selection
}

// Only returns a tree with these files of another one, what is below them, and the directories they are in.
func Only(tree *fstree.Tree, paths []string) (*fstree.Tree, error) {
	all := &selection{names: map[string]*selection{}}
	for _, p := range paths {
		at, inode, way := all, tree.Root, ""
		for name := range strings.SplitSeq(path.Clean("/" + p)[1:], "/") {
			if name == "" {
				break
			}
			dir := inode.Dir()
			if target, ok := inode.Content.(fstree.Symlink); ok {
				return nil, fmt.Errorf("%s: %s is a symbolic link to %s: name the file by its own path", p, fstree.Printable(way), fstree.Printable(string(target)))
			}
			if dir == nil || dir.Lookup(name) == nil {
				return nil, fmt.Errorf("%s: no such file in the image", p)
			}
			inode, way = dir.Lookup(name), way+"/"+name
			next := at.names[name]
			if next == nil {
				next = &selection{names: map[string]*selection{}}
				at.names[name] = next
			}
			at = next
		}
		at.whole = true
	}
	return &fstree.Tree{Root: all.of(tree.Root)}, nil
}

func (s *selection) of(i *fstree.Inode) *fstree.Inode {
	if s.whole {
		return i
	}
	part := *i
	dir := &fstree.Directory{}
	for _, e := range i.Dir().Entries {
		if sub := s.names[e.Name]; sub != nil {
			dir.Entries = append(dir.Entries, fstree.Entry{Name: e.Name, Inode: sub.of(e.Inode)})
		}
	}
	part.Content = dir
	return &part
}
