package delta

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// The operations of a part, see the comment of the package.
const (
	opSplice      = 'S'
	opOpen        = 'o'
	opWrite       = 'w'
	opSetSource   = 'r'
	opUnsetSource = 'R'
	opPatch       = 'B'
	opClose       = 'c'
)

// maxFile limits a file, in bytes, so that sums of sizes do not overflow.
const maxFile = 1 << 60

// machine runs the operations of a part as its objects are read, one after the other: next, and then Read until io.EOF. An object that
// is not read to its end is passed over, and needs no sources.
type machine struct {
	part    *payload
	objects []ostree.ObjectName
	source  func(ostree.Checksum) (*source, error)
	left    uint64 // what the objects still to come can make, in bytes
	counts  Operations

	ops    *bufio.Reader
	made   int // objects that next has returned
	object ostree.ObjectName
	piece  io.Reader // left of the present operation, or nil
	inside bool      // between open and close
	file   uint64    // left of the file to make

	from   ostree.Checksum // the source, zero if none is set
	opened *source         // the source, if it was needed
}

func newMachine(p *payload, entry *Part, open func(ostree.Checksum) (*source, error)) *machine {
	return &machine{part: p, objects: entry.Objects, source: open, left: entry.Makes, ops: bufio.NewReader(p.ops)}
}

// Close gives back the source.
func (m *machine) Close() error { return m.setSource(ostree.Checksum{}) }

func (m *machine) setSource(sum ostree.Checksum) (err error) {
	if m.opened != nil {
		err = m.opened.Close()
	}
	m.opened, m.from = nil, sum
	return err
}

// next goes to the next object. Header is nil for metadata, whose size is that of what there is to read. At the end it returns io.EOF.
func (m *machine) next() (o ostree.ObjectName, header *ostree.FileHeader, err error) {
	for m.inside {
		if _, err := m.step(false); err != nil {
			return o, nil, m.fail(err)
		}
	}
	m.piece = nil
	for {
		op, err := m.ops.ReadByte()
		if err == io.EOF {
			if m.made < len(m.objects) {
				return o, nil, fmt.Errorf("the operations end before object %s", m.objects[m.made])
			}
			return o, nil, io.EOF
		}
		if err != nil {
			return o, nil, err
		}
		m.counts.add(op)
		switch op {
		case opSplice, opOpen:
			if m.made == len(m.objects) {
				return o, nil, fmt.Errorf("more objects are made than the %d that were said", m.made)
			}
			m.object = m.objects[m.made]
			m.made++
			if header, err = m.open(op); err != nil {
				return o, nil, m.fail(err)
			}
			return m.object, header, nil
		case opSetSource, opUnsetSource:
			if err := m.changeSource(op); err != nil {
				return o, nil, m.after(err)
			}
		default:
			return o, nil, m.after(fmt.Errorf("operation %q without an open object", op))
		}
	}
}

func (m *machine) fail(err error) error {
	return fmt.Errorf("object %s: %w", m.object, unexpected(err))
}

// after names the place of an error between objects.
func (m *machine) after(err error) error {
	if m.made == 0 {
		return unexpected(err)
	}
	return fmt.Errorf("behind object %s: %w", m.object, unexpected(err))
}

// numbers reads the operands of an operation.
func (m *machine) numbers(n ...*uint64) error {
	for _, n := range n {
		var err error
		if *n, err = readVarint(m.ops); err != nil {
			return err
		}
	}
	return nil
}

// open begins an object: by splice, of which the data are in the blob, or by open.
func (m *machine) open(op byte) (*ostree.FileHeader, error) {
	if m.object.Kind != ostree.KindFile {
		return nil, m.openMetadata(op)
	}
	var mode, xattrs, size, offset uint64
	operands := []*uint64{&mode, &xattrs, &size, &offset}
	if op == opOpen {
		operands = operands[:3]
	}
	if err := m.numbers(operands...); err != nil {
		return nil, err
	}
	if size > maxFile {
		return nil, fmt.Errorf("%w: %d bytes", errTooLarge, size)
	}
	// A number out of range is not found in the table.
	owner, err := m.part.modes.At(int(min(mode, 1<<31)))
	if err != nil {
		return nil, fmt.Errorf("mode: %w", err)
	}
	attributes, err := m.part.xattrs.At(int(min(xattrs, 1<<31)))
	if err != nil {
		return nil, fmt.Errorf("extended attributes: %w", err)
	}
	if op == opSplice {
		if m.piece, err = m.part.fromBlob(offset, size); err != nil {
			return nil, err
		}
		if isLink(owner) {
			return m.link(owner, attributes, size)
		}
	}
	h, err := makeHeader(owner, "", attributes)
	if err != nil {
		return nil, err
	}
	h.Size = int64(size)
	m.inside, m.file = op == opOpen, size
	return h, m.take(size)
}

