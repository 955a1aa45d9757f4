package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Kind says what is wrong.
type Kind string

// The kinds of findings, in the words of cfsctl.
const (
	ObjectCorrupt       Kind = "object-digest-mismatch" // the content has another digest than the name
	ObjectNoVerity      Kind = "object-verity-missing"  // the repository requires fs-verity, and the object has none
	ObjectOdd           Kind = "object-invalid-name"    // a file in objects/ that is not an object
	ObjectUnreadable    Kind = "object-open-failed"     // the check itself failed for this object
	ImageObjectMissing  Kind = "image-missing-object"   // an image refers to an object that is not there
	StreamObjectMissing Kind = "missing-object-ref"     // a stream does
	LinkBroken          Kind = "broken-symlink"         // a name leads nowhere, or to the wrong place
	NotLink             Kind = "entry-not-symlink"      // a name that is no symbolic link
	ImageCorrupt        Kind = "image-invalid"          // an image that cannot be read
	StreamCorrupt       Kind = "stream-read-failed"     // a stream that cannot be read
)

// Finding is one thing that is wrong.
type Finding struct {
	Kind   Kind   `json:"kind"`
	Path   string `json:"path"` // below the repository
	Detail string `json:"detail"`
}

// String is the line that cfsctl prints.
func (f Finding) String() string { return fmt.Sprintf("fsck: %s: %s: %s", f.Kind, f.Path, f.Detail) }

// FsckOptions says what is checked.
type FsckOptions struct {
	MetadataOnly bool          // not the content of objects
	Read         bool          // read objects that have fs-verity, too, so that the kernel checks every block of them
	Found        func(Finding) // called for each finding as it is found, one at a time
	Checked      *atomic.Int64 // counts objects as they are checked, if it is not nil
	Lock         LockOptions
}

// FsckReport counts what was checked, and what was found wrong with it.
type FsckReport struct {
	Objects, ObjectsBad int // none are checked with MetadataOnly
	Streams, StreamsBad int
	Images, ImagesBad   int
	BrokenLinks         int
	MissingObjects      int
	Findings            []Finding
}

// OK reports whether nothing is wrong.
func (r FsckReport) OK() bool { return len(r.Findings) == 0 }

// Fsck checks the repository. An error means that the check could not be done, findings are in the report.
func (r *Repo) Fsck(ctx context.Context, o FsckOptions) (FsckReport, error) {
	release, err := r.LockShared(ctx, o.Lock)
	if err != nil {
		return FsckReport{}, err
	}
	defer release()
	c := &checker{r: r, o: o}
	if err := c.objects(ctx); err != nil {
		return c.report, err
	}
	for _, kind := range []string{"images", "streams"} {
		if err := c.links(ctx, kind); err != nil {
			return c.report, err
		}
	}
	return c.report, nil
}

// objectSet is the objects of a repository, by directory: of a million, a map takes twice as much.
type objectSet [256][]fsverity.Digest

// add takes the objects of one directory, which it sorts. The slice is not the caller's any more.
func (s *objectSet) add(objects []fsverity.Digest) {
	if len(objects) == 0 {
		return
	}
	slices.SortFunc(objects, fsverity.Digest.Compare)
	s[objects[0].Bytes()[0]] = objects
}

func (s *objectSet) has(d fsverity.Digest) bool {
	_, ok := slices.BinarySearchFunc(s[d.Bytes()[0]], d, fsverity.Digest.Compare)
	return ok
}

type checker struct {
	r      *Repo
	o      FsckOptions
	mu     sync.Mutex
	report FsckReport
	there  objectSet // objects whose file is there
}

func (c *checker) found(k Kind, name, detail string, args ...any) {
	f := Finding{k, name, fmt.Sprintf(detail, args...)}
	c.report.Findings = append(c.report.Findings, f)
	if c.o.Found != nil {
		c.o.Found(f)
	}
}

