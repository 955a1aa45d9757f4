package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/digestcache"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

const (
	// inMemory is the size in bytes up to which a content is read before it is decided whether it must be written.
	inMemory = 1 << 20
	// largestBatch is how many objects may wait for the disk: every one of them is an open file until then.
	largestBatch = 8192
)

// Import brings contents and images into a repository. It is an fstree.Sink. The repository is locked against garbage
// collection until Commit or Abort.
type Import struct {
	r       *Repo
	objects *os.File
	batch   int // objects
	cache   *digestcache.Cache
	release func()
	buffers sync.Pool
	empty   bool        // there were no objects when the import began
	plain   atomic.Bool // the file system has no fs-verity
	clones  atomic.Bool // it may share data between files
	aligned sync.Once
	align   int           // see directAlign
	writes  chan struct{} // see blocks
	store   bool          // see BeginStore

	fanMu sync.Mutex
	fan   [256]int // descriptors of objects/00 to ff, 0 where there is none yet

	mu       sync.Mutex
	flushed  *sync.Cond
	pending  map[fsverity.Digest]*temp // written, without a name
	waiting  int64                     // bytes of them
	flushing map[fsverity.Digest]*temp // on their way to a name
	busy     bool                      // somebody flushes
	failed   error                     // of a flush
	names    []name                    // to be made by Commit, in this order
	stats    ImportStats
	durable  int // of stats.Objects; for who is busy
	done     bool
}

type name struct{ path, target string }

// ImportStats counts what an import has done.
type ImportStats struct {
	Objects int   // new ones
	Bytes   int64 // of new ones
	Reused  int   // that were there
}

// Begin starts an import. It waits for a garbage collection that is going on, see Lock.
func (r *Repo) Begin(ctx context.Context, l LockOptions) (*Import, error) {
	if err := r.writable(); err != nil {
		return nil, err
	}
	release, err := r.LockShared(ctx, l)
	if err != nil {
		return nil, err
	}
	objects, err := r.mkdir("objects")
	if err != nil {
		release()
		return nil, err
	}
	return newImport(r, objects, release), nil
}

func newImport(r *Repo, objects *os.File, release func()) *Import {
	names, _ := objects.Readdirnames(1)
	i := &Import{r: r, objects: objects, release: release, pending: map[fsverity.Digest]*temp{}, empty: len(names) == 0}
	i.batch = batchSize()
	i.clones.Store(true)
	i.writes = make(chan struct{}, 4+2*runtime.GOMAXPROCS(0))
	i.flushed = sync.NewCond(&i.mu)
	i.buffers.New = func() any { return &buffer{d: fsverity.NewDigester(r.Algorithm())} }
	return i
}

// newTemp makes a file for an object.
func (i *Import) newTemp() (*temp, error) {
	t, err := newTemp(i.objects, i.r.dir)
	if err != nil || i.r.keepCached {
		return t, err
	}
	i.aligned.Do(func() { i.align = directAlign(t.fd) })
	if i.align > 0 {
		t.blocks = &blocks{align: i.align, writes: i.writes}
	}
	return t, nil
}

// batchSize returns how many objects may wait for the disk: two batches are open at a time, besides 256 directories and what
// the source has open.
func batchSize() int {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return 64
	}
	return int(min(largestBatch, max(64, (max(limit.Cur, 768)-768)/3)))
}

// Algorithm returns the algorithm of the digests, which is that of the repository.
func (i *Import) Algorithm() fsverity.Algorithm { return i.r.Algorithm() }

// UseCache makes the import believe that objects which the cache knows have not changed since they were measured, instead of
// measuring them again, where they have no fs-verity. Nothing must have been put yet.
func (i *Import) UseCache(c *digestcache.Cache) { i.cache = c }

type buffer struct {
	b bytes.Buffer
	d *fsverity.Digester
}

