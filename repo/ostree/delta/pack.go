package delta

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"io"

	"github.com/composefs-boot/composefs-boot/internal/xz"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// packer makes a part.
type packer struct {
	objects []byte // the list of them, as in the superblock
	makes   uint64
	modes   table
	xattrs  table
	blob    *spool
	ops     []byte
}

// table numbers values that are different.
type table struct {
	numbers map[string]uint64
	list    gvariant.List
	size    int64 // of the values, in bytes
}

func (t *table) number(v gvariant.Value) uint64 {
	key := string(v.Bytes())
	n, ok := t.numbers[key]
	if !ok {
		if t.numbers == nil {
			t.numbers = map[string]uint64{}
		}
		n = uint64(len(t.list))
		t.numbers[key] = n
		t.list = append(t.list, v)
		t.size += int64(len(key))
	}
	return n
}

func newPacker() *packer { return &packer{blob: &spool{}} }

// size returns about how large the part is by now, decompressed, in bytes.
func (p *packer) size() int64 {
	return p.blob.size + int64(len(p.ops)) + p.modes.size + p.xattrs.size
}

func (p *packer) op(code byte, operands ...uint64) {
	p.ops = append(p.ops, code)
	for _, n := range operands {
		p.ops = binary.AppendUvarint(p.ops, n)
	}
}

// object begins an object, which makes this number of bytes.
func (p *packer) object(o ostree.ObjectName, size int64) {
	p.objects = append(append(p.objects, byte(o.Kind)), o.Checksum[:]...)
	p.makes += uint64(size)
}

// metadata adds a metadata object.
func (p *packer) metadata(o ostree.ObjectName, b []byte) error {
	p.object(o, int64(len(b)))
	p.op(opSplice, uint64(len(b)), uint64(p.blob.size))
	_, err := p.blob.Write(b)
	return err
}

// owner returns the numbers of mode and extended attributes.
func (p *packer) owner(h *ostree.FileHeader) (mode, xattrs uint64, err error) {
	owner, attributes, err := splitHeader(h)
	if err != nil {
		return 0, 0, err
	}
	return p.modes.number(owner), p.xattrs.number(attributes), nil
}

// link adds a symbolic link.
func (p *packer) link(o ostree.ObjectName, h *ostree.FileHeader) error {
	mode, xattrs, err := p.owner(h)
	if err != nil {
		return err
	}
	p.object(o, 0)
	p.op(opSplice, mode, xattrs, uint64(len(h.Target)), uint64(p.blob.size))
	_, err = io.WriteString(p.blob, h.Target)
	return err
}

// file adds a file with its content.
func (p *packer) file(o ostree.ObjectName, h *ostree.FileHeader, content io.Reader, size int64) error {
	mode, xattrs, err := p.owner(h)
	if err != nil {
		return err
	}
	p.object(o, size)
	p.op(opSplice, mode, xattrs, uint64(size), uint64(p.blob.size))
	n, err := io.Copy(p.blob, io.LimitReader(content, size))
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// changed adds a file that is described by another one.
func (p *packer) changed(o ostree.ObjectName, h *ostree.FileHeader, c *change) error {
	mode, xattrs, err := p.owner(h)
	if err != nil {
		return err
	}
	p.object(o, c.size)
	source := uint64(p.blob.size)
	if _, err := p.blob.Write(c.from[:]); err != nil {
		return err
	}
	// The order of these two is that of ostree, whose reader for patches wants the source to be set first.
	if c.pieces == nil {
		p.op(opSetSource, source)
	}
	p.op(opOpen, mode, xattrs, uint64(c.size))
	literal := uint64(p.blob.size)
	if _, err := p.blob.Write(c.literal); err != nil {
		return err
	}
	if c.pieces == nil {
		p.op(opPatch, literal, uint64(len(c.literal)))
	}
	set := false
	for _, piece := range c.pieces {
		at := literal
		if piece.old >= 0 {
			at = uint64(piece.old)
		} else {
			literal += uint64(piece.size)
		}
		if is := piece.old >= 0; is != set {
			if set = is; set {
				p.op(opSetSource, source)
			} else {
				p.op(opUnsetSource)
			}
		}
		p.op(opWrite, uint64(piece.size), at)
	}
	p.op(opClose)
	return nil
}

// packed is a part that is complete.
type packed struct {
	entry gvariant.Tuple // for the superblock
	data  *spool
}

// finish compresses the part.
func (p *packer) finish(c *xz.Compressor) (*packed, error) {
	defer p.blob.Close()
	l, err := p.payload()
	if err != nil {
		return nil, err
	}
	out := &spool{}
	sum := sha256.New()
	w := io.MultiWriter(out, sum)
	if _, err = w.Write([]byte{'x'}); err == nil {
		err = c.Compress(w, l.reader(), l.size)
	}
	if err != nil {
		out.Close()
		return nil, err
	}
	return &packed{gvariant.Tuple{uint32(0), sum.Sum(nil), uint64(out.size), p.makes, p.objects}, out}, nil
}

// payload puts together what is compressed.
func (p *packer) payload() (*layout, error) {
	modes, err := gvariant.Encode("a(uuu)", p.modes.list)
	if err != nil {
		return nil, err
	}
	xattrs, err := gvariant.Encode("aa(ayay)", p.xattrs.list)
	if err != nil {
		return nil, err
	}
	var l layout
	l.bytes(modes.Bytes())
	ends := []int64{l.size}
	l.bytes(xattrs.Bytes())
	ends = append(ends, l.size)
	l.add(p.blob.reader(), p.blob.size)
	ends = append(ends, l.size)
	l.bytes(p.ops)
	l.tuple(ends)
	return &l, nil
}

// layout is a container that is put together of what lies in files. All its parts are where they are relative to its beginning.
type layout struct {
	parts []io.Reader
	size  int64
}

func (l *layout) add(r io.Reader, size int64) {
	l.parts = append(l.parts, r)
	l.size += size
}

func (l *layout) bytes(b []byte) { l.add(bytes.NewReader(b), int64(len(b))) }

func (l *layout) align8() { l.bytes(make([]byte, align8(l.size)-l.size)) }

// frame adds the framing offsets of the container that begins at start.
func (l *layout) frame(start int64, ends []int64) {
	size, n := l.size-start, int64(len(ends))
	width := int64(1)
	for frameWidth(size+n*width) > width {
		width *= 2
	}
	for _, end := range ends {
		l.bytes(binary.LittleEndian.AppendUint64(nil, uint64(end))[:width])
	}
}

// tuple adds the framing offsets of a tuple: those of members of variable size, but the last.
func (l *layout) tuple(ends []int64) {
	reverse := make([]int64, len(ends))
	for i, end := range ends {
		reverse[len(ends)-1-i] = end
	}
	l.frame(0, reverse)
}

func (l *layout) reader() io.Reader { return io.MultiReader(l.parts...) }
