package xz

import (
	"encoding/binary"
	"hash/crc32"
	"hash/crc64"
	"io"
)

// blockSize is how many bytes are packed into a block, which needs nothing of others: it bounds the memory that is needed, here and by
// whoever unpacks. It is the dictionary of "xz -8".
const blockSize = 32 << 20

// Compressor writes .xz files. It takes up to eleven times as many bytes of memory as are packed, of blocks of 32 MiB at most, and keeps them for
// the next file.
type Compressor struct {
	e            *encoder
	data, packed []byte
}

// Compress writes what r has, size bytes, as a .xz file: as small as "xz -8" makes it. The same content always makes the same bytes.
func (c *Compressor) Compress(w io.Writer, r io.Reader, size int64) error {
	if c.e == nil {
		c.e = &encoder{}
	}
	header := append([]byte(magic), 0, checkCRC64)
	header = binary.LittleEndian.AppendUint32(header, crc32.ChecksumIEEE(header[6:]))
	if _, err := w.Write(header); err != nil {
		return err
	}
	var index []byte
	blocks := uint64(0)
	for rest := size; rest > 0; {
		c.data = sized(c.data, int(min(rest, blockSize)))
		data := c.data
		rest -= int64(len(data))
		if _, err := io.ReadFull(r, data); err != nil {
			return unexpected(err)
		}
		n, err := c.block(w, data)
		if err != nil {
			return err
		}
		index = binary.AppendUvarint(index, uint64(n))
		index = binary.AppendUvarint(index, uint64(len(data)))
		blocks++
	}
	_, err := w.Write(ending(blocks, index))
	return err
}

// block writes a block, and returns its size without the padding.
func (c *Compressor) block(w io.Writer, data []byte) (int, error) {
	b := []byte{2, 0, 0x21, 1, dictionaryByte(len(data)), 0, 0, 0} // 12 bytes, one filter, LZMA2
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	c.packed = c.e.pack(append(c.packed[:0], b...), data)
	size := len(c.packed) + 8
	c.packed = append(c.packed, make([]byte, -len(c.packed)&3)...)
	c.packed = binary.LittleEndian.AppendUint64(c.packed, crc64.Checksum(data, crc64ECMA))
	_, err := w.Write(c.packed)
	return size, err
}

// dictionaryByte returns the smallest dictionary that holds so many bytes, as block headers have it.
func dictionaryByte(n int) byte {
	k := byte(0)
	for dictionarySize(k) < int64(n) {
		k++
	}
	return k
}

// ending returns what follows the blocks: the index with their sizes, and the footer.
func ending(blocks uint64, sizes []byte) []byte {
	b := append(binary.AppendUvarint([]byte{0}, blocks), sizes...)
	b = append(b, make([]byte, -len(b)&3)...)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
	footer := binary.LittleEndian.AppendUint32(nil, uint32(len(b)/4-1))
	footer = append(footer, 0, checkCRC64)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(footer))
	return append(append(b, footer...), "YZ"...)
}
