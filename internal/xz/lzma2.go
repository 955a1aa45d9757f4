package xz

import (
	"encoding/binary"
	"errors"
	"io"
)

// LZMA2 is a sequence of chunks. Each begins with a control byte:
//
//	0        the end
//	1, 2     u16 size - 1, big endian, bytes as they are; 1 forgets the dictionary
//	0x80...  u16 lower bits of size - 1 (upper five in the control byte), u16 packed size - 1, properties if they change, packed bytes
//
// The two bits above the upper five tell what is reset: nothing, the state, state and properties, dictionary too. A chunk has at most
// 64 KiB packed and 2 MiB unpacked; its bytes are packed by LZMA: a range coder with adaptive probabilities codes literals, and matches
// of what was there before. (LZMA specification, Igor Pavlov; xz-file-format.txt.)
//
// The dictionary is in the same buffer as what has not been read yet, and grows with what comes: a small part takes little memory.

const (
	maxPacked = 64 << 10
	slide     = 8 << 20 // room behind the dictionary, in bytes: whenever it is full, the dictionary moves to the front
	small     = 4 << 20 // up to this the buffer grows by and by, in bytes
	slack     = 64      // bytes behind the packed ones that a symbol can read at most, and more
)

var errLZMA = errors.New("packed data that are damaged")

// lzma2 unpacks a stream.
type lzma2 struct {
	r    io.Reader
	size int // of the dictionary

	buf   []byte
	from  int // what was read ends here
	start int // the dictionary begins here, or size before the end
	reset byte
	err   error

	probs
	lc, lp, pb uint
	state      int
	last       [4]uint32 // distances of matches, less 1
	phase      int       // what to add to a place in buf to have it from the beginning of the dictionary

	rng, code uint32
	in        [maxPacked + slack]byte
	pos       int
}

// What the first chunks have to bring.
const (
	needState byte = 1 + iota
	needProperties
	needDictionary
)

func newLZMA2(r io.Reader, dictionary int) *lzma2 {
	return &lzma2{r: r, size: max(dictionary, 4096), reset: needDictionary}
}

func (d *lzma2) Read(b []byte) (int, error) {
	for d.from == len(d.buf) {
		if d.err == nil {
			d.err = d.chunk()
		}
		if d.err != nil {
			return 0, d.err
		}
	}
	n := copy(b, d.buf[d.from:])
	d.from += n
	return n, nil
}

// room makes the buffer larger by n bytes, and returns those. Everything before was read.
func (d *lzma2) room(n int) []byte {
	if len(d.buf)+n > d.size+slide {
		keep := min(d.size, len(d.buf)-d.start)
		copy(d.buf, d.buf[len(d.buf)-keep:])
		d.phase += len(d.buf) - keep
		d.buf, d.from, d.start = d.buf[:keep], keep, 0
	}
	if need := len(d.buf) + n; need > cap(d.buf) {
		grown := max(need, 2*cap(d.buf))
		if grown > small {
			grown = d.size + slide // at once: memory that was not used yet costs nothing, and what is left behind would
		}
		larger := make([]byte, len(d.buf), min(grown, d.size+slide))
		copy(larger, d.buf)
		d.buf = larger
	}
	d.buf = d.buf[:len(d.buf)+n]
	return d.buf[len(d.buf)-n:]
}

// chunk reads the next chunk, or returns io.EOF.
func (d *lzma2) chunk() error {
	var h [6]byte
	if _, err := io.ReadFull(d.r, h[:1]); err != nil {
		return unexpected(err)
	}
	control := h[0]
	switch {
	case control == 0:
		return io.EOF
	case control < 0x80:
		return d.stored(control)
	}
	size := 5
	reset := control >> 5 & 3
	if reset >= needProperties {
		size++
	}
	if _, err := io.ReadFull(d.r, h[1:size]); err != nil {
		return unexpected(err)
	}
	if reset < d.reset {
		return errLZMA
	}
	d.reset = 0
	if reset == needDictionary {
		d.forget()
	}
	if reset >= needProperties {
		if err := d.properties(h[5]); err != nil {
			return err
		}
	}
	if reset >= needState {
		d.resetState()
	}
	unpacked := int(control&0x1f)<<16 + int(binary.BigEndian.Uint16(h[1:])) + 1
	packed := int(binary.BigEndian.Uint16(h[3:])) + 1
	clear(d.in[packed:min(packed+slack, len(d.in))])
	if _, err := io.ReadFull(d.r, d.in[:packed]); err != nil {
		return unexpected(err)
	}
	if packed < 5 || d.in[0] != 0 {
		return errLZMA
	}
	d.rng, d.code, d.pos = 1<<32-1, binary.BigEndian.Uint32(d.in[1:]), 5
	d.room(unpacked)
	if !d.unpack(len(d.buf)-unpacked, packed) || d.pos != packed || d.code != 0 {
		d.buf = d.buf[:d.from]
		return errLZMA
	}
	return nil
}

