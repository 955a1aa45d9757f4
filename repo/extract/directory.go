package extract

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Extraction writes a tree into a directory.
//
// Everything is made relative to the descriptor of its directory, which was opened by its name and not through a symbolic
// link. So nothing is written elsewhere, whatever the image has for names and targets, and whoever else writes there. First
// come directories, which are the writer's alone as yet, and files; then the further names of files; then what directories
// have for owner, permissions and time, which would change or forbid the rest.
type Extraction struct {
	Objects *Objects
	Root    bool // owners, devices and privileged attributes can be made
	Force   bool // replace what is there

	jobs    chan fileJob
	first   map[*fstree.Inode]string // the first name of every file
	links   []hardLink
	missing map[*fstree.Inode]bool // devices that were left out
	noClone atomic.Bool            // the file system cannot share data

	// What has been done so far; others may look while it goes on.
	Files, Bytes, Cloned           atomic.Int64
	Owners, SetID, Devices, Xattrs atomic.Int64 // left out
	failed                         atomic.Bool
	mu                             sync.Mutex
	err                            error
}

// hardLink is a further name of a file.
type hardLink struct{ first, path string }

// fileJob is a regular file to be written.
type fileJob struct {
	dir   *targetDir
	name  string
	path  string
	inode *fstree.Inode
}

// targetDir is a directory that stays open until the last file in it has been written.
type targetDir struct {
	fd   int
	refs atomic.Int32
}

func (d *targetDir) release() {
	if d.refs.Add(-1) == 0 {
		unix.Close(d.fd)
	}
}

// Run writes the tree into a directory that is there. Without an error, everything is as in the tree but for what was left out.
func (x *Extraction) Run(ctx context.Context, tree *fstree.Tree, dir string) error {
	root, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(root)
	x.jobs = make(chan fileJob, 64)
	x.first, x.missing = map[*fstree.Inode]string{}, map[*fstree.Inode]bool{}
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(x.work)
	}
	own, err := unix.FcntlInt(uintptr(root), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = x.directory(ctx, own, "", tree.Root)
	}
	close(x.jobs)
	workers.Wait()
	if x.err != nil {
		err = x.err
	}
	if err == nil {
		err = x.linkAll(root)
	}
	if err == nil {
		err = x.finish(root, "", tree.Root)
	}
	if err != nil {
		return fmt.Errorf("%s%w", dir, err)
	}
	return nil
}

// at puts the path before an error; that of the root is "".
func at(path string, err error) error { return fmt.Errorf("%s: %w", fstree.Printable(path), err) }

// directory makes what is in a directory, and closes it.
func (x *Extraction) directory(ctx context.Context, fd int, dir string, inode *fstree.Inode) error {
	d := &targetDir{fd: fd}
	d.refs.Store(1)
	defer d.release()
	for _, e := range inode.Dir().Entries {
		if err := ctx.Err(); err != nil {
			return at(dir, err)
		}
		if x.failed.Load() {
			return nil
		}
		p := dir + "/" + e.Name
		if e.Inode.Dir() != nil {
			sub, err := x.mkdir(fd, e.Name)
			if err != nil {
				return at(p, err)
			}
			if err := x.directory(ctx, sub, p, e.Inode); err != nil {
				return err
			}
			continue
		}
		if first, again := x.first[e.Inode]; again {
			if !x.missing[e.Inode] {
				x.links = append(x.links, hardLink{first, p})
			}
			continue
		}
		x.first[e.Inode] = p
		if e.Inode.Type() == fstree.TypeRegular {
			d.refs.Add(1)
			x.jobs <- fileJob{d, e.Name, p, e.Inode}
			continue
		}
		if err := x.special(fd, e.Name, e.Inode); err != nil {
			return at(p, err)
		}
		x.Files.Add(1)
	}
	return nil
}

