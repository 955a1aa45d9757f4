package scan

import (
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/digestcache"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// cached fills a file from the cache, if its digest is known there and the sink does not need the content.
func (s *scanner) cached(d *openDir, f *file) (bool, error) {
	if f.key.Size <= fstree.MaxInline {
		return false, nil
	}
	v, ok := s.options.Cache.Get(f.key)
	if !ok {
		return false, nil
	}
	if has, err := s.sink.Has(v.Digest); !has || err != nil {
		return false, err
	}
	if !v.NoXattrs {
		var err error
		if f.inode.Xattrs, _, err = s.xattrs(d.fd, f.name); err != nil {
			return false, err
		}
	}
	f.inode.Content = &fstree.Object{Digest: v.Digest, Size: f.key.Size}
	s.options.Progress.Bytes.Add(int64(f.key.Size))
	return true, nil
}

// large reads a file that is too large for a batch.
func (s *scanner) large(d *openDir, f *file) error {
	defer d.release()
	err := func() error {
		if ok, err := s.cached(d, f); ok || err != nil {
			return err
		}
		fd, err := openSame(d.fd, f.name, f.key, f.mode, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		var plain bool
		if f.inode.Xattrs, plain, err = s.xattrs(fd, ""); err != nil {
			return err
		}
		object := &fstree.Object{Size: f.key.Size}
		if object.Digest, err = s.sink.Put(descriptor(fd), int64(f.key.Size)); err != nil {
			return err
		}
		f.inode.Content = object
		s.options.Cache.Put(f.key, digestcache.Value{Digest: object.Digest, NoXattrs: plain})
		s.options.Progress.Bytes.Add(int64(f.key.Size))
		return nil
	}()
	if err != nil {
		return fmt.Errorf("%s: %w", d.join(f.name), err)
	}
	return nil
}

// files reads a batch of small files.
func (s *scanner) files(d *openDir, list []file) error {
	defer d.release()
	b := s.buffers.Get().(*buffers)
	defer s.buffers.Put(b)
	b.content, b.contents, b.files, b.plain = b.content[:0], b.contents[:0], b.files[:0], b.plain[:0]
	for k := range list {
		f := &list[k]
		if err := s.small(d, f, b); err != nil {
			return fmt.Errorf("%s: %w", d.join(f.name), err)
		}
	}
	if len(b.contents) == 0 {
		return nil
	}
	digests, err := s.sink.PutAll(b.contents)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	for k, f := range b.files {
		f.inode.Content = &fstree.Object{Digest: digests[k], Size: f.key.Size}
		s.options.Cache.Put(f.key, digestcache.Value{Digest: digests[k], NoXattrs: b.plain[k]})
		s.options.Progress.Bytes.Add(int64(f.key.Size))
	}
	return nil
}

// small reads a small file and adds it to the batch, unless it stays in the tree.
func (s *scanner) small(d *openDir, f *file, b *buffers) error {
	if ok, err := s.cached(d, f); ok || err != nil {
		return err
	}
	fd, err := openSame(d.fd, f.name, f.key, f.mode, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var plain bool
	if f.inode.Xattrs, plain, err = s.xattrs(fd, ""); err != nil {
		return err
	}
	// Room for one byte more tells whether the file has grown; what is there already must not move.
	start, size := len(b.content), int(f.key.Size)
	if cap(b.content) < start+size+1 {
		b.content, start = make([]byte, 0, max(batchBytes, size+1)), 0
	}
	n, err := readFull(fd, b.content[start:start+size+1])
	if err != nil {
		return err
	}
	if n != size {
		return fmt.Errorf("changed while it was read: %d bytes were expected", size)
	}
	content := b.content[start : start+size : start+size]
	if size <= fstree.MaxInline {
		f.inode.Content = fstree.Inline(slices.Clone(content))
		s.options.Progress.Bytes.Add(int64(size))
		return nil
	}
	b.content = b.content[:start+size]
	b.contents, b.files, b.plain = append(b.contents, content), append(b.files, f), append(b.plain, plain)
	return nil
}

// readFull reads until the buffer is full or the file ends. A regular file gives less than was asked for only at its end.
func readFull(fd int, buf []byte) (n int, err error) {
	for n < len(buf) {
		m, err := unix.Read(fd, buf[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, os.NewSyscallError("read", err)
		}
		n += m
		if m == 0 || n == len(buf)-1 {
			break
		}
	}
	return n, nil
}

// descriptor reads from an open file. A sink may read it again, or share its data.
type descriptor int

func (d descriptor) Fd() uintptr { return uintptr(d) }

func (d descriptor) Seek(offset int64, whence int) (int64, error) {
	return unix.Seek(int(d), offset, whence)
}

func (d descriptor) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(int(d), p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0 && len(p) > 0:
			return 0, io.EOF
		}
		return n, nil
	}
}
