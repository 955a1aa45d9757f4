// Package xz reads and writes .xz files, in which the parts of OSTree's static deltas are compressed.
//
// A file (xz-file-format.txt of the XZ Utils; numbers are little endian) is
//
//	header     FD "7zXZ" 0, 0, type of the check, CRC32 of both
//	block      header: its size in words less 1, flags, sizes if flags have 0x40 or 0x80, filters, zeros, CRC32; LZMA2 data; zeros to a
//	           multiple of 4; the check of what is in it
//	index      0, how many blocks; of each the size without zeros, and unpacked; zeros, CRC32
//	footer     CRC32, size of the index in words less 1, 0, type of the check, "YZ"
//
// lzma2.go has the format of the data, and unpacks them; model.go what LZMA is. They are packed in three steps: matches.go finds what was
// there before, planner.go chooses the symbols that cost least, with the prices of prices.go, and encoder.go codes them. That is the way of
// the XZ Utils, and as small.
package xz

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
)

// maxDictionary limits the memory that a block asks for, in bytes: it is that of "xz -9". ostree writes 32 MiB.
const maxDictionary = 64 << 20

var errXZ = errors.New("no .xz stream, or one that is damaged")

var crc64ECMA = crc64.MakeTable(crc64.ECMA)

const (
	magic      = "\xfd7zXZ\x00"
	checkCRC64 = 4
)

// checkSize has the size of the check behind each block, by its type.
var checkSize = [16]int64{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}

// Reader reads what one .xz stream contains, and wants nothing to follow.
type Reader struct {
	r      *counter
	check  byte
	blocks uint64

	block io.Reader // nil between blocks
	start int64     // of the block
	sum   hash.Hash // of the block, nil if the check is not known
	err   error
}

// counter counts the bytes that were read.
type counter struct {
	*bufio.Reader
	n int64
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n += int64(n)
	return n, err
}

func (c *counter) ReadByte() (byte, error) {
	b, err := c.Reader.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

// NewReader begins to read.
func NewReader(r io.Reader) (*Reader, error) {
	x := &Reader{r: &counter{Reader: bufio.NewReaderSize(r, 64<<10)}}
	var b [12]byte
	if _, err := io.ReadFull(x.r, b[:]); err != nil {
		return nil, unexpected(err)
	}
	if string(b[:6]) != magic || b[6] != 0 || b[7] > 15 || crc32.ChecksumIEEE(b[6:8]) != binary.LittleEndian.Uint32(b[8:]) {
		return nil, errXZ
	}
	x.check = b[7]
	return x, nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (x *Reader) Read(b []byte) (int, error) {
	for x.err == nil {
		if x.block == nil {
			x.err = x.nextBlock()
			continue
		}
		n, err := x.block.Read(b)
		if x.sum != nil {
			x.sum.Write(b[:n])
		}
		if err == io.EOF {
			err = x.endBlock()
		}
		x.err = err
		if n > 0 || len(b) == 0 {
			return n, nil
		}
	}
	return 0, x.err
}

// nextBlock reads the header of a block, or the index.
func (x *Reader) nextBlock() error {
	size, err := x.r.ReadByte()
	if err != nil {
		return unexpected(err)
	}
	if size == 0 {
		return x.end()
	}
	x.start = x.r.n - 1
	header := make([]byte, (int(size)+1)*4)
	header[0] = size
	if _, err := io.ReadFull(x.r, header[1:]); err != nil {
		return unexpected(err)
	}
	header, sum := header[:len(header)-4], header[len(header)-4:]
	if crc32.ChecksumIEEE(header) != binary.LittleEndian.Uint32(sum) {
		return errXZ
	}
	flags := header[1]
	fields := bytes.NewReader(header[2:])
	for _, present := range []byte{0x40, 0x80} { // compressed and uncompressed size: nobody needs to know
		if flags&present != 0 {
			if _, err := binary.ReadUvarint(fields); err != nil {
				return errXZ
			}
		}
	}
	var filter [3]byte
	fields.Read(filter[:])
	if flags&0x3f != 0 || filter[0] != 0x21 || filter[1] != 1 {
		return errors.New("a .xz stream with other filters than LZMA2")
	}
	if filter[2] > 40 {
		return errXZ
	}
	dictionary := dictionarySize(filter[2])
	if dictionary > maxDictionary {
		return fmt.Errorf("a .xz stream that needs %d bytes of memory: at most %d are given", dictionary, maxDictionary)
	}
	x.blocks++
	x.sum = nil
	switch x.check {
	case 1:
		x.sum = crc32.NewIEEE()
	case checkCRC64:
		x.sum = crc64.New(crc64ECMA)
	}
	x.block = newLZMA2(x.r, int(dictionary))
	return nil
}

// dictionarySize has two bits of mantissa and an exponent; 40 is 4 GiB - 1.
func dictionarySize(b byte) int64 { return int64(2|b&1)<<(b/2+11) - int64(b/40) }

// endBlock reads what follows the data of a block.
func (x *Reader) endBlock() error {
	x.block = nil
	b := make([]byte, 3+64)
	padding := b[:-(x.r.n-x.start)&3]
	check := b[3:][:checkSize[x.check]]
	for _, b := range [][]byte{padding, check} {
		if _, err := io.ReadFull(x.r, b); err != nil {
			return unexpected(err)
		}
	}
	switch sum := x.sum.(type) {
	case hash.Hash32:
		if sum.Sum32() != binary.LittleEndian.Uint32(check) {
			return errXZ
		}
	case hash.Hash64:
		if sum.Sum64() != binary.LittleEndian.Uint64(check) {
			return errXZ
		}
	}
	if len(bytes.Trim(padding, "\x00")) > 0 {
		return errXZ
	}
	return nil
}

// end reads the index and the footer, and returns io.EOF. What the index says of the blocks is known.
func (x *Reader) end() error {
	start := x.r.n - 1
	blocks, err := binary.ReadUvarint(x.r)
	if err != nil || blocks != x.blocks {
		return errXZ
	}
	for range 2 * blocks {
		if _, err := binary.ReadUvarint(x.r); err != nil {
			return errXZ
		}
	}
	rest := make([]byte, -(x.r.n-start)&3+4+12)
	if _, err := io.ReadFull(x.r, rest); err != nil {
		return unexpected(err)
	}
	index := (x.r.n - 12 - start) / 4 // words
	footer := rest[len(rest)-12:]
	if crc32.ChecksumIEEE(footer[4:10]) != binary.LittleEndian.Uint32(footer) || int64(binary.LittleEndian.Uint32(footer[4:]))+1 != index ||
		footer[8] != 0 || footer[9] != x.check || string(footer[10:]) != "YZ" {
		return errXZ
	}
	if _, err := x.r.ReadByte(); err != io.EOF {
		return errors.New("bytes behind the .xz stream")
	}
	return io.EOF
}