// objects checks what is in objects/, several of its directories at a time.
func (c *checker) objects(ctx context.Context) error {
	m := newMeasurer(c.r)
	m.read = c.o.Read
	type directory struct {
		fd    int
		names []string
		want  []fsverity.Digest
	}
	work := make(chan directory)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for d := range work {
				m.objects(d.fd, d.names, d.want, func(k int, found measured) { c.object(d.want[k], found.err) })
				unix.Close(d.fd)
			}
		})
	}
	err := c.r.eachDirectory(func(dir *os.File, name string, objects []fsverity.Digest, odd []string) error {
		c.mu.Lock()
		c.there.add(objects)
		for _, name := range odd {
			if !c.o.MetadataOnly {
				c.report.Objects++
				c.report.ObjectsBad++
			}
			c.found(ObjectOdd, name, "not an object of this repository: neither used nor removed")
		}
		c.mu.Unlock()
		if c.o.MetadataOnly || len(objects) == 0 {
			return ctx.Err()
		}
		// Pieces, so that one large directory does not keep everybody else waiting.
		const piece = 1024
		for len(objects) > 0 {
			n := min(piece, len(objects))
			fd, err := unix.FcntlInt(dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return os.NewSyscallError("dup", err)
			}
			next := directory{fd: fd, want: objects[:n]}
			for _, d := range next.want {
				next.names = append(next.names, d.ObjectPath()[3:])
			}
			objects = objects[n:]
			work <- next
		}
		return ctx.Err()
	})
	close(work)
	workers.Wait()
	return err
}

// object takes down what was found out about an object.
func (c *checker) object(d fsverity.Digest, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Objects++
	if err != nil {
		kind := ObjectUnreadable
		switch {
		case errors.Is(err, ErrNoVerity):
			kind = ObjectNoVerity
		case errors.Is(err, ErrCorrupt), errors.Is(err, unix.EIO):
			kind = ObjectCorrupt
		}
		c.report.ObjectsBad++
		c.found(kind, "objects/"+d.ObjectPath(), "%v", err)
	}
	if c.o.Checked != nil {
		c.o.Checked.Add(1)
	}
}

// links checks the names of images or streams, what they lead to, and the refs.
func (c *checker) links(ctx context.Context, kind string) error {
	total, bad := &c.report.Images, &c.report.ImagesBad
	corrupt, missing := ImageCorrupt, ImageObjectMissing
	if kind == "streams" {
		total, bad = &c.report.Streams, &c.report.StreamsBad
		corrupt, missing = StreamCorrupt, StreamObjectMissing
	}
	names := map[string]bool{} // whether there is an object
	var refs [][2]string
	broken := func(name, detail string, args ...any) {
		c.report.BrokenLinks++
		c.found(LinkBroken, name, detail, args...)
	}
	if err := c.r.walkLinks(kind, func(name, target string) {
		if strings.HasPrefix(name, kind+"/refs/") {
			refs = append(refs, [2]string{name, target})
			return
		}
		*total++
		d, err := digestOfLink(target)
		names[path.Base(name)] = err == nil && c.there.has(d)
		if err != nil || target != "../objects/"+d.ObjectPath() {
			*bad++
			broken(name, "leads to %q: want an object", target)
			return
		}
		if kind == "images" && path.Base(name) != d.String() {
			*bad++
			broken(name, "leads to another image, %v", d)
			return
		}
		if !c.there.has(d) {
			*bad++
			broken(name, "its object is not there")
			return
		}
		objects, streams, err := c.r.references(name, d)
		if err != nil {
			*bad++
			c.found(corrupt, name, "%v", err)
			return
		}
		for _, o := range append(objects, streams...) {
			if !c.there.has(o) {
				c.report.MissingObjects++
				c.found(missing, name, "%v", o)
			}
		}
	}, func(name string) {
		*total++
		*bad++
		c.found(NotLink, name, "not used")
	}); err != nil {
		return err
	}
	for _, ref := range refs {
		if up := strings.Repeat("../", strings.Count(ref[0], "/")-1); ref[1] != up+path.Base(ref[1]) || !names[path.Base(ref[1])] {
			broken(ref[0], "leads to %q, which is not there", ref[1])
		}
	}
	return ctx.Err()
}
