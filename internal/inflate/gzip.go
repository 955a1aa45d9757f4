package inflate

import (
	"errors"
	"hash/crc32"
	"io"
)

// Errors of gzip files.
var (
	ErrHeader   = errors.New("not a gzip file")
	ErrChecksum = errors.New("the checksum differs")
)

// GzipReader decompresses a gzip file, of which several members in sequence are one content.
type GzipReader struct {
	z      Reader
	inside bool // a member
	first  bool // no member was read yet
	crc    uint32
	size   uint32
	err    error
}

// NewGzipReader returns a reader of a gzip file.
func NewGzipReader(r io.Reader) *GzipReader {
	g := &GzipReader{first: true}
	g.z.Reset(r)
	return g
}

// Read decompresses. At the end of the last member the error is io.EOF; what follows it, and is no member, is ErrHeader.
func (g *GzipReader) Read(p []byte) (int, error) {
	for g.err == nil {
		if !g.inside {
			if g.err = g.header(); g.err != nil {
				break
			}
			g.z.begin()
			g.inside, g.first, g.crc, g.size = true, false, 0, 0
		}
		n, err := g.z.Read(p)
		g.crc = crc32.Update(g.crc, crc32.IEEETable, p[:n])
		g.size += uint32(n)
		if err == io.EOF {
			g.inside = false
			err = g.trailer()
		}
		g.err = err
		if n > 0 || len(p) == 0 {
			return n, nil
		}
	}
	return 0, g.err
}

// trailer checks what stands behind the member (RFC 1952, 2.3.1).
func (g *GzipReader) trailer() error {
	crc, err := g.uint32()
	if err != nil {
		return err
	}
	size, err := g.uint32()
	if err == nil && (crc != g.crc || size != g.size) {
		err = ErrChecksum
	}
	return err
}

func (g *GzipReader) uint32() (uint32, error) {
	low, err := g.z.take(16)
	if err != nil {
		return 0, g.z.cause(err)
	}
	high, err := g.z.take(16)
	return uint32(high)<<16 | uint32(low), g.z.cause(err)
}

// header reads the header of a member (RFC 1952, 2.3). At the end of the file the error is io.EOF, unless no member was there.
func (g *GzipReader) header() error {
	const hasCRC, hasExtra, hasName, hasComment = 1 << 1, 1 << 2, 1 << 3, 1 << 4
	crc := uint32(0)
	var err error
	next := func() byte {
		v := 0
		if err == nil {
			v, err = g.z.take(8)
			crc = crc32.Update(crc, crc32.IEEETable, []byte{byte(v)})
		}
		return byte(v)
	}
	if err := g.z.need(8); err == io.ErrUnexpectedEOF && g.z.cause(err) == err && !g.first {
		return io.EOF
	}
	magic := [3]byte{next(), next(), next()}
	flags := next()
	for range 6 { // time, level, system
		next()
	}
	if err == nil && (magic != [3]byte{0x1f, 0x8b, 8} || flags&0xe0 != 0) {
		return ErrHeader
	}
	if flags&hasExtra != 0 {
		for range int(next()) | int(next())<<8 {
			next()
		}
	}
	for _, text := range [2]byte{hasName, hasComment} {
		for flags&text != 0 && err == nil && next() != 0 {
		}
	}
	if flags&hasCRC != 0 {
		want := uint16(crc)
		if have := uint16(next()) | uint16(next())<<8; err == nil && have != want {
			return ErrHeader
		}
	}
	return g.z.cause(err)
}
