package xz

import "encoding/binary"

// What literals and matches depend on, besides the state: the upper 3 bits of the byte before, and the lower 2 bits of the place.
const (
	literalBits = 3
	placeBits   = 2
	properties  = placeBits*45 + literalBits
)

// op is a symbol: n bytes that are a literal or a match.
type op struct {
	n    uint32
	back uint32 // literal; below 4, which of the last distances; else 4 and the distance less 1
}

const literal = 1<<32 - 1

// coding is what the decoder knows by itself from one symbol to the next.
type coding struct {
	state int
	last  [4]uint32 // distances of matches, less 1
}

// after returns what is known after a symbol.
func (c coding) after(o op) coding {
	switch {
	case o.back == literal:
		c.state = afterLiteral(c.state)
	case o.back >= 4:
		c.state = afterMatch(c.state)
		c.last = [4]uint32{o.back - 4, c.last[0], c.last[1], c.last[2]}
	case o.n == 1:
		c.state = afterShort(c.state)
	default:
		c.state = afterRepeated(c.state)
		distance := c.last[o.back]
		copy(c.last[1:o.back+1], c.last[:o.back])
		c.last[0] = distance
	}
	return c
}

// encoder packs a block of bytes. It can be used again for another one.
type encoder struct {
	probs
	coding
	data   []byte
	at     int // what is before has been packed
	finder finder

	// The range coder: the range begins at low, whose byte in front is kept, with as many of 0xff as are counted, until it is known whether
	// 1 is carried into it.
	low  uint64
	rng  uint32
	kept byte
	ffs  int
	out  []byte

	prices
	planner
}

// pack appends a block as chunks of LZMA2.
func (e *encoder) pack(to, data []byte) []byte {
	e.data, e.at = data, 0
	e.finder.reset(data)
	e.planner.reset()
	e.forget()
	need := needDictionary
	for e.at < len(data) {
		start := e.at
		e.chunk()
		piece := data[start:e.at]
		if len(e.out) < len(piece) && len(e.out) <= maxPacked {
			to = append(to, 0x80|need<<5|byte((len(piece)-1)>>16))
			to = binary.BigEndian.AppendUint16(to, uint16(len(piece)-1))
			to = binary.BigEndian.AppendUint16(to, uint16(len(e.out)-1))
			if need >= needProperties {
				to = append(to, properties)
			}
			to = append(to, e.out...)
			need = 0
			continue
		}
		for len(piece) > 0 {
			n := min(len(piece), 1<<16)
			control := byte(2)
			if need == needDictionary {
				control, need = 1, needProperties
			}
			to = binary.BigEndian.AppendUint16(append(to, control), uint16(n-1))
			to = append(to, piece[:n]...)
			piece = piece[n:]
		}
		// The decoder has not seen what the probabilities have learnt.
		need = max(need, needState)
		e.forget()
	}
	return append(to, 0)
}

// forget resets the state.
func (e *encoder) forget() {
	e.coding = coding{}
	e.probs.init()
	e.coded = refresh // so that prices are computed
}

// chunk packs as much as a chunk can hold, into out.
func (e *encoder) chunk() {
	e.low, e.rng, e.kept, e.ffs, e.out = 0, 1<<32-1, 0, 0, e.out[:0]
	for start := e.at; e.at < len(e.data) && e.at-start < 2<<20-maxPlan-2*maxMatch && len(e.out)+e.ffs < maxPacked-8<<10; {
		for _, o := range e.plan() {
			e.symbol(o)
		}
	}
	for range 5 {
		e.shift()
	}
}

// symbol codes a symbol.
func (e *encoder) symbol(o op) {
	posState := e.at & (1<<placeBits - 1)
	state := e.state
	if o.back == literal {
		e.bit(&e.probs.match[state][posState], 0)
		e.literal()
		e.coding = e.after(o)
		e.at++
		return
	}
	e.bit(&e.probs.match[state][posState], 1)
	switch o.back {
	default:
		e.bit(&e.rep[state], 0)
		e.length(&e.matchLength, posState, o.n)
		e.distance(o.back-4, o.n)
	case 0:
		e.bit(&e.rep[state], 1)
		e.bit(&e.repG0[state], 0)
		e.bit(&e.long[state][posState], uint32(min(o.n-1, 1)))
	case 1:
		e.bit(&e.rep[state], 1)
		e.bit(&e.repG0[state], 1)
		e.bit(&e.repG1[state], 0)
	case 2, 3:
		e.bit(&e.rep[state], 1)
		e.bit(&e.repG0[state], 1)
		e.bit(&e.repG1[state], 1)
		e.bit(&e.repG2[state], o.back-2)
	}
	if o.back < 4 && o.n > 1 {
		e.length(&e.repeatedMatch, posState, o.n)
	}
	e.coding = e.after(o)
	e.at += int(o.n)
	e.coded++
}

