package repo

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/digestcache"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Has reports whether an object is there and sound, see fstree.Sink.
func (i *Import) Has(d fsverity.Digest) (bool, error) { return i.have(d, nil) }

// have reports whether an object is there and sound. One that is there but not sound is replaced later, by its name. The
// content is what the object should have, or nil.
func (i *Import) have(d fsverity.Digest, content []byte) (bool, error) {
	i.mu.Lock()
	ok := i.pending[d] != nil || i.flushing[d] != nil
	i.mu.Unlock()
	if ok {
		return true, nil
	}
	var err error
	if i.empty {
		// What somebody else has brought since then publish finds.
		ok = i.r.knows(d)
	} else {
		ok, err = i.sound(d, content)
	}
	if ok {
		i.mu.Lock()
		i.stats.Reused++
		i.mu.Unlock()
	}
	return ok, err
}

// knows reports whether an object has been measured, or written, by this process.
func (r *Repo) knows(d fsverity.Digest) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.verified[d]
}

// fanout returns a descriptor of the directory of an object, -1 if it is not there and is not to be made.
func (i *Import) fanout(d fsverity.Digest, create bool) (int, error) {
	i.fanMu.Lock()
	defer i.fanMu.Unlock()
	at := &i.fan[d.Bytes()[0]]
	if *at != 0 {
		return *at, nil
	}
	name := d.String()[:2]
	open := func() (int, error) {
		return unix.Openat(int(i.objects.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	fd, err := retry(open)
	if err == unix.ENOENT && create {
		if err = unix.Mkdirat(int(i.objects.Fd()), name, 0o755); err == nil || err == unix.EEXIST {
			fd, err = retry(open)
		}
	}
	if err == unix.ENOENT && !create {
		return -1, nil
	}
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "objects/" + name, Err: err}
	}
	*at = fd
	return fd, nil
}

// sound reports whether an object is there and has its digest. It is measured once.
func (i *Import) sound(d fsverity.Digest, content []byte) (bool, error) {
	if i.r.knows(d) {
		return true, nil
	}
	dir, err := i.fanout(d, false)
	if dir < 0 {
		return false, err
	}
	if ok, err := i.remembered(dir, d); ok || err != nil {
		return ok, err
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(dir, d.FileName(), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	if err == unix.ENOENT || err == unix.ELOOP {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("object %v: %w", d, err)
	}
	ok, err := i.measure(fd, d, content)
	if err != nil {
		return false, fmt.Errorf("object %v: %w", d, err)
	}
	if ok {
		i.r.mu.Lock()
		i.r.verified[d] = true
		i.r.mu.Unlock()
	}
	return ok, nil
}

// remembered reports whether the cache knows the object, and nobody has changed it since it was measured.
func (i *Import) remembered(dir int, d fsverity.Digest) (bool, error) {
	if i.cache == nil || i.r.verity || !i.plain.Load() {
		return false, nil
	}
	var st unix.Statx_t
	err := unix.Statx(dir, d.FileName(), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS, &st)
	if err == unix.ENOENT {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("object %v: %w", d, os.NewSyscallError("statx", err))
	}
	v, ok := i.cache.Get(digestcache.KeyOf(&st))
	return ok && v.Digest == d && st.Mode&unix.S_IFMT == unix.S_IFREG, nil
}

// measure reports whether the open file is the object, and closes it. Without fs-verity its content is compared with the one
// that is there already, which is as good as measuring it, or measured.
func (i *Import) measure(fd int, d fsverity.Digest, content []byte) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		unix.Close(fd)
		return false, os.NewSyscallError("statx", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		unix.Close(fd)
		return false, nil
	}
	key := digestcache.KeyOf(&st)
	if i.plain.Load() && !i.r.verity {
		if content != nil {
			same, err := sameContent(fd, int64(st.Size), content)
			unix.Close(fd)
			if same {
				i.cache.Put(key, digestcache.Value{Digest: d})
			}
			return same, err
		}
	}
	f := os.NewFile(uintptr(fd), "object")
	defer f.Close()
	if _, err := fsverity.Measure(f); errors.Is(err, fsverity.ErrNotSupported) {
		i.plain.Store(true)
	}
	switch err := i.r.Verify(f, d); {
	case err == nil:
		i.cache.Put(key, digestcache.Value{Digest: d})
		return true, nil
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrNoVerity), errors.Is(err, unix.EIO):
		return false, nil
	default:
		return false, err
	}
}

// comparing has the buffers of sameContent.
var comparing = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// sameContent compares an open file with a content. A file that cannot be read is another one.
func sameContent(fd int, size int64, content []byte) (bool, error) {
	if size != int64(len(content)) {
		return false, nil
	}
	b := comparing.Get().(*[64 << 10]byte)
	defer comparing.Put(b)
	buf := b[:]
	for len(content) > 0 {
		n, err := retry(func() (int, error) { return unix.Read(fd, buf[:min(len(buf), len(content))]) })
		if err == unix.EIO {
			return false, nil
		}
		if err != nil {
			return false, os.NewSyscallError("read", err)
		}
		if n == 0 || !bytes.Equal(buf[:n], content[:n]) {
			return false, nil
		}
		content = content[n:]
	}
	return true, nil
}