// stored reads a chunk that is not packed.
func (d *lzma2) stored(control byte) error {
	var h [2]byte
	if _, err := io.ReadFull(d.r, h[:]); err != nil {
		return unexpected(err)
	}
	switch {
	case control == 1:
		d.forget()
		d.reset = needProperties // so that no match is remembered that was before
	case control > 2 || d.reset == needDictionary:
		return errLZMA
	}
	if _, err := io.ReadFull(d.r, d.room(int(binary.BigEndian.Uint16(h[:]))+1)); err != nil {
		d.buf = d.buf[:d.from]
		return unexpected(err)
	}
	return nil
}

// forget begins another dictionary.
func (d *lzma2) forget() { d.start, d.phase = len(d.buf), -len(d.buf) }

func (d *lzma2) properties(b byte) error {
	if b >= 9*5*5 {
		return errLZMA
	}
	d.lc, d.lp, d.pb = uint(b%9), uint(b/9%5), uint(b/45)
	if d.lc+d.lp > 4 {
		return errLZMA
	}
	return nil
}

func (d *lzma2) resetState() {
	d.state, d.last = 0, [4]uint32{}
	d.probs.init()
}

// bit reads a bit. Behind the packed bytes it reads zeros; unpack notices that. Where most time is spent, in tree and unpackLiteral, it is
// written out.
func (d *lzma2) bit(p *prob) uint32 {
	bound := (d.rng >> probBits) * uint32(*p)
	var bit uint32
	if d.code < bound {
		d.rng = bound
		*p += (1<<probBits - *p) >> probMove
	} else {
		d.rng -= bound
		d.code -= bound
		*p -= *p >> probMove
		bit = 1
	}
	if d.rng < 1<<24 {
		d.rng <<= 8
		d.code = d.code<<8 | uint32(d.in[d.pos])
		d.pos++
	}
	return bit
}

// tree reads bits, the highest first.
func (d *lzma2) tree(p []prob, bits uint) uint32 {
	rng, code, pos := d.rng, d.code, d.pos
	m := uint32(1)
	for m < 1<<bits {
		q := &p[m]
		bound := (rng >> probBits) * uint32(*q)
		if code < bound {
			rng = bound
			*q += (1<<probBits - *q) >> probMove
			m <<= 1
		} else {
			rng -= bound
			code -= bound
			*q -= *q >> probMove
			m = m<<1 | 1
		}
		if rng < 1<<24 {
			rng <<= 8
			code = code<<8 | uint32(d.in[pos])
			pos++
		}
	}
	d.rng, d.code, d.pos = rng, code, pos
	return m - 1<<bits
}

// reverse reads bits, the lowest first.
func (d *lzma2) reverse(p []prob, bits uint) uint32 {
	m, n := uint32(1), uint32(0)
	for i := range bits {
		b := d.bit(&p[m])
		m = m<<1 | b
		n |= b << i
	}
	return n
}

// direct reads bits that have no probabilities, the highest first.
func (d *lzma2) direct(bits uint) uint32 {
	n := uint32(0)
	for range bits {
		d.rng >>= 1
		b := uint32(0)
		if d.code >= d.rng {
			d.code -= d.rng
			b = 1
		}
		n = n<<1 | b
		if d.rng < 1<<24 {
			d.rng <<= 8
			d.code = d.code<<8 | uint32(d.in[d.pos])
			d.pos++
		}
	}
	return n
}

