package delta

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"golang.org/x/sys/unix"
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

const (
	maxTarget = 4096    // of a symbolic link, in bytes
	maxFile   = 1 << 60 // bytes: sums of them do not overflow
)

// Content is the content of a file object. It is closed when it is not needed any more.
type Content interface {
	io.ReaderAt
	io.Closer
	Size() int64
}

// machine runs the operations of a part as its objects are read, one after the other: next, and then Read until io.EOF. An object that
// is not read to its end is passed over, and needs no sources.
type machine struct {
	part    *payload
	objects []Object
	source  func(Checksum) (Content, error)
	left    uint64 // what the objects still to come can make, in bytes
	counts  map[byte]int

	ops  *bufio.Reader
	made int // objects that next has returned

	object Object
	size   int64     // of the object as a stream
	header []byte    // left of it
	piece  io.Reader // left of the present operation, or nil
	inside bool      // between open and close
	file   uint64    // left of the file to make
	sum    hash.Hash

	from   Checksum // the source, zero if none is set
	opened Content  // the source, if it was needed
}

func newMachine(p *payload, entry *Part, source func(Checksum) (Content, error)) *machine {
	return &machine{part: p, objects: entry.Objects, source: source, left: entry.Makes, counts: map[byte]int{}, ops: bufio.NewReader(p.ops)}
}

// Close gives back the source.
func (m *machine) Close() error { return m.setSource(Checksum{}) }

func (m *machine) setSource(sum Checksum) (err error) {
	if m.opened != nil {
		err = m.opened.Close()
	}
	m.opened, m.from = nil, sum
	return err
}

// next goes to the next object. At the end it returns io.EOF.
func (m *machine) next() (o Object, size int64, err error) {
	for m.inside {
		if _, err := m.step(false); err != nil {
			return o, 0, m.fail(err)
		}
	}
	m.piece, m.header = nil, nil
	for {
		op, err := m.ops.ReadByte()
		if err == io.EOF {
			if m.made < len(m.objects) {
				return o, 0, fmt.Errorf("the operations end before %s", m.objects[m.made])
			}
			return o, 0, io.EOF
		}
		if err != nil {
			return o, 0, err
		}
		m.counts[op]++
		switch op {
		case opSplice, opOpen:
			if m.made == len(m.objects) {
				return o, 0, fmt.Errorf("more objects are made than the %d that were said", m.made)
			}
			m.object = m.objects[m.made]
			m.made++
			m.sum = sha256.New()
			if err := m.open(op); err != nil {
				return o, 0, m.fail(err)
			}
			return m.object, m.size, nil
		case opSetSource, opUnsetSource:
			if err := m.changeSource(op); err != nil {
				return o, 0, m.after(err)
			}
		default:
			return o, 0, m.after(fmt.Errorf("operation %q without an open object", op))
		}
	}
}

func (m *machine) fail(err error) error { return fmt.Errorf("%s: %w", m.object, unexpected(err)) }

