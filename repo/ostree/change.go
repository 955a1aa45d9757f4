package ostree

import (
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Changes are made to a tree before a commit of it is composed, as ostree commit makes them with the options of these names.
type Changes struct {
	Owner, Group *uint32 // of all files and directories; nil: as they are
	// Canonical makes root the owner, takes all modes down to 0755, and removes extended attributes: what a repository of the mode
	// bare-user-only can hold.
	Canonical     bool
	NoXattrs      bool
	ROExecutables bool // nobody may write to files that somebody may execute
	SkipSpecial   bool // leave out what OSTree cannot hold
	Overrides
}

// CanonicalPermissions are the changes for bare-user-only.
var CanonicalPermissions = Changes{Canonical: true}

// Apply changes the tree. It returns how many names were left out because OSTree cannot hold what they are.
func (c Changes) Apply(tree *fstree.Tree) (left int, err error) {
	c.each(tree, func(i *fstree.Inode) {
		if d := i.Dir(); d != nil && c.SkipSpecial {
			left += skipSpecial(d)
		}
		c.owner(i)
	})
	if err := c.Overrides.apply(tree); err != nil {
		return left, err
	}
	// Last, as ostree does: what cannot be is not, whatever is said of single files.
	c.each(tree, c.canonical)
	tree.CountLinks()
	return left, nil
}

func (c Changes) each(tree *fstree.Tree, change func(*fstree.Inode)) {
	seen := map[*fstree.Inode]bool{}
	tree.Walk(func(_ string, i *fstree.Inode) error {
		if seen[i] {
			return nil
		}
		seen[i] = true
		change(i)
		return nil
	})
}

func (c Changes) owner(i *fstree.Inode) {
	if c.Owner != nil {
		i.UID = *c.Owner
	}
	if c.Group != nil {
		i.GID = *c.Group
	}
	regular := i.Type() == fstree.TypeRegular
	if c.ROExecutables && regular && i.Perm&0o111 != 0 {
		i.Perm &^= 0o222
	}
}

func (c Changes) canonical(i *fstree.Inode) {
	if c.Canonical {
		i.UID, i.GID = 0, 0
		if i.Type() != fstree.TypeSymlink {
			i.Perm &= 0o755
		}
	}
	if c.NoXattrs || c.Canonical {
		i.Xattrs = nil
	}
}

// skipSpecial removes the entries of a directory that cannot be in a commit.
func skipSpecial(d *fstree.Directory) int {
	var kept []fstree.Entry
	for _, e := range d.Entries {
		switch e.Inode.Content.(type) {
		case *fstree.Directory, fstree.Inline, *fstree.Object, fstree.Symlink:
			kept = append(kept, e)
		}
	}
	n := len(d.Entries) - len(kept)
	d.Entries = kept
	return n
}

// Check tells what cannot be meant.
func (c Changes) Check() error {
	for _, id := range []*uint32{c.Owner, c.Group} {
		if c.Canonical && id != nil && *id != 0 {
			return fmt.Errorf("canonical permissions have root as the owner and group: not %d", *id)
		}
	}
	return nil
}
