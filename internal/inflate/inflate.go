// Package inflate decompresses DEFLATE streams (RFC 1951) and gzip files (RFC 1952), several times as fast as the libraries there are
// in Go: most of the time that it takes to bring an image from a registry, or a commit from an archive, is spent here.
//
// The input is looked at 64 bits at a time, and a code is found by one look into a table of 2,048 entries, by two if it is longer than
// 11 bits. An entry has two literals where the codes of both fit into those 11 bits. The output goes to a buffer with the last 32 KiB
// before it, which is what distances may reach back to; so that nothing needs to be checked within a match, both buffers have room
// behind their end.
//
//	            31  30  29   28     26-12    11-8   5-0
//	length       0   0               base    code   bits    of the code, and of it together with what is added to the base
//	table        0   1        1     where    size           of another table, which longer codes lead to
//	end          0   1   1                          bits    of the block; without end and table: there is no such code
//	literal      1   2nd byte in 23-16, 1st byte in 15-8, number of bytes in 7-6, bits of the codes in 5-0
//
// All that is read is untrusted: what is not a complete code, or leads out of the window, is ErrCorrupt.
package inflate

import (
	"encoding/binary"
	"errors"
	"io"
)

// ErrCorrupt tells that the input is no DEFLATE stream.
var ErrCorrupt = errors.New("not a valid compressed stream")

const (
	window   = 32 << 10
	outSize  = 128 << 10 // of new bytes in the buffer
	longest  = 258       // bytes of a match
	outSlack = longest + 32
	inSize   = 64 << 10
	inSlack  = 32 // zeros behind the end of the input, that words can be read which reach beyond it
)

// Reader decompresses one DEFLATE stream. It reads more from its source than it needs.
type Reader struct {
	src       io.Reader
	srcErr    error // of the source, io.EOF included: then in has slack behind it
	in        [inSize + inSlack]byte
	from, to  int // what was not taken yet of in; from may be beyond to when bits of the slack were taken
	bits      uint64
	n         uint // bits that were taken from in, and not yet used
	out       [window + outSize + outSlack]byte
	at, given int // in out: the end of what is there, and of what was handed out
	base      int // where the stream begins in out, distances do not reach before it
	err       error
	block     state
	last      bool // the block is the last one
	stored    int  // bytes that are left of a stored block
	lit       *litTable
	dist      *distTable
	ownLit    litTable
	ownDist   distTable
	lengths   [maxLit + maxDist]uint8
}

type state uint8

const (
	betweenBlocks state = iota
	inStored
	inCodes
	finished
)

// NewReader returns a Reader of a stream.
func NewReader(r io.Reader) *Reader {
	z := &Reader{}
	z.Reset(r)
	return z
}

// Reset makes the Reader read another stream.
func (z *Reader) Reset(r io.Reader) {
	z.src, z.srcErr = r, nil
	z.from, z.to = 0, 0
	z.at, z.given = 0, 0
	z.begin()
}

// begin expects a stream where the input is.
func (z *Reader) begin() {
	z.bits, z.n = 0, 0
	z.base = z.at
	z.err = nil
	z.block, z.last = betweenBlocks, false
}

// Read decompresses. At the end of the stream the error is io.EOF.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for z.given == z.at {
		if z.err != nil {
			return 0, z.err
		}
		z.more()
	}
	n := copy(p, z.out[z.given:z.at])
	z.given += n
	return n, nil
}

// more decompresses until the buffer is full, or the stream ends: then err is set.
func (z *Reader) more() {
	if shift := z.at - window; shift > 0 && z.at >= window+outSize {
		copy(z.out[:window], z.out[shift:z.at])
		z.at, z.given, z.base = window, window, max(0, z.base-shift)
	}
	for z.err == nil && z.at < window+outSize {
		switch z.block {
		case betweenBlocks:
			z.err = z.header()
		case inStored:
			z.err = z.copyStored()
		case inCodes:
			z.err = z.decode()
		case finished:
			z.giveBack()
			z.err = io.EOF
		}
	}
	z.err = z.cause(z.err)
}

// cause returns why the input has ended too early, if that is what err says.
func (z *Reader) cause(err error) error {
	if err == io.ErrUnexpectedEOF && z.srcErr != nil && z.srcErr != io.EOF {
		return z.srcErr
	}
	return err
}

// fill reads more input. At its end there is none: then slack follows.
func (z *Reader) fill() {
	if z.srcErr != nil {
		return
	}
	keep := min(z.from, 8) // what is in bits may be given back
	z.to = copy(z.in[:], z.in[z.from-keep:z.to])
	z.from = keep
	n := 0
	for tries := 0; n == 0 && z.srcErr == nil; tries++ {
		n, z.srcErr = z.src.Read(z.in[z.to:inSize])
		if n == 0 && tries == 100 {
			z.srcErr = io.ErrNoProgress
		}
	}
	z.to += n
	clear(z.in[z.to : z.to+inSlack])
}

// need makes n bits available, at most 32.
func (z *Reader) need(n uint) error {
	for z.n < n {
		for z.from >= z.to {
			if z.srcErr != nil {
				return io.ErrUnexpectedEOF
			}
			z.fill()
		}
		z.bits |= uint64(z.in[z.from]) << z.n
		z.from++
		z.n += 8
	}
	return nil
}

// take returns n bits, at most 16.
func (z *Reader) take(n uint) (int, error) {
	if err := z.need(n); err != nil {
		return 0, err
	}
	v := z.bits & (1<<n - 1)
	z.bits >>= n
	z.n -= n
	return int(v), nil
}

// giveBack returns whole bytes to the input.
func (z *Reader) giveBack() {
	z.from -= int(z.n / 8)
	z.bits, z.n = 0, 0
}