// after names the place of an error between objects.
func (m *machine) after(err error) error {
	if m.made == 0 {
		return unexpected(err)
	}
	return fmt.Errorf("behind %s: %w", m.object, unexpected(err))
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
func (m *machine) open(op byte) (err error) {
	var mode, xattrs, size, offset uint64
	switch {
	case m.object.Kind != File && op == opOpen:
		return errors.New("opened as a file")
	case m.object.Kind != File:
		if err = m.numbers(&size, &offset); err != nil {
			return err
		}
		if size > maxMetadata {
			return fmt.Errorf("%w: %d bytes, at most %d are metadata", errTooLarge, size, maxMetadata)
		}
	case op == opOpen:
		err = m.numbers(&mode, &xattrs, &size)
	default:
		err = m.numbers(&mode, &xattrs, &size, &offset)
	}
	if err != nil {
		return err
	}
	if size > maxFile {
		return fmt.Errorf("%w: %d bytes", errTooLarge, size)
	}
	link := false
	if op == opSplice {
		if m.piece, err = m.part.fromBlob(offset, size); err != nil {
			return err
		}
	}
	if m.object.Kind == File {
		if link, err = m.openFile(mode, xattrs, size); err != nil {
			return err
		}
		if link && op == opOpen {
			return errors.New("a symbolic link made as a file is")
		}
	}
	if !link {
		if size > m.left {
			return fmt.Errorf("%d bytes are more than what the part says that it makes", size)
		}
		m.left -= size
	}
	m.size = int64(len(m.header))
	if !link {
		m.size += int64(size)
	}
	m.inside, m.file = op == opOpen, size
	return nil
}

// openFile makes the header of a file object. The content of a symbolic link is in the header.
func (m *machine) openFile(mode, xattrs, size uint64) (link bool, err error) {
	// A number out of range is not found in the dictionary.
	owner, err := m.part.modes.At(int(min(mode, 1<<31)))
	if err != nil {
		return false, fmt.Errorf("mode: %w", err)
	}
	attributes, err := m.part.xattrs.At(int(min(xattrs, 1<<31)))
	if err != nil {
		return false, fmt.Errorf("extended attributes: %w", err)
	}
	h := Header{Xattrs: attributes}
	for i, n := range []*uint32{&h.UID, &h.GID, &h.Mode} {
		v, err := owner.At(i)
		if err == nil {
			*n, err = v.BigUint32()
		}
		if err != nil {
			return false, err
		}
	}
	switch h.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFLNK:
		if size > maxTarget || m.piece == nil {
			return true, fmt.Errorf("a symbolic link of %d bytes: at most %d, spliced", size, maxTarget)
		}
		target := make([]byte, size)
		if _, err := io.ReadFull(m.piece, target); err != nil {
			return true, err
		}
		h.Target, link, m.piece = string(target), true, nil
	default:
		return false, fmt.Errorf("mode %o: neither a file nor a symbolic link", h.Mode)
	}
	m.header, err = h.stream()
	return link, err
}

// Read reads the object as the stream that its checksum is of, and compares that at the end.
func (m *machine) Read(b []byte) (n int, err error) {
	if len(b) == 0 {
		return 0, nil
	}
	for n == 0 {
		switch {
		case len(m.header) > 0:
			n = copy(b, m.header)
			m.header = m.header[n:]
		case m.piece != nil:
			n, err = m.piece.Read(b)
			if err == io.EOF {
				m.piece, err = nil, nil
			}
		case m.inside:
			m.piece, err = m.step(true)
		default:
			if is := Checksum(m.sum.Sum(nil)); is != m.object.Checksum {
				return 0, m.fail(fmt.Errorf("what is made has the checksum %s", is))
			}
			return 0, io.EOF
		}
		if err != nil {
			return 0, m.fail(err)
		}
	}
	m.sum.Write(b[:n])
	return n, nil
}

// step runs the next operation of an open object and returns what it writes, unless that is passed over.
func (m *machine) step(run bool) (io.Reader, error) {
	op, err := m.ops.ReadByte()
	if err != nil {
		return nil, err
	}
	m.counts[op]++
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
		return nil, m.setSource(Checksum{})
	}
	return nil, fmt.Errorf("operation %q inside of an object", op)
}

func (m *machine) write(size, offset uint64, run bool) (io.Reader, error) {
	if size > m.file {
		return nil, fmt.Errorf("%d bytes written where %d are left", size, m.file)
	}
	m.file -= size
	if m.from == (Checksum{}) {
		return m.part.fromBlob(offset, size)
	}
	if !run {
		return nil, nil
	}
	if err := m.openSource(); err != nil {
		return nil, err
	}
	all := uint64(m.opened.Size())
	if offset > all || size > all-offset {
		return nil, fmt.Errorf("%d bytes from %d of the source %s, which has %d", size, offset, m.from, all)
	}
	return io.NewSectionReader(m.opened, int64(offset), int64(size)), nil
}

func (m *machine) patch(size, offset uint64, run bool) (io.Reader, error) {
	if m.from == (Checksum{}) {
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
	return newPatched(bufio.NewReader(patch), m.opened, m.opened.Size(), left), nil
}

// changeSource sets or unsets the source. It is opened when something is read from it.
func (m *machine) changeSource(op byte) error {
	var sum Checksum
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
	c, err := m.source(m.from)
	if err != nil {
		return fmt.Errorf("source %s: %w", m.from, err)
	}
	m.opened = c
	return nil
}
