package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// Item is a commit that is written, and the refs that lead to it then.
type Item struct {
	Commit *ostree.Stored
	Refs   []string
}

// Options says what is written.
type Options struct {
	// Depth is how many commits are written that came before, as far as they are here: 0 for none, -1 for all.
	Depth int
	// AnyRef writes refs that the commits are not meant for, too. Readers refuse them.
	AnyRef   bool
	DryRun   bool // count, and write nothing
	Progress *Progress
	Lock     repo.LockOptions // of the composefs repository
}

// Progress counts what an export has written; other goroutines may look at it meanwhile.
type Progress struct {
	Objects atomic.Int64
	Bytes   atomic.Int64 // of contents, not compressed
}

// Result counts what an export has written.
type Result struct {
	Commits  []ostree.Checksum `json:"commits"` // that were not there
	Metadata int               `json:"metadata_written"`
	Files    int               `json:"files_written"`
	Present  int               `json:"objects_present"` // that were there
	Bytes    int64             `json:"bytes_written"`   // of contents, not compressed
}

// The objects of a chunk get their names at once, after one barrier.
const (
	chunkObjects = 8192
	chunkBytes   = 512 << 20
)

// Export writes commits of a composefs repository, with all their objects, their detached metadata, and refs. What is there is not written
// again; detached metadata and refs are replaced. Export is interrupted by the context alone, and resumed by itself.
func (r *Repository) Export(ctx context.Context, from *repo.Repo, items []Item, o Options) (Result, error) {
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	release, err := from.LockShared(ctx, o.Lock)
	if err != nil {
		return Result{}, err
	}
	defer release()
	e := &export{r: r, from: from, o: o, result: Result{Commits: []ostree.Checksum{}}, done: map[ostree.Checksum]bool{}, planned: map[ostree.ObjectName]bool{}}
	if e.w, err = r.newWriter(); err != nil {
		return e.result, err
	}
	var refs []small
	for _, i := range items {
		c, err := i.Commit.Commit(from)
		if err != nil {
			return e.result, err
		}
		for _, ref := range i.Refs {
			err := summary.CheckRef(ref)
			if err == nil && !o.AnyRef {
				if err = c.CheckBinding(ref, r.Collection()); err != nil {
					err = fmt.Errorf("commit %v: %w", i.Commit.Checksum, err)
				}
			}
			if err != nil {
				return e.result, err
			}
			refs = append(refs, small{"refs/heads/" + ref, []byte(i.Commit.Checksum.String() + "\n")})
		}
	}
	for _, i := range items {
		if err := e.history(ctx, i.Commit); err != nil {
			return e.result, err
		}
	}
	if o.DryRun {
		return e.result, nil
	}
	return e.result, r.replace(refs...)
}

type export struct {
	r       *Repository
	from    *repo.Repo
	o       Options
	w       *writer
	done    map[ostree.Checksum]bool   // commits
	planned map[ostree.ObjectName]bool // objects that are there, or will be
	result  Result
}

// history writes a commit after those before it: whoever finds a commit may look for its parent.
func (e *export) history(ctx context.Context, s *ostree.Stored) error {
	entries, _, err := s.History(e.from)
	if err != nil {
		return err
	}
	if e.o.Depth >= 0 && len(entries) > e.o.Depth+1 {
		entries = entries[:e.o.Depth+1]
	}
	for _, entry := range slices.Backward(entries) {
		one := s
		if entry.Checksum != s.Checksum {
			if one, err = ostree.Open(e.from, entry.Checksum.String()); err != nil {
				return err
			}
		}
		if err := e.commit(ctx, one); err != nil {
			return fmt.Errorf("commit %v: %w", one.Checksum, err)
		}
	}
	return nil
}

// commit writes one commit.
func (e *export) commit(ctx context.Context, s *ostree.Stored) error {
	if e.done[s.Checksum] {
		return nil
	}
	objects, err := s.Objects(e.from)
	if err != nil {
		return err
	}
	name := ostree.ObjectName{Checksum: s.Checksum, Kind: ostree.KindCommit}
	data, err := objects.Metadata(name)
	if err != nil {
		return err
	}
	missing, err := e.missing(objects, data)
	if err != nil {
		return err
	}
	for len(missing) > 0 {
		n := min(len(missing), chunkObjects)
		rest, err := e.chunk(ctx, objects, missing[:n])
		if err != nil {
			return err
		}
		missing = append(rest, missing[n:]...)
	}
	there, err := e.r.has(name.Path(false))
	if err != nil {
		return err
	}
	if there {
		e.result.Present++
	} else {
		e.result.Commits = append(e.result.Commits, s.Checksum)
	}
	e.done[s.Checksum] = true
	if e.o.DryRun {
		return nil
	}
	return e.name(ctx, s, name, data, there)
}

// name writes the commit itself, which makes it be there, and its detached metadata before it.
func (e *export) name(ctx context.Context, s *ostree.Stored, name ostree.ObjectName, data []byte, there bool) error {
	detached, err := s.Detached(e.from)
	if err != nil {
		return err
	}
	var files []small
	if detached != nil {
		n := ostree.ObjectName{Checksum: s.Checksum, Kind: ostree.KindCommitMeta}
		if old, err := e.r.Metadata(ctx, n); err != nil && !errors.Is(err, ostree.ErrNotFound) {
			return err
		} else if err != nil || !bytes.Equal(old, detached) {
			files = append(files, small{n.Path(false), detached})
		}
	}
	if !there {
		files = append(files, small{name.Path(false), data})
	}
	if err := e.r.replace(files...); err != nil {
		return err
	}
	// A pull of it may have been interrupted here, of which this is the end.
	err = e.r.root.Remove("state/" + s.Checksum.String() + ".commitpartial")
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return err
}

