package repo

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// OpenVerified opens an object that the import has put, whether it is visible yet or not, or one of the repository, see Repo.OpenVerified.
// Nothing has to be durable for that.
func (i *Import) OpenVerified(d fsverity.Digest) (*os.File, error) {
	if f, err := i.openPending(d); f != nil || err != nil {
		return f, err
	}
	return i.r.OpenVerified(d)
}

// OpenStream opens a splitstream that the import has put, or one of the repository, see Repo.OpenStream.
func (i *Import) OpenStream(d fsverity.Digest, contentType uint64) (*Stream, error) {
	f, err := i.OpenVerified(d)
	if err != nil {
		return nil, err
	}
	return i.r.openStream(f, d, contentType)
}

// openPending opens an object that has no name yet, nil if there is none. Its content is what it was when it was digested.
func (i *Import) openPending(d fsverity.Digest) (*os.File, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.flushing[d] != nil {
		i.awaitFlush() // its file may be closed at any moment
	}
	t := i.pending[d]
	if t == nil || i.failed != nil {
		return nil, i.failed
	}
	err := t.wait()
	if err == nil {
		// The descriptor itself may be one that reads whole blocks only.
		var fd int
		fd, err = retry(func() (int, error) {
			return unix.Open(fmt.Sprintf("/proc/self/fd/%d", t.fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		})
		if err == nil {
			return os.NewFile(uintptr(fd), "new object"), nil
		}
	}
	return nil, fmt.Errorf("object %v: %w", d, err)
}
