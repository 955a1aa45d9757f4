package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
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
	inMemory = 4 << 20
	// batch is how many objects are made durable at once: every one of them is an open file until then.
	batch = 2048
)

// Import brings contents and images into a repository. It is an fstree.Sink. The repository is locked against garbage
// collection until Commit or Abort.
type Import struct {
	r       *Repo
	objects *os.File
	cache   *digestcache.Cache
	release func()
	buffers sync.Pool
	empty   bool        // there were no objects when the import began
	plain   atomic.Bool // the file system has no fs-verity
	clones  atomic.Bool // it may share data between files
	store   bool        // see BeginStore

	fanMu sync.Mutex
	fan   [256]int // descriptors of objects/00 to ff, 0 where there is none yet

	mu       sync.Mutex
	flushed  *sync.Cond
	pending  map[fsverity.Digest]*temp // written, without a name
	flushing map[fsverity.Digest]*temp // on their way to a name
	failed   error                     // of a flush
	names    []name                    // to be made by Commit, in this order
	stats    ImportStats
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
	i.clones.Store(true)
	i.flushed = sync.NewCond(&i.mu)
	i.buffers.New = func() any { return &buffer{d: fsverity.NewDigester(r.Algorithm())} }
	return i
}

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
	t, err := newTemp(i.objects, i.r.dir)
	if err != nil {
		return err
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
	t, err := newTemp(i.objects, i.r.dir)
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
	t, err := newTemp(i.objects, i.r.dir)
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
	ok, err := i.sound(d, content)
	if ok {
		i.mu.Lock()
		i.stats.Reused++
		i.mu.Unlock()
	}
	return ok, err
}

// fanout returns a descriptor of the directory of an object, -1 if it is not there and is not to be made.
func (i *Import) fanout(d fsverity.Digest, create bool) (int, error) {
	i.fanMu.Lock()
	defer i.fanMu.Unlock()
	at := &i.fan[d.Bytes()[0]]
	if *at != 0 {
		return *at, nil
	}
	name := d.ObjectPath()[:2]
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
	i.r.mu.Lock()
	known := i.r.verified[d]
	i.r.mu.Unlock()
	if known {
		return true, nil
	}
	dir, err := i.fanout(d, false)
	if dir < 0 {
		return false, err
	}
	fd, err := retry(func() (int, error) {
		return unix.Openat(dir, d.ObjectPath()[3:], unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
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
		if v, ok := i.cache.Get(key); ok && v.Digest == d {
			unix.Close(fd)
			return true, nil
		}
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

// sameContent compares an open file with a content. A file that cannot be read is another one.
func sameContent(fd int, size int64, content []byte) (bool, error) {
	if size != int64(len(content)) {
		return false, nil
	}
	buf := make([]byte, min(len(content), 256<<10))
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

func (i *Import) add(d fsverity.Digest, t *temp, size int64) error {
	if i.store {
		if err := unix.Fchmod(t.fd, 0o644); err != nil {
			t.discard()
			return os.NewSyscallError("fchmod", err)
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pending[d] != nil || i.flushing[d] != nil { // another goroutine had the same content
		t.discard()
		return nil
	}
	i.pending[d] = t
	i.stats.Objects++
	i.stats.Bytes += size
	if len(i.pending) < batch {
		return i.failed
	}
	// One flush goes on while others fill the next batch; who is faster than the disk waits here.
	i.awaitFlush()
	if i.failed != nil || len(i.pending) < batch {
		return i.failed
	}
	i.flushing, i.pending = i.pending, map[fsverity.Digest]*temp{}
	list := maps.Clone(i.flushing)
	go func() {
		err := i.flush(list)
		i.mu.Lock()
		i.failed, i.flushing = err, nil
		i.flushed.Broadcast()
		i.mu.Unlock()
	}()
	return nil
}

// awaitFlush waits until no flush goes on. The caller holds the lock.
func (i *Import) awaitFlush() {
	for i.flushing != nil {
		i.flushed.Wait()
	}
}

// settle makes visible what has been put so far.
func (i *Import) settle() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.flushPending()
}

// flushPending flushes what is pending, after what is on its way. The caller holds the lock.
func (i *Import) flushPending() error {
	i.awaitFlush()
	if i.failed != nil {
		return i.failed
	}
	list := i.pending
	i.pending = map[fsverity.Digest]*temp{}
	return i.flush(list)
}

// flush makes files durable and then visible. It closes them, whatever happens.
func (i *Import) flush(list map[fsverity.Digest]*temp) error {
	if len(list) == 0 {
		return nil
	}
	var failed error
	if err := unix.Syncfs(int(i.objects.Fd())); err != nil {
		failed = os.NewSyscallError("syncfs", err)
	}
	var mu sync.Mutex
	var workers sync.WaitGroup
	queue := make(chan fsverity.Digest)
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for d := range queue {
				mu.Lock()
				skip := failed != nil
				mu.Unlock()
				if !skip {
					if err := i.publish(d, list[d]); err != nil {
						mu.Lock()
						failed = fmt.Errorf("object %v: %w", d, err)
						mu.Unlock()
					}
				}
				list[d].discard()
			}
		})
	}
	for d := range list {
		queue <- d
	}
	close(queue)
	workers.Wait()
	return failed
}

func (i *Import) publish(d fsverity.Digest, t *temp) error {
	if !i.plain.Load() || i.r.verity {
		err := t.seal(i.r.Algorithm(), i.objects)
		if errors.Is(err, fsverity.ErrNotSupported) && !i.r.verity {
			i.plain.Store(true)
			err = nil
		}
		if i.store && unsuitable(err) {
			err = nil
		}
		if err != nil {
			return err
		}
	}
	dir, err := i.fanout(d, true)
	if err != nil {
		return err
	}
	name := d.ObjectPath()[3:]
	err = t.link(dir, name)
	if errors.Is(err, unix.EEXIST) {
		// Either somebody else was faster, or this object is there to be replaced.
		if ok, _ := i.sound(d, nil); ok {
			return nil
		}
		err = t.replace(dir, name)
	}
	if err == nil {
		i.r.mu.Lock()
		i.r.verified[d] = true
		i.r.mu.Unlock()
	}
	return err
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
	t, err := newTemp(i.objects, i.r.dir)
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
	if err := i.flushPending(); err != nil {
		return err
	}
	if len(i.names) == 0 {
		return nil
	}
	// The names of the objects must be durable before anything leads to them.
	if err := unix.Syncfs(int(i.objects.Fd())); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	for _, n := range i.names {
		dir, err := i.r.mkdir(filepath.Dir(n.path))
		if err != nil {
			return err
		}
		err = symlink(dir, n.target, filepath.Base(n.path))
		if err == nil {
			err = dir.Sync()
		}
		dir.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", n.path, err)
		}
	}
	return nil
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
