package ostree

import (
	"bufio"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// filez is an open object of an archive on this machine. There are many of them, most are small, and an os.File asks the kernel
// several times as often.
type filez struct {
	fd   int
	left int64 // bytes to read
	*bufio.Reader
}

var filezReaders = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 64<<10) }}

// openFilez takes over the descriptor of a regular file.
func openFilez(fd int) (*filez, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fstat", err)
	}
	z := &filez{fd: fd, left: st.Size, Reader: filezReaders.Get().(*bufio.Reader)}
	z.Reset(descriptor{z})
	return z, nil
}

// Close closes the file, once: the number of the descriptor may be that of another file after that.
func (z *filez) Close() error {
	if z.Reader == nil {
		return os.ErrClosed
	}
	z.Reset(nil)
	filezReaders.Put(z.Reader)
	z.Reader = nil
	return os.NewSyscallError("close", unix.Close(z.fd))
}

// descriptor reads what a filez buffers. It knows the end without asking for more.
type descriptor struct{ z *filez }

func (d descriptor) Read(p []byte) (int, error) {
	if d.z.left <= 0 || len(p) == 0 {
		return 0, io.EOF
	}
	for {
		n, err := unix.Read(d.z.fd, p[:min(int64(len(p)), d.z.left)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, os.NewSyscallError("read", err)
		}
		if n == 0 {
			return 0, io.EOF
		}
		d.z.left -= int64(n)
		return n, nil
	}
}