// literals returns the probabilities of a literal at a place.
func (e *encoder) literals(at int) *[0x300]prob {
	before := byte(0)
	if at > 0 {
		before = e.data[at-1]
	}
	return (*[0x300]prob)(e.probs.literal[0x300*int(before>>(8-literalBits)):])
}

func (e *encoder) literal() {
	p := e.literals(e.at)
	symbol := uint32(e.data[e.at]) | 0x100
	if e.state < litStates {
		for k := 7; k >= 0; k-- {
			e.bit(&p[symbol>>(k+1)], symbol>>k&1)
		}
		return
	}
	// See unpackLiteral.
	matched, half := uint32(e.data[e.at-int(e.last[0])-1]), uint32(0x100)
	for symbol < 0x10000 {
		matched <<= 1
		e.bit(&p[half+matched&half+symbol>>8], symbol>>7&1)
		symbol <<= 1
		half &= ^(matched ^ symbol)
	}
}

func (e *encoder) length(l *lengths, posState int, n uint32) {
	switch n -= minMatch; {
	case n < 8:
		e.bit(&l.choice, 0)
		e.tree(l.low[posState][:], 3, n)
	case n < 16:
		e.bit(&l.choice, 1)
		e.bit(&l.choice2, 0)
		e.tree(l.mid[posState][:], 3, n-8)
	default:
		e.bit(&l.choice, 1)
		e.bit(&l.choice2, 1)
		e.tree(l.high[:], 8, n-16)
	}
}

func (e *encoder) distance(distance, n uint32) {
	slot := slotOf(distance)
	e.tree(e.slot[min(n-minMatch, 3)][:], 6, slot)
	if slot < 4 {
		return
	}
	width := slot>>1 - 1
	rest := distance - (2|slot&1)<<width
	if slot < 14 {
		e.reverse(e.special[(2|slot&1)<<width-slot:], width, rest)
		return
	}
	for k := width; k > 4; {
		k--
		e.rng >>= 1
		if rest>>k&1 != 0 {
			e.low += uint64(e.rng)
		}
		e.normalize()
	}
	e.reverse(e.align[:], 4, rest&15)
}

// tree codes bits, the highest first.
func (e *encoder) tree(p []prob, width, value uint32) {
	m := uint32(1)
	for k := width; k > 0; {
		k--
		b := value >> k & 1
		e.bit(&p[m], b)
		m = m<<1 | b
	}
}

// reverse codes bits, the lowest first.
func (e *encoder) reverse(p []prob, width, value uint32) {
	m := uint32(1)
	for k := range width {
		b := value >> k & 1
		e.bit(&p[m], b)
		m = m<<1 | b
	}
}

// bit codes a bit.
func (e *encoder) bit(p *prob, bit uint32) {
	bound := e.rng >> probBits * uint32(*p)
	if bit == 0 {
		e.rng = bound
		*p += (1<<probBits - *p) >> probMove
	} else {
		e.low += uint64(bound)
		e.rng -= bound
		*p -= *p >> probMove
	}
	e.normalize()
}

func (e *encoder) normalize() {
	if e.rng < 1<<24 {
		e.rng <<= 8
		e.shift()
	}
}

// shift moves the range up by a byte.
func (e *encoder) shift() {
	if e.low < 0xff000000 || e.low >= 1<<32 {
		carry := byte(e.low >> 32)
		e.out = append(e.out, e.kept+carry)
		for ; e.ffs > 0; e.ffs-- {
			e.out = append(e.out, 0xff+carry)
		}
		e.kept = byte(e.low >> 24)
	} else {
		e.ffs++
	}
	e.low = e.low & 0x00ffffff << 8
}