func (d *lzma2) length(l *lengths, posState int) int {
	switch {
	case d.bit(&l.choice) == 0:
		return minMatch + int(d.tree(l.low[posState][:], 3))
	case d.bit(&l.choice2) == 0:
		return minMatch + 8 + int(d.tree(l.mid[posState][:], 3))
	}
	return minMatch + 16 + int(d.tree(l.high[:], 8))
}

func (d *lzma2) distance(length int) uint32 {
	slot := d.tree(d.slot[min(length-minMatch, 3)][:], 6)
	if slot < 4 {
		return slot
	}
	bits := uint(slot>>1 - 1)
	n := (2 | slot&1) << bits
	if slot < 14 {
		return n + d.reverse(d.special[n-slot:], bits)
	}
	return n + d.direct(bits-4)<<4 + d.reverse(d.align[:], 4)
}

// unpack fills the buffer from at on. It is false if that is not what the packed bytes make.
func (d *lzma2) unpack(at, packed int) bool {
	for at < len(d.buf) {
		if d.pos > packed {
			return false
		}
		place := at + d.phase
		posState := place & (1<<d.pb - 1)
		if d.bit(&d.match[d.state][posState]) == 0 {
			d.unpackLiteral(at, place)
			at++
			continue
		}
		n := 0
		switch {
		case d.bit(&d.probs.rep[d.state]) == 0:
			copy(d.last[1:], d.last[:])
			n = d.length(&d.matchLength, posState)
			d.last[0] = d.distance(n)
			d.state = afterMatch(d.state)
		case d.repeated(posState):
			n = 1
			d.state = afterShort(d.state)
		default:
			n = d.length(&d.repeatedMatch, posState)
			d.state = afterRepeated(d.state)
		}
		// A match must not begin before the dictionary, nor go on behind the chunk.
		distance := int(d.last[0]) + 1
		if distance > min(at-d.start, d.size) || n > len(d.buf)-at {
			return false
		}
		for from, end := at-distance, at+n; at < end; {
			at += copy(d.buf[at:end], d.buf[from:at])
		}
	}
	return true
}

// repeated reads which of the last distances is meant, and moves it to the front. It is true for a match of one byte.
func (d *lzma2) repeated(posState int) bool {
	if d.bit(&d.repG0[d.state]) == 0 {
		return d.bit(&d.long[d.state][posState]) == 0
	}
	i := 1
	if d.bit(&d.repG1[d.state]) == 1 {
		i = 2 + int(d.bit(&d.repG2[d.state]))
	}
	distance := d.last[i]
	copy(d.last[1:i+1], d.last[:i])
	d.last[0] = distance
	return false
}

// unpackLiteral reads a byte.
func (d *lzma2) unpackLiteral(at, place int) {
	before := byte(0)
	if at > d.start {
		before = d.buf[at-1]
	}
	context := uint(place)&(1<<d.lp-1)<<d.lc + uint(before)>>(8-d.lc)
	p := (*[0x300]prob)(d.literal[0x300*context:])
	rng, code, pos := d.rng, d.code, d.pos
	m := uint32(1)
	// After a match, the byte that would have followed it tells which probabilities are used, until a bit is another one.
	matched, half := uint32(0), uint32(0)
	if d.state >= litStates {
		matched, half = uint32(d.buf[at-int(d.last[0])-1]), 0x100
	}
	for m < 0x100 {
		matched <<= 1
		q := &p[half+matched&half+m]
		bound := (rng >> probBits) * uint32(*q)
		if code < bound {
			rng = bound
			*q += (1<<probBits - *q) >> probMove
			m <<= 1
			half &^= matched
		} else {
			rng -= bound
			code -= bound
			*q -= *q >> probMove
			m = m<<1 | 1
			half &= matched
		}
		if rng < 1<<24 {
			rng <<= 8
			code = code<<8 | uint32(d.in[pos])
			pos++
		}
	}
	d.rng, d.code, d.pos = rng, code, pos
	d.buf[at] = byte(m)
	d.state = afterLiteral(d.state)
}
