package fstree

import (
	"io"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Sink takes the contents of files that are too large to stay in the tree. Sources hand every content to a sink, which
// stores it or only computes its digest. Sinks are safe for concurrent use.
type Sink interface {
	// Put reads r to its end and returns the digest of what it read. Size is the expected number of bytes; another number
	// is an error, since the file changed while it was read.
	Put(r io.Reader, size int64) (fsverity.Digest, error)
	// PutAll takes whole contents and returns their digests, in the same order. Several small ones at once are faster than one
	// after the other. The contents are the caller's again when it returns.
	PutAll(contents [][]byte) ([]fsverity.Digest, error)
	// Has reports whether the sink needs no content with this digest: its caller knows it, from a cache.
	Has(d fsverity.Digest) (bool, error)
}

// Open opens the content of a regular file of a tree, whether it is inline or an object.
type Open func(path string, inode *Inode) (io.ReadCloser, error)
