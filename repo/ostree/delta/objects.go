package delta

import (
	"context"
	"fmt"
	"hash"
	"io"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// A delta of a damaged repository would be of no use to anybody: what goes into it is checked.

func fileName(sum ostree.Checksum) ostree.ObjectName {
	return ostree.ObjectName{Checksum: sum, Kind: ostree.KindFile}
}

// metadata returns a metadata object, which is checked.
func metadata(ctx context.Context, from ostree.Source, o ostree.ObjectName) ([]byte, error) {
	b, err := from.Metadata(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("object %s: %w", o, err)
	}
	return b, o.Verify(b)
}

// opened is a file object. Its content has its checksum, or reading it fails at the end.
type opened struct {
	*ostree.File
	sum     ostree.Checksum
	content io.Reader
	hash    hash.Hash
}

func openFile(ctx context.Context, from ostree.Source, sum ostree.Checksum) (*opened, error) {
	f, err := from.File(ctx, sum)
	if err != nil {
		return nil, fmt.Errorf("object %s: %w", fileName(sum), err)
	}
	o := &opened{File: f, sum: sum, content: io.LimitReader(inflated(f), f.Size+1)}
	if o.hash, err = f.NewHash(); err != nil {
		f.Content.Close()
		return nil, fmt.Errorf("object %s: %w", fileName(sum), err)
	}
	return o, nil
}

func (o *opened) Close() error { return o.Content.Close() }

func (o *opened) Read(b []byte) (int, error) {
	n, err := o.content.Read(b)
	o.hash.Write(b[:n])
	if err == io.EOF {
		if is := ostree.Checksum(o.hash.Sum(nil)); is != o.sum {
			err = fmt.Errorf("object %s: %w: %v", fileName(o.sum), ostree.ErrChecksum, is)
		}
	}
	return n, err
}
