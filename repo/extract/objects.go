// Package extract takes the files of an image out of it: into a directory, or as a tar archive. Contents that are objects are
// verified, wherever they come from.
package extract

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Objects opens the contents that an image does not have itself, and lets none pass that has another digest than the image
// says. It may be used from several goroutines.
type Objects struct {
	Repo      *repo.Repo
	Dir       *os.File // of objects; it is asked instead of the repository, if it is there
	digesters [fsverity.SHA512 + 1]sync.Pool
}

// object is the open file with a content.
type object struct {
	*os.File
	digest fsverity.Digest // what it must have
	sealed bool            // it has fs-verity with this digest: the kernel checks what is read
}

// find opens a content that has not been verified, but for what the kernel says.
func (s *Objects) find(o *fstree.Object) (object, error) {
	want := o.Digest
	if want.IsZero() {
		var err error
		if want, err = fsverity.ParseObjectPath(o.Path); err != nil {
			return object{}, errors.New("the image names no digest for its content, which cannot be verified: mount the image instead")
		}
	}
	f, err := s.openObject(o, want)
	if err != nil {
		return object{}, err
	}
	found := object{f, want, false}
	if err := s.check(&found, o.Size); err != nil {
		f.Close()
		return object{}, fmt.Errorf("object %v: %w", want, err)
	}
	return found, nil
}

func (s *Objects) openObject(o *fstree.Object, want fsverity.Digest) (*os.File, error) {
	switch {
	case s.Dir != nil:
		how := unix.OpenHow{
			// A pipe there must not block.
			Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		}
		for {
			fd, err := unix.Openat2(int(s.Dir.Fd()), o.Payload(), &how)
			switch err {
			case nil:
				return os.NewFile(uintptr(fd), o.Payload()), nil
			case unix.EINTR, unix.EAGAIN:
				continue
			}
			return nil, fmt.Errorf("object %v: %s/%s: %w", want, s.Dir.Name(), o.Payload(), err)
		}
	case s.Repo != nil:
		return s.Repo.OpenObject(want)
	}
	return nil, fmt.Errorf("object %v: its content is not in the image: say where it is, with --objects DIR or --repo PATH", want)
}

// check measures an object as far as that is done without reading it.
func (s *Objects) check(o *object, size uint64) error {
	info, err := o.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	got, err := fsverity.Measure(o.File)
	switch {
	case err == nil:
		if o.sealed = true; got != o.digest {
			return repo.ErrCorrupt
		}
	case !errors.Is(err, fsverity.ErrNotEnabled) && !errors.Is(err, fsverity.ErrNotSupported):
		return err
	case s.Dir == nil && s.Repo.RequiresVerity():
		return repo.ErrNoVerity
	}
	if uint64(info.Size()) != size {
		return fmt.Errorf("%d bytes, %d in the image: %w", info.Size(), size, repo.ErrCorrupt)
	}
	return nil
}

// Open opens a content that is verified: by the kernel, or by reading it once.
func (s *Objects) Open(o *fstree.Object) (*os.File, error) {
	f, err := s.find(o)
	if err != nil || f.sealed {
		return f.File, err
	}
	got, err := s.digest(f.digest.Algorithm(), io.NewSectionReader(f, 0, int64(o.Size)))
	if err == nil && got != f.digest {
		err = repo.ErrCorrupt
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("object %v: %w", f.digest, err)
	}
	return f.File, nil
}

// digest reads r to its end.
func (s *Objects) digest(a fsverity.Algorithm, r io.Reader) (fsverity.Digest, error) {
	pool := &s.digesters[a]
	d, ok := pool.Get().(*fsverity.Digester)
	if !ok {
		d = fsverity.NewDigester(a)
	}
	defer pool.Put(d)
	d.Reset()
	_, err := d.ReadFrom(r)
	return d.Sum(), err
}

// copyBuffers are for copies of contents.
var copyBuffers = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}

// Copy copies a content of this size and no other. A pipe that ends early is an error of the writer.
func Copy(w io.Writer, r io.Reader, size uint64) error {
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, *buf)
	if err == nil && uint64(n) != size {
		err = fmt.Errorf("%d bytes, %d were expected: it changed while it was read", n, size)
	}
	return err
}
