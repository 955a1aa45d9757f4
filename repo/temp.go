package repo

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// temp is a file that has no name yet or, on file systems that need one, a name in tmp/. It is a plain descriptor: an import
// makes hundreds of thousands of them, and an os.File costs several system calls each.
type temp struct {
	fd     int
	file   *os.File // of fd, once it has been sealed
	dir    *os.File // where name is
	name   string   // "" if the file has none
	blocks *blocks  // of a file that is written past the page cache
}

// noUnnamed makes newTemp do without unnamed files. Only tests set it.
var noUnnamed = false

// newTemp makes a file on the file system of dir, below repository.
func newTemp(dir, repository *os.File) (*temp, error) {
	if !noUnnamed {
		fd, err := retry(func() (int, error) {
			return unix.Openat(int(dir.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
		})
		if err == nil {
			return &temp{fd: fd}, nil
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
	fd, err := retry(func() (int, error) {
		return unix.Openat(int(tmp.Fd()), name, unix.O_CREAT|unix.O_EXCL|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	})
	if err != nil {
		tmp.Close()
		return nil, &os.PathError{Op: "create", Path: "tmp/" + name, Err: err}
	}
	return &temp{fd: fd, dir: tmp, name: name}, nil
}

// retry calls f again while a signal interrupts it.
func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// Write appends to the file.
func (t *temp) Write(b []byte) (int, error) {
	if t.blocks != nil {
		t.collect(b)
		return len(b), nil
	}
	n, err := t.write(b)
	return n, os.NewSyscallError("write", err)
}

func (t *temp) write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := retry(func() (int, error) { return unix.Write(t.fd, b[done:]) })
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

// ReadAt reads what was written.
func (t *temp) ReadAt(b []byte, at int64) (int, error) {
	done := 0
	for done < len(b) {
		n, err := retry(func() (int, error) { return unix.Pread(t.fd, b[done:], at+int64(done)) })
		if err != nil {
			return done, os.NewSyscallError("read", err)
		}
		if n == 0 {
			return done, io.EOF
		}
		done += n
	}
	return done, nil
}

// seal enables fs-verity. ErrNotSupported leaves the file as it was.
func (t *temp) seal(a fsverity.Algorithm, dir *os.File) error {
	// While a descriptor can write, fs-verity cannot be enabled.
	fd, err := retry(func() (int, error) {
		return unix.Open(fmt.Sprintf("/proc/self/fd/%d", t.fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	})
	if err != nil {
		return os.NewSyscallError("open", err)
	}
	unix.Close(t.fd)
	t.file = os.NewFile(uintptr(fd), "new object")
	if t.name != "" {
		err = fsverity.Enable(t.file, a)
	} else {
		t.file, err = fsverity.EnableOrCopy(t.file, dir, a)
	}
	t.fd = int(t.file.Fd())
	return err
}

// link gives the file its name. The error is EEXIST if there is one of that name.
func (t *temp) link(dir int, name string) error {
	var err error
	if t.name != "" {
		err = unix.Linkat(int(t.dir.Fd()), t.name, dir, name, 0)
		if err == nil {
			unix.Unlinkat(int(t.dir.Fd()), t.name, 0)
			t.name = ""
		}
	} else {
		err = linkUnnamed(t.fd, dir, name)
	}
	if err != nil {
		return &os.LinkError{Op: "link", Old: "new file", New: name, Err: err}
	}
	return nil
}

// noEmptyPath tells that the kernel links no descriptors: before Linux 6.10 that takes CAP_DAC_READ_SEARCH.
var noEmptyPath atomic.Bool

// linkUnnamed gives an open file a name. By its descriptor that is faster than by its link in /proc.
func linkUnnamed(fd, dir int, name string) error {
	if !noEmptyPath.Load() {
		err := unix.Linkat(fd, "", dir, name, unix.AT_EMPTY_PATH)
		if err != unix.ENOENT {
			return err
		}
		noEmptyPath.Store(true)
	}
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), dir, name, unix.AT_SYMLINK_FOLLOW)
}

// replace makes something in the place of another, in one step. It is made in tmp/, where garbage collection finds it if nothing comes
// after that.
func (r *Repo) replace(dir int, name string, make func(dir int, name string) error) error {
	tmp, err := r.mkdir("tmp")
	if err != nil {
		return err
	}
	defer tmp.Close()
	other := rand.Text()
	if err := make(int(tmp.Fd()), other); err != nil {
		return err
	}
	if err := unix.Renameat(int(tmp.Fd()), other, dir, name); err != nil {
		unix.Unlinkat(int(tmp.Fd()), other, 0)
		return &os.LinkError{Op: "rename", Old: "tmp/" + other, New: name, Err: err}
	}
	return nil
}

// discard closes the file, and removes it if it has no name but the one in tmp/.
func (t *temp) discard() {
	if t.blocks != nil {
		t.wait()
		t.drop()
	}
	if t.name != "" {
		unix.Unlinkat(int(t.dir.Fd()), t.name, 0)
	}
	if t.dir != nil {
		t.dir.Close()
	}
	if t.file != nil {
		t.file.Close()
	} else {
		unix.Close(t.fd)
	}
}

// symlink makes a symbolic link, replacing what is there, in one step.
func (r *Repo) symlink(dir *os.File, target, name string) error {
	if have, err := readlink(dir, name); err == nil && have == target {
		return nil
	}
	link := func(dir int, name string) error {
		if err := unix.Symlinkat(target, dir, name); err != nil {
			return &os.LinkError{Op: "symlink", Old: target, New: name, Err: err}
		}
		return nil
	}
	err := link(int(dir.Fd()), name)
	if errors.Is(err, unix.EEXIST) {
		err = r.replace(int(dir.Fd()), name, link)
	}
	return err
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
