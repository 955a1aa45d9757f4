package delta

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"strconv"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

const (
	// maxMetadata limits a commit, and what a superblock has beside its parts, in bytes.
	maxMetadata = ostree.MaxMetadata
	signedMagic = "OSTSGNDT"
	objectSize  = 1 + 32
)

// Delta is an open delta.
type Delta struct {
	Name
	Time       uint64 // when it was made, in seconds since 1970
	Commit     []byte // the commit object of To, whose checksum is right
	CommitMeta []byte // its detached metadata, an a{sv}; nil if there is none
	Parts      []Part
	Fallbacks  []Fallback
	Order      ByteOrder
	// Signed has the bytes that were signed, and Signatures what package sign reads, an a{sv}. They are nil if there are none. Who wants
	// them right verifies them: nothing here does.
	Signed     *io.SectionReader
	Signatures []byte
}

// Part is the entry of a part in the superblock.
type Part struct {
	Checksum ostree.Checksum
	Size     uint64 // of the part, in bytes
	Makes    uint64 // size of the files and metadata objects that it makes, in bytes, without symbolic links
	Objects  []ostree.ObjectName

	inline *io.SectionReader // nil if it is a file of its own
}

// Inline says that the part is inside of the superblock.
func (p Part) Inline() bool { return p.inline != nil }

// Fallback is an object that has to be fetched by itself.
type Fallback struct {
	ostree.ObjectName
	Size     uint64 // of the object as it is in the repository of who made the delta, in bytes
	FileSize uint64 // of its content
}

// ByteOrder tells how the sizes in a superblock are written.
type ByteOrder byte

// The orders of bytes. Deltas of before 2016 do not tell theirs.
const (
	UnknownOrder ByteOrder = 0
	LittleEndian ByteOrder = 'l'
	BigEndian    ByteOrder = 'B'
)

// Open reads a superblock, signed or not, and checks that the commit in it is what it says. The reader is used as long as the delta is.
func Open(r io.ReaderAt, size int64) (*Delta, error) {
	d, err := open(io.NewSectionReader(r, 0, size))
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("delta: superblock: %w", err)
	}
	return d, nil
}

func open(r *io.SectionReader) (*Delta, error) {
	var d Delta
	var magic [len(signedMagic)]byte
	if n, err := r.ReadAt(magic[:], 0); err != nil && err != io.EOF {
		return nil, err
	} else if string(magic[:n]) == signedMagic {
		var err error
		if r, err = d.unwrap(r); err != nil {
			return nil, fmt.Errorf("signed: %w", err)
		}
	}
	ends, limit, err := tuple(r, 6)
	if err != nil {
		return nil, err
	}
	// Where the members start.
	metadata, time, from, to, commit, before, parts, fallbacks := int64(0), align8(ends[0]), align8(ends[0])+8, ends[1], align8(ends[2]), ends[3], align8(ends[4]), align8(ends[5])
	b, err := load(r, time, from, 8)
	if err != nil {
		return nil, err
	}
	d.Time = binary.BigEndian.Uint64(b)
	if err := loadChecksum(&d.From, r, from, ends[1], true); err != nil {
		return nil, fmt.Errorf("checksum of the source: %w", err)
	}
	if err := loadChecksum(&d.To, r, to, ends[2], false); err != nil {
		return nil, fmt.Errorf("checksum of the target: %w", err)
	}
	if d.Commit, err = load(r, commit, ends[3], maxMetadata); err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	if sum := ostree.Checksum(sha256.Sum256(d.Commit)); sum != d.To {
		return nil, fmt.Errorf("commit %s: its checksum is %s", d.To, sum)
	}
	if b, err = load(r, before, ends[4], maxMetadata); err != nil {
		return nil, err
	} else if len(b) > 0 {
		return nil, errors.New("it wants other deltas applied before, which no one does")
	}
	if b, err = load(r, parts, ends[5], maxMetadata); err == nil {
		err = d.readParts(b)
	}
	if err != nil {
		return nil, fmt.Errorf("parts: %w", err)
	}
	if b, err = load(r, fallbacks, limit, maxMetadata); err == nil {
		err = d.readFallbacks(b)
	}
	if err != nil {
		return nil, fmt.Errorf("fallbacks: %w", err)
	}
	if r, err = part(r, metadata, ends[0]); err == nil {
		err = d.readMetadata(r)
	}
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	d.swap()
	return &d, nil
}

// unwrap returns the superblock inside of a signed one.
func (d *Delta) unwrap(r *io.SectionReader) (*io.SectionReader, error) {
	ends, limit, err := tuple(r, 1)
	if err != nil {
		return nil, err
	}
	if d.Signatures, err = load(r, align8(ends[0]), limit, maxMetadata); err != nil {
		return nil, err
	}
	d.Signed, err = part(r, int64(len(signedMagic)), ends[0])
	return d.Signed, err
}

func loadChecksum(sum *ostree.Checksum, r *io.SectionReader, from, to int64, empty bool) error {
	b, err := load(r, from, to, maxKey)
	if err == nil && len(b) != len(sum) && !(empty && len(b) == 0) {
		err = fmt.Errorf("%d bytes, want %d", len(b), len(sum))
	}
	copy(sum[:], b)
	return err
}