// missing returns the objects of a commit that the repository lacks, and tells why it cannot hold one of them before any is written.
func (e *export) missing(objects *ostree.Objects, data []byte) (list []ostree.ObjectName, err error) {
	c, err := ostree.ParseCommit(data)
	if err != nil {
		return nil, err
	}
	seen := map[ostree.ObjectName]bool{}
	want := func(n ostree.ObjectName) (first bool, err error) {
		if seen[n] {
			return false, nil
		}
		seen[n] = true
		there := e.planned[n]
		if !there {
			if there, err = e.r.has(n.Path(e.r.Mode == ostree.Archive)); err != nil {
				return false, err
			}
			e.planned[n] = true
		}
		if there {
			e.result.Present++
		} else {
			list = append(list, n)
		}
		return true, nil
	}
	trees := []ostree.Checksum{c.RootTree}
	if _, err := want(ostree.ObjectName{Checksum: c.RootMeta, Kind: ostree.KindDirMeta}); err != nil {
		return nil, err
	}
	for len(trees) > 0 {
		n := ostree.ObjectName{Checksum: trees[len(trees)-1], Kind: ostree.KindDirTree}
		trees = trees[:len(trees)-1]
		first, err := want(n)
		if err != nil {
			return nil, err
		}
		if !first {
			continue
		}
		b, err := objects.Metadata(n)
		if err != nil {
			return nil, err
		}
		t, err := ostree.ParseDirTree(b)
		if err != nil {
			return nil, fmt.Errorf("object %v: %w", n, err)
		}
		for _, d := range t.Dirs {
			trees = append(trees, d.Tree)
			if _, err := want(ostree.ObjectName{Checksum: d.Meta, Kind: ostree.KindDirMeta}); err != nil {
				return nil, err
			}
		}
		for _, f := range t.Files {
			if _, err := want(ostree.ObjectName{Checksum: f.File, Kind: ostree.KindFile}); err != nil {
				return nil, err
			}
		}
	}
	for _, n := range list {
		if n.Kind != ostree.KindFile {
			continue
		}
		f, err := objects.File(n.Checksum)
		if err == nil {
			err = check(e.r.Mode, &f.FileHeader)
		}
		if err != nil {
			return nil, fmt.Errorf("object %v: %w", n, err)
		}
	}
	return list, nil
}

// chunk writes objects under temporary names, makes them durable, and gives them their names. It returns those for which there was no
// more room.
func (e *export) chunk(ctx context.Context, objects *ostree.Objects, list []ostree.ObjectName) (rest []ostree.ObjectName, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var mu sync.Mutex
	var renames []rename
	var bytes int64
	next := 0
	take := func() (n ostree.ObjectName, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if next == len(list) || bytes >= chunkBytes || ctx.Err() != nil {
			return n, false
		}
		next++
		return list[next-1], true
	}
	if !e.o.DryRun {
		if _, err := e.r.staged(""); err != nil { // before several want it
			return nil, err
		}
	}
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for n, ok := take(); ok; n, ok = take() {
				done, size, err := e.object(ctx, objects, n)
				if err != nil {
					stop(fmt.Errorf("object %v: %w", n, err))
					return
				}
				mu.Lock()
				renames = append(renames, done...)
				bytes += size
				e.result.Bytes += size
				if n.Kind == ostree.KindFile {
					e.result.Files++
				} else {
					e.result.Metadata++
				}
				mu.Unlock()
				e.o.Progress.Objects.Add(1)
				e.o.Progress.Bytes.Add(size)
			}
		})
	}
	workers.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if e.o.DryRun {
		return list[next:], nil
	}
	return list[next:], e.r.rename(renames)
}

// rename makes files durable and gives them their names.
func (r *Repository) rename(list []rename) error {
	if err := r.barrier(); err != nil {
		return err
	}
	dirs := map[string]bool{}
	for _, n := range list {
		dirs[path.Dir(n.to)] = true
	}
	for dir := range maps.Keys(dirs) {
		if err := r.root.MkdirAll(dir, 0o777); err != nil {
			return err
		}
	}
	for _, n := range list {
		if err := r.root.Rename(n.from, n.to); err != nil {
			return err
		}
	}
	return nil
}

// object writes one object.
func (e *export) object(ctx context.Context, objects *ostree.Objects, n ostree.ObjectName) (done []rename, size int64, err error) {
	if n.Kind != ostree.KindFile {
		data, err := objects.Metadata(n)
		if err == nil && !e.o.DryRun {
			done, err = e.w.metadata(n, data)
		}
		return done, 0, err
	}
	f, err := objects.File(n.Checksum)
	if err != nil || e.o.DryRun {
		if err == nil {
			size = f.Size
		}
		return nil, size, err
	}
	var content io.Reader = bytes.NewReader(f.Inline)
	if !f.Object.IsZero() {
		// It is not verified by its digest: its checksum is compared.
		file, err := e.from.OpenObject(f.Object)
		if err != nil {
			return nil, 0, err
		}
		defer file.Close()
		content = file
	}
	done, err = e.w.write(n.Checksum, &f.FileHeader, &interruptible{ctx, content})
	return done, f.Size, err
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
