package scan

import (
	"fmt"
	"io"
	"sync"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Digests returns a sink that stores nothing: for the digest of an image alone, no repository is needed.
func Digests(a fsverity.Algorithm) fstree.Sink {
	return &digests{a, sync.Pool{New: func() any { return fsverity.NewDigester(a) }}}
}

type digests struct {
	alg  fsverity.Algorithm
	pool sync.Pool
}

func (s *digests) PutAll(contents [][]byte) ([]fsverity.Digest, error) {
	return fsverity.OfAll(s.alg, contents), nil
}

func (s *digests) Has(d fsverity.Digest) (bool, error) { return d.Algorithm() == s.alg, nil }

func (s *digests) Put(r io.Reader, size int64) (fsverity.Digest, error) {
	d := s.pool.Get().(*fsverity.Digester)
	defer s.pool.Put(d)
	d.Reset()
	n, err := d.ReadFrom(r)
	if err != nil {
		return fsverity.Digest{}, err
	}
	if n != size {
		return fsverity.Digest{}, fmt.Errorf("changed while it was read: %d bytes, %d were expected", n, size)
	}
	return d.Sum(), nil
}
