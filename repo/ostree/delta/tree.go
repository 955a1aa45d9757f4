package delta

import (
	"context"
	"fmt"
	"path"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// maxTreeDepth limits how deep directories lie: Linux has paths of 4096 bytes.
const maxTreeDepth = 2048

// tree has the objects of a commit, each once, in the order of their paths.
type tree struct {
	metadata []ostree.ObjectName
	files    []treeFile
	byPath   map[string]ostree.Checksum
}

// treeFile is a file object by the first path that it has.
type treeFile struct {
	path string
	sum  ostree.Checksum
}

// walker reads a tree. A directory that is met again is not entered: otherwise a few directories inside of each other, several times
// each, would be a tree without end.
type walker struct {
	from ostree.Source
	tree
	seen map[ostree.ObjectName]bool
}

// readTree reads the tree of a commit, without the commit.
func readTree(ctx context.Context, from ostree.Source, commit []byte) (*tree, error) {
	c, err := ostree.ParseCommit(commit)
	if err != nil {
		return nil, err
	}
	w := &walker{from: from, seen: map[ostree.ObjectName]bool{}}
	w.byPath = map[string]ostree.Checksum{}
	err = w.directory(ctx, "/", c.RootTree, c.RootMeta, 0)
	return &w.tree, err
}

// first reports whether an object is met for the first time.
func (w *walker) first(o ostree.ObjectName) bool {
	is := !w.seen[o]
	w.seen[o] = true
	return is
}

func (w *walker) directory(ctx context.Context, dir string, contents, meta ostree.Checksum, depth int) error {
	if depth > maxTreeDepth {
		return fmt.Errorf("%.80s...: more than %d directories in each other", dir, maxTreeDepth)
	}
	if o := (ostree.ObjectName{Checksum: meta, Kind: ostree.KindDirMeta}); w.first(o) {
		w.metadata = append(w.metadata, o)
	}
	o := ostree.ObjectName{Checksum: contents, Kind: ostree.KindDirTree}
	if !w.first(o) {
		return nil
	}
	w.metadata = append(w.metadata, o)
	b, err := metadata(ctx, w.from, o)
	if err != nil {
		return err
	}
	t, err := ostree.ParseDirTree(b)
	if err != nil {
		return fmt.Errorf("object %s: %w", o, err)
	}
	return w.entries(ctx, dir, t, depth)
}

func (w *walker) entries(ctx context.Context, dir string, t *ostree.DirTree, depth int) error {
	for _, f := range t.Files {
		p := path.Join(dir, f.Name)
		if w.first(fileName(f.File)) {
			w.files = append(w.files, treeFile{p, f.File})
		}
		w.byPath[p] = f.File
	}
	for _, d := range t.Dirs {
		if err := w.directory(ctx, path.Join(dir, d.Name), d.Tree, d.Meta, depth+1); err != nil {
			return err
		}
	}
	return nil
}
