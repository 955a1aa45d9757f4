package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// image is an image that a command reads files from, without mounting it.
type image struct {
	name    string
	file    *os.File
	size    int64
	objects objects
}

// openImage opens an image: a file, or else one of the repository, which is verified. Contents that are not in the image are
// looked for in the directory of objects, if one is given, and in the repository.
func (a *app) openImage(name, objectsDir string) (*image, error) {
	i := &image{name: name}
	if err := i.open(a, objectsDir); err != nil {
		i.close()
		return nil, err
	}
	return i, nil
}

func (i *image) open(a *app, objectsDir string) error {
	info, err := os.Stat(i.name)
	switch {
	case errors.Is(err, os.ErrNotExist), err == nil && info.IsDir():
		if i.objects.repo, err = a.repositoryWith(i.name, "image file"); err != nil {
			return err
		}
		if i.file, err = openNamed(i.objects.repo, i.name, "image file"); err != nil {
			return err
		}
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s: not a regular file: want an image file, a ref or a digest", i.name)
	default:
		if i.file, err = os.Open(i.name); err != nil {
			return err
		}
		// Objects of a file that is given alone are looked for only where somebody said.
		if objectsDir == "" {
			if i.objects.repo, err = a.openIfThere(); err != nil {
				return err
			}
		}
	}
	if info, err = i.file.Stat(); err != nil {
		return err
	}
	i.size = info.Size()
	if objectsDir != "" {
		if i.objects.dir, err = os.OpenFile(objectsDir, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			return fmt.Errorf("--objects: %w", err)
		}
	}
	return nil
}

func (i *image) close() {
	if i.file != nil {
		i.file.Close()
	}
	if i.objects.repo != nil {
		i.objects.repo.Close()
	}
	if i.objects.dir != nil {
		i.objects.dir.Close()
	}
}

// tree reads the whole image.
func (i *image) tree() (*fstree.Tree, error) {
	tree, _, err := erofs.Read(i.file, i.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.name, err)
	}
	return tree, nil
}

// repositoryWith opens the repository to look for an image in, after what was looked for first is not there.
func (a *app) repositoryWith(name, first string) (*repo.Repo, error) {
	r, err := a.open()
	if err != nil {
		return nil, fmt.Errorf("%s: no such %s, and no repository with an image of that name: %w", name, first, err)
	}
	if err := a.checkHash(r); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// openNamed opens an image of the repository.
func openNamed(r *repo.Repo, name, first string) (*os.File, error) {
	_, err := r.ImageDigest(name)
	if err == nil {
		var f *os.File
		if f, _, err = r.OpenImage(name); err == nil {
			return f, nil
		}
		if !errors.Is(err, repo.ErrNotFound) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%s: no such %s, and no image of that name in the repository %s (see: images): %w", name, first, r.Path(), err)
}

// objects opens the contents that an image does not have itself, and lets none pass that has another digest than the image
// says. It may be used from several goroutines.
type objects struct {
	repo      *repo.Repo
	dir       *os.File // is asked instead of the repository, if it is there
	digesters [fsverity.SHA512 + 1]sync.Pool
}

// object is the open file with a content.
type object struct {
	*os.File
	digest fsverity.Digest // what it must have
	sealed bool            // it has fs-verity with this digest: the kernel checks what is read
}

// find opens a content that has not been verified, but for what the kernel says.
func (s *objects) find(o *fstree.Object) (object, error) {
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

func (s *objects) openObject(o *fstree.Object, want fsverity.Digest) (*os.File, error) {
	switch {
	case s.dir != nil:
		how := unix.OpenHow{
			// A pipe there must not block.
			Flags:   unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		}
		for {
			fd, err := unix.Openat2(int(s.dir.Fd()), o.Payload(), &how)
			switch err {
			case nil:
				return os.NewFile(uintptr(fd), o.Payload()), nil
			case unix.EINTR, unix.EAGAIN:
				continue
			}
			return nil, fmt.Errorf("object %v: %s/%s: %w", want, s.dir.Name(), o.Payload(), err)
		}
	case s.repo != nil:
		return s.repo.OpenObject(want)
	}
	return nil, fmt.Errorf("object %v: its content is not in the image: say where it is, with --objects DIR or --repo PATH", want)
}

// check measures an object as far as that is done without reading it.
func (s *objects) check(o *object, size uint64) error {
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
	case s.dir == nil && s.repo.RequiresVerity():
		return repo.ErrNoVerity
	}
	if uint64(info.Size()) != size {
		return fmt.Errorf("%d bytes, %d in the image: %w", info.Size(), size, repo.ErrCorrupt)
	}
	return nil
}

// open opens a content that is verified: by the kernel, or by reading it once.
func (s *objects) open(o *fstree.Object) (*os.File, error) {
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
func (s *objects) digest(a fsverity.Algorithm, r io.Reader) (fsverity.Digest, error) {
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

// copyContent copies a content of this size and no other. A pipe that ends early is an error of the writer.
func copyContent(w io.Writer, r io.Reader, size uint64) error {
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, *buf)
	if err == nil && uint64(n) != size {
		err = fmt.Errorf("%d bytes, %d were expected: it changed while it was read", n, size)
	}
	return err
}

// printable returns a name as it can be shown: as it is, if that is printable, and with \n, \\ or \xHH for all other bytes.
// Nobody's file name moves the cursor.
func printable(name string) string {
	odd := func(r rune) bool { return r == '\\' || r == utf8.RuneError || !unicode.IsPrint(r) }
	if strings.IndexFunc(name, odd) < 0 {
		return name
	}
	var b strings.Builder
	for len(name) > 0 {
		r, n := utf8.DecodeRuneInString(name)
		switch {
		case r == '\\':
			b.WriteString(`\\`)
		case r == '\n':
			b.WriteString(`\n`)
		case odd(r):
			for k := range n {
				fmt.Fprintf(&b, `\x%02x`, name[k])
			}
		default:
			b.WriteString(name[:n])
		}
		name = name[n:]
	}
	return b.String()
}
