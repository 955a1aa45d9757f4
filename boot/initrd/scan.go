package initrd

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Limits of an initramfs that is scanned.
const (
	maxName     = 4096    // bytes of a path
	maxEntries  = 1 << 20 // in all archives
	maxUnpacked = 4 << 30 // bytes in all archives
)

// ErrCompression tells of a part of an initramfs whose compression is not read.
var ErrCompression = errors.New("compressed in a way that is not read, want zstd, xz or gzip")

// Scan calls visit for every entry of an initramfs with its path, without a slash in front, its mode as in stat(2), and its
// content, which need not be read. It reads what the kernel unpacks: archives one after the other, with zeros between them,
// plain or compressed. A part that is compressed with xz or zstd is the last that is read, as their readers do not stop at its
// end; it is the last one of usual initramfs.
func Scan(r io.Reader, visit func(path string, mode uint32, content io.Reader) error) error {
	s := &scanner{visit: visit}
	in := &offsetReader{r: bufio.NewReaderSize(r, 64<<10)}
	for {
		ending, err := in.next()
		if err == io.EOF {
			return nil
		}
		where := in.n
		if err == nil {
			err = s.part(in, ending)
		}
		if err != nil {
			return fmt.Errorf("initramfs: offset %d: %w", where, err)
		}
		if ending == ".xz" || ending == ".zst" {
			return nil
		}
	}
}

// scanner counts what has been unpacked.
type scanner struct {
	visit   func(string, uint32, io.Reader) error
	entries int
}

// part reads archives up to the end of a compressed part, or one plain archive.
func (s *scanner) part(in *offsetReader, ending string) error {
	if ending == "" {
		return s.archive(in)
	}
	d, err := decompressor(in, ending)
	if err != nil {
		return err
	}
	defer d.Close()
	if g, ok := d.(interface{ Multistream(bool) }); ok {
		g.Multistream(false) // what follows may be a plain archive
	}
	unpacked := &offsetReader{r: bufio.NewReaderSize(io.LimitReader(d, maxUnpacked), 64<<10)}
	for {
		switch inner, err := unpacked.next(); {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		case inner != "":
			return fmt.Errorf("compressed twice")
		}
		if err := s.archive(unpacked); err != nil {
			return err
		}
	}
}

// archive reads a newc archive up to its trailer.
func (s *scanner) archive(r *offsetReader) error {
	for {
		header := make([]byte, headerSize)
		if _, err := io.ReadFull(r, header); err != nil {
			return fmt.Errorf("header of an entry: %w", err)
		}
		if magic := string(header[:6]); magic != "070701" && magic != "070702" {
			return fmt.Errorf("%q: no header of a newc archive", magic)
		}
		field := func(k int) (int64, error) { // of 13 numbers
			n, err := strconv.ParseUint(string(header[6+8*k:14+8*k]), 16, 32)
			return int64(n), err
		}
		mode, err1 := field(1)
		size, err2 := field(6)
		length, err3 := field(11)
		if err := errors.Join(err1, err2, err3); err != nil {
			return fmt.Errorf("header of an entry: %q: no number", header)
		}
		if length < 1 || length > maxName {
			return fmt.Errorf("name of %d bytes: want 1 to %d", length, maxName)
		}
		name := make([]byte, (headerSize+length+3)/4*4-headerSize)
		if _, err := io.ReadFull(r, name); err != nil {
			return fmt.Errorf("name of an entry: %w", err)
		}
		name, _, _ = bytes.Cut(name[:length], []byte{0})
		if string(name) == "TRAILER!!!" {
			return nil
		}
		if s.entries++; s.entries > maxEntries {
			return fmt.Errorf("more than %d entries", maxEntries)
		}
		content := &io.LimitedReader{R: r, N: size}
		path := strings.TrimPrefix(strings.TrimPrefix(string(name), "."), "/")
		if err := s.visit(path, uint32(mode), content); err != nil {
			return err
		}
		rest := content.N + (4-size%4)%4
		if n, err := io.CopyN(io.Discard, r, rest); n < rest {
			return fmt.Errorf("%.100q: %d bytes of its content are missing: %w", path, rest-n, err)
		}
	}
}

// offsetReader counts the bytes that were read. It reads single bytes, too, so that gzip reads no further than its end.
type offsetReader struct {
	r *bufio.Reader
	n int64
}

func (o *offsetReader) Read(b []byte) (int, error) {
	n, err := o.r.Read(b)
	o.n += int64(n)
	return n, err
}

func (o *offsetReader) ReadByte() (byte, error) {
	b, err := o.r.ReadByte()
	if err == nil {
		o.n++
	}
	return b, err
}

// next skips zeros and tells how the next part is compressed: as the ending of a file name, "" if it is not.
func (o *offsetReader) next() (ending string, err error) {
	for {
		b, err := o.r.Peek(1)
		if err != nil {
			return "", err
		}
		if b[0] != 0 {
			break
		}
		o.ReadByte()
	}
	b, err := o.r.Peek(6)
	if err != nil && err != io.EOF {
		return "", err
	}
	for magic, ending := range map[string]string{"07070": "", "\x1f\x8b": ".gz", "\x28\xb5\x2f\xfd": ".zst", "\xfd7zXZ\x00": ".xz"} {
		if strings.HasPrefix(string(b), magic) {
			return ending, nil
		}
	}
	return "", ErrCompression
}
