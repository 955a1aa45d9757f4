package erofs

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
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
	id     uint32
	name   string
	value  string
	own    bool // the value follows from the object of each inode, as no other inode has it
	length int  // of the value
	index  byte
	filter uint32 // the bit that the name has in the name filter of an inode
	count  uint32 // inodes that have it; more than one share it
	offset uint32 // in the table of shared attributes, in bytes
}

func (a *attr) suffix() string { return a.name[len(prefixes[a.index]):] }

func (a *attr) size() uint64 { return align(4+uint64(len(a.suffix())+a.length), 4) }

// appendTo appends the attribute as it is for an inode with this object, which is nil if it has none.
func (a *attr) appendTo(b []byte, o *fstree.Object) []byte {
	s := a.suffix()
	b = append(b, byte(len(s)), a.index)
	b = binary.LittleEndian.AppendUint16(b, uint16(a.length))
	b = append(b, s...)
	switch {
	case !a.own:
		b = append(b, a.value...)
	case a.name == xattrMetacopy:
		b = appendMetacopy(b, o.Digest)
	default:
		b = appendRedirect(b, o.Digest)
	}
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func appendMetacopy(b []byte, d fsverity.Digest) []byte {
	b = append(b, 0, byte(4+d.Algorithm().Size()), 0, byte(d.Algorithm()))
	b, _ = d.AppendBinary(b)
	return b
}

// appendRedirect appends the path of an object: /00/112233...
func appendRedirect(b []byte, d fsverity.Digest) []byte {
	b = append(b, '/', 0)
	start := len(b)
	b, _ = d.AppendText(b)
	b[start-1], b[start], b[start+1] = b[start], b[start+1], '/'
	return b
}

// attrSet is the attributes of an inode. Inodes with the same ones share it; what is own to each inode does not count.
type attrSet struct {
	attrs  []*attr // the references to shared ones before those that are written in full
	shared int     // how many are references
	size   uint32  // bytes in the inode
	filter uint32
	inodes uint32 // how many have it
}

func (s *attrSet) bytes() uint64 {
	if s == nil {
		return 0
	}
	return uint64(s.size)
}

// split puts references before what is written in full, and sums up.
func (s *attrSet) split(f Format) error {
	most := maxSharedV2
	if f != V2 {
		most = maxSharedV1
	}
	var refs, full []*attr
	size := uint64(xattrHeaderSize)
	s.filter = ^uint32(0)
	for _, a := range s.attrs {
		s.filter &^= a.filter
		if a.count > 1 && len(refs) < most {
			refs = append(refs, a)
			size += 4
		} else {
			full = append(full, a)
			size += a.size()
		}
	}
	if (size-xattrHeaderSize)/4+1 > math.MaxUint16 {
		return fmt.Errorf("%d bytes of extended attributes do not fit in an inode", size)
	}
	s.attrs, s.shared, s.size = append(refs, full...), len(refs), uint32(size)
	return nil
}

type attrKey struct{ name, value string }

type ownKey struct {
	name   string
	length int
}

// attrTable holds every attribute and every set of them once.
type attrTable struct {
	format Format
	attrs  map[attrKey]*attr
	own    map[ownKey]*attr
	sets   map[string]*attrSet // by the ids of their attributes
	list   []*attrSet
	key    []byte
}

func newAttrTable(f Format) *attrTable {
	return &attrTable{format: f, attrs: map[attrKey]*attr{}, own: map[ownKey]*attr{}, sets: map[string]*attrSet{}}
}

// use returns the attribute with this name and value.
func (t *attrTable) use(name, value string) (*attr, error) {
	a := t.attrs[attrKey{name, value}]
	if a != nil {
		return a, nil
	}
	a = &attr{id: uint32(len(t.attrs) + len(t.own)), name: name, value: value, length: len(value)}
	var suffix string
	a.index, suffix = splitName(name, t.format)
	if name == "" || len(suffix) > 255 {
		return nil, fmt.Errorf("xattr %.60q: a name of %d bytes does not fit in an image", name, len(name))
	}
	if len(value) > 65535 {
		return nil, fmt.Errorf("xattr %.60q: a value of %d bytes, at most 65535 fit", name, len(value))
	}
	a.filter = 1 << (xxh32(suffix, 0x25bbe08f+uint32(a.index)) % 32)
	t.attrs[attrKey{name, value}] = a
	return a, nil
}

// useOwn returns the attribute that leads to an object of its own. The value tells only how long it is.
func (t *attrTable) useOwn(name string, value []byte) (*attr, error) {
	key := ownKey{name, len(value)}
	if a := t.own[key]; a != nil {
		return a, nil
	}
	a, err := t.use(name, string(value))
	if err != nil {
		return nil, err
	}
	own := *a
	own.id, own.own, own.value = uint32(len(t.attrs)+len(t.own)), true, ""
	t.own[key] = &own
	return &own, nil
}

// set returns the set of these attributes.
func (t *attrTable) set(attrs []*attr) *attrSet {
	t.key = t.key[:0]
	for _, a := range attrs {
		t.key = binary.LittleEndian.AppendUint32(t.key, a.id)
	}
	s := t.sets[string(t.key)]
	if s == nil {
		s = &attrSet{attrs: slices.Clone(attrs)}
		t.sets[string(t.key)] = s
		t.list = append(t.list, s)
	}
	return s
}

// share returns the attributes that more than one inode has, in the order in which they are written, and gives them
// their offsets.
func (t *attrTable) share() (shared []*attr, size uint64) {
	for _, s := range t.list {
		for _, a := range s.attrs {
			if !a.own {
				a.count += s.inodes
			}
		}
	}
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
