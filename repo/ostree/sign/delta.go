package sign

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// deltaMagic begins a signed superblock, big endian: OSTSGNDT. A plain one begins with an offset, or a small dictionary.
const deltaMagic = 0x4F535453474E4454

// signedDelta is the type of a signed superblock: the magic number, the superblock, the dictionary of signatures.
const signedDelta = "(taya{sv})"

// Delta takes a superblock of a static delta apart: the superblock as it was signed, and its signatures. One that is not signed comes
// back as it is, without any.
func Delta(b []byte) (superblock []byte, s Signatures, err error) {
	if len(b) < 8 || binary.BigEndian.Uint64(b) != deltaMagic {
		return b, Signatures{}, nil
	}
	v, err := gvariant.New(signedDelta, b)
	if err != nil {
		return nil, nil, fmt.Errorf("signed superblock: %w", err)
	}
	block, err := v.At(1)
	if err != nil {
		return nil, nil, fmt.Errorf("signed superblock: %w", err)
	}
	dictionary, err := v.At(2)
	if err == nil {
		s, err = ParseValue(dictionary)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("signed superblock: %w", err)
	}
	return block.Bytes(), s, nil
}

// SignDelta signs a superblock.
func SignDelta(superblock []byte, signers ...Signer) ([]byte, error) {
	dictionary, err := Add(nil, superblock, signers...)
	if err != nil {
		return nil, err
	}
	v, err := gvariant.New("a{sv}", dictionary)
	if err != nil {
		return nil, err
	}
	magic := bits.ReverseBytes64(deltaMagic)
	out, err := gvariant.Encode(signedDelta, gvariant.Tuple{magic, superblock, v})
	return out.Bytes(), err
}
