package ostree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/inflate"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

const (
	smallFile  = 256 << 10 // larger contents are stored one by one, while they are read
	batchBytes = 512 << 10 // of small contents that are stored at once
	allBatches = 8 << 20   // of all that workers collect at a time
	batchFiles = 256
	// What has come is made durable after as many bytes, or as much time, together with the journal of it. What comes from far away
	// is dearer.
	checkpointBytes   = 128 << 20
	checkpointTime    = 4 * time.Second
	checkpointFarTime = time.Second
)

// fetcher brings the objects of one commit. Each of its workers takes an object that is wanted, dirtrees first since they tell what else
// is, and collects small contents to store many at once.
type fetcher struct {
	p     *pull
	ctx   context.Context
	stop  context.CancelCauseFunc
	j     *journal
	bases []*Objects    // whose objects need not be fetched
	batch int           // bytes that a worker collects
	every time.Duration // between checkpoints

	mu      sync.Mutex
	changed *sync.Cond
	metas   []ObjectName
	files   []Checksum
	seen    map[ObjectName]bool
	busy    int      // workers that may find out what else is wanted
	got     *Objects // the commit's
	fresh   *Objects // of those that were fetched, the ones that are not in the journal yet
	bytes   int64    // of contents, since the last checkpoint
	saved   time.Time
	saving  sync.Mutex // held by who makes a checkpoint
	stats   PullStats
}

// fetch brings all objects of a commit. Have are those that an earlier pull of it has brought.
func (p *pull) fetch(ctx context.Context, l link, j *journal, have *Objects, stats *PullStats) (*Objects, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	a := p.i.Algorithm()
	commit, err := ParseCommit(l.commit)
	if err != nil {
		return nil, err
	}
	if !commit.Parent.IsZero() {
		if err := p.tryBase(commit.Parent); err != nil {
			return nil, err
		}
	}
	extra := newObjects(a, l.c)
	n, every := p.o.InFlight, checkpointFarTime
	if n <= 0 {
		n, every = 2*runtime.GOMAXPROCS(0), checkpointTime
	}
	f := &fetcher{p: p, ctx: ctx, stop: stop, j: j, bases: append([]*Objects{have, extra}, p.bases...), seen: map[ObjectName]bool{},
		batch: min(batchBytes, allBatches/n), every: every, got: newObjects(a, l.c), fresh: newObjects(a, l.c), saved: time.Now()}
	f.changed = sync.NewCond(&f.mu)
	wake := context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.changed.Broadcast()
	})
	defer wake()
	if p.o.Prefetch != nil {
		err = p.o.Prefetch(ctx, l.c, &Collector{f: f, to: extra})
	}
	if err == nil {
		if have.Len()+extra.Len() == 0 {
			p.o.Progress.Metadata.Add(1)
			f.stats.Metadata++
		}
		f.got.entries[l.c] = entry{data: l.commit}
		f.want(ObjectName{commit.RootMeta, KindDirMeta})
		f.want(ObjectName{commit.RootTree, KindDirTree})
		var workers sync.WaitGroup
		for range n {
			workers.Go(func() {
				if err := f.work(); err != nil {
					stop(err)
				}
			})
		}
		workers.Wait()
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, f.checkpoint())
	}
	stats.Metadata += f.stats.Metadata
	stats.Files += f.stats.Files
	stats.Reused += f.stats.Reused
	stats.Bytes += f.stats.Bytes
	p.bases = append(p.bases, f.got)
	return f.got, nil
}

// want puts an object among those that are to come, once.
func (f *fetcher) want(n ObjectName) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seen[n] {
		return
	}
	f.seen[n] = true
	f.p.o.Progress.Pending.Add(1)
	if n.Kind == KindFile {
		f.files = append(f.files, n.Checksum)
	} else {
		f.metas = append(f.metas, n)
	}
	f.changed.Signal()
}