// Put stores a content and returns its digest. Nothing of it is visible before Commit, except that many objects are made
// visible, each of them whole, as more come. See fstree.Sink.
func (i *Import) Put(r io.Reader, size int64) (fsverity.Digest, error) {
	buf := i.buffers.Get().(*buffer)
	defer i.buffers.Put(buf)
	buf.b.Reset()
	buf.d.Reset()
	if f, ok := r.(interface{ Fd() uintptr }); ok && i.clones.Load() {
		if t := i.clone(f.Fd()); t != nil {
			n, err := buf.d.ReadFrom(io.NewSectionReader(t, 0, math.MaxInt64))
			return i.putTemp(buf.d.Sum(), t, n, size, err)
		}
	}
	if size > inMemory {
		return i.putLarge(buf.d, r, size)
	}
	buf.b.Grow(int(size) + bytes.MinRead)
	n, err := buf.b.ReadFrom(io.LimitReader(r, size+1))
	if err = expect(n, size, err); err != nil {
		return fsverity.Digest{}, err
	}
	buf.d.Write(buf.b.Bytes())
	digest := buf.d.Sum()
	return digest, i.putContent(digest, buf.b.Bytes())
}

// PutAll stores several contents, see fstree.Sink.
func (i *Import) PutAll(contents [][]byte) ([]fsverity.Digest, error) {
	digests := fsverity.OfAll(i.r.Algorithm(), contents)
	for k, content := range contents {
		if err := i.putContent(digests[k], content); err != nil {
			return nil, err
		}
	}
	return digests, nil
}

func (i *Import) putContent(d fsverity.Digest, content []byte) error {
	if have, err := i.have(d, content); have || err != nil {
		return err
	}
	t, err := i.newTemp()
	if err != nil {
		return err
	}
	if len(content) < directSize {
		t.blocks = nil
	}
	if _, err := t.Write(content); err != nil {
		t.discard()
		return err
	}
	return i.add(d, t, int64(len(content)))
}

// putLarge stores a content that does not fit in memory. Where the repository has objects already, it may have this one: a
// content that can be read twice is only written when it is known to be new.
func (i *Import) putLarge(d *fsverity.Digester, r io.Reader, size int64) (fsverity.Digest, error) {
	if again, ok := r.(io.Seeker); ok && !i.empty {
		n, err := d.ReadFrom(r)
		if err = expect(n, size, err); err != nil {
			return fsverity.Digest{}, err
		}
		digest := d.Sum()
		if have, err := i.have(digest, nil); have || err != nil {
			return digest, err
		}
		if _, err := again.Seek(0, io.SeekStart); err != nil {
			return digest, err
		}
		d.Reset()
	}
	t, err := i.newTemp()
	if err != nil {
		return fsverity.Digest{}, err
	}
	n, err := d.ReadFrom(io.TeeReader(r, t))
	return i.putTemp(d.Sum(), t, n, size, err)
}

// putTemp stores a content that is in a file already, of n bytes, unless there was an error.
func (i *Import) putTemp(digest fsverity.Digest, t *temp, n, size int64, err error) (fsverity.Digest, error) {
	have := false
	if err = expect(n, size, err); err == nil {
		have, err = i.have(digest, nil)
	}
	if have || err != nil {
		t.discard()
		return digest, err
	}
	return digest, i.add(digest, t, size)
}

// expect turns another size than the expected one into an error.
func expect(n, size int64, err error) error {
	if err == nil && n != size {
		return fmt.Errorf("%w: %d bytes, %d were expected", errChanged, n, size)
	}
	return err
}

// clone makes a file that shares its data with an open one, nil where that is not possible. The clone is what is hashed: the
// file may change meanwhile, the clone does not.
func (i *Import) clone(fd uintptr) *temp {
	t, err := i.newTemp()
	if err != nil {
		return nil // the other way will say why
	}
	if unix.IoctlFileClone(t.fd, int(fd)) != nil {
		i.clones.Store(false)
		t.discard()
		return nil
	}
	return t
}

// PutImage writes an image of the tree and returns its digest, under which Commit makes it visible, and under a ref, if
// that is not "".
func (i *Import) PutImage(t *fstree.Tree, f erofs.Format, ref string) (fsverity.Digest, error) {
	return i.putImage(func(w io.Writer) error { return erofs.Write(w, t, f) }, ref)
}

// PutImageFile takes an image that is there already. Its content is not looked at.
func (i *Import) PutImageFile(r io.Reader, ref string) (fsverity.Digest, error) {
	return i.putImage(func(w io.Writer) error { _, err := io.Copy(w, r); return err }, ref)
}

