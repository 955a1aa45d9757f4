package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// ConvertOptions says what becomes of a repository.
type ConvertOptions struct {
	Format  erofs.Format  // that the images are written in
	Objects *atomic.Int64 // counts objects as they are converted, if it is not nil
	Lock    LockOptions
}

// Converted is an image or stream before and after.
type Converted struct {
	Name string          // "images" or the name of the stream
	Refs []string        // that lead to it
	From fsverity.Digest // of the object
	To   fsverity.Digest
}

// Conversion is what a conversion has done.
type Conversion struct {
	Images, Streams []Converted
	Objects         int
	Stats           ImportStats
}

// ConvertTo writes every image and stream of a repository, and what they need, into another one, which may have another
// algorithm: contents are verified by their old digests and named by their new ones. The other repository may be the same one;
// then only images change, the refs lead to the new ones, and the old ones are left to garbage collection.
//
// Nothing changes in the repository that is converted, and nothing is visible in the other one before all is there, but for whole
// objects. What was interrupted is begun again and finds them.
//
// Digests within contents, such as an OCI configuration that was sealed with the digest of an image, stay as they are.
func (r *Repo) ConvertTo(ctx context.Context, to *Repo, o ConvertOptions) (Conversion, error) {
	var result Conversion
	release, err := r.LockShared(ctx, o.Lock)
	if err != nil {
		return result, err
	}
	defer release()
	i, err := to.Begin(ctx, o.Lock)
	if err != nil {
		return result, err
	}
	defer i.Abort()
	c := &converter{r: r, i: i, same: r == to, o: o, to: map[fsverity.Digest]fsverity.Digest{}, refs: map[string][]string{},
		images: map[fsverity.Digest]bool{}, streams: map[fsverity.Digest]string{}, busy: map[fsverity.Digest]bool{}}
	if err := c.list(); err != nil {
		return result, err
	}
	if result.Objects, err = c.objects(ctx); err != nil {
		return result, err
	}
	for _, n := range c.names {
		if err := ctx.Err(); err != nil {
			return result, err
		}
		if c.same && strings.HasPrefix(n.name, "streams/") {
			continue
		}
		d, err := c.named(n.digest)
		if err != nil {
			return result, fmt.Errorf("%s: %w", n.name, err)
		}
		done := Converted{Name: path.Base(n.name), Refs: c.refs[n.name], From: n.digest, To: d}
		if strings.HasPrefix(n.name, "images/") {
			done.Name = "images"
			result.Images = append(result.Images, done)
			for _, ref := range done.Refs {
				if err := i.Name(d, ref); err != nil {
					return result, err
				}
			}
			continue
		}
		result.Streams = append(result.Streams, done)
		i.nameStream(done.Name, d, done.Refs)
	}
	result.Stats = i.Stats()
	return result, i.Commit()
}

type converter struct {
	r    *Repo
	i    *Import
	same bool // it is the same repository: objects and streams stay
	o    ConvertOptions

	names   []object // images and streams
	refs    map[string][]string
	images  map[fsverity.Digest]bool
	streams map[fsverity.Digest]string // their names

	mu   sync.Mutex
	to   map[fsverity.Digest]fsverity.Digest // new digests by old ones
	busy map[fsverity.Digest]bool            // streams that are being converted, to find circles
}

// list finds the images and streams.
func (c *converter) list() error {
	for _, kind := range []string{"images", "streams"} {
		var failed error
		if err := c.r.walkLinks(kind, func(name, target string) {
			if ref, ok := strings.CutPrefix(name, kind+"/refs/"); ok {
				to := kind + "/" + path.Base(target)
				c.refs[to] = append(c.refs[to], ref)
				return
			}
			d, err := digestOfLink(target)
			if err != nil || path.Dir(name) != kind {
				failed = fmt.Errorf("%s leads to %q: want an object (fsck --repair may help)", name, target)
				return
			}
			c.names = append(c.names, object{name, d})
			if kind == "images" {
				c.images[d] = true
			} else {
				c.streams[d] = name
			}
		}, nil); err != nil {
			return err
		}
		if failed != nil {
			return failed
		}
	}
	return nil
}

