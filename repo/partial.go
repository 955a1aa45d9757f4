package repo

import (
	"context"
	"errors"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Partial is what has been received so far of something that takes long to come: a file in tmp/ that outlives the process, so that
// the next one goes on where this one was stopped. It has one user at a time. Nothing vouches for its content: after a power cut it
// may be anything. Garbage collection removes it when nobody has written to it for Margins.Temporary.
type Partial struct {
	*os.File
	r    *Repo
	path string
}

// OpenPartial opens the file of that name, or makes it. It waits while somebody else has it open, who may have removed it then: an
// empty file tells nothing about what has become of its content. The caller is importing: the repository is locked.
func (r *Repo) OpenPartial(ctx context.Context, name string, l LockOptions) (*Partial, error) {
	if err := fstree.CheckName(name); err != nil {
		return nil, err
	}
	path := "tmp/" + name
	for {
		tmp, err := r.mkdir("tmp")
		if err != nil {
			return nil, err
		}
		fd, err := retry(func() (int, error) {
			return unix.Openat(int(tmp.Fd()), name, unix.O_CREAT|unix.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		})
		tmp.Close()
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		p := &Partial{os.NewFile(uintptr(fd), path), r, path}
		if err := r.flock(ctx, p.File, unix.LOCK_EX, l); err != nil {
			p.Close()
			return nil, err
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
			p.Close()
			return nil, &os.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
		}
		if st.Nlink > 0 {
			return p, nil
		}
		p.Close() // who had it has removed it
	}
}

// RemovePartial removes the file of that name, if there is one. Whoever has it open goes on with it.
func (r *Repo) RemovePartial(name string) error {
	err := r.unlink("tmp/" + name)
	if errors.Is(err, unix.ENOENT) {
		return nil // there is no tmp/
	}
	return err
}

// Remove removes the file, which is not wanted any more, and closes it.
func (p *Partial) Remove() error { return errors.Join(p.r.unlink(p.path), p.Close()) }

// Partials returns the names of all such files, sorted.
func (r *Repo) Partials() ([]string, error) {
	dir, err := r.openat("tmp", unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	slices.Sort(names)
	return names, err
}
