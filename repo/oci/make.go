package oci

import (
	"context"
	"fmt"
	"slices"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// lacking returns the composefs images that are not there yet: plain ones, and bootable ones if they are asked for.
func (p *pull) lacking(image *Image) ([]LinkedImage, error) {
	if !image.Manifest.IsImage() {
		return nil, nil
	}
	want := make([]LinkedImage, 0, 2*len(p.o.Formats))
	for _, f := range p.o.Formats {
		want = append(want, LinkedImage{Format: f})
	}
	if p.o.Transform != nil && p.o.Expected.IsZero() {
		for _, f := range p.o.Formats {
			want = append(want, LinkedImage{Format: f, Bootable: true})
		}
	}
	var missing []LinkedImage
	for _, l := range want {
		d, ok := image.Find(l.Bootable, l.Format, l.Xattrs)
		if ok {
			f, _, err := p.r.OpenImage(d.String())
			if err != nil && !lost(err) {
				return nil, err
			}
			if ok = err == nil; ok {
				f.Close()
			}
		}
		if !ok {
			missing = append(missing, l)
		}
	}
	return missing, nil
}

// tree makes the tree of which images are made that keep these extended attributes.
func (p *pull) tree(ctx context.Context, image *Image, mode fstree.XattrMode) (*fstree.Tree, error) {
	// The layers and their objects can be read when they have names.
	if err := p.i.Checkpoint(); err != nil {
		return nil, err
	}
	tree, err := image.Tree(ctx, p.r, p.i, p.o.Limits)
	if err == nil {
		err = tree.MakeContainerRoot(mode)
	}
	return tree, err
}

func (p *pull) transform(tree *fstree.Tree) error {
	if err := p.i.Checkpoint(); err != nil { // files with holes
		return err
	}
	return p.o.Transform(tree, Files(p.r))
}

// make makes images of a tree, the bootable ones last.
func (p *pull) make(image *Image, tree *fstree.Tree, list []LinkedImage) error {
	transformed := false
	var err error
	for _, l := range list {
		if l.Bootable && !transformed {
			if err := p.transform(tree); err != nil {
				return err
			}
			transformed = true
		}
		if l.Digest, err = p.i.PutImage(tree, l.Format, ""); err != nil {
			return err
		}
		image.link(l)
	}
	return nil
}

// search makes the image to boot that has the expected digest.
func (p *pull) search(ctx context.Context, image *Image) error {
	tried := 0
	for _, mode := range []fstree.XattrMode{fstree.XattrsAllowlist, fstree.XattrsKeepUser} {
		tree, err := p.tree(ctx, image, mode)
		if err == nil {
			err = p.transform(tree)
		}
		if err != nil {
			return err
		}
		for _, f := range []erofs.Format{erofs.V1, erofs.V2} {
			digester := fsverity.NewDigester(p.r.Algorithm())
			if err := erofs.Write(digester, tree, f); err != nil {
				return err
			}
			tried++
			if digester.Sum() != p.o.Expected {
				continue
			}
			d, err := p.i.PutImage(tree, f, "")
			if err != nil {
				return err
			}
			image.link(LinkedImage{Digest: d, Bootable: true, Format: f, Xattrs: mode})
			return nil
		}
	}
	return fmt.Errorf("no image to boot has the expected digest %v: %d ways to make it were tried", p.o.Expected, tried)
}

// link adds a composefs image, or replaces the one of its kind.
func (i *Image) link(l LinkedImage) {
	i.Linked = slices.DeleteFunc(slices.Clone(i.Linked), func(have LinkedImage) bool { return have.key() == l.key() })
	i.Linked = append(i.Linked, l)
	slices.SortFunc(i.Linked, LinkedImage.compare)
}
