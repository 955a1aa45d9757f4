package boot

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// WriteState writes the state of the deployment below a mounted physical root. It gets its name when it is whole and durable.
// A state that is there already is left alone, for it is the machine's own; of the files beside /etc and /var, those that
// are missing are added.
func (p Plan) WriteState(dir string, open fstree.Open) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, err := root.Lstat(p.State); err == nil {
		return p.completeState(root)
	}
	if p.Carry != nil {
		if err := p.Carry.shareVar(root); err != nil {
			return err
		}
		open = p.Carry.opener(open)
	}
	t, err := p.StateTree()
	if err != nil {
		return err
	}
	if err := root.MkdirAll(path.Dir(p.State), 0o755); err != nil {
		return err
	}
	// Not among the deployments, for those who list them. What an interrupted run left of this one is of no use.
	unfinished := newState(p.State)
	if err := root.RemoveAll(unfinished); err != nil {
		return err
	}
	links := map[*fstree.Inode]string{}
	err = (&fstree.Tree{Root: t.Lookup(p.State)}).Walk(func(name string, i *fstree.Inode) error {
		if err := unpack(root, path.Join(unfinished, name), i, open, links); err != nil {
			return fmt.Errorf("%s: %w", path.Join(dir, p.State, name), err)
		}
		return nil
	})
	if err == nil {
		err = syncAll(root)
	}
	if err == nil {
		err = root.Rename(unfinished, p.State)
	}
	if err != nil {
		return errors.Join(err, root.RemoveAll(unfinished))
	}
	return syncAll(root)
}

func (p Plan) completeState(root *os.Root) error {
	for _, f := range p.Files {
		if _, err := root.Lstat(f.Path); err == nil {
			continue
		}
		if err := writeFile(root, f); err != nil {
			return fmt.Errorf("%s: %w", path.Join(root.Name(), f.Path), err)
		}
	}
	return syncAll(root)
}

// unpack makes a file of a tree. Nothing is there under its name.
func unpack(root *os.Root, name string, i *fstree.Inode, open fstree.Open, links map[*fstree.Inode]string) error {
	if first, ok := links[i]; ok {
		return root.Link(first, name)
	}
	if i.Nlink > 1 {
		links[i] = name
	}
	parent, err := root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer parent.Close()
	base := path.Base(name)
	switch c := i.Content.(type) {
	case *fstree.Directory:
		err = root.Mkdir(name, 0o700)
	case fstree.Symlink:
		err = root.Symlink(string(c), name)
	case fstree.Inline, *fstree.Object:
		err = unpackFile(root, name, i, open)
	case fstree.Device:
		err = unix.Mknodat(int(parent.Fd()), base, i.Mode(), int(c.Rdev))
	default:
		err = unix.Mknodat(int(parent.Fd()), base, i.Mode(), 0)
	}
	if err != nil {
		return err
	}
	if err := root.Lchown(name, int(i.UID), int(i.GID)); err != nil && (os.Geteuid() == 0 || !errors.Is(err, os.ErrPermission)) {
		return err
	}
	at := fmt.Sprintf("/proc/self/fd/%d/%s", parent.Fd(), base)
	for _, x := range i.Xattrs {
		if err := unix.Lsetxattr(at, x.Name, x.Value, 0); err != nil {
			return fmt.Errorf("attribute %s: %w", x.Name, err)
		}
	}
	if _, ok := i.Content.(fstree.Symlink); ok {
		return nil
	}
	return unix.Fchmodat(int(parent.Fd()), base, i.Perm, 0)
}

func unpackFile(root *os.Root, name string, i *fstree.Inode, open fstree.Open) error {
	w, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if inline, ok := i.Content.(fstree.Inline); ok {
		_, err = w.Write(inline)
		return errors.Join(err, w.Close())
	}
	r, err := open("/"+name, i)
	if err == nil {
		_, err = io.Copy(w, r)
		r.Close()
	}
	return errors.Join(err, w.Close())
}
