package delta

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// similar finds files that others can be described by.
type similar struct {
	from   ostree.Source
	tree   *tree
	byName map[string][]ostree.Checksum
	byStem map[string][]ostree.Checksum
	sizes  map[ostree.Checksum]int64 // -1 of files that cannot be used
}

func newSimilar(from ostree.Source, t *tree) *similar {
	s := &similar{from, t, map[string][]ostree.Checksum{}, map[string][]ostree.Checksum{}, map[ostree.Checksum]int64{}}
	for _, f := range t.files {
		base := path.Base(f.path)
		s.byName[base] = append(s.byName[base], f.sum)
		s.byStem[stem(base)] = append(s.byStem[stem(base)], f.sum)
	}
	return s
}

// stem returns what a name has in front of its first dot: libraries differ in what follows.
func stem(base string) string {
	if i := strings.IndexByte(base, '.'); i > 0 {
		return base[:i]
	}
	return base
}

// maxAlike limits how many files of one name are looked at.
const maxAlike = 256

// find returns the file that this one is most likely made of, and its size: that with the same path, or else one with the same name
// or stem whose size is nearest and differs by less than a third.
func (s *similar) find(ctx context.Context, f treeFile, size int64) (ostree.Checksum, int64, error) {
	base := path.Base(f.path)
	if size == 0 || slices.Contains([]string{".xz", ".bz2", ".zst"}, path.Ext(base)) {
		return ostree.Checksum{}, 0, nil
	}
	if sum, ok := s.tree.byPath[f.path]; ok {
		n, err := s.size(ctx, sum)
		if err != nil || n > 0 {
			return sum, n, err
		}
	}
	for _, list := range [][]ostree.Checksum{s.byName[base], s.byStem[stem(base)]} {
		best, distance := ostree.Checksum{}, size/3+1
		for _, sum := range list[:min(len(list), maxAlike)] {
			n, err := s.size(ctx, sum)
			if err != nil {
				return ostree.Checksum{}, 0, err
			}
			if d := max(n-size, size-n); n > 0 && d < distance {
				best, distance = sum, d
			}
		}
		if !best.IsZero() {
			return best, s.sizes[best], nil
		}
	}
	return ostree.Checksum{}, 0, nil
}

// size returns the size of a file, or -1 if it cannot be used.
func (s *similar) size(ctx context.Context, sum ostree.Checksum) (int64, error) {
	n, ok := s.sizes[sum]
	if ok {
		return n, nil
	}
	f, err := s.from.File(ctx, sum)
	if err != nil {
		return 0, fmt.Errorf("object %s: %w", fileName(sum), err)
	}
	defer f.Content.Close()
	n = f.Size
	// Who applies a delta without being root can have files of root below, which it can read only if everybody can.
	if f.IsSymlink() || f.Mode&0o004 == 0 {
		n = -1
	}
	s.sizes[sum] = n
	return n, nil
}
