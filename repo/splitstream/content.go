package splitstream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// ErrObject tells that an object comes next, and no inline bytes.
var ErrObject = errors.New("an object comes next")

// Content is the stream itself, from its beginning to its end: inline bytes and objects in turn.
type Content struct {
	s      *Reader
	z      *zstd.Decoder
	inline int64  // bytes that are left of a chunk
	object int64  // the number of the object that comes next, -1 if none does
	read   uint64 // inline bytes so far
}

// Content returns the stream from its beginning. Close frees what it holds.
func (s *Reader) Content() (*Content, error) {
	z, err := zstd.NewReader(io.NewSectionReader(s.r, s.stream.start, s.stream.end-s.stream.start),
		zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstd), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, fmt.Errorf("splitstream: %w", err)
	}
	return &Content{s: s, z: z, object: -1}, nil
}

// Close ends the reading.
func (c *Content) Close() { c.z.Close() }

// next reads the head of a chunk, if the last one is used up. The error is io.EOF at the end of the stream.
func (c *Content) next() error {
	if c.inline > 0 || c.object >= 0 {
		return nil
	}
	var head [8]byte
	if _, err := io.ReadFull(c.z, head[:]); err == io.EOF {
		return err
	} else if err != nil {
		return c.fail(err)
	}
	n := int64(binary.LittleEndian.Uint64(head[:]))
	switch {
	case n == math.MinInt64 || n < 0 && uint64(-n) > c.s.Size-c.read:
		return c.fail(fmt.Errorf("an inline chunk of %d bytes in a stream of %d", uint64(-n), c.s.Size))
	case n < 0:
		c.inline = -n
		c.read += uint64(-n)
	case n >= int64(len(c.s.Objects)):
		return c.fail(fmt.Errorf("object %d of %d", n, len(c.s.Objects)))
	default:
		c.object = n
	}
	return nil
}

func (c *Content) fail(err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("splitstream: chunk after %d inline bytes: %w", c.read, err)
}

// Read reads inline bytes. The error is ErrObject where an object comes next, and io.EOF at the end of the stream.
func (c *Content) Read(p []byte) (int, error) {
	if err := c.next(); err != nil {
		return 0, err
	}
	if c.object >= 0 {
		return 0, ErrObject
	}
	n, err := c.z.Read(p[:min(int64(len(p)), c.inline)])
	c.inline -= int64(n)
	if n > 0 {
		err = nil
	}
	if err != nil {
		err = c.fail(err)
	}
	return n, err
}

// Object returns the object that comes next, and goes on behind it. It is false, and nothing is passed, where inline bytes come
// next or the stream ends.
func (c *Content) Object() (d fsverity.Digest, ok bool, err error) {
	if err := c.next(); err != nil && err != io.EOF {
		return d, false, err
	}
	if c.object < 0 {
		return d, false, nil
	}
	d = c.s.Objects[c.object]
	c.object = -1
	return d, true, nil
}

// WriteTo writes what the stream is the split form of. It needs the content of the objects.
func (s *Reader) WriteTo(w io.Writer, open func(fsverity.Digest) (io.ReadCloser, error)) error {
	c, err := s.Content()
	if err != nil {
		return err
	}
	defer c.Close()
	var written uint64
	for written <= s.Size {
		d, ok, err := c.Object()
		if err != nil {
			return err
		}
		var n int64
		if ok {
			n, err = s.writeObject(w, d, open)
		} else if n, err = io.Copy(w, c); errors.Is(err, ErrObject) {
			err = nil
		} else if err == nil { // the end
			written += uint64(n)
			break
		}
		written += uint64(n)
		if err != nil {
			return fmt.Errorf("splitstream: at %d: %w", written, err)
		}
	}
	if written != s.Size {
		return fmt.Errorf("splitstream: %d bytes, but the info section says %d", written, s.Size)
	}
	return nil
}

func (s *Reader) writeObject(w io.Writer, d fsverity.Digest, open func(fsverity.Digest) (io.ReadCloser, error)) (int64, error) {
	f, err := open(d)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return io.Copy(w, f)
}
