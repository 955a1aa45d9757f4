package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// Source is a place that images come from: a registry, a directory, another program's storage. It hands out what it has and
// checks nothing: digests, sizes and formats are checked here. It is safe for concurrent use.
type Source interface {
	// Manifest returns the bytes of a manifest or index: of the image that the source was opened for, or, if the digest is not "",
	// of the one with that digest, which an index has named.
	Manifest(ctx context.Context, d Digest) ([]byte, error)
	// Blob opens a config, layer or other blob that a manifest names, from an offset on: what was read before the connection broke
	// is not read again. Reading ends with the context. A source that keeps layers uncompressed may give them so, but then every
	// time; size is that of the whole blob as it gives it, -1 if it does not know. An error that wraps ErrPermanent is not worth
	// another attempt.
	Blob(ctx context.Context, d Descriptor, offset int64) (r io.ReadCloser, size int64, err error)
}

// ErrPermanent tells that a source will not give another answer when it is asked again: there is no such blob, or no permission.
var ErrPermanent = errors.New("trying again does not help")

// Permanent marks an error with ErrPermanent, and leaves its text as it is.
func Permanent(err error) error { return permanent{err} }

type permanent struct{ error }

func (p permanent) Is(target error) bool { return target == ErrPermanent }
func (p permanent) Unwrap() error        { return p.error }

// Retry says how often a blob is opened again after a failure. The zero value gives up at once.
type Retry struct {
	Attempts int           // in sequence without a single byte
	Wait     time.Duration // before the first one; doubled for each that follows
}

// resuming reads a blob and, if that fails, goes on where it stopped.
type resuming struct {
	ctx    context.Context
	source Source
	blob   Descriptor
	retry  Retry
	got    func(n int)

	r      io.ReadCloser
	size   int64
	at     int64
	failed int // attempts in sequence
}

func (b *resuming) Read(p []byte) (int, error) {
	for {
		n, err := b.try(p)
		if n > 0 || err == nil || err == io.EOF {
			return n, err
		}
		b.Close()
		if b.failed++; b.failed > b.retry.Attempts || errors.Is(err, ErrPermanent) || b.ctx.Err() != nil {
			return 0, fmt.Errorf("after %d bytes: %w", b.at, err)
		}
		select {
		case <-b.ctx.Done():
			return 0, context.Cause(b.ctx)
		case <-time.After(b.retry.Wait << (b.failed - 1)):
		}
	}
}

// try reads once. An error with bytes before it comes again.
func (b *resuming) try(p []byte) (n int, err error) {
	if b.r == nil {
		if b.r, b.size, err = b.source.Blob(b.ctx, b.blob, b.at); err != nil {
			b.r = nil
			return 0, err
		}
	}
	n, err = b.r.Read(p)
	b.at += int64(n)
	if b.got != nil {
		b.got(n)
	}
	switch {
	case b.size >= 0 && b.at > b.size:
		return 0, fmt.Errorf("%w: there are more than %d bytes", ErrPermanent, b.size)
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

// Close closes what is open. What is read after it is opened again.
func (b *resuming) Close() error {
	if b.r == nil {
		return nil
	}
	r := b.r
	b.r = nil
	return r.Close()
}
