package delta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/composefs-boot/composefs-boot/internal/inflate"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// maxParts limits how many parts are applied at the same time: decompressing takes 40 MiB each for what ostree writes.
const maxParts = 2

// Store is where a delta is applied: an [ostree.Collector] for example. It is used by several goroutines at the same time.
type Store interface {
	// Has reports whether an object is there already, so that it need not be made.
	Has(ostree.Checksum) bool
	// File opens a file object of the commit From.
	File(ostree.Checksum) (*ostree.File, error)
	// PutMetadata and PutFile take an object, and check it against its checksum.
	PutMetadata(ostree.ObjectName, []byte) error
	PutFile(ostree.Checksum, *ostree.FileHeader, io.Reader) error
}

// Apply makes the objects of all parts and gives them to the store. Open opens parts that are files of their own, by number; it is called
// by several goroutines at the same time. The first error ends it all. The commit itself is not given, nor are the fallbacks.
func (d *Delta) Apply(ctx context.Context, s Store, open func(ctx context.Context, i int) (io.ReadCloser, error)) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(runtime.GOMAXPROCS(0), maxParts, len(d.Parts)) {
		wg.Go(func() {
			for i := range next {
				if err := d.applyPart(ctx, s, open, i); err != nil {
					stop(fmt.Errorf("delta %s: part %d: %w", d.Name, i, err))
				}
			}
		})
	}
feed:
	for i := range d.Parts {
		select {
		case next <- i:
		case <-ctx.Done():
			break feed
		}
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

// applyPart makes the objects of one part, if any of them is missing.
func (d *Delta) applyPart(ctx context.Context, s Store, open func(context.Context, int) (io.ReadCloser, error), i int) error {
	entry := &d.Parts[i]
	missing := false
	for _, o := range entry.Objects {
		missing = missing || !s.Has(o.Checksum) && o.Kind != ostree.KindCommit
	}
	if !missing {
		return nil
	}
	p, err := d.loadPart(ctx, open, i)
	if err != nil {
		return err
	}
	defer p.Close()
	m := newMachine(p, entry, func(sum ostree.Checksum) (*source, error) { return openSource(s, sum) })
	defer m.Close()
	for {
		o, header, err := m.next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		switch {
		case s.Has(o.Checksum) || o.Kind == ostree.KindCommit: // the commit is in the superblock, too
		case header != nil:
			err = s.PutFile(o.Checksum, header, m)
		default:
			var b []byte
			if b, err = io.ReadAll(m); err == nil {
				err = s.PutMetadata(o, b)
			}
		}
		if err != nil {
			return err
		}
	}
}

// loadPart reads part i from the superblock or from its file.
func (d *Delta) loadPart(ctx context.Context, open func(context.Context, int) (io.ReadCloser, error), i int) (*payload, error) {
	entry := &d.Parts[i]
	if entry.inline != nil {
		return entry.loadPart(io.NewSectionReader(entry.inline, 0, entry.inline.Size()))
	}
	if open == nil {
		return nil, errors.New("it is a file of its own, and cannot be found")
	}
	f, err := open(ctx, i)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return entry.loadPart(f)
}

// source is the content of a file object that is there already.
type source struct {
	io.ReaderAt
	io.Closer
	size int64
}

// openSource opens a file object. Content that cannot be read at any place is read into a file first.
func openSource(s Store, sum ostree.Checksum) (*source, error) {
	f, err := s.File(sum)
	if err != nil {
		return nil, err
	}
	if at, ok := f.Content.(io.ReaderAt); ok && !f.Deflated {
		return &source{at, f.Content, f.Size}, nil
	}
	defer f.Content.Close()
	copied := &spool{}
	if n, err := io.Copy(copied, io.LimitReader(inflated(f), f.Size+1)); err != nil || n != f.Size {
		copied.Close()
		return nil, errors.Join(err, fmt.Errorf("%d bytes of content, want %d", n, f.Size))
	}
	return &source{copied.reader(), copied, f.Size}, nil
}

// inflated reads the content of a file object.
func inflated(f *ostree.File) io.Reader {
	if f.Deflated {
		return inflate.NewReader(f.Content)
	}
	return f.Content
}
