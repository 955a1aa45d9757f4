package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// ErrContentType tells that a splitstream is of something else.
var ErrContentType = errors.New("a splitstream of another content type")

// Stream is an open splitstream of the repository, whose digest has been verified.
type Stream struct {
	*splitstream.Reader
	file *os.File
}

// Close closes the stream.
func (s *Stream) Close() error { return s.file.Close() }

// OpenStream opens the splitstream that is this object and verifies it. A stream of another content type is refused, unless that is 0.
func (r *Repo) OpenStream(d fsverity.Digest, contentType uint64) (*Stream, error) {
	f, err := r.OpenVerified(d)
	if err != nil {
		return nil, err
	}
	return r.openStream(f, d, contentType)
}

func (r *Repo) openStream(f *os.File, d fsverity.Digest, contentType uint64) (*Stream, error) {
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	s, err := splitstream.Open(f, info.Size(), r.Algorithm())
	if err == nil && contentType != 0 && s.ContentType != contentType {
		err = fmt.Errorf("%w: %#x, and %#x is expected", ErrContentType, s.ContentType, contentType)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("object %v: %w", d, err)
	}
	return &Stream{s, f}, nil
}

// OpenVerified opens an object whose content is what its name says.
func (r *Repo) OpenVerified(d fsverity.Digest) (*os.File, error) {
	f, err := r.OpenObject(d)
	if err != nil {
		return nil, err
	}
	if err := r.Verify(f, d); err != nil {
		f.Close()
		return nil, fmt.Errorf("object %v: %w", d, err)
	}
	return f, nil
}

// WriteTo writes what the stream is the split form of. Every object is verified before it is read.
func (s *Stream) WriteTo(w io.Writer, r *Repo) error {
	return s.Reader.WriteTo(w, func(d fsverity.Digest) (io.ReadCloser, error) { return r.OpenVerified(d) })
}

// PutStream stores a splitstream and returns its digest, and the size of its object in bytes if there was none like it, otherwise
// 0. NameStream gives it a name.
func (i *Import) PutStream(w *splitstream.Writer) (d fsverity.Digest, added int64, err error) {
	content, size, err := w.Finish()
	if err != nil {
		return d, 0, err
	}
	t, err := i.newTemp()
	if err != nil {
		return d, 0, err
	}
	digester := fsverity.NewDigester(i.r.Algorithm())
	if _, err := io.Copy(io.MultiWriter(t, digester), content); err != nil {
		t.discard()
		return d, 0, err
	}
	d = digester.Sum()
	have, err := i.have(d, nil)
	if have || err != nil {
		t.discard()
		return d, 0, err
	}
	return d, size, i.add(d, t, size)
}

// NameStream gives a stream that this import or an earlier one has put its name, and adds refs that lead to it. Names of images
// and streams appear in the order in which they were given.
func (i *Import) NameStream(stream string, d fsverity.Digest, refs ...string) error {
	if err := fstree.CheckName(stream); err != nil {
		return err
	}
	for _, ref := range refs {
		if err := checkRef(ref); err != nil {
			return err
		}
	}
	i.nameStream(stream, d, refs)
	return nil
}

// Checkpoint makes durable and visible what has been put and named so far, as Commit does, and the import goes on.
func (i *Import) Checkpoint() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.done {
		return errors.New("the import is over")
	}
	return i.publishAll()
}

// StreamRefs returns the refs of streams below a directory, "oci", sorted by name. Their targets are names of streams.
func (r *Repo) StreamRefs(dir string) ([]Ref, error) {
	if err := checkRef(dir); err != nil {
		return nil, err
	}
	var refs []Ref
	err := r.walkLinks("streams/refs/"+dir, func(name, target string) {
		refs = append(refs, Ref{Name: strings.TrimPrefix(name, "streams/refs/"+dir+"/"), Target: path.Base(target)})
	}, nil)
	return refs, err
}

// Streams returns the names of all streams, sorted.
func (r *Repo) Streams() ([]string, error) { return r.namesIn("streams") }

// ImageNames returns the names of all images, digests, sorted, whether their objects are there or not.
func (r *Repo) ImageNames() ([]string, error) { return r.namesIn("images") }

func (r *Repo) namesIn(kind string) ([]string, error) {
	var names []string
	err := r.walkLinks(kind, func(name, _ string) {
		if name = strings.TrimPrefix(name, kind+"/"); !strings.Contains(name, "/") {
			names = append(names, name)
		}
	}, nil)
	return names, err
}

// RemoveStreamRef removes a ref of a stream. What it led to is garbage if nothing else leads there. The error is ErrNotFound if
// there is no such ref.
func (r *Repo) RemoveStreamRef(ctx context.Context, ref string, l LockOptions) error {
	return r.removeRef(ctx, "streams", ref, l)
}

// removeRef removes a ref of an image or a stream.
func (r *Repo) removeRef(ctx context.Context, kind, ref string, l LockOptions) error {
	if err := checkRef(ref); err != nil {
		return err
	}
	if err := r.writable(); err != nil {
		return err
	}
	release, err := r.LockShared(ctx, l)
	if err != nil {
		return err
	}
	defer release()
	name := kind + "/refs/" + ref
	dir, err := r.openat(path.Dir(name), unix.O_RDONLY|unix.O_DIRECTORY)
	if err == nil {
		defer dir.Close()
		err = unix.Unlinkat(int(dir.Fd()), path.Base(name), 0)
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("ref %q: %w", ref, ErrNotFound)
	}
	if err != nil {
		return &os.PathError{Op: "remove", Path: name, Err: err}
	}
	return dir.Sync()
}
