package oci

import (
	"context"
	"io"
)

// Target is a place that images are given to: a registry, a directory. It is told what everything is and need not check it: a content
// that is not what its descriptor says ends with an error instead of io.EOF, and must not be kept then. What it has been given before
// stays valid whatever happens: the manifest comes when all that it names is there.
type Target interface {
	// Has reports whether a blob is there, and sound: it is not given then.
	Has(ctx context.Context, d Descriptor) (bool, error)
	// PutBlob stores a config, layer or other blob, of d.Size bytes. An error that wraps ErrPermanent is not worth another attempt.
	PutBlob(ctx context.Context, d Descriptor, content io.Reader) error
	// PutManifest stores a manifest or index, and makes it known.
	PutManifest(ctx context.Context, d Descriptor, content []byte, as Known) error
}

// Known is how a manifest is known.
type Known int

const (
	KnownByName   Known = iota // by the name that the target was opened for
	KnownByDigest              // an artifact that refers to an image, for example
	KnownByIndex               // one that follows names it
)
