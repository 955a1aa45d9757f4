package boot

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// needsSpace returns how many bytes the plan's files take on a mounted ESP, and how many are free. A file that is there
// already counts as well: while it is replaced, both need their space.
func (p Plan) needsSpace(esp string) (need, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(esp, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: esp, Err: err}
	}
	need, err = disk.FATUsage(p.ESPFiles(), int64(st.Bsize))
	return need, int64(st.Bavail) * st.Bsize, err
}

// CheckESP tells whether the plan's files have the space that they need.
func (p Plan) CheckESP(esp string) error {
	need, free, err := p.needsSpace(esp)
	if err == nil && need > free {
		err = fmt.Errorf("%d bytes are needed, only %d are free: remove old boot entries, or use a larger partition", need, free)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", esp, err)
	}
	return nil
}

// WriteESP writes the plan's files to a mounted ESP. All of them fit, or nothing is written. Files get their names when they
// are whole; files of others are left alone.
func (p Plan) WriteESP(esp string) error {
	if err := p.CheckESP(esp); err != nil {
		return err
	}
	root, err := os.OpenRoot(esp)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, f := range p.ESP {
		if err := writeFile(root, f); err != nil {
			return fmt.Errorf("%s: %w", path.Join(esp, f.Path), err)
		}
	}
	d, err := os.Open(esp)
	if err != nil {
		return err
	}
	defer d.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(d.Fd())))
}

func writeFile(root *os.Root, f Place) error {
	if err := root.MkdirAll(path.Dir(f.Path), 0o755); err != nil {
		return err
	}
	r, err := f.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	temporary := path.Dir(f.Path) + "/." + rand.Text()[:12] + ".tmp"
	w, err := root.OpenFile(temporary, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	n, err := io.Copy(w, r)
	if err == nil && n != f.Size {
		err = fmt.Errorf("%d bytes, %d were planned", n, f.Size)
	}
	if err == nil {
		err = w.Sync()
	}
	err = errors.Join(err, w.Close())
	if err == nil {
		err = root.Rename(temporary, f.Path)
	}
	if err != nil {
		root.Remove(temporary)
	}
	return err
}

// WriteState writes the state of the deployment below a mounted physical root. A state that is there already is left alone:
// it is the machine's own.
func (p Plan) WriteState(dir string, open fstree.Open) error {
	t, err := p.StateTree()
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	links := map[*fstree.Inode]string{}
	return t.Walk(func(name string, i *fstree.Inode) error {
		if name == "/" {
			return nil
		}
		name = strings.TrimPrefix(name, "/")
		if err := unpack(root, name, i, open, links); err != nil {
			return fmt.Errorf("%s: %w", path.Join(dir, name), err)
		}
		return nil
	})
}

// unpack makes a file of a tree. What is there already stays as it is.
func unpack(root *os.Root, name string, i *fstree.Inode, open fstree.Open, links map[*fstree.Inode]string) error {
	if _, err := root.Lstat(name); err == nil {
		return nil
	}
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
