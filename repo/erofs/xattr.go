package erofs

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"strings"
)

// prefixes are the parts of attribute names that are stored as a number. 5 is "lustre.", which the C tools do not use.
var prefixes = [...]string{1: "user.", 2: xattrACLAccess, 3: xattrACLDefault, 4: "trusted.", 5: "lustre.", 6: "security."}

// splitName cuts an attribute's name into the number of its prefix and the rest. Prefix 0 is the empty one.
func splitName(name string, f Format) (index byte, suffix string) {
	for i := len(prefixes) - 1; i > 0; i-- {
		if i == 5 && f != V2 {
			continue
		}
		if rest, ok := strings.CutPrefix(name, prefixes[i]); ok {
			return byte(i), rest
		}
	}
	return 0, name
}

// attr is an extended attribute as it is written. All inodes that have the same attribute, name and value, refer to one
// attr.
type attr struct {
	name   string
	value  string
	index  byte
	count  uint32 // inodes that have it; more than one share it
	offset uint32 // in the table of shared attributes, in bytes
}

func (a *attr) suffix() string { return a.name[len(prefixes[a.index]):] }

func (a *attr) size() uint64 { return align(4+uint64(len(a.suffix())+len(a.value)), 4) }

func (a *attr) appendTo(b []byte) []byte {
	s := a.suffix()
	b = append(b, byte(len(s)), a.index)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(a.value)))
	b = append(b, s...)
	b = append(b, a.value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// filterBit returns the bit that an attribute's name has in the name filter of its inode.
func (a *attr) filterBit() uint32 {
	return 1 << (xxh32(a.suffix(), 0x25bbe08f+uint32(a.index)) % 32)
}

type attrKey struct{ name, value string }

// attrTable holds every attribute of an image once.
type attrTable struct {
	format Format
	attrs  map[attrKey]*attr
}

func newAttrTable(f Format) *attrTable {
	return &attrTable{format: f, attrs: map[attrKey]*attr{}}
}

// use returns the attribute for one more inode that has it.
func (t *attrTable) use(name, value string) (*attr, error) {
	key := attrKey{name, value}
	a := t.attrs[key]
	if a == nil {
		a = &attr{name: name, value: value}
		var suffix string
		a.index, suffix = splitName(name, t.format)
		if name == "" || len(suffix) > 255 {
			return nil, fmt.Errorf("xattr %.60q: a name of %d bytes does not fit in an image", name, len(name))
		}
		if len(value) > 65535 {
			return nil, fmt.Errorf("xattr %.60q: a value of %d bytes, at most 65535 fit", name, len(value))
		}
		t.attrs[key] = a
	}
	a.count++
	return a, nil
}

// share returns the attributes that more than one inode has, in the order in which they are written, and gives them
// their offsets.
func (t *attrTable) share() (shared []*attr, size uint64) {
	for _, a := range t.attrs {
		if a.count > 1 {
			shared = append(shared, a)
		}
	}
	slices.SortFunc(shared, func(a, b *attr) int {
		if t.format == V2 {
			return cmp.Or(cmp.Compare(a.index, b.index), strings.Compare(a.suffix(), b.suffix()),
				strings.Compare(a.value, b.value))
		}
		return -cmp.Or(strings.Compare(a.name, b.name), cmp.Compare(len(a.value), len(b.value)),
			strings.Compare(a.value, b.value))
	})
	for _, a := range shared {
		a.offset = uint32(size)
		size += a.size()
	}
	return shared, size
}

// xxh32 is the 32-bit xxHash, with which EROFS makes its name filter: github.com/Cyan4973/xxHash,
// doc/xxhash_spec.md.
func xxh32(s string, seed uint32) uint32 {
	const (
		p1 = 0x9e3779b1
		p2 = 0x85ebca77
		p3 = 0xc2b2ae3d
		p4 = 0x27d4eb2f
		p5 = 0x165667b1
	)
	word := func(k int) uint32 {
		return uint32(s[k]) | uint32(s[k+1])<<8 | uint32(s[k+2])<<16 | uint32(s[k+3])<<24
	}
	h, k := seed+p5, 0
	if len(s) >= 16 {
		lanes := [4]uint32{seed, seed, seed, seed}
		lanes[0] += p1
		lanes[0] += p2
		lanes[1] += p2
		lanes[3] -= p1
		for ; k+16 <= len(s); k += 16 {
			for l := range lanes {
				lanes[l] = bits.RotateLeft32(lanes[l]+word(k+4*l)*p2, 13) * p1
			}
		}
		h = bits.RotateLeft32(lanes[0], 1) + bits.RotateLeft32(lanes[1], 7) +
			bits.RotateLeft32(lanes[2], 12) + bits.RotateLeft32(lanes[3], 18)
	}
	h += uint32(len(s))
	for ; k+4 <= len(s); k += 4 {
		h = bits.RotateLeft32(h+word(k)*p3, 17) * p4
	}
	for ; k < len(s); k++ {
		h = bits.RotateLeft32(h+uint32(s[k])*p5, 11) * p1
	}
	h = (h ^ h>>15) * p2
	h = (h ^ h>>13) * p3
	return h ^ h>>16
}