// next returns an object that is to come. It waits while others may find out about more, unless that is not wanted.
func (f *fetcher) next(wait bool) (n ObjectName, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.ctx.Err() == nil {
		if k := len(f.metas); k > 0 {
			n, f.metas = f.metas[k-1], f.metas[:k-1]
			f.busy++
			return n, true
		}
		if k := len(f.files); k > 0 {
			n, f.files = ObjectName{f.files[k-1], KindFile}, f.files[:k-1]
			return n, true
		}
		if f.busy == 0 || !wait {
			break
		}
		f.changed.Wait()
	}
	return n, false
}

// done tells that a worker has found out all that a dirtree or dirmeta names.
func (f *fetcher) done() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.busy--; f.busy == 0 {
		f.changed.Broadcast()
	}
}

func (f *fetcher) work() error {
	b := &batch{f: f}
	for {
		n, ok := f.next(false)
		if !ok {
			if err := b.store(); err != nil {
				return err
			}
			if n, ok = f.next(true); !ok {
				return nil
			}
		}
		var err error
		if n.Kind == KindFile {
			err = b.file(n)
		} else {
			err = f.metadata(n)
			f.done()
		}
		if err != nil {
			f.stop(fmt.Errorf("object %v: %w", n, err))
			return b.store() // what has come stays
		}
		f.p.o.Progress.Pending.Add(-1)
	}
}

// metadata brings a dirtree or dirmeta.
func (f *fetcher) metadata(n ObjectName) error {
	e, found := f.find(n.Checksum)
	data, err := e.metadata(n)
	if found = found && err == nil; !found {
		if data, err = f.p.source.Metadata(f.ctx, n); err == nil {
			err = n.Verify(data)
		}
		if err != nil {
			return err
		}
	}
	if n.Kind == KindDirMeta {
		if _, err := ParseDirMeta(data); err != nil {
			return err
		}
	} else {
		t, err := ParseDirTree(data)
		if err != nil {
			return err
		}
		for _, e := range t.Files {
			f.want(ObjectName{e.File, KindFile})
		}
		for _, e := range t.Dirs {
			f.want(ObjectName{e.Meta, KindDirMeta})
			f.want(ObjectName{e.Tree, KindDirTree})
		}
	}
	f.add(n, entry{data: data}, found, 0)
	return nil
}

// find looks for an object that need not be fetched.
func (f *fetcher) find(c Checksum) (e entry, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, b := range f.bases {
		if e, ok = b.entries[c]; ok {
			break
		}
	}
	return e, ok
}

// add takes an object into the commit.
func (f *fetcher) add(n ObjectName, e entry, reused bool, size int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.got.entries[n.Checksum] = e
	if reused {
		f.stats.Reused++
		return
	}
	f.brought(n, e, size)
}

// brought counts an object that has come. The caller holds the lock.
func (f *fetcher) brought(n ObjectName, e entry, size int64) {
	f.fresh.entries[n.Checksum] = e
	f.stats.Bytes += size
	f.bytes += size
	f.p.o.Progress.Bytes.Add(size)
	if n.Kind == KindFile {
		f.stats.Files++
		f.p.o.Progress.Files.Add(1)
	} else {
		f.stats.Metadata++
		f.p.o.Progress.Metadata.Add(1)
	}
}

// save makes a checkpoint if it is time.
func (f *fetcher) save() error {
	f.mu.Lock()
	due := f.bytes >= checkpointBytes || time.Since(f.saved) >= f.every
	if due {
		f.bytes, f.saved = 0, time.Now()
	}
	f.mu.Unlock()
	if !due {
		return nil
	}
	return f.checkpoint()
}

// checkpoint makes durable what has come, and writes it into the journal.
func (f *fetcher) checkpoint() error {
	f.saving.Lock()
	defer f.saving.Unlock()
	f.mu.Lock()
	fresh := f.fresh
	f.fresh = newObjects(fresh.alg, fresh.Commit)
	f.mu.Unlock()
	if fresh.Len() == 0 {
		return nil
	}
	if err := f.p.i.Checkpoint(); err != nil {
		return err
	}
	return f.j.add(fresh)
}

// batch has contents that one worker stores at once.
type batch struct {
	f        *fetcher
	data     []byte
	names    []ObjectName
	headers  []*FileHeader
	contents [][]byte
	began    time.Time // when the first of them came
}