func (i *Import) putImage(write func(io.Writer) error, ref string) (fsverity.Digest, error) {
	if ref != "" {
		if err := checkRef(ref); err != nil {
			return fsverity.Digest{}, err
		}
	}
	t, err := i.newTemp()
	if err != nil {
		return fsverity.Digest{}, err
	}
	d := fsverity.NewDigester(i.r.Algorithm())
	if err := write(io.MultiWriter(t, d)); err != nil {
		t.discard()
		return fsverity.Digest{}, err
	}
	digest := d.Sum()
	have, err := i.have(digest, nil)
	if have || err != nil {
		t.discard()
	} else {
		err = i.add(digest, t, int64(d.Size()))
	}
	if err != nil {
		return digest, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.names = append(i.names, name{"images/" + digest.String(), "../objects/" + digest.ObjectPath()})
	if ref != "" {
		i.names = append(i.names, refName(digest, ref))
	}
	return digest, nil
}

// Name adds a ref for an image that this import or an earlier one has put.
func (i *Import) Name(d fsverity.Digest, ref string) error {
	if err := checkRef(ref); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.names = append(i.names, refName(d, ref))
	return nil
}

func refName(d fsverity.Digest, ref string) name {
	return name{"images/refs/" + ref, strings.Repeat("../", 1+strings.Count(ref, "/")) + d.String()}
}

// nameStream adds the name of a stream that has been put, and its refs.
func (i *Import) nameStream(stream string, d fsverity.Digest, refs []string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.names = append(i.names, name{"streams/" + stream, "../objects/" + d.ObjectPath()})
	for _, ref := range refs {
		i.names = append(i.names, name{"streams/refs/" + ref, strings.Repeat("../", 1+strings.Count(ref, "/")) + stream})
	}
}

// checkRef tells why a ref's name cannot be a path.
func checkRef(ref string) error {
	for part := range strings.SplitSeq(ref, "/") {
		if err := fstree.CheckName(part); err != nil {
			return fmt.Errorf("ref %q: %w", ref, err)
		}
	}
	return nil
}

// Stats returns what has been done so far.
func (i *Import) Stats() ImportStats {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stats
}

// Commit makes the import visible: objects, then images, then refs, each durable before the next. The import is over
// then, whether there is an error or not.
func (i *Import) Commit() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.done {
		return errors.New("the import is over")
	}
	defer i.end()
	return i.publishAll()
}

// publishAll makes objects and names visible that have been put and given so far. The caller holds the lock, which is let go meanwhile.
func (i *Import) publishAll() error {
	i.awaitFlush() // which may be of another checkpoint
	names, objects := i.names, i.stats.Objects
	i.names = nil
	return i.flushAll(func() error {
		if objects == i.durable && i.named(names) {
			return nil // an earlier import has made all of it durable
		}
		// The names of the objects must be durable before anything leads to them.
		if err := unix.Syncfs(int(i.objects.Fd())); err != nil {
			return os.NewSyscallError("syncfs", err)
		}
		i.durable = objects
		// A run of names in one directory becomes durable at once, before the next one begins.
		for len(names) > 0 {
			dir := filepath.Dir(names[0].path)
			n := 1
			for n < len(names) && filepath.Dir(names[n].path) == dir {
				n++
			}
			if err := i.link(dir, names[:n]); err != nil {
				return err
			}
			names = names[n:]
		}
		return nil
	})
}

// link makes names in one directory, durable.
func (i *Import) link(path string, names []name) error {
	dir, err := i.r.mkdir(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer dir.Close()
	for _, n := range names {
		if err := i.r.symlink(dir, n.target, filepath.Base(n.path)); err != nil {
			return fmt.Errorf("%s: %w", n.path, err)
		}
	}
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// named reports whether every name is there already.
func (i *Import) named(names []name) bool {
	for _, n := range names {
		dir, err := i.r.openat(filepath.Dir(n.path), unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return false
		}
		have, err := readlink(dir, filepath.Base(n.path))
		dir.Close()
		if err != nil || have != n.target {
			return false
		}
	}
	return true
}

// Abort ends the import without making anything more visible. After Commit it does nothing.
func (i *Import) Abort() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if !i.done {
		i.end()
	}
}

func (i *Import) end() {
	i.done = true
	i.awaitFlush()
	for _, t := range i.pending {
		t.discard()
	}
	i.pending = map[fsverity.Digest]*temp{}
	for _, fd := range i.fan {
		if fd != 0 {
			unix.Close(fd)
		}
	}
	i.objects.Close()
	i.release()
}
