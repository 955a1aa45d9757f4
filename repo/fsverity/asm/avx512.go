package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// avx512 keeps the state in Z0 to Z7 and the words in Z16 to Z31. It needs AVX512F and AVX512BW.
type avx512 struct{ swap Mem }

var z = []reg.VecPhysical{
	reg.Z0, reg.Z1, reg.Z2, reg.Z3, reg.Z4, reg.Z5, reg.Z6, reg.Z7, reg.Z8, reg.Z9, reg.Z10, reg.Z11, reg.Z12, reg.Z13, reg.Z14, reg.Z15,
	reg.Z16, reg.Z17, reg.Z18, reg.Z19, reg.Z20, reg.Z21, reg.Z22, reg.Z23, reg.Z24, reg.Z25, reg.Z26, reg.Z27, reg.Z28, reg.Z29, reg.Z30, reg.Z31,
}

// Truth tables of the functions of three bits.
const (
	ternaryXor      = 0x96
	ternaryChoose   = 0xca
	ternaryMajority = 0xe8
)

func (*avx512) width() int                 { return 64 }
func (*avx512) state() []reg.VecPhysical   { return z[:8] }
func (*avx512) begin([]reg.VecPhysical)    {}
func (*avx512) move(from, to Op)           { VMOVDQU64(from, to) }
func (*avx512) word(j int) reg.VecPhysical { return z[16+j] }

func (*avx512) add(h hash, a, b, to Op) {
	if h.word == 4 {
		VPADDD(a, b, to)
	} else {
		VPADDQ(a, b, to)
	}
}

func (*avx512) addConstant(h hash, k, to Op) {
	if h.word == 4 {
		VPADDD_BCST(k, to, to)
	} else {
		VPADDQ_BCST(k, to, to)
	}
}

func (*avx512) rotate(h hash, n uint64, from, to Op) {
	if h.word == 4 {
		VPRORD(U8(n), from, to)
	} else {
		VPRORQ(U8(n), from, to)
	}
}

func (*avx512) shift(h hash, n uint64, from, to Op) {
	if h.word == 4 {
		VPSRLD(U8(n), from, to)
	} else {
		VPSRLQ(U8(n), from, to)
	}
}

func (*avx512) ternary(h hash, table uint8, a, b, c Op) {
	if h.word == 4 {
		VPTERNLOGD(U8(table), c, b, a)
	} else {
		VPTERNLOGQ(U8(table), c, b, a)
	}
}

func (v *avx512) transpose(h hash, in, offset reg.GPPhysical) {
	lanes := 64 / h.word
	// A row is what 64 bytes of one lane hold; SHA-512 has two for each lane.
	for half := range h.chunk() / 64 {
		rows := z[16+half*8:][:lanes]
		for lane, row := range rows {
			MOVQ(Mem{Base: in, Disp: 8 * lane}, reg.R8)
			VMOVDQU64(Mem{Base: reg.R8, Index: offset, Scale: 1, Disp: 64 * half}, row)
		}
		if h.word == 4 {
			// Squares of four by four words, which then stand in the four parts of a register.
			for g := 0; g < lanes; g += 4 {
				r, t := rows[g:g+4], z[g:g+4]
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
				VPUNPCKLQDQ(rows[g+1], rows[g], z[8])
				VPUNPCKHQDQ(rows[g+1], rows[g], rows[g+1])
				VMOVDQA64(z[8], rows[g])
			}
		}
		// Then the parts themselves are transposed.
		step := lanes / 4
		for c := range step {
			r, t := []reg.VecPhysical{rows[c], rows[step+c], rows[2*step+c], rows[3*step+c]}, z[4*(c%4):][:4]
			VSHUFI32X4(U8(0x44), r[1], r[0], t[0])
			VSHUFI32X4(U8(0xee), r[1], r[0], t[1])
			VSHUFI32X4(U8(0x44), r[3], r[2], t[2])
			VSHUFI32X4(U8(0xee), r[3], r[2], t[3])
			VSHUFI32X4(U8(0x88), t[2], t[0], r[0])
			VSHUFI32X4(U8(0xdd), t[2], t[0], r[1])
			VSHUFI32X4(U8(0x88), t[3], t[1], r[2])
			VSHUFI32X4(U8(0xdd), t[3], t[1], r[3])
		}
	}
	VMOVDQU64(v.swap, z[0])
	for j := range 16 {
		VPSHUFB(z[0], v.word(j), v.word(j))
	}
}

func (v *avx512) schedule(h hash, j int) {
	w, next, mid, last := v.word(j), v.word((j+1)%16), v.word((j+9)%16), v.word((j+14)%16)
	t := z[8:]
	v.rotate(h, h.sigma0[0], next, t[0])
	v.rotate(h, h.sigma0[1], next, t[1])
	v.shift(h, h.sigma0[2], next, t[2])
	v.rotate(h, h.sigma1[0], last, t[3])
	v.rotate(h, h.sigma1[1], last, t[4])
	v.shift(h, h.sigma1[2], last, t[5])
	v.add(h, mid, w, w)
	v.ternary(h, ternaryXor, t[0], t[1], t[2])
	v.ternary(h, ternaryXor, t[3], t[4], t[5])
	v.add(h, t[0], w, w)
	v.add(h, t[3], w, w)
}

func (v *avx512) round(h hash, s []reg.VecPhysical, k Mem, j int) {
	t := z[8:]
	a, b, c, d, e, f, g, hh := s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
	v.addConstant(h, k, hh)
	if j >= 0 {
		v.add(h, v.word(j), hh, hh)
	}
	v.rotate(h, h.sum1[0], e, t[0])
	v.rotate(h, h.sum1[1], e, t[1])
	v.rotate(h, h.sum1[2], e, t[2])
	VMOVDQA64(e, t[3])
	v.ternary(h, ternaryXor, t[0], t[1], t[2])
	v.ternary(h, ternaryChoose, t[3], f, g)
	v.add(h, t[3], hh, hh)
	v.rotate(h, h.sum0[0], a, t[4])
	v.rotate(h, h.sum0[1], a, t[5])
	v.rotate(h, h.sum0[2], a, t[6])
	v.add(h, t[0], hh, hh)
	VMOVDQA64(a, t[7])
	v.ternary(h, ternaryXor, t[4], t[5], t[6])
	v.ternary(h, ternaryMajority, t[7], b, c)
	v.add(h, hh, d, d)
	v.add(h, t[7], t[4], t[4])
	v.add(h, t[4], hh, hh)
}
