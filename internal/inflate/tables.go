package inflate

import "math/bits"

const (
	litBits  = 11 // of the first look
	distBits = 8
	maxBits  = 15 // of a code
	maxLit   = 286
	maxDist  = 30
)

// A table is followed by those for longer codes, each for codes that begin alike. There are at most half as many as such codes, since
// codes are complete.
type (
	litTable  [1<<litBits + maxFixed/2<<(maxBits-litBits)]uint32
	distTable [1<<distBits + 32/2<<(maxBits-distBits)]uint32
)

const maxFixed = 288 // the fixed code has two lengths that are never used

const (
	isLiteral = 1 << 31
	isOther   = 1 << 30
	isEnd     = 1 << 29
	isTable   = 1 << 28
)

// litEntries and distEntries are the entries of the symbols, without the bits of their codes.
var litEntries, distEntries = func() (lit [maxFixed]uint32, dist [32]uint32) {
	for k := range 256 {
		lit[k] = isLiteral | uint32(k)<<8 | 1<<6
	}
	lit[256] = isOther | isEnd
	base := uint32(3)
	for k := 257; k < 285; k++ {
		extra := uint32(max(0, (k-261)/4))
		lit[k] = base<<12 | extra
		base += 1 << extra
	}
	lit[285] = longest << 12
	lit[286], lit[287] = isOther, isOther
	base = 1
	for k := range maxDist {
		extra := uint32(max(0, (k-2)/2))
		dist[k] = base<<12 | extra
		base += 1 << extra
	}
	dist[30], dist[31] = isOther, isOther
	return lit, dist
}()

// The codes of blocks that bring none (RFC 1951, 3.2.6).
var fixedLit, fixedDist = func() (lit litTable, dist distTable) {
	var lengths [maxFixed]uint8
	for k := range lengths {
		switch {
		case k < 144:
			lengths[k] = 8
		case k < 256:
			lengths[k] = 9
		case k < 280:
			lengths[k] = 7
		default:
			lengths[k] = 8
		}
	}
	build(lit[:], litBits, lengths[:], litEntries[:])
	pair(&lit)
	var five [32]uint8
	for k := range five {
		five[k] = 5
	}
	build(dist[:], distBits, five[:], distEntries[:])
	return lit, dist
}()

// order is that of the lengths of the code for lengths.
var order = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// codes reads the codes of a block (RFC 1951, 3.2.7).
func (z *Reader) codes() error {
	counts, err := z.take(14)
	if err != nil {
		return err
	}
	lits, dists, n := counts&31+257, counts>>5&31+1, counts>>10+4
	if lits > maxLit || dists > maxDist {
		return ErrCorrupt
	}
	var small [19]uint8
	for _, k := range order[:n] {
		v, err := z.take(3)
		if err != nil {
			return err
		}
		small[k] = uint8(v)
	}
	var table [1 << 7]uint32
	var symbols [19]uint32
	for k := range symbols {
		symbols[k] = uint32(k) << 12
	}
	if !build(table[:], 7, small[:], symbols[:]) {
		return ErrCorrupt
	}
	lengths := z.lengths[:lits+dists]
	for k := 0; k < len(lengths); {
		// The end of the input may be nearer than the longest code.
		err := z.need(7)
		e := table[z.bits&127]
		if e&isOther != 0 || uint(e&63) > z.n {
			if err == nil {
				err = ErrCorrupt
			}
			return err
		}
		z.bits >>= e & 63
		z.n -= uint(e & 63)
		length, from, extra := uint8(0), 0, uint(0)
		switch symbol := e >> 12; symbol {
		default:
			lengths[k] = uint8(symbol)
			k++
			continue
		case 16:
			if k == 0 {
				return ErrCorrupt
			}
			length, from, extra = lengths[k-1], 3, 2
		case 17:
			from, extra = 3, 3
		case 18:
			from, extra = 11, 7
		}
		more, err := z.take(extra)
		if err != nil {
			return err
		}
		if from += more; from > len(lengths)-k {
			return ErrCorrupt
		}
		for range from {
			lengths[k] = length
			k++
		}
	}
	if !build(z.ownLit[:], litBits, lengths[:lits], litEntries[:]) || !build(z.ownDist[:], distBits, lengths[lits:], distEntries[:]) {
		return ErrCorrupt
	}
	pair(&z.ownLit)
	return nil
}

// build fills a table whose first look takes size bits from the lengths of codes, and reports whether they are a code: complete, or
// one code of one bit, or none at all, as other programs permit it, too.
func build(table []uint32, size int, lengths []uint8, entries []uint32) bool {
	var count [maxBits + 1]int
	for _, l := range lengths {
		count[l]++
	}
	longest := 0
	var next [maxBits + 1]int // code of each length
	code, used := 0, 0
	for l := 1; l <= maxBits; l++ {
		next[l] = code
		if count[l] > 0 {
			longest = l
		}
		used += count[l] << (maxBits - l)
		code = (code + count[l]) << 1
	}
	complete := used == 1<<maxBits
	if !complete {
		if used != 0 && (longest != 1 || count[1] != 1) {
			return false
		}
		for k := range table[:1<<size] {
			table[k] = isOther
		}
	}
	// Longer codes, by their first bits.
	deeper, free := max(0, longest-size), 0
	if deeper > 0 {
		clear(table[:1<<size])
	}
	for symbol, l := range lengths {
		if l == 0 {
			continue
		}
		length := int(l)
		code := int(bits.Reverse16(uint16(next[length])) >> (16 - length))
		next[length]++
		// What is added to a length or distance is taken together with the code.
		e := entries[symbol]
		if e&(isLiteral|isOther) == 0 {
			e |= uint32(length) << 8
		}
		e += uint32(length)
		if length <= size {
			for k := code; k < 1<<size; k += 1 << length {
				table[k] = e
			}
			continue
		}
		first := code & (1<<size - 1)
		if table[first]&isTable == 0 {
			table[first] = isOther | isTable | uint32(free)<<12 | uint32(deeper)<<8
			free += 1 << deeper
		}
		sub := table[1<<size+int(table[first]>>12&0xfff):][:1<<deeper]
		for k := code >> size; k < 1<<deeper; k += 1 << (length - size) {
			sub[k] = e
		}
	}
	return true
}

// pair puts two literals into an entry where the codes of both fit.
func pair(t *litTable) {
	for k := 1<<litBits - 1; k >= 0; k-- { // downwards: the index of the second is not larger, so it is not paired yet
		e := t[k]
		second := t[k>>(e&63)]
		if e&second&isLiteral != 0 && e&63+second&63 <= litBits {
			t[k] = isLiteral | 2<<6 | second&0xff00<<8 | e&0xff00 | (e&63 + second&63)
		}
	}
}