// file brings a content object.
func (b *batch) file(n ObjectName) error {
	f := b.f
	if e, ok := f.find(n.Checksum); ok {
		have, err := e.checked(n.Checksum)
		if ok = err == nil; ok && !have.Object.IsZero() {
			if ok, err = f.p.i.Has(have.Object); err != nil {
				return err
			}
		}
		if ok {
			f.add(n, e, true, 0)
			return nil
		}
	}
	file, err := f.p.source.File(f.ctx, n.Checksum)
	if err != nil {
		return err
	}
	defer file.Content.Close()
	if file.Deflated {
		z := inflaters.Get().(*inflate.Reader)
		defer inflaters.Put(z)
		z.Reset(file.Content)
		return b.content(n, &file.FileHeader, z)
	}
	return b.content(n, &file.FileHeader, file.Content)
}

// content takes the content of an object, checks it, and stores it, now or later.
func (b *batch) content(n ObjectName, h *FileHeader, r io.Reader) error {
	f := b.f
	sum, err := h.NewHash()
	if err != nil {
		return err
	}
	check := func() error {
		if got := Checksum(sum.Sum(nil)); got != n.Checksum {
			return fmt.Errorf("%w: %v", ErrChecksum, got)
		}
		return nil
	}
	if h.Size > smallFile {
		// One byte more than there should be is an error, and not without end.
		d, err := f.p.i.Put(io.TeeReader(&interruptible{f.ctx, io.LimitReader(r, h.Size+1)}, sum), h.Size)
		if err == nil {
			err = check()
		}
		if err != nil {
			return err
		}
		e, err := newEntry(h, nil, d)
		if err != nil {
			return err
		}
		f.add(n, e, false, h.Size)
		return f.save()
	}
	if b.data == nil {
		b.data = make([]byte, 0, f.batch+smallFile)
	}
	at := len(b.data)
	content := b.data[at : at+int(h.Size) : at+int(h.Size)]
	if !h.IsSymlink() {
		if _, err := io.ReadFull(r, content); err != nil {
			return fmt.Errorf("the content is not of %d bytes: %w", h.Size, unexpected(err))
		}
		var one [1]byte
		if k, err := io.ReadFull(r, one[:]); k > 0 || err != io.EOF {
			if err == nil {
				err = errors.New("there are more")
			}
			return fmt.Errorf("the content is not of %d bytes: %w", h.Size, err)
		}
	}
	sum.Write(content)
	if err := check(); err != nil {
		return err
	}
	if h.Size <= maxInline(f.got.alg) {
		e, err := newEntry(h, content, fsverity.Digest{})
		if err != nil {
			return err
		}
		f.add(n, e, false, h.Size)
		return nil
	}
	b.data = b.data[:at+int(h.Size)]
	if len(b.names) == 0 {
		b.began = time.Now()
	}
	b.names, b.headers, b.contents = append(b.names, n), append(b.headers, h), append(b.contents, content)
	if len(b.data) >= f.batch || len(b.names) >= batchFiles || time.Since(b.began) >= f.every/2 {
		return b.store()
	}
	return nil
}

// store stores the contents that have been collected.
func (b *batch) store() error {
	if len(b.names) == 0 {
		return nil
	}
	digests, err := b.f.p.i.PutAll(b.contents)
	if err != nil {
		return err
	}
	for k, n := range b.names {
		e, err := newEntry(b.headers[k], nil, digests[k])
		if err != nil {
			return err
		}
		b.f.add(n, e, false, b.headers[k].Size)
	}
	b.data, b.names, b.headers, b.contents = b.data[:0], b.names[:0], b.headers[:0], b.contents[:0]
	return b.f.save()
}

// interruptible is a reader that ends with the context.
type interruptible struct {
	ctx context.Context
	r   io.Reader
}

func (i *interruptible) Read(p []byte) (int, error) {
	if i.ctx.Err() != nil {
		return 0, context.Cause(i.ctx)
	}
	return i.r.Read(p)
}

// inflaters are used again: each has buffers of some hundred KiB.
var inflaters = sync.Pool{New: func() any { return inflate.NewReader(nil) }}
