package delta

import (
	"errors"
	"io"
)

// maxVarint is how many bytes a varint has at most. Ten hold 70 bits; those above 64 have to be zero, which ostree does not check.
const maxVarint = 10

var errVarint = errors.New("a number of more than 64 bits")

func readVarint(r io.ByteReader) (uint64, error) {
	var n uint64
	for i := range maxVarint {
		b, err := r.ReadByte()
		if err != nil {
			return 0, unexpected(err)
		}
		if i == maxVarint-1 && b > 1 {
			break
		}
		n |= uint64(b&0x7f) << (7 * i)
		if b < 0x80 {
			return n, nil
		}
	}
	return 0, errVarint
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