func (d *Delta) readParts(b []byte) error {
	list, err := gvariant.New("a(uayttay)", b)
	if err != nil {
		return err
	}
	if err := list.Check(); err != nil {
		return err
	}
	n, err := list.Len()
	if err != nil {
		return err
	}
	for i := range n {
		p, err := readPart(list, i)
		if err != nil {
			return fmt.Errorf("part %d: %w", i, err)
		}
		d.Parts = append(d.Parts, p)
	}
	return nil
}

func readPart(list gvariant.Value, i int) (p Part, err error) {
	f := member(list, i)
	version := f.uint32(0)
	sum := f.bytes(1)
	p.Size, p.Makes = f.uint64(2), f.uint64(3)
	objects := f.bytes(4)
	switch {
	case f.err != nil:
		return p, f.err
	case version != 0:
		return p, fmt.Errorf("version %d: only 0 is known", version)
	case len(sum) != len(p.Checksum):
		return p, fmt.Errorf("a checksum of %d bytes", len(sum))
	case len(objects)%objectSize != 0:
		return p, fmt.Errorf("a list of objects of %d bytes, no multiple of %d", len(objects), objectSize)
	}
	p.Checksum = ostree.Checksum(sum)
	p.Objects = make([]ostree.ObjectName, len(objects)/objectSize)
	for k := range p.Objects {
		b := objects[k*objectSize:][:objectSize]
		p.Objects[k] = ostree.ObjectName{Checksum: ostree.Checksum(b[1:]), Kind: ostree.Kind(b[0])}
		if !known(p.Objects[k].Kind) {
			return p, fmt.Errorf("object %s is of kind %d", p.Objects[k].Checksum, b[0])
		}
	}
	return p, nil
}

func (d *Delta) readFallbacks(b []byte) error {
	list, err := gvariant.New("a(yaytt)", b)
	if err != nil {
		return err
	}
	if err := list.Check(); err != nil {
		return err
	}
	n, err := list.Len()
	if err != nil {
		return err
	}
	for i := range n {
		f := member(list, i)
		kind, sum := ostree.Kind(f.byte(0)), f.bytes(1)
		fallback := Fallback{ostree.ObjectName{Kind: kind}, f.uint64(2), f.uint64(3)}
		if f.err != nil {
			return f.err
		}
		if !known(kind) || len(sum) != len(fallback.Checksum) {
			return fmt.Errorf("object %d of kind %d with a checksum of %d bytes", i, kind, len(sum))
		}
		fallback.Checksum = ostree.Checksum(sum)
		d.Fallbacks = append(d.Fallbacks, fallback)
	}
	return nil
}

func (d *Delta) readMetadata(r *io.SectionReader) error {
	entries, err := dictionary(r)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.key == "ostree.endianness" && e.typ == "y" {
			b, err := load(e.value, 0, e.value.Size(), 1)
			if err != nil {
				return err
			}
			if len(b) != 1 || b[0] != byte(LittleEndian) && b[0] != byte(BigEndian) {
				return fmt.Errorf("%s: %q, want 'l' or 'B'", e.key, b)
			}
			d.Order = ByteOrder(b[0])
		}
		name, ok := strings.CutPrefix(e.key, d.Path()+"/")
		if !ok {
			continue
		}
		if name == "commitmeta" && e.typ == "a{sv}" {
			if d.CommitMeta, err = load(e.value, 0, e.value.Size(), maxMetadata); err != nil {
				return fmt.Errorf("%s: %w", e.key, err)
			}
		}
		i, err := strconv.ParseUint(name, 10, 31)
		if err == nil && e.typ == "(yay)" && i < uint64(len(d.Parts)) {
			d.Parts[i].inline = e.value
		}
	}
	return nil
}

// swap brings the sizes into the order of bytes that is meant. They have been read as little endian.
func (d *Delta) swap() {
	if d.Order == LittleEndian || d.Order == UnknownOrder && !d.strange() {
		return
	}
	for i := range d.Parts {
		p := &d.Parts[i]
		p.Size, p.Makes = bits.ReverseBytes64(p.Size), bits.ReverseBytes64(p.Makes)
	}
	for i := range d.Fallbacks {
		f := &d.Fallbacks[i]
		f.Size, f.FileSize = bits.ReverseBytes64(f.Size), bits.ReverseBytes64(f.FileSize)
	}
}

// strange tells whether sizes cannot be meant as they were read: parts that grow by compression, or objects of more than 4 GiB.
func (d *Delta) strange() bool {
	var size, objects uint64
	for _, p := range d.Parts {
		if p.Size/6 > p.Makes/5 {
			return true
		}
		var over uint64
		if size, over = bits.Add64(size, p.Size, 0); over > 0 {
			return true
		}
		objects += uint64(len(p.Objects))
	}
	return objects > 0 && size/objects > math.MaxUint32
}

// fields reads the members of a tuple until one fails.
type fields struct {
	v   gvariant.Value
	err error
}

func member(list gvariant.Value, i int) *fields {
	v, err := list.At(i)
	return &fields{v, err}
}

func (f *fields) at(i int) gvariant.Value {
	v, err := f.v.At(i)
	if f.err == nil {
		f.err = err
	}
	return v
}

func field[T any](f *fields, read func() (T, error)) T {
	x, err := read()
	if f.err == nil {
		f.err = err
	}
	return x
}

func (f *fields) byte(i int) byte     { return field(f, f.at(i).Byte) }
func (f *fields) uint32(i int) uint32 { return field(f, f.at(i).Uint32) }
func (f *fields) uint64(i int) uint64 { return field(f, f.at(i).Uint64) }
func (f *fields) bytes(i int) []byte  { return f.at(i).Bytes() }
