package pid1

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// moved are the mounts that the system's init gets.
var moved = []string{"/dev", "/proc", "/sys", "/run"}

// programs are what is started if nothing else is said.
var programs = []string{"/sbin/init", "/usr/lib/systemd/systemd"}

// stepFindInit finds the program to execute, in the new root.
type stepFindInit struct{ want string }

// stepMove moves a mount into the new root.
type stepMove struct{ dir string }

// stepSwitch makes the new root that of this process, and gives the initramfs' memory back.
type stepSwitch struct{}

// stepExecute becomes the system's init.
type stepExecute struct{}

func (s stepFindInit) String() string {
	if s.want != "" {
		return "find " + s.want + " in it, as init= says"
	}
	return "find " + strings.Join(programs, " or ") + " in it"
}
func (s stepMove) String() string    { return "move " + s.dir + " into it" }
func (s stepSwitch) String() string  { return "delete the initramfs and switch to the new root" }
func (s stepExecute) String() string { return "execute it" }

func (s stepFindInit) do(r *run) error {
	root, err := os.OpenFile(Sysroot, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	candidates := programs
	if s.want != "" {
		candidates = []string{s.want}
	}
	var errs []error
	for _, name := range candidates {
		err := executable(root, name)
		if err == nil {
			r.init = name
			return nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	return fmt.Errorf("nothing to execute in the image: boot another entry: %w", errors.Join(errs...))
}

// executable checks that a path, as it will be after the switch, is a program.
func executable(root *os.File, name string) error {
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o111 == 0 {
		return errors.New("not a program")
	}
	return nil
}

func (s stepMove) do(r *run) error {
	target := Sysroot + s.dir
	// A link would put the kernel's files anywhere.
	var st unix.Stat_t
	if err := unix.Lstat(target, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("the image has no directory %s: make it with one, or boot another entry", s.dir)
	}
	return os.NewSyscallError("mount", unix.Mount(s.dir, target, "", unix.MS_MOVE, ""))
}

func (s stepSwitch) do(r *run) error {
	old, err := os.OpenFile("/", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer old.Close()
	if err := unix.Chdir(Sysroot); err != nil {
		return &os.PathError{Op: "chdir", Path: Sysroot, Err: err}
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	if err := unix.Chroot("."); err != nil {
		return os.NewSyscallError("chroot", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return os.NewSyscallError("chdir", err)
	}
	return deleteInitramfs(old)
}

// Magic numbers of the file systems that an initramfs is unpacked to, linux/magic.h.
const (
	magicRamfs = 0x858458f6
	magicTmpfs = 0x01021994
)

// deleteInitramfs deletes everything below a directory, to give the memory back. It leaves alone what is no initramfs, and
// what is mounted in it.
func deleteInitramfs(root *os.File) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(root.Fd()), &fs); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if fs.Type != magicRamfs && fs.Type != magicTmpfs {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	emptyDir(root, st.Dev)
	return nil
}

// emptyDir deletes what is in a directory, as far as it is on the device. What cannot be deleted stays: that costs memory,
// nothing else.
func emptyDir(dir *os.File, dev uint64) {
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Dev != dev {
			continue
		}
		flags := 0
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			flags = unix.AT_REMOVEDIR
			fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			sub := os.NewFile(uintptr(fd), name)
			emptyDir(sub, dev)
			sub.Close()
		}
		unix.Unlinkat(int(dir.Fd()), name, flags)
	}
}

func (s stepExecute) do(r *run) error {
	err := unix.Exec(r.init, []string{r.init}, os.Environ())
	return &os.PathError{Op: "exec", Path: r.init, Err: err}
}
