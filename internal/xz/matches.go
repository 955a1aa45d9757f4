package xz

import (
	"encoding/binary"
	"math/bits"
)

const (
	// nice is the length of a match from which on no better one is looked for, and depth how many places are looked at for one. Both are
	// those of "xz -8".
	nice  = 64
	depth = 48
)

// match is a length, and the distance less 1.
type match struct{ n, distance uint32 }

// finder finds where bytes were before. The places that have the same hash of four bytes are in a binary tree, sorted by what follows
// them, the latest one at the root; each search makes the place that it is for the new root. Matches of two and three bytes are worth
// something only if they are near: of those, the last places alone are known.
//
// A place is known by its number, plus 1; 0 is none.
type finder struct {
	data  []byte
	at    int
	two   [1 << 16]uint32
	three [1 << 16]uint32
	four  []uint32
	shift uint
	sons  []uint32 // of each place two: what follows the left one is smaller
}

// reset begins with other bytes.
func (f *finder) reset(data []byte) {
	f.data, f.at = data, 0
	clear(f.two[:])
	clear(f.three[:])
	width := max(bits.Len(uint(len(data))), 12) - 2
	f.shift = uint(32 - width)
	f.four = sized(f.four, 1<<width)
	clear(f.four)
	f.sons = sized(f.sons, 2*len(data)) // each is written before it is read
}

// sized returns a slice of a length. One that is new has room for somewhat larger ones: parts of a delta are never of the same size, and
// what each leaves behind would be much.
func sized[T any](s []T, n int) []T {
	if cap(s) < n {
		s = make([]T, 1<<bits.Len(uint(n-1)))
	}
	return s[:n]
}

// mix is the golden ratio, as a hash multiplies by it.
const mix = 0x9e3779b1

// find appends the matches of the next place, longer and longer ones, each as near as it can be, and goes on by one.
func (f *finder) find(found []match) []match {
	at, data := f.at, f.data
	f.at++
	if len(data)-at < 4 {
		return found
	}
	word := binary.LittleEndian.Uint32(data[at:])
	h2, h3 := word&0xffff, word<<8*mix>>16
	two, three := f.two[h2], f.three[h3]
	f.two[h2], f.three[h3] = uint32(at+1), uint32(at+1)
	limit := min(maxMatch, len(data)-at)
	best := 1
	if two != 0 {
		best = common(data, int(two)-1, at, 2, limit)
		found = append(found, match{uint32(best), uint32(at) - two})
	}
	if three != 0 && three != two {
		if n := common(data, int(three)-1, at, 0, limit); n > max(best, 2) {
			best = n
			found = append(found, match{uint32(n), uint32(at) - three})
		}
	}
	return f.plant(at, word*mix>>f.shift, max(best, 3), found)
}

// skip goes on by n places.
func (f *finder) skip(n int) {
	for range n {
		at := f.at
		f.at++
		if len(f.data)-at < 4 {
			continue
		}
		word := binary.LittleEndian.Uint32(f.data[at:])
		f.two[word&0xffff], f.three[word<<8*mix>>16] = uint32(at+1), uint32(at+1)
		f.plant(at, word*mix>>f.shift, maxMatch, nil)
	}
}

// plant makes a place the root of the tree of its hash, and appends matches that are longer than the best one.
func (f *finder) plant(at int, hash uint32, best int, found []match) []match {
	data, sons := f.data, f.sons
	left, right := 2*at, 2*at+1 // where the next one goes that is smaller, or larger
	below, above := 0, 0        // what the last of those have in common with this place
	place := f.four[hash]
	f.four[hash] = uint32(at + 1)
	limit := min(nice, len(data)-at)
	for range depth {
		if place == 0 {
			break
		}
		other := int(place) - 1
		n := common(data, other, at, min(below, above), limit)
		if n == limit { // it takes the other's place
			sons[left], sons[right] = sons[2*other], sons[2*other+1]
			if n > best {
				n = common(data, other, at, n, min(maxMatch, len(data)-at))
				found = append(found, match{uint32(n), uint32(at) - place})
			}
			return found
		}
		if n > best {
			best = n
			found = append(found, match{uint32(n), uint32(at) - place})
		}
		if data[other+n] < data[at+n] {
			sons[left] = place
			left, below = 2*other+1, n
			place = sons[left]
		} else {
			sons[right] = place
			right, above = 2*other, n
			place = sons[right]
		}
	}
	sons[left], sons[right] = 0, 0
	return found
}

// common returns how many bytes are the same at two places, of which n are known to be, up to a limit that the later one has.
func common(data []byte, earlier, later, n, limit int) int {
	a, b := data[earlier:earlier+limit], data[later:later+limit]
	for n+8 <= limit {
		if x := binary.LittleEndian.Uint64(a[n:]) ^ binary.LittleEndian.Uint64(b[n:]); x != 0 {
			return n + bits.TrailingZeros64(x)/8
		}
		n += 8
	}
	for n < limit && a[n] == b[n] {
		n++
	}
	return n
}