// objects converts every object that an image or stream needs and that is neither itself.
func (c *converter) objects(ctx context.Context) (int, error) {
	need := map[fsverity.Digest]string{} // and by what
	for _, n := range c.names {
		objects, streams, err := c.r.references(n.name, n.digest)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", n.name, err)
		}
		for _, d := range append(objects, streams...) {
			if !c.images[d] && c.streams[d] == "" {
				need[d] = n.name
			}
		}
	}
	if c.same {
		for d := range need {
			c.to[d] = d
		}
		return len(need), nil
	}
	list := make([]fsverity.Digest, 0, len(need))
	for d := range need {
		list = append(list, d)
	}
	slices.SortFunc(list, fsverity.Digest.Compare)
	var failed atomic.Pointer[error]
	work := make(chan fsverity.Digest)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for d := range work {
				if failed.Load() != nil || ctx.Err() != nil {
					continue
				}
				if err := c.object(d); err != nil {
					err = fmt.Errorf("object %v of %s: %w (fsck --repair may help)", d, need[d], err)
					failed.CompareAndSwap(nil, &err)
				}
				if c.o.Objects != nil {
					c.o.Objects.Add(1)
				}
			}
		})
	}
	for _, d := range list {
		work <- d
	}
	close(work)
	workers.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return len(list), ctx.Err()
}

func (c *converter) object(d fsverity.Digest) error {
	f, err := c.r.OpenObject(d)
	if err != nil {
		return err
	}
	defer f.Close()
	// Verified before, on the same descriptor.
	if err := c.r.Verify(f, d); err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	to, err := c.i.Put(f, info.Size())
	if err == nil && to.Algorithm() == d.Algorithm() && to != d {
		err = ErrCorrupt
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.to[d] = to
	c.mu.Unlock()
	return nil
}

// named converts the object of an image or stream, once, and what it refers to before.
func (c *converter) named(d fsverity.Digest) (fsverity.Digest, error) {
	if to, done := c.to[d]; done {
		return to, nil
	}
	if c.busy[d] {
		return fsverity.Digest{}, errors.New("it refers to itself")
	}
	c.busy[d] = true
	f, err := c.r.OpenObject(d)
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer f.Close()
	if err := c.r.Verify(f, d); err != nil {
		return fsverity.Digest{}, err
	}
	var to fsverity.Digest
	if c.images[d] {
		t, _, err := readImage(f)
		if err == nil {
			err = c.tree(t)
		}
		if err != nil {
			return fsverity.Digest{}, err
		}
		if to, err = c.i.PutImage(t, c.o.Format, ""); err != nil {
			return fsverity.Digest{}, err
		}
	} else {
		info, err := f.Stat()
		if err != nil {
			return fsverity.Digest{}, err
		}
		s, err := splitstream.Open(f, info.Size(), c.r.Algorithm())
		if err != nil {
			return fsverity.Digest{}, err
		}
		if to, err = c.stream(s); err != nil {
			return fsverity.Digest{}, err
		}
	}
	c.to[d] = to
	return to, nil
}

// tree gives the files of a tree their new digests.
func (c *converter) tree(t *fstree.Tree) error {
	done := map[*fstree.Object]bool{}
	return t.Walk(func(name string, i *fstree.Inode) error {
		o, ok := i.Content.(*fstree.Object)
		if !ok || o.Size == 0 || done[o] {
			return nil
		}
		done[o] = true
		if o.Digest.IsZero() || o.Path != "" && o.Path != o.Digest.ObjectPath() {
			return fmt.Errorf("%s: its content is not an object of the repository", name)
		}
		to, ok := c.to[o.Digest]
		if !ok {
			return fmt.Errorf("%s: object %v: %w", name, o.Digest, ErrNotFound)
		}
		o.Digest, o.Path = to, ""
		return nil
	})
}

func (c *converter) stream(s *splitstream.Reader) (fsverity.Digest, error) {
	convert := func(list []fsverity.Digest) ([]fsverity.Digest, error) {
		out := make([]fsverity.Digest, len(list))
		for k, d := range list {
			to, err := c.reference(d)
			if err != nil {
				return nil, fmt.Errorf("%v: %w", d, err)
			}
			out[k] = to
		}
		return out, nil
	}
	objects, err := convert(s.Objects)
	if err != nil {
		return fsverity.Digest{}, err
	}
	streams, err := convert(s.Streams)
	if err != nil {
		return fsverity.Digest{}, err
	}
	var b bytes.Buffer
	if err := s.WriteAs(&b, c.i.r.Algorithm(), objects, streams); err != nil {
		return fsverity.Digest{}, err
	}
	return c.i.Put(&b, int64(b.Len()))
}

// reference returns the new digest of what a stream refers to, which may be a stream or an image as well.
func (c *converter) reference(d fsverity.Digest) (fsverity.Digest, error) {
	if to, ok := c.to[d]; ok {
		return to, nil
	}
	if c.images[d] || c.streams[d] != "" {
		return c.named(d)
	}
	return fsverity.Digest{}, ErrNotFound
}
