package fstree

import (
	"errors"
	"fmt"
	"strings"
)

// XattrMode says which extended attributes of a container's root file system are kept.
type XattrMode int

const (
	// XattrsAllowlist keeps only security.capability. On a mounted container the host's own labels show through, so this
	// is the only mode that gives the same tree for the mounted and the packed form of an image.
	XattrsAllowlist XattrMode = iota
	// XattrsKeepUser keeps user.* as well.
	XattrsKeepUser
	// XattrsAll keeps everything.
	XattrsAll
)

var xattrModeNames = [...]string{XattrsAllowlist: "allowlist-only", XattrsKeepUser: "keep-user-xattrs", XattrsAll: "all"}

func (m XattrMode) String() string { return xattrModeNames[m] }

// ParseXattrMode reads "allowlist-only", "keep-user-xattrs" or "all".
func ParseXattrMode(s string) (XattrMode, error) {
	for m, name := range xattrModeNames {
		if s == name {
			return XattrMode(m), nil
		}
	}
	return 0, fmt.Errorf("unknown xattr mode %q: want %s", s, strings.Join(xattrModeNames[:], ", "))
}

// Keeps reports whether an extended attribute stays in this mode.
func (m XattrMode) Keeps(name string) bool {
	switch m {
	case XattrsAll:
		return true
	case XattrsKeepUser:
		return name == "security.capability" || strings.HasPrefix(name, "user.")
	}
	return name == "security.capability"
}

// FilterXattrs removes the extended attributes that the mode does not keep.
func (t *Tree) FilterXattrs(m XattrMode) {
	t.Walk(func(_ string, i *Inode) error {
		var kept []Xattr
		for _, x := range i.Xattrs {
			if m.Keeps(x.Name) {
				kept = append(kept, x)
			}
		}
		i.Xattrs = kept
		return nil
	})
}

// ErrNoUsr tells that a tree cannot be a container's root: the metadata of the root directory is copied from /usr.
var ErrNoUsr = errors.New("no directory /usr in the tree: it is not the root of an operating system " +
	"(to take the tree as it is, use --no-propagate-usr-to-root)")

// MakeContainerRoot gives the tree what is left open or differs by accident between the forms of the same container
// image: the root directory gets the metadata of /usr, /run is emptied, extended attributes are filtered.
func (t *Tree) MakeContainerRoot(m XattrMode) error {
	usr := t.Root.Dir().Lookup("usr")
	if usr == nil || usr.Dir() == nil {
		return ErrNoUsr
	}
	root := *usr
	root.Content = t.Root.Content
	root.Xattrs = append([]Xattr(nil), usr.Xattrs...)
	*t.Root = root
	if run := t.Root.Dir().Lookup("run"); run != nil {
		if run.Dir() == nil {
			return fmt.Errorf("/run: not a directory")
		}
		t.EmptyDir(run)
	}
	t.FilterXattrs(m)
	t.CountLinks()
	return nil
}

// EmptyDir removes the entries of a directory and gives it the time of /usr, nanoseconds included, since its own time
// tells when it was last used on the machine that built the tree. The caller counts links again.
func (t *Tree) EmptyDir(dir *Inode) {
	dir.Dir().Entries = nil
	if usr := t.Root.Dir().Lookup("usr"); usr != nil {
		dir.Mtime = usr.Mtime
	}
}