// mkdir makes a directory that is its maker's alone, and opens it.
func (x *Extraction) mkdir(parent int, name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	err := unix.Mkdirat(parent, name, 0o700)
	if err == unix.EEXIST && x.Force {
		fd, err := openat(parent, name, flags)
		if err == nil {
			if err = unix.Fchmod(fd, 0o700); err != nil {
				unix.Close(fd)
			}
			return fd, err
		}
		if err != unix.ENOTDIR && err != unix.ELOOP {
			return -1, err
		}
		if err := unix.Unlinkat(parent, name, 0); err != nil {
			return -1, err
		}
		if err := unix.Mkdirat(parent, name, 0o700); err != nil {
			return -1, err
		}
	} else if err != nil {
		return -1, err
	}
	return openat(parent, name, flags)
}

func openat(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags, 0o600)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// create makes what is not a directory. What has the name already is removed, if that is asked for.
func (x *Extraction) create(dir int, name string, create func() error) error {
	err := create()
	if err != unix.EEXIST || !x.Force {
		return err
	}
	if err := unix.Unlinkat(dir, name, 0); err == unix.EISDIR {
		return errors.New("there is a directory in its place: remove that")
	} else if err != nil {
		return err
	}
	return create()
}

// special makes a symlink, device, pipe or socket.
func (x *Extraction) special(dir int, name string, i *fstree.Inode) error {
	err := x.create(dir, name, func() error {
		switch c := i.Content.(type) {
		case fstree.Symlink:
			return unix.Symlinkat(string(c), dir, name)
		case fstree.Device:
			if !x.Root && (c.Block || c.Rdev != 0) { // a whiteout is no device, and everybody's
				return unix.EPERM
			}
			return unix.Mknodat(dir, name, i.Type()|0o600, int(unix.Mkdev(c.Major(), c.Minor())))
		}
		return unix.Mknodat(dir, name, i.Type()|0o600, 0)
	})
	if _, device := i.Content.(fstree.Device); device && err == unix.EPERM {
		x.Devices.Add(1)
		x.missing[i] = true
		return nil
	}
	if err != nil {
		return err
	}
	fd, err := openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return x.metadata(fd, true, i)
}

// work writes files until there are no more; after an error it only closes their directories.
func (x *Extraction) work() {
	for j := range x.jobs {
		if !x.failed.Load() {
			if err := x.file(j); err != nil {
				x.mu.Lock()
				if x.err == nil {
					x.err = at(j.path, err)
				}
				x.mu.Unlock()
				x.failed.Store(true)
			}
		}
		j.dir.release()
	}
}

func (x *Extraction) file(j fileJob) error {
	var fd int
	err := x.create(j.dir.fd, j.name, func() (err error) {
		fd, err = openat(j.dir.fd, j.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC)
		return err
	})
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), j.name)
	switch c := j.inode.Content.(type) {
	case fstree.Inline:
		_, err = f.Write(c)
	case *fstree.Object:
		err = x.content(f, c)
	}
	if err == nil {
		err = x.metadata(fd, false, j.inode)
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err != nil {
		// What is wrong must not be taken for the file.
		unix.Unlinkat(j.dir.fd, j.name, 0)
		return err
	}
	x.Files.Add(1)
	return nil
}

// content copies an object. The digest is that of what has been written, so it does not matter who changes the object
// meanwhile, nor that sharing data goes past the checks of fs-verity.
func (x *Extraction) content(f *os.File, o *fstree.Object) error {
	from, err := x.Objects.find(o)
	if err != nil {
		return err
	}
	defer from.Close()
	var written fsverity.Digest
	if x.clone(f, from.File) {
		x.Cloned.Add(1)
		written, err = x.Objects.digest(from.digest.Algorithm(), io.NewSectionReader(f, 0, math.MaxInt64))
	} else {
		written, err = x.Objects.digest(from.digest.Algorithm(), io.TeeReader(from, f))
	}
	if err == nil && written != from.digest {
		err = repo.ErrCorrupt
	}
	if err != nil {
		return fmt.Errorf("object %v: %w", from.digest, err)
	}
	x.Bytes.Add(int64(o.Size))
	return nil
}

