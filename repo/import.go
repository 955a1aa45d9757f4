package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

const (
	// inMemory is the size in bytes up to which a content is read before it is decided whether it must be written.
	inMemory = 4 << 20
	// batch is how many objects are made durable at once: every one of them is an open file until then.
	batch = 512
)

// Import brings contents and images into a repository. It is an fstree.Sink. The repository is locked against garbage
// collection until Commit or Abort.
type Import struct {
	r       *Repo
	objects *os.File
	release func()
	buffers sync.Pool

	mu      sync.Mutex
	pending map[fsverity.Digest]*temp // written, without a name
	names   []name                    // to be made by Commit, in this order
	stats   ImportStats
	done    bool

	// Of a store, see BeginStore.
	plain  bool        // objects are readable by all, and get fs-verity where it is to be had
	clones atomic.Bool // the file system may share data between files
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
	i := &Import{r: r, objects: objects, release: release, pending: map[fsverity.Digest]*temp{}}
	i.buffers.New = func() any { return &buffer{d: fsverity.NewDigester(r.Algorithm())} }
	return i
}

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
	if f, ok := r.(*os.File); ok && i.clones.Load() {
		if t := i.clone(f); t != nil {
			n, err := buf.d.ReadFrom(t.f)
			return i.putTemp(buf.d, t, n, size, err)
		}
	}
	if size > inMemory {
		return i.putLarge(buf.d, r, size)
	}
	buf.b.Grow(int(size) + bytes.MinRead)
	n, err := buf.b.ReadFrom(io.LimitReader(r, size+1))
	if err != nil {
		return fsverity.Digest{}, err
	}
	if n != size {
		return fsverity.Digest{}, fmt.Errorf("%w: %d bytes, %d were expected", errChanged, n, size)
	}
	buf.d.Write(buf.b.Bytes())
	digest := buf.d.Sum()
	have, err := i.have(digest)
	if have || err != nil {
		return digest, err
	}
	t, err := newTemp(i.objects, i.r.dir)
	if err != nil {
		return digest, err
	}
	if _, err := t.f.Write(buf.b.Bytes()); err != nil {
		t.discard()
		return digest, err
	}
	return digest, i.add(digest, t, size)
}

func (i *Import) putLarge(d *fsverity.Digester, r io.Reader, size int64) (fsverity.Digest, error) {
	t, err := newTemp(i.objects, i.r.dir)
	if err != nil {
		return fsverity.Digest{}, err
	}
	n, err := d.ReadFrom(io.TeeReader(r, t.f))
	return i.putTemp(d, t, n, size, err)
}

// putTemp stores a content that is in a file already: n bytes that d has seen, unless there was an error.
func (i *Import) putTemp(d *fsverity.Digester, t *temp, n, size int64, err error) (fsverity.Digest, error) {
	if err == nil && n != size {
		err = fmt.Errorf("%w: %d bytes, %d were expected", errChanged, n, size)
	}
	if err != nil {
		t.discard()
		return fsverity.Digest{}, err
	}
	digest := d.Sum()
	have, err := i.have(digest)
	if have || err != nil {
		t.discard()
		return digest, err
	}
	return digest, i.add(digest, t, size)
}

// have reports whether an object is there and sound. One that is there but not sound is replaced later, by its name.
func (i *Import) have(d fsverity.Digest) (bool, error) {
	i.mu.Lock()
	_, pending := i.pending[d]
	i.mu.Unlock()
	if pending {
		return true, nil
	}
	ok, err := i.r.sound(d)
	if ok {
		i.mu.Lock()
		i.stats.Reused++
		i.mu.Unlock()
	}
	return ok, err
}

// sound reports whether an object is there and has its digest. It is measured once.
func (r *Repo) sound(d fsverity.Digest) (bool, error) {
	r.mu.Lock()
	known := r.verified[d]
	r.mu.Unlock()
	if known {
		return true, nil
	}
	f, err := r.openat(r.objects+d.ObjectPath(), unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	switch err := r.Verify(f, d); {
	case err == nil:
		r.mu.Lock()
		r.verified[d] = true
		r.mu.Unlock()
		return true, nil
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrNoVerity), errors.Is(err, unix.EIO):
		return false, nil
	default:
		return false, fmt.Errorf("object %v: %w", d, err)
	}
}

func (i *Import) add(d fsverity.Digest, t *temp, size int64) error {
	var err error
	if i.plain {
		err = t.f.Chmod(0o644)
	}
	if err == nil {
		err = t.readOnly()
	}
	if err != nil {
		t.discard()
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pending[d] != nil { // another goroutine had the same content
		t.discard()
		return nil
	}
	i.pending[d] = t
	i.stats.Objects++
	i.stats.Bytes += size
	if len(i.pending) < batch {
		return nil
	}
	return i.flush()
}

// flush makes what is pending durable and then visible. The caller holds the lock: other writers wait at the barrier.
func (i *Import) flush() error {
	if len(i.pending) == 0 {
		return nil
	}
	if err := unix.Syncfs(int(i.objects.Fd())); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	for d, t := range i.pending {
		err := i.publish(d, t)
		t.discard()
		delete(i.pending, d)
		if err != nil {
			return fmt.Errorf("object %v: %w", d, err)
		}
	}
	return nil
}

func (i *Import) publish(d fsverity.Digest, t *temp) error {
	err := t.seal(i.r.Algorithm(), i.objects)
	if errors.Is(err, fsverity.ErrNotSupported) && !i.r.verity || i.plain && unsuitable(err) {
		err = nil
	}
	if err != nil {
		return err
	}
	path := d.ObjectPath()
	dir, err := i.r.mkdir(i.r.objects + filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	err = t.link(dir, filepath.Base(path))
	if errors.Is(err, unix.EEXIST) {
		// Either somebody else was faster, or this object is there to be replaced.
		if ok, _ := i.r.sound(d); ok {
			return nil
		}
		err = t.replace(dir, filepath.Base(path))
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
	if err := write(io.MultiWriter(t.f, d)); err != nil {
		t.discard()
		return fsverity.Digest{}, err
	}
	digest := d.Sum()
	have, err := i.have(digest)
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
	if err := i.flush(); err != nil {
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
	for _, t := range i.pending {
		t.discard()
	}
	i.pending = map[fsverity.Digest]*temp{}
	i.objects.Close()
	i.release()
}
