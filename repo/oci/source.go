package oci

import (
	"context"
	"errors"
	"io"
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
