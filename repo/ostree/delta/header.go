package delta

import (
	"bytes"
	"encoding/binary"
	"math/bits"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

const (
	headerType   = "(uuuusa(ayay))" // of a file object: uid, gid, mode, 0, target, extended attributes
	headerPrefix = 8                // bytes before it: its size, zeros
)

// makeHeader makes the header of a file object out of a mode and extended attributes, as they are in the tables of a part.
func makeHeader(owner gvariant.Value, target string, xattrs gvariant.Value) (*ostree.FileHeader, error) {
	members := gvariant.Tuple{nil, nil, nil, uint32(0), target, xattrs}
	for i := range 3 {
		v, err := owner.At(i)
		if err != nil {
			return nil, err
		}
		members[i] = v // big endian in both
	}
	v, err := gvariant.Encode(headerType, members)
	if err != nil {
		return nil, err
	}
	b := make([]byte, headerPrefix, headerPrefix+len(v.Bytes()))
	binary.BigEndian.PutUint32(b, uint32(len(v.Bytes())))
	return ostree.ReadFileHeader(bytes.NewReader(append(b, v.Bytes()...)))
}

// splitHeader is the inverse of makeHeader.
func splitHeader(h *ostree.FileHeader) (owner, xattrs gvariant.Value, err error) {
	b, err := h.Encode()
	if err != nil {
		return owner, xattrs, err
	}
	v, err := gvariant.New(headerType, b[headerPrefix:])
	if err != nil {
		return owner, xattrs, err
	}
	if xattrs, err = v.At(5); err != nil {
		return owner, xattrs, err
	}
	be := bits.ReverseBytes32
	owner, err = gvariant.Encode("(uuu)", gvariant.Tuple{be(h.UID), be(h.GID), be(h.Mode)})
	return owner, xattrs, err
}
