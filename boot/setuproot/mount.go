package setuproot

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openBeneath opens a path below dir, through no symbolic link and no other mount's magic.
func openBeneath(dir *os.File, path string, flags int) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), path, &how)
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
			continue
		case err == unix.ELOOP || err == unix.ENOTDIR:
			return nil, refuse("%s: a symbolic link or a file where a directory must be: somebody planted it; remove it", path)
		case err == unix.ENOPKG:
			return nil, refuse("%s: this kernel lacks the algorithm of its fs-verity digest (module sha512_generic): "+
				"put it into the initramfs", path)
		case err != nil:
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// openRegular opens a file below dir for reading. What else may have been put there is not even opened: a fifo would make us
// wait for ever, and a device would do whatever its driver does then.
func openRegular(dir *os.File, path string) (*os.File, error) {
	f, err := openBeneath(dir, path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, refuse("%s: not a regular file: somebody planted it; boot another entry, or install the image again", path)
	}
	return os.OpenFile(procPath(f), unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// ensureDir opens a directory, and makes it before if need be.
func ensureDir(parent *os.File, name string, mode uint32) (f *os.File, made bool, err error) {
	f, err = openBeneath(parent, name, unix.O_PATH|unix.O_DIRECTORY)
	if !errors.Is(err, unix.ENOENT) {
		return f, false, err
	}
	err = unix.Mkdirat(int(parent.Fd()), name, mode)
	if err == unix.EROFS {
		return nil, false, fmt.Errorf("%s is missing, and the physical root is mounted read-only: add \"rw\" to the kernel "+
			"command line, or install the image again", name)
	}
	if err != nil && err != unix.EEXIST {
		return nil, false, &os.PathError{Op: "mkdir", Path: name, Err: err}
	}
	f, err = openBeneath(parent, name, unix.O_PATH|unix.O_DIRECTORY)
	return f, err == nil, err
}

// likeLower gives a new directory of the state the mode, owner and label of the directory that it covers: it is what is seen.
func likeLower(upper, base *os.File) error {
	var b unix.Stat_t
	if err := unix.Fstat(int(base.Fd()), &b); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if err := unix.Chown(procPath(upper), int(b.Uid), int(b.Gid)); err != nil {
		return os.NewSyscallError("chown", err)
	}
	if err := unix.Chmod(procPath(upper), b.Mode&0o7777); err != nil {
		return os.NewSyscallError("chmod", err)
	}
	const label = "security.selinux"
	value := make([]byte, 4096)
	if n, err := unix.Getxattr(procPath(base), label, value); err == nil {
		// A system without SELinux does not mind, one with it complains about the missing label.
		unix.Setxattr(procPath(upper), label, value[:n], 0)
	}
	return nil
}

func readOnly(f *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(f.Fd()), &st) == nil && st.Flags&unix.ST_RDONLY != 0
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// filesystem is a file system that is being configured: fsopen(2). The first error stays.
type filesystem struct {
	name string
	fd   int
	err  error
}

func openFS(name string) (*filesystem, error) {
	fd, err := unix.Fsopen(name, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("file system %s: %w", name, os.NewSyscallError("fsopen", err))
	}
	return &filesystem{name: name, fd: fd}, nil
}

func (f *filesystem) close() { unix.Close(f.fd) }

func (f *filesystem) keep(what string, err error) {
	if err == nil || f.err != nil {
		return
	}
	f.err = fmt.Errorf("file system %s: %s: %w", f.name, what, err)
	if log := f.log(); log != "" {
		f.err = fmt.Errorf("%w (the kernel says: %s)", f.err, log)
	}
}

// log returns what the kernel has to say about the last call.
func (f *filesystem) log() string {
	var lines []string
	buf := make([]byte, 1024)
	for range 8 {
		n, err := unix.Read(f.fd, buf)
		if err != nil || n <= 2 {
			break
		}
		lines = append(lines, strings.TrimSpace(string(buf[2:n]))) // "e ", "w " or "i " stands before the text
	}
	return strings.Join(lines, "; ")
}

func (f *filesystem) flag(key string) { f.keep(key, unix.FsconfigSetFlag(f.fd, key)) }

func (f *filesystem) set(key, value string) {
	f.keep(key+"="+value, unix.FsconfigSetString(f.fd, key, value))
}

// layer gives overlayfs a directory, as a descriptor or by the path that the descriptor has in /proc.
func (f *filesystem) layer(key string, dir *os.File, fd bool) {
	if fd {
		f.keep(key, unix.FsconfigSetFd(f.fd, key, int(dir.Fd())))
		return
	}
	f.set(key, procPath(dir))
}

// create makes the file system as it was configured.
func (f *filesystem) create() {
	if f.err == nil {
		f.keep("creating it", unix.FsconfigCreate(f.fd))
	}
}

// mount creates the file system and makes a mount of it, attached to nothing.
func (f *filesystem) mount(attributes int) (*os.File, error) {
	f.create()
	if f.err != nil {
		return nil, f.err
	}
	fd, err := unix.Fsmount(f.fd, unix.FSMOUNT_CLOEXEC, attributes)
	if err != nil {
		f.keep("fsmount", err)
		return nil, f.err
	}
	return os.NewFile(uintptr(fd), f.name), nil
}

// mapOwners makes a mount that is attached to nothing yet show the owners of files as a user namespace maps them.
func mapOwners(mount *os.File, namespace string) error {
	ns, err := os.OpenFile(namespace, unix.O_RDONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer ns.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(int(mount.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("%s: mapping owners: %w (it must be a user namespace other than the first one)", namespace,
			os.NewSyscallError("mount_setattr", err))
	}
	return nil
}

// cloneTree makes a mount of a directory, attached to nothing: a bind mount to be.
func cloneTree(dir int, path string, flags uint) (*os.File, error) {
	fd, err := unix.OpenTree(dir, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|flags)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// moveMount attaches a mount to a directory below dir.
func moveMount(tree, dir *os.File, path string) error {
	at, err := openBeneath(dir, path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer at.Close()
	err = unix.MoveMount(int(tree.Fd()), "", int(at.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return &os.PathError{Op: "move_mount", Path: path, Err: err}
	}
	return nil
}

func moveMountPath(tree *os.File, path string) error {
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "move_mount", Path: path, Err: err}
	}
	return nil
}

// loopDevice makes a read-only block device of an open file. It goes when it is no longer used.
func loopDevice(image *os.File) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("this kernel mounts erofs only from a block device, and there are no loop devices "+
			"(module loop): %w", err)
	}
	defer control.Close()
	config := unix.LoopConfig{Fd: uint32(image.Fd())}
	config.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
	for range 64 {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, os.NewSyscallError("LOOP_CTL_GET_FREE", err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), os.O_RDONLY, 0)
		if err != nil {
			return nil, err
		}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), unix.LOOP_CONFIGURE, uintptr(unsafe.Pointer(&config)))
		if errno == 0 {
			return dev, nil
		}
		dev.Close()
		if errno != unix.EBUSY { // somebody else was faster
			return nil, os.NewSyscallError("LOOP_CONFIGURE", errno)
		}
	}
	return nil, errors.New("no free loop device")
}
