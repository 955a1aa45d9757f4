package delta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
)

// maxParts limits how many parts are applied at the same time: decompressing takes memory, see maxDictionary.
const maxParts = 4

// Store is where a delta is applied. Its functions are called by several goroutines at the same time.
type Store struct {
	// Part opens a part that is a file of its own, by its number.
	Part func(ctx context.Context, i int) (io.ReadCloser, error)
	// Source opens the content of a file object of the commit From.
	Source func(context.Context, Checksum) (Content, error)
	// Have tells whether an object is there already, so that it need not be made. If it is nil, none is.
	Have func(context.Context, Object) (bool, error)
	// Put takes an object, as the stream that its checksum is of, and its size. At the end, r returns an error if the checksum is not
	// right; before that, nothing of the object can be trusted. Put reads r to its end.
	Put func(ctx context.Context, o Object, size int64, r io.Reader) error
	// Temp makes a file that has no name, or loses it by itself.
	Temp func() (*os.File, error)
}

// Apply makes the objects of all parts and hands them to the store. The first error ends it. The commit itself is not among them: it is
// for the caller to add, once the fallbacks have been fetched too.
func (d *Delta) Apply(ctx context.Context, s Store) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	next := make(chan int)
	for range min(runtime.GOMAXPROCS(0), maxParts, len(d.Parts)) {
		wg.Go(func() {
			for i := range next {
				if err := d.applyPart(ctx, s, i); err != nil {
					cancel(fmt.Errorf("delta %s: part %d: %w", d.Name, i, err))
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
func (d *Delta) applyPart(ctx context.Context, s Store, i int) error {
	entry := &d.Parts[i]
	have := make([]bool, len(entry.Objects))
	missing := false
	for k, o := range entry.Objects {
		var err error
		if s.Have != nil {
			have[k], err = s.Have(ctx, o)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
		missing = missing || !have[k]
	}
	if !missing {
		return nil
	}
	p, err := d.loadPart(ctx, i, s.Part, s.Temp)
	if err != nil {
		return err
	}
	defer p.Close()
	m := newMachine(p, entry, func(sum Checksum) (Content, error) { return s.Source(ctx, sum) })
	defer m.Close()
	for k := 0; ; k++ {
		o, size, err := m.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if have[k] {
			continue
		}
		r := &whole{r: m}
		if err := s.Put(ctx, o, size, r); err != nil {
			return err
		}
		if r.err != io.EOF {
			// What was not read, or an error that was not passed on.
			if n, err := r.Read(make([]byte, 1)); n > 0 || err == nil {
				return fmt.Errorf("%s: it was not read to its end", o)
			} else if err != io.EOF {
				return err
			}
		}
	}
}

// whole remembers how reading ended.
type whole struct {
	r   io.Reader
	err error
}

func (w *whole) Read(b []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.r.Read(b)
	w.err = err
	return n, err
}

// loadPart reads part i from the superblock or from its file.
func (d *Delta) loadPart(ctx context.Context, i int, open func(context.Context, int) (io.ReadCloser, error), temp func() (*os.File, error)) (*payload, error) {
	entry := &d.Parts[i]
	if entry.inline != nil {
		return entry.loadPart(io.NewSectionReader(entry.inline, 0, entry.inline.Size()), temp)
	}
	if open == nil {
		return nil, errors.New("it is a file of its own, and cannot be found")
	}
	f, err := open(ctx, i)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return entry.loadPart(f, temp)
}
