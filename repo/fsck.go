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

	"github.com/composefs-boot/composefs-boot/repo/fstree"
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
	// Breaks tells what cannot be used because of a damaged or missing object.
	Breaks []Broken `json:"breaks,omitempty"`

	object fsverity.Digest // that is damaged or missing
	size   int64           // it should have; -1 if nobody tells
	link   string          // what a broken link should be, "" if that is not known
	image  fsverity.Digest // that a broken ref should lead to, and that has no name
}

// Broken is an image or stream that needs a damaged object.
type Broken struct {
	Name  string   `json:"name"`            // images/DIGEST or streams/NAME
	Refs  []string `json:"refs,omitempty"`  // that lead to it
	Paths []string `json:"paths,omitempty"` // in the image, the first ones; none if it is the image itself that is damaged
	More  int      `json:"more,omitempty"`  // paths that are not listed
}

const mostPaths = 100

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
	c := &checker{r: r, o: o, refs: map[string][]string{}}
	if err := c.objects(ctx); err != nil {
		return c.report, err
	}
	for _, kind := range []string{"images", "streams"} {
		if err := c.links(ctx, kind); err != nil {
			return c.report, err
		}
	}
	return c.report, c.explain(ctx)
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
	there  objectSet           // objects whose file is there
	names  []object            // images and streams
	refs   map[string][]string // what they are called, by their names
}

// object is an object by the name that it has as an image or stream.
type object struct {
	name   string
	digest fsverity.Digest
}

func (c *checker) found(k Kind, name, detail string, args ...any) {
	c.add(Finding{Kind: k, Path: name, Detail: fmt.Sprintf(detail, args...), size: -1})
}

func (c *checker) add(f Finding) {
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
				next.names = append(next.names, d.FileName())
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
		c.add(Finding{Kind: kind, Path: "objects/" + d.ObjectPath(), Detail: err.Error(), object: d, size: -1})
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
	broken := func(f Finding, detail string, args ...any) {
		c.report.BrokenLinks++
		f.Kind, f.Detail, f.size = LinkBroken, fmt.Sprintf(detail, args...), -1
		c.add(f)
	}
	if err := c.r.walkLinks(kind, func(name, target string) {
		if strings.HasPrefix(name, kind+"/refs/") {
			refs = append(refs, [2]string{name, target})
			return
		}
		*total++
		d, err := digestOfLink(target)
		if err == nil {
			c.names = append(c.names, object{name, d})
		}
		names[path.Base(name)] = err == nil && c.there.has(d)
		if right := "../objects/" + d.ObjectPath(); err != nil || target != right {
			*bad++
			f := Finding{Path: name}
			// The name of an image tells what it should lead to.
			if image, err := fsverity.ParseHex(path.Base(name)); kind == "images" && err == nil {
				d, right = image, "../objects/"+image.ObjectPath()
			}
			if !d.IsZero() && c.there.has(d) {
				f.link = right
			}
			broken(f, "leads to %q: want an object", target)
			return
		}
		if kind == "images" && path.Base(name) != d.String() {
			*bad++
			f := Finding{Path: name}
			if image, err := fsverity.ParseHex(path.Base(name)); err == nil && c.there.has(image) {
				f.link = "../objects/" + image.ObjectPath()
			}
			broken(f, "leads to another image, %v", d)
			return
		}
		if !c.there.has(d) {
			*bad++
			broken(Finding{Path: name, object: d}, "its object is not there")
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
				c.add(Finding{Kind: missing, Path: name, Detail: o.String(), object: o, size: -1})
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
		to := kind + "/" + path.Base(ref[1])
		c.refs[to] = append(c.refs[to], strings.TrimPrefix(ref[0], kind+"/"))
		if up := strings.Repeat("../", strings.Count(ref[0], "/")-1); ref[1] != up+path.Base(ref[1]) || !names[path.Base(ref[1])] {
			f := Finding{Path: ref[0]}
			d, err := fsverity.ParseHex(path.Base(ref[1]))
			switch {
			case names[path.Base(ref[1])]:
				f.link = up + path.Base(ref[1])
			case kind == "images" && err == nil:
				f.link, f.image, f.object = up+d.String(), d, d
				if c.there.has(d) {
					f.object = fsverity.Digest{}
				}
			}
			broken(f, "leads to %q, which is not there", ref[1])
		}
	}
	return ctx.Err()
}

// explain tells of each object that is damaged or missing what needs it.
func (c *checker) explain(ctx context.Context) error {
	breaks := map[fsverity.Digest][]Broken{}
	sizes := map[fsverity.Digest]int64{}
	for _, f := range c.report.Findings {
		if !f.object.IsZero() {
			breaks[f.object] = nil
			sizes[f.object] = -1
		}
	}
	if len(breaks) == 0 {
		return nil
	}
	for _, o := range c.names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if list, bad := breaks[o.digest]; bad {
			breaks[o.digest] = append(list, Broken{Name: o.name, Refs: c.refs[o.name]})
			continue
		}
		for d, b := range c.needs(o, breaks, sizes) {
			breaks[d] = append(breaks[d], *b)
		}
	}
	for k, f := range c.report.Findings {
		if !f.object.IsZero() {
			c.report.Findings[k].Breaks, c.report.Findings[k].size = breaks[f.object], sizes[f.object]
		}
	}
	return nil
}

// needs returns which of the objects an image or stream needs, and where. What cannot be read has been reported already.
func (c *checker) needs(o object, which map[fsverity.Digest][]Broken, sizes map[fsverity.Digest]int64) map[fsverity.Digest]*Broken {
	found := map[fsverity.Digest]*Broken{}
	need := func(d fsverity.Digest, name string) {
		if _, wanted := which[d]; !wanted {
			return
		}
		b := found[d]
		if b == nil {
			b = &Broken{Name: o.name, Refs: c.refs[o.name]}
			found[d] = b
		}
		switch {
		case name == "":
		case len(b.Paths) < mostPaths:
			b.Paths = append(b.Paths, name)
		default:
			b.More++
		}
	}
	f, err := c.r.OpenObject(o.digest)
	if err != nil {
		return nil
	}
	defer f.Close()
	if strings.HasPrefix(o.name, "streams/") {
		if objects, streams, err := c.r.references(o.name, o.digest); err == nil {
			for _, d := range append(objects, streams...) {
				need(d, "")
			}
		}
		return found
	}
	t, _, err := readImage(f)
	if err != nil {
		return nil
	}
	t.Walk(func(name string, i *fstree.Inode) error {
		if d := objectOf(i); !d.IsZero() {
			if _, wanted := which[d]; wanted {
				sizes[d] = int64(i.Size())
			}
			need(d, name)
		}
		return nil
	})
	return found
}
