package oci

import (
	"context"
	"fmt"
	"io"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// ImportLayer brings one layer into the repository, which may be compressed, and returns the digest of its stream. It has to have
// the diff ID. Refs that lead to it keep it. A layer that is there is not read.
func ImportLayer(ctx context.Context, r *repo.Repo, layer io.Reader, diffID Digest, l Limits, lock repo.LockOptions, refs ...string) (fsverity.Digest, error) {
	i, err := r.Begin(ctx, lock)
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer i.Abort()
	d, err := present(r, diffID, LayerContent)
	if err != nil {
		return d, err
	}
	if d.IsZero() {
		s := newSplitter(i, l.orDefault())
		defer s.close()
		done, err := s.layer(ctx, layer, diffID)
		if err != nil {
			return d, fmt.Errorf("layer %s: %w", diffID, err)
		}
		d = done.stream
	}
	if err := i.NameStream(layerStream+string(diffID), d, refs...); err != nil {
		return d, err
	}
	return d, i.Commit()
}

func openLayer(r *repo.Repo, diffID Digest, contentType uint64) (*repo.Stream, fsverity.Digest, error) {
	d, err := r.StreamObject(layerStream + string(diffID))
	if err != nil {
		return nil, d, err
	}
	s, err := r.OpenStream(d, contentType)
	if err != nil {
		return nil, d, fmt.Errorf("layer %s: %w", diffID, err)
	}
	return s, d, nil
}

// WriteLayer writes a layer as it was, decompressed, or the blob of an artifact. Every object is verified before it is written, and
// in the end the whole.
func WriteLayer(w io.Writer, r *repo.Repo, diffID Digest) error {
	s, _, err := openLayer(r, diffID, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	h := diffID.newHash()
	if err := s.WriteTo(io.MultiWriter(w, h), r); err != nil {
		return fmt.Errorf("layer %s: %w", diffID, err)
	}
	if err := diffID.check(h); err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	return nil
}

// EachFile calls f for every entry of a layer, in order; path begins with a slash, and link is the path that a hard link leads
// to, "" for anything else. Whiteouts are files like others.
func EachFile(r *repo.Repo, diffID Digest, sink fstree.Sink, f func(path string, i *fstree.Inode, link string) error) error {
	s, _, err := openLayer(r, diffID, LayerContent)
	if err != nil {
		return err
	}
	defer s.Close()
	a, err := newArchive(s.Reader, r, sink, Limits{}.orDefault())
	if err != nil {
		return err
	}
	defer a.close()
	for {
		e, err := a.next()
		if err == io.EOF {
			return nil
		}
		link := ""
		if err == nil && e.isLink {
			link = "/" + e.link
			e.inode.Content = fstree.Inline(nil)
		}
		if err == nil {
			err = f("/"+e.path, &e.inode, link)
		}
		if err != nil {
			return fmt.Errorf("layer %s: %w", diffID, err)
		}
	}
}

// LayerInfo tells how a layer is kept. Sizes are in bytes.
type LayerInfo struct {
	DiffID  Digest
	Stream  fsverity.Digest
	Size    int64 // of the archive
	Entries int
	Objects int   // different ones
	Outside int64 // bytes of the archive that are objects
}

// Layer returns how a layer is kept.
func Layer(r *repo.Repo, diffID Digest, sink fstree.Sink) (LayerInfo, error) {
	s, d, err := openLayer(r, diffID, LayerContent)
	if err != nil {
		return LayerInfo{}, err
	}
	defer s.Close()
	info := LayerInfo{DiffID: diffID, Stream: d, Size: int64(s.Size), Objects: len(s.Objects)}
	err = EachFile(r, diffID, sink, func(_ string, i *fstree.Inode, _ string) error {
		info.Entries++
		if o, ok := i.Content.(*fstree.Object); ok {
			info.Outside += int64(o.Size)
		}
		return nil
	})
	return info, err
}
