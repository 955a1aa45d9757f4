package oci

import (
	"context"
	"fmt"
	"io"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// growing is the tree of an image that grows while its layers come, each when it and those below it are there.
type growing struct {
	there []chan struct{} // closed by who has set the stream of the layer
	done  chan struct{}
	stop  context.CancelFunc
	m     *merged
	err   error
}

// grow begins to make the tree of an image. The layers are read as the import has them, before they are durable.
func (p *pull) grow(ctx context.Context, image *Image) *growing {
	g := &growing{there: make([]chan struct{}, len(image.Manifest.Layers)), done: make(chan struct{}), m: newMerged()}
	for k := range g.there {
		g.there[k] = make(chan struct{})
	}
	ctx, g.stop = context.WithCancel(ctx)
	go func() {
		defer close(g.done)
		for k, there := range g.there {
			select {
			case <-there:
				g.err = g.m.stream(p.i, image.Layers[k], counted{p.i, p}, p.o.Limits)
			case <-ctx.Done():
				g.err = ctx.Err()
			}
			if g.err != nil {
				g.err = fmt.Errorf("layer %s: %w", image.layerIDs()[k], g.err)
				return
			}
		}
	}()
	return g
}

// has tells that a layer is there.
func (g *growing) has(k int) {
	if g != nil {
		close(g.there[k])
	}
}

// wait waits until all layers are in it, or one cannot be.
func (g *growing) wait() {
	if g != nil {
		<-g.done
	}
}

// end ends it, complete or not.
func (g *growing) end() {
	if g != nil {
		g.stop()
		g.wait()
	}
}

// counted counts files with holes, which are objects of no layer.
type counted struct {
	*repo.Import
	p *pull
}

func (c counted) Put(r io.Reader, size int64) (fsverity.Digest, error) {
	c.p.mu.Lock()
	c.p.stats.Reused++ // see count
	c.p.mu.Unlock()
	return c.Import.Put(r, size)
}

// tree returns the tree that has grown, as tree below does.
func (g *growing) tree() (*fstree.Tree, error) {
	if g.err != nil {
		return nil, g.err
	}
	tree := g.m.tree()
	return tree, tree.MakeContainerRoot(fstree.XattrsAllowlist)
}
