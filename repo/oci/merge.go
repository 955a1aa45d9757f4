package oci

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

const (
	whiteout     = ".wh."
	opaque       = ".wh..wh..opq"
	whiteoutMeta = ".wh..wh." // what AUFS kept beside whiteouts; it is of no use to others
)

// merged is the tree that layers make, one upon the other.
type merged struct{ root *dir }

// dir is a directory that is still open to changes.
type dir struct {
	inode   *fstree.Inode
	entries map[string]*child
}

type child struct {
	inode *fstree.Inode
	dir   *dir // nil if it is none
}

func newDir(i *fstree.Inode) *dir { return &dir{i, map[string]*child{}} }

func newMerged() *merged { return &merged{newDir(fstree.NewDir(0o755))} }

// layer lays the files of one more layer upon the tree. Whiteouts hide what is below the layer and nothing of the layer itself,
// wherever they stand in it. So they come first.
func (m *merged) layer(next func() (*entry, error)) error {
	var files, whiteouts []*entry
	for {
		e, err := next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if name := base(e.path); strings.HasPrefix(name, whiteout) {
			whiteouts = append(whiteouts, e)
		} else {
			files = append(files, e)
		}
	}
	// A link may be the last name that is left of a file that is hidden.
	below := map[*entry]*child{}
	if len(whiteouts) > 0 {
		for _, e := range files {
			if e.isLink {
				below[e] = m.lookup(e.link)
			}
		}
	}
	for _, e := range whiteouts {
		if err := m.hide(e.path); err != nil {
			return fmt.Errorf("%s: %w", e.path, err)
		}
	}
	for _, e := range files {
		if err := m.add(e, below[e]); err != nil {
			return fmt.Errorf("%s: %w", e.path, err)
		}
	}
	return nil
}

func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// lookup returns what is at a path, nil if nothing is. Symbolic links are not followed.
func (m *merged) lookup(path string) *child {
	at := &child{m.root.inode, m.root}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" { // the root
			continue
		}
		if at.dir == nil {
			return nil
		}
		if at = at.dir.entries[name]; at == nil {
			return nil
		}
	}
	return at
}

// hide applies a whiteout. One for something that is not there is no error: builders write them to be sure.
func (m *merged) hide(path string) error {
	name := base(path)
	parent := m.lookup(strings.TrimSuffix(path, name))
	if name != opaque && !strings.HasPrefix(name, whiteoutMeta) {
		if err := fstree.CheckName(name[len(whiteout):]); err != nil {
			return fmt.Errorf("whiteout: %w", err)
		}
	}
	switch {
	case parent == nil || parent.dir == nil:
	case name == opaque:
		clear(parent.dir.entries)
	default:
		delete(parent.dir.entries, name[len(whiteout):])
	}
	return nil
}

// add lays one file upon the tree; below is what a hard link led to before whiteouts were applied.
func (m *merged) add(e *entry, below *child) error {
	if e.path == "" {
		if e.inode.Dir() == nil {
			return fmt.Errorf("the root is not a directory")
		}
		setMetadata(m.root.inode, &e.inode)
		return nil
	}
	name := base(e.path)
	parent, err := m.parent(strings.TrimSuffix(e.path, name))
	if err != nil {
		return err
	}
	have := parent.entries[name]
	switch {
	case e.isLink:
		target := m.lookup(e.link)
		if target == nil {
			target = below
		}
		switch {
		case target == nil:
			return fmt.Errorf("hard link to %s: there is no such file", e.link)
		case target.dir != nil:
			return fmt.Errorf("hard link to %s: it is a directory", e.link)
		}
		parent.entries[name] = target
	case e.inode.Dir() == nil:
		parent.entries[name] = &child{inode: &e.inode}
	case have != nil && have.dir != nil:
		setMetadata(have.inode, &e.inode)
	default:
		parent.entries[name] = &child{&e.inode, newDir(&e.inode)}
	}
	return nil
}

// parent returns a directory, and makes it and its parents if the layers have left them out.
func (m *merged) parent(path string) (*dir, error) {
	at := m.root
	for name := range strings.SplitSeq(strings.TrimSuffix(path, "/"), "/") {
		if name == "" {
			continue
		}
		next := at.entries[name]
		if next == nil {
			i := fstree.NewDir(0o755)
			next = &child{i, newDir(i)}
			at.entries[name] = next
		}
		if next.dir == nil {
			// Container engines do not agree on what this means: some follow a link that is there, some replace it.
			return nil, fmt.Errorf("%s is not a directory: its layer was not made for the layers below it", strings.TrimSuffix(path, "/"))
		}
		at = next.dir
	}
	return at, nil
}

func setMetadata(to, from *fstree.Inode) {
	content := to.Content
	*to = *from
	to.Content = content
}

// tree returns the tree. Nothing can be added then.
func (m *merged) tree() *fstree.Tree {
	m.root.close()
	return &fstree.Tree{Root: m.root.inode}
}

func (d *dir) close() {
	list := make([]fstree.Entry, 0, len(d.entries))
	for name, c := range d.entries {
		if c.dir != nil {
			c.dir.close()
		}
		list = append(list, fstree.Entry{Name: name, Inode: c.inode})
	}
	slices.SortFunc(list, func(a, b fstree.Entry) int { return strings.Compare(a.Name, b.Name) })
	d.inode.Content = &fstree.Directory{Entries: list}
	d.entries = nil
}
