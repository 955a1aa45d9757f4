package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Ref is a name for an image or stream.
type Ref struct {
	Name   string
	Target string          // last part of what it leads to: the digest of an image, the name of a stream
	Digest fsverity.Digest // of the image; zero if the link is odd
}

// Images returns the refs of images, sorted by name.
func (r *Repo) Images() ([]Ref, error) {
	var refs []Ref
	err := r.walkLinks("images/refs", func(name, target string) {
		d, _ := fsverity.ParseHex(path.Base(target))
		refs = append(refs, Ref{strings.TrimPrefix(name, "images/refs/"), path.Base(target), d})
	}, nil)
	return refs, err
}

// RemoveImageRef removes a ref of an image. The image is garbage if nothing else leads to it. The error is ErrNotFound if there is no
// such ref.
func (r *Repo) RemoveImageRef(ctx context.Context, ref string, l LockOptions) error {
	return r.removeRef(ctx, "images", ref, l)
}

// walkLinks calls link for the symbolic links below a directory, in the order of their names, and other for all that is
// neither that nor a directory. A missing directory is empty.
func (r *Repo) walkLinks(dir string, link func(name, target string), other func(name string)) error {
	f, err := r.openat(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		name := dir + "/" + e.Name()
		switch {
		case e.IsDir():
			if err := r.walkLinks(name, link, other); err != nil {
				return err
			}
		case e.Type()&os.ModeSymlink != 0:
			target, err := readlink(f, e.Name())
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				return err
			}
			link(name, target)
		case other != nil:
			other(name)
		}
	}
	return nil
}

// ImageDigest returns the digest of an image by any of its names: the digest itself, the name of a ref, or that with
// "refs/" or "ref/" before it. Whether the image is there is not looked at for a digest.
func (r *Repo) ImageDigest(name string) (fsverity.Digest, error) {
	if d, err := fsverity.ParseHex(name); err == nil {
		return d, nil
	}
	ref := strings.TrimPrefix(strings.TrimPrefix(name, "refs/"), "ref/")
	if err := checkRef(ref); err != nil {
		return fsverity.Digest{}, err
	}
	dir, err := r.openat(path.Dir("images/refs/"+ref), unix.O_RDONLY|unix.O_DIRECTORY)
	if err == nil {
		defer dir.Close()
		var target string
		if target, err = readlink(dir, path.Base(ref)); err == nil {
			return digestOfLink(target)
		}
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		err = ErrNotFound
	}
	return fsverity.Digest{}, fmt.Errorf("image %q: %w", name, err)
}

// OpenImage opens an image by any of its names, see ImageDigest, and verifies it.
func (r *Repo) OpenImage(name string) (*os.File, fsverity.Digest, error) {
	d, err := r.ImageDigest(name)
	if err != nil {
		return nil, d, err
	}
	f, err := r.openImage(d)
	if err != nil {
		return nil, d, fmt.Errorf("image %q: %w", name, err)
	}
	return f, d, nil
}

func (r *Repo) openImage(d fsverity.Digest) (*os.File, error) {
	dir, err := r.openat("images", unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if _, err := readlink(dir, d.String()); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, ErrNotFound
		}
		return nil, err
	}
	f, err := r.OpenObject(d)
	if err != nil {
		return nil, err
	}
	if err := r.Verify(f, d); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ReadImage reads an image into a tree, by any of its names, and verifies it before.
func (r *Repo) ReadImage(name string) (*fstree.Tree, erofs.Format, error) {
	f, _, err := r.OpenImage(name)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	t, format, err := readImage(f)
	if err != nil {
		return nil, 0, fmt.Errorf("image %q: %w", name, err)
	}
	return t, format, nil
}

func readImage(f *os.File) (*fstree.Tree, erofs.Format, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	return erofs.Read(f, info.Size())
}

// objectOf returns the object that holds a file's content, the zero digest if there is none.
func objectOf(i *fstree.Inode) fsverity.Digest {
	o, ok := i.Content.(*fstree.Object)
	if !ok || o.Size == 0 {
		return fsverity.Digest{}
	}
	if o.Path != "" {
		d, _ := fsverity.ParseObjectPath(o.Path)
		return d
	}
	return o.Digest
}

// Objects returns the digests of the objects that a tree refers to, each once, sorted by their text. Objects whose path is no
// digest are left out.
func Objects(t *fstree.Tree) []fsverity.Digest {
	seen := map[fsverity.Digest]bool{}
	t.Walk(func(_ string, i *fstree.Inode) error {
		if d := objectOf(i); !d.IsZero() {
			seen[d] = true
		}
		return nil
	})
	list := make([]fsverity.Digest, 0, len(seen))
	for d := range seen {
		list = append(list, d)
	}
	slices.SortFunc(list, fsverity.Digest.Compare)
	return list
}
