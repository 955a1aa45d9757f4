package repo

import (
	"context"
	"io"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// findContent looks for wanted objects among the files below a directory, whatever their names are. Files of other sizes are
// not read, if the sizes are known.
func (p *repairPlan) findContent(ctx context.Context, dir string) error {
	s := sized{Sink: scan.Digests(p.r.Algorithm()), sizes: map[int64]bool{}}
	for _, w := range p.wanted {
		if w.source == "" {
			s.any = s.any || w.size < 0
			s.sizes[w.size] = true
		}
	}
	tree, err := scan.Dir(ctx, dir, s, scan.Options{NoXattrs: true, Mounts: true})
	if err != nil {
		return err
	}
	return tree.Walk(func(name string, i *fstree.Inode) error {
		if o, ok := i.Content.(*fstree.Object); ok && !o.Digest.IsZero() {
			p.found(o.Digest, dir+name)
		}
		return nil
	})
}

// sized is a sink that computes the digests of files of some sizes only.
type sized struct {
	fstree.Sink
	any   bool
	sizes map[int64]bool
}

func (s sized) Put(r io.Reader, size int64) (fsverity.Digest, error) {
	if !s.any && !s.sizes[size] {
		return fsverity.Digest{}, nil
	}
	return s.Sink.Put(r, size)
}
