package repo

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// temp is a file that has no name yet or, on file systems that need one, a name in tmp/.
type temp struct {
	f    *os.File
	dir  *os.File // where name is
	name string   // "" if the file has none
}

// noUnnamed makes newTemp do without unnamed files. Only tests set it.
var noUnnamed = false

// newTemp makes a file on the file system of dir, below repository.
func newTemp(dir, repository *os.File) (*temp, error) {
	if !noUnnamed {
		fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
		if err == nil {
			return &temp{f: os.NewFile(uintptr(fd), "unnamed file")}, nil
		}
		if err != unix.EOPNOTSUPP && err != unix.EISDIR && err != unix.ENOSYS {
			return nil, &os.PathError{Op: "create", Path: dir.Name(), Err: err}
		}
	}
	if err := unix.Mkdirat(int(repository.Fd()), "tmp", 0o755); err != nil && err != unix.EEXIST {
		return nil, &os.PathError{Op: "mkdir", Path: "tmp", Err: err}
	}
	tmp, err := openBeneath(repository, "tmp", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	name := rand.Text()
	fd, err := unix.Openat(int(tmp.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		tmp.Close()
		return nil, &os.PathError{Op: "create", Path: "tmp/" + name, Err: err}
	}
	return &temp{f: os.NewFile(uintptr(fd), "tmp/"+name), dir: tmp, name: name}, nil
}

// readOnly exchanges the descriptor for one that cannot write: while there is one that can, fs-verity cannot be enabled.
func (t *temp) readOnly() error {
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", t.f.Fd()))
	if err != nil {
		return err
	}
	t.f.Close()
	t.f = f
	return nil
}

// seal enables fs-verity. ErrNotSupported leaves the file as it was.
func (t *temp) seal(a fsverity.Algorithm, dir *os.File) error {
	if err := t.readOnly(); err != nil {
		return err
	}
	if t.name != "" {
		return fsverity.Enable(t.f, a)
	}
	f, err := fsverity.EnableOrCopy(t.f, dir, a)
	t.f = f
	return err
}

// link gives the file its name. The error is EEXIST if there is one of that name.
func (t *temp) link(dir *os.File, name string) error {
	var err error
	if t.name != "" {
		err = unix.Linkat(int(t.dir.Fd()), t.name, int(dir.Fd()), name, 0)
		if err == nil {
			unix.Unlinkat(int(t.dir.Fd()), t.name, 0)
			t.name = ""
		}
	} else {
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", t.f.Fd()), int(dir.Fd()), name, unix.AT_SYMLINK_FOLLOW)
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: t.f.Name(), New: name, Err: err}
	}
	return nil
}

// replace gives the file a name that another file has.
func (t *temp) replace(dir *os.File, name string) error {
	other := "." + rand.Text()
	if err := t.link(dir, other); err != nil {
		return err
	}
	if err := unix.Renameat(int(dir.Fd()), other, int(dir.Fd()), name); err != nil {
		unix.Unlinkat(int(dir.Fd()), other, 0)
		return &os.LinkError{Op: "rename", Old: other, New: name, Err: err}
	}
	return nil
}

// discard closes the file, and removes it if it has no name but the one in tmp/.
func (t *temp) discard() {
	if t.name != "" {
		unix.Unlinkat(int(t.dir.Fd()), t.name, 0)
	}
	if t.dir != nil {
		t.dir.Close()
	}
	t.f.Close()
}

// symlink makes a symbolic link, replacing what is there, in one step.
func symlink(dir *os.File, target, name string) error {
	if have, err := readlink(dir, name); err == nil && have == target {
		return nil
	}
	other := "." + rand.Text()
	if err := unix.Symlinkat(target, int(dir.Fd()), other); err != nil {
		return &os.LinkError{Op: "symlink", Old: target, New: name, Err: err}
	}
	if err := unix.Renameat(int(dir.Fd()), other, int(dir.Fd()), name); err != nil {
		unix.Unlinkat(int(dir.Fd()), other, 0)
		return &os.LinkError{Op: "rename", Old: other, New: name, Err: err}
	}
	return nil
}

func readlink(dir *os.File, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: name, Err: err}
	}
	return string(buf[:n]), nil
}

var errChanged = errors.New("changed while it was read")