// header reads the beginning of a block.
func (z *Reader) header() error {
	if z.last {
		z.block = finished
		return nil
	}
	head, err := z.take(3)
	if err != nil {
		return err
	}
	z.last = head&1 != 0
	switch head >> 1 {
	case 0:
		z.giveBack()
		size, err := z.take(16)
		if err != nil {
			return err
		}
		not, err := z.take(16)
		if err != nil {
			return err
		}
		if size != not^0xffff {
			return ErrCorrupt
		}
		z.block, z.stored = inStored, size
		return nil
	case 1:
		z.lit, z.dist = &fixedLit, &fixedDist
	case 2:
		if err := z.codes(); err != nil {
			return err
		}
		z.lit, z.dist = &z.ownLit, &z.ownDist
	default:
		return ErrCorrupt
	}
	z.block = inCodes
	return nil
}

// copyStored copies bytes that are not compressed.
func (z *Reader) copyStored() error {
	for z.stored > 0 && z.at < window+outSize {
		if z.from >= z.to {
			if z.srcErr != nil {
				return io.ErrUnexpectedEOF
			}
			z.fill()
			continue
		}
		n := copy(z.out[z.at:window+outSize], z.in[z.from:min(z.to, z.from+z.stored)])
		z.at += n
		z.from += n
		z.stored -= n
	}
	if z.stored == 0 {
		z.block = betweenBlocks
	}
	return nil
}

// decode decompresses a block until it ends, or the output is full.
func (z *Reader) decode() error {
	for {
		if z.to-z.from < inSlack {
			z.fill()
		}
		// Two words are read from the limit on, before it is looked at again.
		limit := z.to - 16
		if z.srcErr != nil {
			limit = z.to + 8
		}
		end, err := z.run(limit)
		if z.from-int(z.n/8) > z.to {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		if end {
			z.block = betweenBlocks
			return nil
		}
		if z.at >= window+outSize {
			return nil
		}
	}
}

// run is the inner loop: it goes on while there is input before the limit, and room for a match. It reports the end of the block.
func (z *Reader) run(limit int) (end bool, err error) {
	in, out, lit, dist := &z.in, &z.out, z.lit, z.dist
	from, at, base := z.from, z.at, z.base
	bits, n := z.bits, z.n
	for from < limit && at < window+outSize {
		// At least 56 bits: three codes of at most 11, or two, one of 15 and 5 more.
		bits |= binary.LittleEndian.Uint64(in[from:]) << (n & 63)
		from += int((63 - n) >> 3)
		n |= 56

		e := lit[bits&(1<<litBits-1)]
		if e&isLiteral != 0 {
			bits >>= e & 63
			n -= uint(e & 63)
			binary.LittleEndian.PutUint16(out[at:], uint16(e>>8))
			at += int(e >> 6 & 3)
			e = lit[bits&(1<<litBits-1)]
			if e&isLiteral != 0 {
				bits >>= e & 63
				n -= uint(e & 63)
				binary.LittleEndian.PutUint16(out[at:], uint16(e>>8))
				at += int(e >> 6 & 3)
				e = lit[bits&(1<<litBits-1)]
				if e&isLiteral != 0 {
					bits >>= e & 63
					n -= uint(e & 63)
					binary.LittleEndian.PutUint16(out[at:], uint16(e>>8))
					at += int(e >> 6 & 3)
					continue
				}
			}
		}
		if e&isOther != 0 {
			if e&isTable != 0 {
				e = lit[1<<litBits+int(e>>12&0xfff)+int(bits>>litBits&(1<<(e>>8&15)-1))]
				if e&isLiteral != 0 {
					bits >>= e & 63
					n -= uint(e & 63)
					out[at] = byte(e >> 8)
					at++
					continue
				}
			}
			if e&isOther != 0 {
				if e&isEnd == 0 {
					err = ErrCorrupt
					break
				}
				bits >>= e & 63
				n -= uint(e & 63)
				end = true
				break
			}
		}
		length := int(e>>12&0x7fff) + int(bits&(1<<(e&63)-1)>>(e>>8&15))
		bits >>= e & 63
		n -= uint(e & 63)
		if n < 28 {
			bits |= binary.LittleEndian.Uint64(in[from:]) << (n & 63)
			from += int((63 - n) >> 3)
			n |= 56
		}
		e = dist[bits&(1<<distBits-1)]
		if e&isTable != 0 {
			e = dist[1<<distBits+int(e>>12&0xfff)+int(bits>>distBits&(1<<(e>>8&15)-1))]
		}
		if e&isOther != 0 {
			err = ErrCorrupt
			break
		}
		back := int(e>>12&0x7fff) + int(bits&(1<<(e&63)-1)>>(e>>8&15))
		bits >>= e & 63
		n -= uint(e & 63)
		if back > at-base {
			err = ErrCorrupt
			break
		}
		to := at + length
		src := at - back
		switch {
		case back >= 8:
			// Most matches are short; what is written beyond their end will be overwritten, or is in the slack.
			binary.LittleEndian.PutUint64(out[at:], binary.LittleEndian.Uint64(out[src:]))
			binary.LittleEndian.PutUint64(out[at+8:], binary.LittleEndian.Uint64(out[src+8:]))
			for at, src = at+16, src+16; at < to; {
				binary.LittleEndian.PutUint64(out[at:], binary.LittleEndian.Uint64(out[src:]))
				at += 8
				src += 8
			}
		case back == 1:
			same := uint64(out[src]) * 0x0101010101010101
			for at < to {
				binary.LittleEndian.PutUint64(out[at:], same)
				at += 8
			}
		default:
			for at < to {
				out[at] = out[src]
				at++
				src++
			}
		}
		at = to
	}
	z.from, z.at, z.bits, z.n = from, at, bits, n
	return end, err
}
