package delta

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// maxHeader limits the header of a file object, in bytes: extended attributes have 64 KiB each.
const maxHeader = 16 << 20

// Header is that of a file object.
type Header struct {
	UID, GID, Mode uint32
	Target         string         // of a symbolic link
	Xattrs         gvariant.Value // a(ayay)
}

// stream returns what the stream of the object begins with, in front of the content.
func (h Header) stream() ([]byte, error) {
	be := bits.ReverseBytes32 // gvariant writes little endian
	v, err := gvariant.Encode("(uuuusa(ayay))", gvariant.Tuple{be(h.UID), be(h.GID), be(h.Mode), uint32(0), h.Target, h.Xattrs})
	if err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint32(nil, uint32(len(v.Bytes())))
	return append(append(b, 0, 0, 0, 0), v.Bytes()...), nil
}

// readHeader reads what stream writes, and returns its size.
func readHeader(r io.Reader) (h Header, size int64, err error) {
	var head [8]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return h, 0, unexpected(err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxHeader {
		return h, 0, fmt.Errorf("%w: a header of %d bytes", errTooLarge, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return h, 0, unexpected(err)
	}
	v, err := gvariant.New("(uuuusa(ayay))", b)
	if err != nil {
		return h, 0, err
	}
	for i, n := range []*uint32{&h.UID, &h.GID, &h.Mode} {
		m, err := v.At(i)
		if err == nil {
			*n, err = m.BigUint32()
		}
		if err != nil {
			return h, 0, err
		}
	}
	target, err1 := v.At(4)
	xattrs, err2 := v.At(5)
	if err := errors.Join(err1, err2); err != nil {
		return h, 0, err
	}
	h.Xattrs = xattrs
	h.Target, err = target.String()
	return h, int64(len(head)) + int64(n), err
}
