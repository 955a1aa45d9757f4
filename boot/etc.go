package boot

import (
	"bytes"
	"slices"

	"github.com/composefs-boot/composefs-boot/boot/setuproot"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// bindsEtc reports whether the state of the system is to have all of /etc, not the changes to that of the image. One whose configuration
// is not understood has an initramfs of its own, and is taken for one that does not say so.
func (s System) bindsEtc() (bool, error) {
	text, err := s.SetupConfig()
	if err != nil || text == nil {
		return false, err
	}
	c, err := setuproot.ParseConfig(text)
	return err == nil && c.Etc == setuproot.Bind, nil
}

// mergeEtc brings the changes that a machine has made to /etc, mine, since it was that of its image, old, to that of another image, next.
// What the machine has changed, added or removed counts for whole files, and everything else is as the other image has it. A file that the
// machine has changed stays, with the directories that it is in, whatever the image has in its place. Neither tree is changed.
func mergeEtc(old, mine, next *fstree.Inode) *fstree.Inode {
	merged := *metadata(old, mine, next)
	dir := &fstree.Directory{}
	merged.Content = dir
	for _, e := range entries(next) {
		if entry(old, e.Name) == nil && entry(mine, e.Name) == nil {
			dir.Set(e.Name, e.Inode)
		}
	}
	for _, e := range entries(mine) {
		if i := mergeEntry(entry(old, e.Name), e.Inode, entry(next, e.Name)); i != nil {
			dir.Set(e.Name, i)
		}
	}
	return &merged
}

// mergeEntry merges what the machine has under a name; nil is nothing.
func mergeEntry(old, mine, next *fstree.Inode) *fstree.Inode {
	if mine.Dir() == nil {
		if old != nil && sameEtc(old, mine) {
			return next
		}
		return mine
	}
	if next != nil && next.Dir() != nil {
		return mergeEtc(old, mine, next)
	}
	// The image has none any more, or something else: what the machine has changed in it stays.
	merged := mergeEtc(old, mine, nil)
	if old != nil && old.Dir() != nil && len(merged.Dir().Entries) == 0 && sameEtc(old, mine) {
		return next
	}
	return merged
}

// metadata is the directory whose owner, permissions and attributes count.
func metadata(old, mine, next *fstree.Inode) *fstree.Inode {
	if next != nil && old != nil && old.Dir() != nil && sameEtc(old, mine) {
		return next
	}
	return mine
}

func entries(i *fstree.Inode) []fstree.Entry {
	if i == nil || i.Dir() == nil {
		return nil
	}
	return i.Dir().Entries
}

func entry(i *fstree.Inode, name string) *fstree.Inode {
	if i == nil || i.Dir() == nil {
		return nil
	}
	return i.Dir().Lookup(name)
}

// sameEtc reports whether a file is as the image has it; of directories, their entries are not compared. Times are not: they are when it
// was written here. Labels are not: they are those of another policy, perhaps.
func sameEtc(a, b *fstree.Inode) bool {
	label := func(x fstree.Xattr) bool { return x.Name == "security.selinux" }
	same := func(x, y fstree.Xattr) bool { return x.Name == y.Name && bytes.Equal(x.Value, y.Value) }
	if a.Mode() != b.Mode() || a.UID != b.UID || a.GID != b.GID ||
		!slices.EqualFunc(slices.DeleteFunc(slices.Clone(a.Xattrs), label), slices.DeleteFunc(slices.Clone(b.Xattrs), label), same) {
		return false
	}
	switch content := a.Content.(type) {
	case *fstree.Directory:
		return true
	case fstree.Inline:
		other, ok := b.Content.(fstree.Inline)
		return ok && bytes.Equal(content, other)
	case *fstree.Object:
		other, ok := b.Content.(*fstree.Object)
		return ok && content.Digest == other.Digest
	}
	return a.Content == b.Content
}
