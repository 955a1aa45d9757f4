package xz

import (
	"math"
	"math/bits"
)

// What a symbol costs is known from the probabilities: the logarithms of those of its bits. Prices are in sixteenths of a bit.

const endless = 1 << 30

// bitPrices has what a bit of 0 costs that has a probability.
var bitPrices = func() (t [1 << (probBits - 4)]uint32) {
	for i := range t {
		t[i] = uint32(math.Round(-16 * math.Log2((float64(i)+0.5)/float64(len(t)))))
	}
	return t
}()

func bitPrice(p prob, bit uint32) uint32 { return bitPrices[(uint32(p)^-bit&(1<<probBits-1))>>4] }

func treePrice(p []prob, width, value uint32) (price uint32) {
	for m := value | 1<<width; m > 1; m >>= 1 {
		price += bitPrice(p[m>>1], m&1)
	}
	return price
}

func reversePrice(p []prob, width, value uint32) (price uint32) {
	m := uint32(1)
	for k := range width {
		b := value >> k & 1
		price += bitPrice(p[m], b)
		m = m<<1 | b
	}
	return price
}

// slotOf returns the slot of a distance: how many bits it has, and the second one.
func slotOf(distance uint32) uint32 {
	if distance < 4 {
		return distance
	}
	n := uint32(bits.Len32(distance)) - 1
	return n<<1 | distance>>(n-1)&1
}

const (
	near    = 128 // distances below have no bits that are not modelled
	refresh = 64  // matches after which prices of lengths and distances are computed again
)

// prices has those that many symbols share. They are a bit old.
type prices struct {
	coded     int                                     // matches since they were computed
	lengths   [2][1 << placeBits][maxMatch + 1]uint32 // of matches, and of repeated ones
	slots     [4][64]uint32                           // with the bits that are not modelled
	distances [4][near]uint32
	aligns    [16]uint32
}

func (p *prices) update(m *probs) {
	p.coded = 0
	for k, l := range []*lengths{&m.matchLength, &m.repeatedMatch} {
		for posState := range p.lengths[k] {
			l.prices(p.lengths[k][posState][minMatch:], posState)
		}
	}
	for i := range p.slots {
		for slot := range uint32(64) {
			price := treePrice(m.slot[i][:], 6, slot)
			if slot >= 14 {
				price += (slot>>1 - 1 - 4) * 16
			}
			p.slots[i][slot] = price
		}
	}
	for d := range uint32(near) {
		price, slot := uint32(0), slotOf(d)
		if slot >= 4 {
			width := slot>>1 - 1
			base := (2 | slot&1) << width
			price = reversePrice(m.special[base-slot:], width, d-base)
		}
		for i := range p.distances {
			p.distances[i][d] = p.slots[i][slot] + price
		}
	}
	for i := range p.aligns {
		p.aligns[i] = reversePrice(m.align[:], 4, uint32(i))
	}
}

func (l *lengths) prices(to []uint32, posState int) {
	short, other := bitPrice(l.choice, 0), bitPrice(l.choice, 1)
	mid, long := other+bitPrice(l.choice2, 0), other+bitPrice(l.choice2, 1)
	for n := range uint32(len(to)) {
		switch {
		case n < 8:
			to[n] = short + treePrice(l.low[posState][:], 3, n)
		case n < 16:
			to[n] = mid + treePrice(l.mid[posState][:], 3, n-8)
		default:
			to[n] = long + treePrice(l.high[:], 8, n-16)
		}
	}
}

// distance returns the price of a distance, by that of its match's length: 0 for 2, to 3.
func (p *prices) distance(distance uint32, length int) uint32 {
	if distance < near {
		return p.distances[length][distance]
	}
	return p.slots[length][slotOf(distance)] + p.aligns[distance&15]
}

// literalPrice returns the price of a byte. After a match it depends on the byte that would have followed that one.
func literalPrice(p *[0x300]prob, value byte, afterMatch bool, matched byte) (price uint32) {
	symbol := uint32(value) | 0x100
	if !afterMatch {
		for ; symbol > 1; symbol >>= 1 {
			price += bitPrice(p[symbol>>1], symbol&1)
		}
		return price
	}
	m, half := uint32(matched), uint32(0x100)
	for symbol < 0x10000 {
		m <<= 1
		price += bitPrice(p[half+m&half+symbol>>8], symbol>>7&1)
		symbol <<= 1
		half &= ^(m ^ symbol)
	}
	return price
}