// clone makes a file share the data of another one, and reports whether it does.
func (x *Extraction) clone(to, from *os.File) bool {
	if x.noClone.Load() {
		return false
	}
	err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
	if err == unix.EOPNOTSUPP || err == unix.EXDEV || err == unix.ENOTTY || err == unix.EINVAL {
		x.noClone.Store(true)
	}
	return err == nil
}

// metadata sets owner, permissions, attributes and time, in an order in which none undoes another one. A descriptor that is
// only a place (O_PATH) is not good for all of it, but its name in /proc is.
func (x *Extraction) metadata(fd int, place bool, i *fstree.Inode) error {
	proc := fmt.Sprintf("/proc/self/fd/%d", fd)
	perm := i.Perm
	if x.Root {
		if i.UID == math.MaxUint32 || i.GID == math.MaxUint32 {
			x.Owners.Add(1) // the kernel takes these for "as it is"
		}
		if err := unix.Fchownat(fd, "", int(i.UID), int(i.GID), unix.AT_EMPTY_PATH); err != nil {
			return os.NewSyscallError("chown", err)
		}
	} else {
		if int(i.UID) != os.Geteuid() || int(i.GID) != os.Getegid() {
			x.Owners.Add(1)
		}
		if perm&0o6000 != 0 {
			perm &^= 0o6000 // they would stand for another user than in the image
			x.SetID.Add(1)
		}
	}
	if i.Type() != fstree.TypeSymlink {
		var err error
		if place {
			err = unix.Chmod(proc, perm)
		} else {
			err = unix.Fchmod(fd, perm)
		}
		if err != nil {
			return os.NewSyscallError("chmod", err)
		}
	}
	for _, a := range i.Xattrs {
		if !x.Root && (strings.HasPrefix(a.Name, "trusted.") || strings.HasPrefix(a.Name, "security.")) {
			x.Xattrs.Add(1)
			continue
		}
		var err error
		if place {
			err = unix.Setxattr(proc, a.Name, a.Value, 0)
		} else {
			err = unix.Fsetxattr(fd, a.Name, a.Value, 0)
		}
		if err == unix.EOPNOTSUPP || err == unix.EPERM {
			x.Xattrs.Add(1)
		} else if err != nil {
			return fmt.Errorf("attribute %s: %w", fstree.Printable(a.Name), err)
		}
	}
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: i.Mtime.Sec, Nsec: int64(i.Mtime.Nsec)}}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(fd, "", times, unix.AT_EMPTY_PATH))
}

// linkAll gives files their further names.
func (x *Extraction) linkAll(root int) error {
	for _, l := range x.links {
		err := x.link(root, l)
		if err != nil {
			return at(l.path, err)
		}
	}
	return nil
}

func (x *Extraction) link(root int, l hardLink) error {
	from, err := openBelow(root, path.Dir(l.first))
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := openBelow(root, path.Dir(l.path))
	if err != nil {
		return err
	}
	defer unix.Close(to)
	name := path.Base(l.path)
	return x.create(to, name, func() error { return unix.Linkat(from, path.Base(l.first), to, name, 0) })
}

// openBelow opens a directory, one after the other on its way: there is no limit for the length, and no link is followed.
func openBelow(root int, dir string) (int, error) {
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := openat(root, ".", flags)
	for name := range strings.SplitSeq(strings.Trim(dir, "/"), "/") {
		if err != nil || name == "" {
			break
		}
		parent := fd
		fd, err = openat(parent, name, flags)
		unix.Close(parent)
	}
	return fd, err
}

// finish sets the metadata of directories, each after what is in it.
func (x *Extraction) finish(fd int, dir string, inode *fstree.Inode) error {
	for _, e := range inode.Dir().Entries {
		if e.Inode.Dir() == nil {
			continue
		}
		p := dir + "/" + e.Name
		sub, err := openat(fd, e.Name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC)
		if err != nil {
			return at(p, err)
		}
		err = x.finish(sub, p, e.Inode)
		unix.Close(sub)
		if err != nil {
			return err
		}
	}
	if err := x.metadata(fd, false, inode); err != nil {
		return at(dir, err)
	}
	return nil
}
