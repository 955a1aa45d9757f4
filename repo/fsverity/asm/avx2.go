package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// avx2 keeps the state in Y0 to Y7 and the words on the stack.
type avx2 struct {
	swap, words  Mem
	byteRotation Mem // a rotation of words of 64 bits by one byte is a permutation of bytes
}

var y = []reg.VecPhysical{
	reg.Y0, reg.Y1, reg.Y2, reg.Y3, reg.Y4, reg.Y5, reg.Y6, reg.Y7, reg.Y8, reg.Y9, reg.Y10, reg.Y11, reg.Y12, reg.Y13, reg.Y14, reg.Y15,
}

func (*avx2) width() int               { return 32 }
func (*avx2) state() []reg.VecPhysical { return y[:8] }
func (*avx2) move(from, to Op)         { VMOVDQU(from, to) }
func (v *avx2) word(j int) Mem         { return v.words.Offset(32 * j) }

// The majority of a, b and c is b ^ (a^b)&(b^c), and the b^c of a round is the a^b of the one before it. They take turns in
// Y14 and Y15.
func (*avx2) begin(s []reg.VecPhysical) { VPXOR(s[1], s[2], y[15]) }

func (*avx2) add(h hash, a, b, to Op) {
	if h.word == 4 {
		VPADDD(a, b, to)
	} else {
		VPADDQ(a, b, to)
	}
}

// rotations xors rotations of from into to; the last one is a shift if shift is set. The two halves of each rotation are joined
// first: that keeps the chain of instructions short that wait for each other.
func (v *avx2) rotations(h hash, n [3]uint64, shift bool, from, to, tmp1, tmp2 Op) {
	bits := uint64(8 * h.word)
	right := func(n uint64, to Op) {
		if h.word == 4 {
			VPSRLD(U8(n), from, to)
		} else {
			VPSRLQ(U8(n), from, to)
		}
	}
	left := func(n uint64, to Op) {
		if h.word == 4 {
			VPSLLD(U8(n), from, to)
		} else {
			VPSLLQ(U8(n), from, to)
		}
	}
	one := func(k int, to, tmp Op) {
		switch {
		case shift && k == 2:
			right(n[k], to)
		case n[k] == 8 && h.word == 8:
			VPSHUFB(v.byteRotation, from, to)
		default:
			right(n[k], to)
			left(bits-n[k], tmp)
			VPXOR(tmp, to, to)
		}
	}
	one(0, to, tmp1)
	one(1, tmp1, tmp2)
	VPXOR(tmp1, to, to)
	one(2, tmp1, tmp2)
	VPXOR(tmp1, to, to)
}

func (v *avx2) transpose(h hash, in, offset reg.GPPhysical) {
	lanes := 32 / h.word
	for part := range h.chunk() / 32 {
		rows, t := y[:lanes], y[lanes:2*lanes]
		for lane, row := range rows {
			MOVQ(Mem{Base: in, Disp: 8 * lane}, reg.R8)
			VMOVDQU(Mem{Base: reg.R8, Index: offset, Scale: 1, Disp: 32 * part}, row)
		}
		if h.word == 4 {
			for g := 0; g < lanes; g += 4 {
				r, t := rows[g:g+4], t[g:g+4]
				VPUNPCKLDQ(r[1], r[0], t[0])
				VPUNPCKHDQ(r[1], r[0], t[1])
				VPUNPCKLDQ(r[3], r[2], t[2])
				VPUNPCKHDQ(r[3], r[2], t[3])
				VPUNPCKLQDQ(t[2], t[0], r[0])
				VPUNPCKHQDQ(t[2], t[0], r[1])
				VPUNPCKLQDQ(t[3], t[1], r[2])
				VPUNPCKHQDQ(t[3], t[1], r[3])
			}
		} else {
			for g := 0; g < lanes; g += 2 {
				VPUNPCKLQDQ(rows[g+1], rows[g], t[g])
				VPUNPCKHQDQ(rows[g+1], rows[g], t[g+1])
			}
			rows, t = t, rows
		}
		// The two parts of the registers.
		step := lanes / 2
		for c := range step {
			VPERM2I128(U8(0x20), rows[step+c], rows[c], t[c])
			VPERM2I128(U8(0x31), rows[step+c], rows[c], t[step+c])
		}
		for c := range lanes {
			VPSHUFB(v.swap, t[c], t[c])
			VMOVDQU(t[c], v.word(part*lanes+c))
		}
	}
}

func (v *avx2) schedule(h hash, j int) {
	w := v.word(j)
	VMOVDQU(v.word((j+1)%16), y[8])
	VMOVDQU(v.word((j+14)%16), y[9])
	VMOVDQU(w, y[13])
	v.add(h, v.word((j+9)%16), y[13], y[13])
	v.rotations(h, h.sigma0, true, y[8], y[10], y[11], y[12])
	v.add(h, y[10], y[13], y[13])
	v.rotations(h, h.sigma1, true, y[9], y[12], y[11], y[8])
	v.add(h, y[12], y[13], y[13])
	VMOVDQU(y[13], w)
}

func (v *avx2) round(h hash, s []reg.VecPhysical, k Mem, j int) {
	a, b, d, e, f, g, hh := s[0], s[1], s[3], s[4], s[5], s[6], s[7]
	if h.word == 4 {
		VPBROADCASTD(k, y[8])
	} else {
		VPBROADCASTQ(k, y[8])
	}
	v.add(h, y[8], hh, hh)
	if j >= 0 {
		v.add(h, v.word(j), hh, hh)
	}
	v.rotations(h, h.sum1, false, e, y[9], y[10], y[8])
	VPXOR(f, g, y[11])
	VPAND(e, y[11], y[11])
	VPXOR(g, y[11], y[11])
	v.add(h, y[9], hh, hh)
	v.add(h, y[11], hh, hh)
	v.add(h, hh, d, d)
	v.rotations(h, h.sum0, false, a, y[12], y[13], y[10])
	// Y14 and Y15 change with every round; a position in the names tells which is which.
	ab, bc := y[14], y[15]
	if a == y[1] || a == y[3] || a == y[5] || a == y[7] {
		ab, bc = bc, ab
	}
	VPXOR(a, b, ab)
	VPAND(ab, bc, bc)
	VPXOR(b, bc, bc)
	v.add(h, y[12], hh, hh)
	v.add(h, bc, hh, hh)
}
