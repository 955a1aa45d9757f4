package fsverity

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errors of [Enable] and [Measure] that callers decide on. Every other error is returned as the kernel gave it.
var (
	// ErrNotSupported: the kernel or the file system has no fs-verity, or the file system was made without it.
	ErrNotSupported = errors.New("fs-verity is not supported by the kernel or the file system")
	// ErrNotEnabled: the file system could, but this file has no fs-verity digest.
	ErrNotEnabled = errors.New("fs-verity is not enabled on the file")
	// ErrAlreadyEnabled: the file has fs-verity already, with whatever digest.
	ErrAlreadyEnabled = errors.New("fs-verity is already enabled on the file")
)

// Enable makes the file read-only for ever and lets the kernel check every block that is read from it. The descriptor
// must be open for reading only. A descriptor open for writing anywhere else makes the kernel answer ETXTBSY; since a
// child forked at the wrong moment may hold one until it executes, Enable tries again for a while before it returns it.
func Enable(f *os.File, a Algorithm) error {
	arg := unix.FsverityEnableArg{Version: 1, Hash_algorithm: uint32(a), Block_size: BlockSize}
	wait := time.Millisecond
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg)))
		runtime.KeepAlive(f)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		case unix.ETXTBSY:
			if wait > 64*time.Millisecond {
				return os.NewSyscallError("FS_IOC_ENABLE_VERITY", errno)
			}
			time.Sleep(wait)
			wait *= 2
			continue
		case unix.EEXIST:
			return ErrAlreadyEnabled
		case unix.EOPNOTSUPP, unix.ENOTTY:
			return ErrNotSupported
		}
		return os.NewSyscallError("FS_IOC_ENABLE_VERITY", errno)
	}
}

// EnableOrCopy is [Enable] for a file without a name. If it stays busy, because some process keeps a writable descriptor,
// the content is copied to a new unnamed file in dir, which nobody else can have open, and verity is enabled there. It
// returns the file to go on with: f itself or the copy, in which case f has been closed.
func EnableOrCopy(f *os.File, dir *os.File, a Algorithm) (*os.File, error) {
	err := Enable(f, a)
	if !errors.Is(err, unix.ETXTBSY) {
		return f, err
	}
	info, err := f.Stat()
	if err != nil {
		return f, err
	}
	fd, err := unix.Openat(int(dir.Fd()), ".", unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, uint32(info.Mode().Perm()))
	if err != nil {
		return f, fmt.Errorf("file is busy and cannot be copied: %w", err)
	}
	w := os.NewFile(uintptr(fd), f.Name())
	_, err = io.Copy(w, io.NewSectionReader(f, 0, info.Size()))
	var again *os.File
	if err == nil {
		again, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", w.Fd()))
	}
	w.Close()
	if err != nil {
		return f, fmt.Errorf("file is busy and cannot be copied: %w", err)
	}
	if err := Enable(again, a); err != nil {
		again.Close()
		return f, err
	}
	f.Close()
	return again, nil
}

// Measure asks the kernel for the digest of a file, which it returns only for a file whose every read it checks.
func Measure(f *os.File) (Digest, error) {
	defer runtime.KeepAlive(f)
	return MeasureDescriptor(int(f.Fd()))
}

// MeasureDescriptor is [Measure] for a plain file descriptor.
func MeasureDescriptor(fd int) (Digest, error) {
	var arg struct {
		algorithm, size uint16
		sum             [64]byte
	}
	arg.size = uint16(len(arg.sum))
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.FS_IOC_MEASURE_VERITY, uintptr(unsafe.Pointer(&arg)))
	switch errno {
	case 0:
	case unix.ENODATA:
		return Digest{}, ErrNotEnabled
	case unix.EOPNOTSUPP, unix.ENOTTY:
		return Digest{}, ErrNotSupported
	default:
		return Digest{}, os.NewSyscallError("FS_IOC_MEASURE_VERITY", errno)
	}
	if int(arg.size) > len(arg.sum) {
		return Digest{}, fmt.Errorf("FS_IOC_MEASURE_VERITY: digest of %d bytes", arg.size)
	}
	d, err := MakeDigest(Algorithm(arg.algorithm), arg.sum[:arg.size])
	if err != nil {
		return Digest{}, fmt.Errorf("FS_IOC_MEASURE_VERITY: %w", err)
	}
	return d, nil
}