func (m *machine) openMetadata(op byte) error {
	if op == opOpen {
		return errors.New("metadata opened as a file is")
	}
	var size, offset uint64
	err := m.numbers(&size, &offset)
	if err != nil {
		return err
	}
	if size > maxMetadata {
		return fmt.Errorf("%w: %d bytes, at most %d are metadata", errTooLarge, size, maxMetadata)
	}
	if m.piece, err = m.part.fromBlob(offset, size); err != nil {
		return err
	}
	return m.take(size)
}

// take counts what an object makes against what the part says.
func (m *machine) take(size uint64) error {
	if size > m.left {
		return fmt.Errorf("its %d bytes are more than what the part says that it makes", size)
	}
	m.left -= size
	return nil
}

// isLink tells whether the mode in an entry of the table is that of a symbolic link.
func isLink(owner gvariant.Value) bool {
	mode, err := owner.At(2)
	if err != nil {
		return false
	}
	n, err := mode.BigUint32()
	return err == nil && n&fstree.TypeMask == fstree.TypeSymlink
}

// link makes the header of a symbolic link, whose target is in the blob.
func (m *machine) link(owner, xattrs gvariant.Value, size uint64) (*ostree.FileHeader, error) {
	if size > fstree.MaxSymlink {
		return nil, fmt.Errorf("a symbolic link with a target of %d bytes: at most %d are possible", size, fstree.MaxSymlink)
	}
	target := make([]byte, size)
	if _, err := io.ReadFull(m.piece, target); err != nil {
		return nil, err
	}
	m.piece = nil
	return makeHeader(owner, string(target), xattrs)
}

// Read reads the content of the object.
func (m *machine) Read(b []byte) (n int, err error) {
	for n == 0 && len(b) > 0 {
		switch {
		case m.piece != nil:
			n, err = m.piece.Read(b)
			if err == io.EOF {
				m.piece, err = nil, nil
			}
		case m.inside:
			m.piece, err = m.step(true)
		default:
			return 0, io.EOF
		}
		if err != nil {
			return n, m.fail(err)
		}
	}
	return n, nil
}

// step runs the next operation of an open object and returns what it writes, unless that is passed over.
func (m *machine) step(run bool) (io.Reader, error) {
	op, err := m.ops.ReadByte()
	if err != nil {
		return nil, err
	}
	m.counts.add(op)
	switch op {
	case opWrite:
		var size, offset uint64
		if err := m.numbers(&size, &offset); err != nil {
			return nil, err
		}
		return m.write(size, offset, run)
	case opPatch:
		var size, offset uint64
		if err := m.numbers(&offset, &size); err != nil {
			return nil, err
		}
		return m.patch(size, offset, run)
	case opSetSource, opUnsetSource:
		return nil, m.changeSource(op)
	case opClose:
		m.inside = false
		if m.file > 0 {
			return nil, fmt.Errorf("closed %d bytes too early", m.file)
		}
		return nil, m.setSource(ostree.Checksum{})
	}
	return nil, fmt.Errorf("operation %q inside of an object", op)
}

func (m *machine) write(size, offset uint64, run bool) (io.Reader, error) {
	if size > m.file {
		return nil, fmt.Errorf("%d bytes written where %d are left", size, m.file)
	}
	m.file -= size
	if m.from.IsZero() {
		return m.part.fromBlob(offset, size)
	}
	if !run {
		return nil, nil
	}
	if err := m.openSource(); err != nil {
		return nil, err
	}
	all := uint64(m.opened.size)
	if offset > all || size > all-offset {
		return nil, fmt.Errorf("%d bytes from %d of the source %s, which has %d", size, offset, m.from, all)
	}
	return io.NewSectionReader(m.opened, int64(offset), int64(size)), nil
}

func (m *machine) patch(size, offset uint64, run bool) (io.Reader, error) {
	if m.from.IsZero() {
		return nil, errors.New("a patch without a source")
	}
	patch, err := m.part.fromBlob(offset, size)
	if err != nil {
		return nil, err
	}
	left := int64(m.file) // a patch makes the file to its end
	m.file = 0
	if !run {
		return nil, nil
	}
	if err := m.openSource(); err != nil {
		return nil, err
	}
	return newPatched(bufio.NewReader(patch), m.opened, m.opened.size, left), nil
}

// changeSource sets or unsets the source. It is opened when something is read from it.
func (m *machine) changeSource(op byte) error {
	var sum ostree.Checksum
	if op == opSetSource {
		var offset uint64
		err := m.numbers(&offset)
		if err == nil {
			sum, err = m.part.checksumAt(offset)
		}
		if err != nil {
			return fmt.Errorf("source: %w", unexpected(err))
		}
	}
	return m.setSource(sum)
}

func (m *machine) openSource() error {
	if m.opened != nil {
		return nil
	}
	s, err := m.source(m.from)
	if err != nil {
		return fmt.Errorf("source %s: %w", m.from, err)
	}
	m.opened = s
	return nil
}
