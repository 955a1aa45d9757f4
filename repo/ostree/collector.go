package ostree

import (
	"fmt"
	"io"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Collector takes objects of a commit that come in another way than one by one, and gives those that are here already. It may be used
// from several goroutines. What the commit does not need does no harm.
type Collector struct {
	f  *fetcher
	to *Objects
}

// Has reports whether an object is here: it was put, an earlier pull has brought it, or another commit has it.
func (c *Collector) Has(sum Checksum) bool {
	_, ok := c.f.find(sum)
	return ok
}

// Metadata returns a dirtree or dirmeta that is here. The error is ErrNotFound if it is not.
func (c *Collector) Metadata(n ObjectName) ([]byte, error) {
	e, ok := c.f.find(n.Checksum)
	if !ok {
		return nil, fmt.Errorf("object %v: %w", n, ErrNotFound)
	}
	return e.metadata(n)
}

// File opens a content object that is here. The error is ErrNotFound if it is not.
func (c *Collector) File(sum Checksum) (*File, error) {
	e, ok := c.f.find(sum)
	if !ok {
		return nil, fmt.Errorf("object %v: %w", ObjectName{sum, KindFile}, ErrNotFound)
	}
	return e.open(c.f.p.r, sum)
}

// PutMetadata takes a dirtree or dirmeta, and checks it.
func (c *Collector) PutMetadata(n ObjectName, data []byte) error {
	if n.Kind != KindDirTree && n.Kind != KindDirMeta {
		return fmt.Errorf("object %v: want a dirtree or dirmeta", n)
	}
	if err := n.Verify(data); err != nil {
		return err
	}
	c.put(n, entry{data: data}, 0)
	return nil
}

// PutFile takes a content object, and checks it. The content is read to its end.
func (c *Collector) PutFile(sum Checksum, h *FileHeader, content io.Reader) error {
	n := ObjectName{sum, KindFile}
	err := h.check()
	if err == nil {
		err = c.putFile(n, h, content)
	}
	if err != nil {
		return fmt.Errorf("object %v: %w", n, err)
	}
	return nil
}

func (c *Collector) putFile(n ObjectName, h *FileHeader, content io.Reader) error {
	sum, err := h.NewHash()
	if err != nil {
		return err
	}
	r := io.TeeReader(io.LimitReader(content, h.Size+1), sum)
	var inline []byte
	var d fsverity.Digest
	if h.Size > maxInline(c.to.alg) {
		d, err = c.f.p.i.Put(r, h.Size)
	} else if inline, err = io.ReadAll(r); err == nil && int64(len(inline)) != h.Size {
		err = fmt.Errorf("the content is not of %d bytes", h.Size)
	}
	if err != nil {
		return err
	}
	if got := Checksum(sum.Sum(nil)); got != n.Checksum {
		return fmt.Errorf("%w: %v", ErrChecksum, got)
	}
	e, err := newEntry(h, inline, d)
	if err != nil {
		return err
	}
	c.put(n, e, h.Size)
	return c.f.save()
}

func (c *Collector) put(n ObjectName, e entry, size int64) {
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	c.to.entries[n.Checksum] = e
	c.f.brought(n, e, size)
}
