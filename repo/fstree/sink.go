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
}

// Open opens the content of a regular file of a tree, whether it is inline or an object.
type Open func(path string, inode *Inode) (io.ReadCloser, error)
