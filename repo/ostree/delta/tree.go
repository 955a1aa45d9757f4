package delta

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// maxTreeDepth limits how deep directories lie: Linux has paths of 4096 bytes.
const maxTreeDepth = 2048

// tree has the objects of a commit, each once, in the order of their paths.
type tree struct {
	metadata []Object
	files    []treeFile
	byPath   map[string]Checksum
}

// treeFile is a file object by the first path that it has.
type treeFile struct {
	path string
	sum  Checksum
}

// walker reads a tree. A directory that is met again is not entered: otherwise a few directories inside of each other, several times
// each, would be a tree without end.
type walker struct {
	from *Repository
	tree
	seen map[Object]bool
}

// readTree reads the tree of a commit, without the commit.
func readTree(ctx context.Context, from *Repository, commit []byte) (*tree, error) {
	v, err := gvariant.New("(a{sv}aya(say)sstayay)", commit)
	if err != nil {
		return nil, err
	}
	contents, err1 := checksumAt(v, 6)
	meta, err2 := checksumAt(v, 7)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	w := &walker{from: from, seen: map[Object]bool{}}
	w.byPath = map[string]Checksum{}
	err = w.directory(ctx, "/", contents, meta, 0)
	return &w.tree, err
}

func checksumAt(v gvariant.Value, i int) (Checksum, error) {
	m, err := v.At(i)
	if err == nil && len(m.Bytes()) != len(Checksum{}) {
		err = fmt.Errorf("a checksum of %d bytes", len(m.Bytes()))
	}
	if err != nil {
		return Checksum{}, err
	}
	return Checksum(m.Bytes()), nil
}

// first reports whether an object is met for the first time.
func (w *walker) first(o Object) bool {
	is := !w.seen[o]
	w.seen[o] = true
	return is
}

func (w *walker) directory(ctx context.Context, dir string, contents, meta Checksum, depth int) error {
	if depth > maxTreeDepth {
		return fmt.Errorf("%.80s...: more than %d directories in each other", dir, maxTreeDepth)
	}
	if o := (Object{DirMeta, meta}); w.first(o) {
		w.metadata = append(w.metadata, o)
	}
	o := Object{DirTree, contents}
	if !w.first(o) {
		return nil
	}
	w.metadata = append(w.metadata, o)
	b, err := w.from.metadata(ctx, o)
	if err == nil {
		err = w.entries(ctx, dir, b, depth)
	}
	return err
}

func (w *walker) entries(ctx context.Context, dir string, dirtree []byte, depth int) error {
	v, err := gvariant.New("(a(say)a(sayay))", dirtree)
	if err != nil {
		return err
	}
	for list := range 2 {
		entries, err := v.At(list)
		if err != nil {
			return err
		}
		n, err := entries.Len()
		if err != nil {
			return err
		}
		for i := range n {
			e := member(entries, i)
			name := field(e, e.at(0).String)
			sum, err := checksumAt(e.v, 1)
			if err = errors.Join(e.err, err); err != nil {
				return err
			}
			p := path.Join(dir, name)
			if list == 0 {
				if w.first(Object{File, sum}) {
					w.files = append(w.files, treeFile{p, sum})
				}
				w.byPath[p] = sum
				continue
			}
			meta, err := checksumAt(e.v, 2)
			if err == nil {
				err = w.directory(ctx, p, sum, meta, depth+1)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// metadata returns a metadata object, which is checked.
func (r *Repository) metadata(ctx context.Context, o Object) ([]byte, error) {
	b, err := r.Metadata(ctx, o)
	if err == nil {
		if is := Checksum(sha256.Sum256(b)); is != o.Checksum {
			err = fmt.Errorf("its checksum is %s", is)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o, err)
	}
	return b, nil
}

// similar finds files that others can be described by.
type similar struct {
	from   *Repository
	tree   *tree
	byName map[string][]Checksum
	byStem map[string][]Checksum
	sizes  map[Checksum]int64 // -1 of files that cannot be used
}

func newSimilar(from *Repository, t *tree) *similar {
	s := &similar{from, t, map[string][]Checksum{}, map[string][]Checksum{}, map[Checksum]int64{}}
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
func (s *similar) find(ctx context.Context, f treeFile, size int64) (Checksum, int64, error) {
	base := path.Base(f.path)
	if size == 0 || slices.Contains([]string{".xz", ".bz2", ".zst"}, path.Ext(base)) {
		return Checksum{}, 0, nil
	}
	if sum, ok := s.tree.byPath[f.path]; ok {
		n, err := s.size(ctx, sum)
		if err != nil || n > 0 {
			return sum, n, err
		}
	}
	for _, list := range [][]Checksum{s.byName[base], s.byStem[stem(base)]} {
		best, distance := Checksum{}, size/3+1
		for _, sum := range list[:min(len(list), maxAlike)] {
			n, err := s.size(ctx, sum)
			if err != nil {
				return Checksum{}, 0, err
			}
			if d := max(n-size, size-n); n > 0 && d < distance {
				best, distance = sum, d
			}
		}
		if best != (Checksum{}) {
			return best, s.sizes[best], nil
		}
	}
	return Checksum{}, 0, nil
}

// size returns the size of a file, or -1 if it cannot be used.
func (s *similar) size(ctx context.Context, sum Checksum) (int64, error) {
	n, ok := s.sizes[sum]
	if ok {
		return n, nil
	}
	f, err := s.from.file(ctx, sum)
	if err != nil {
		return 0, err
	}
	defer f.Content.Close()
	n = f.Size
	// Who applies a delta without being root can have files of root below, which it can read only if everybody can.
	if f.Mode&unix.S_IFMT != unix.S_IFREG || f.Mode&unix.S_IROTH == 0 {
		n = -1
	}
	s.sizes[sum] = n
	return n, nil
}
