package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"github.com/composefs-boot/composefs-boot/repo"
)

// Retry says how often something is asked for again after a failure. The zero value gives up at once.
type Retry struct {
	Attempts int           // in sequence without a single byte; the first one follows at once
	Wait     time.Duration // before the second one; doubled for each that follows
	Idle     time.Duration // a connection that has brought nothing for so long has failed; 0: never
}

// DefaultRetry is for networks: half a minute passes before it gives up.
var DefaultRetry = Retry{Attempts: 6, Wait: time.Second, Idle: time.Minute}

// Do calls f until it does not fail any more, or there is no hope.
func (r Retry) Do(ctx context.Context, f func() error) error {
	for failed := 1; ; failed++ {
		err := f()
		if err == nil {
			return nil
		}
		if err := r.again(ctx, failed, err); err != nil {
			return err
		}
	}
}

// again waits before the next attempt, after a number of failed ones in sequence. It returns an error if there is to be none.
func (r Retry) again(ctx context.Context, failed int, err error) error {
	if failed > r.Attempts || errors.Is(err, ErrPermanent) || ctx.Err() != nil {
		return err
	}
	var wait time.Duration
	if failed > 1 {
		wait = r.Wait << min(failed-2, 16)
		wait += rand.N(wait/8 + 1) // many machines that fail at the same time do not come back at the same time
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(wait):
		return nil
	}
}

// resuming reads a blob and, if that fails, goes on where it stopped. With a file for it, what comes is kept there, and what is
// there already is not asked for.
type resuming struct {
	ctx    context.Context
	source Source
	blob   Descriptor
	retry  Retry
	got    func(n int)
	kept   *repo.Partial // nil: nothing is kept
	have   int64         // bytes of it that were there

	r      io.ReadCloser
	end    context.CancelFunc
	size   int64
	at     int64
	failed int   // attempts in sequence
	broken error // it has given up
}

func (b *resuming) Read(p []byte) (int, error) {
	if b.at < b.have {
		n, err := b.kept.ReadAt(p[:min(int64(len(p)), b.have-b.at)], b.at)
		b.at += int64(n)
		if n > 0 {
			err = nil
		}
		return n, err
	}
	for {
		n, err := b.try(p)
		if n > 0 || err == nil || err == io.EOF {
			return n, err
		}
		b.Close()
		b.failed++
		if err := b.retry.again(b.ctx, b.failed, err); err != nil {
			b.broken = fmt.Errorf("after %d bytes: %w", b.at, err)
			return 0, b.broken
		}
	}
}

var errIdle = errors.New("the connection brings nothing more")

// try reads once. An error with bytes before it comes again.
func (b *resuming) try(p []byte) (n int, err error) {
	if b.kept != nil && b.at == b.blob.Size {
		return 0, io.EOF // all of it was there
	}
	if b.r == nil {
		var ctx context.Context
		ctx, b.end = context.WithCancel(b.ctx)
		err = b.watched(func() (err error) {
			b.r, b.size, err = b.source.Blob(ctx, b.blob, b.at)
			return err
		})
		if err != nil {
			b.end()
			b.Close()
			return 0, err
		}
	}
	err = b.watched(func() (err error) {
		n, err = b.r.Read(p)
		return err
	})
	b.keep(p[:n])
	b.at += int64(n)
	if b.got != nil {
		b.got(n)
	}
	switch {
	case b.size >= 0 && b.at > b.size:
		return 0, Permanent(fmt.Errorf("there are more than %d bytes", b.size))
	case n > 0:
		b.failed = 0
		return n, nil
	case b.at == b.size:
		return 0, io.EOF // also if the connection broke then
	case err == io.EOF && b.at < b.size:
		return 0, fmt.Errorf("it ends, and %d bytes are expected: %w", b.size, io.ErrUnexpectedEOF)
	}
	return 0, err
}

// watched ends the connection if f takes too long.
func (b *resuming) watched(f func() error) error {
	if b.retry.Idle <= 0 {
		return f()
	}
	end := b.end
	timer := time.AfterFunc(b.retry.Idle, end)
	err := f()
	if !timer.Stop() {
		err = errIdle
	}
	return err
}

// keep writes what came to the file. If it cannot, for the disk is full perhaps, nothing is kept any more.
func (b *resuming) keep(p []byte) {
	if b.kept == nil || len(p) == 0 {
		return
	}
	if _, err := b.kept.WriteAt(p, b.at); err != nil {
		b.kept.Truncate(0)
		b.kept = nil
	}
}

// Close closes what is open. What is read after it is opened again.
func (b *resuming) Close() error {
	if b.r == nil {
		return nil
	}
	b.end() // first: a source may read to the end of the body else
	r := b.r
	b.r = nil
	return r.Close()
}
