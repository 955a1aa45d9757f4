package delta

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// A file is described by one that is similar, as bsdiff does it (Percival, "Naive differences of executable code"): where both have the
// same bytes they are laid upon each other, and that goes on in both directions while more than half of the bytes are the same.
// Code that has moved differs in few bytes then, all over, and the differences compress well. Places that are the same are found by
// a table of hashes and not by a suffix array: in linear time, and in memory that does not grow with the file.

// run is a stretch of the new file: add bytes that lie upon the old one, and then copy bytes that are new.
type run struct {
	new, old  int // where it begins
	add, copy int // bytes
}

const (
	blockSize  = 16      // bytes that have to be the same to be found
	maxBlocks  = 4 << 20 // in the table
	maxProbes  = 4       // slots that a block can be in
	minBetter  = 8       // bytes that another place has to have more than the present one
	minLiteral = 32      // bytes that are the same, to be written from the source
)

// index finds blocks of a file.
type index struct {
	old   []byte
	slots []int32 // place of a block + 1, by its hash
	shift int
}

func newIndex(old []byte) *index {
	step := max(1, len(old)/maxBlocks)
	n := bits.Len(uint(2 * (len(old)/step + 1)))
	x := &index{old, make([]int32, 1<<n), 64 - n}
	for at := 0; at+blockSize <= len(old); at += step {
		// Of blocks that are the same, the first is found: long stretches of zeros are entered at their beginning.
		if slot := x.slot(old[at:]); slot != nil && *slot == 0 {
			*slot = int32(at + 1)
		}
	}
	return x
}

// slot returns the slot of the block that b begins with, or an empty one; nil if there is none in reach.
func (x *index) slot(b []byte) *int32 {
	h := x.hash(b)
	for i := range uint64(maxProbes) {
		slot := &x.slots[(h+i)%uint64(len(x.slots))]
		if *slot == 0 || bytes.Equal(x.old[*slot-1:][:blockSize], b[:blockSize]) {
			return slot
		}
	}
	return nil
}

func (x *index) hash(b []byte) uint64 {
	h := binary.LittleEndian.Uint64(b)*0x9e3779b97f4a7c15 ^ bits.RotateLeft64(binary.LittleEndian.Uint64(b[8:]), 29)
	return h * 0xd6e8feb86659fd93 >> x.shift
}

// find returns where in the old file the block is that b begins with, or -1.
func (x *index) find(b []byte) int {
	if slot := x.slot(b); slot != nil {
		return int(*slot) - 1
	}
	return -1
}

// diff describes a new file by an old one, both of less than 2 GiB. The runs cover the new file, in order.
func diff(old, new []byte) []run {
	x := newIndex(old)
	var runs []run
	at := run{}
	scan := 0
	for at.new < len(new) {
		p, q, n := x.next(new, scan, at.old-at.new)
		forward := extend(old[at.old:], new[at.new:p])
		back := 0
		if p < len(new) {
			back = extendBack(old[:q], new[at.new:p])
		}
		if over := forward + back - (p - at.new); over > 0 {
			// Both lie upon the same stretch: each takes the side on which it fits better.
			k := split(old[at.old+forward-over:], old[q-back:], new[p-back:p-back+over])
			forward -= over - k
			back -= k
		}
		at.add, at.copy = forward, p-back-at.new-forward
		if at.add+at.copy > 0 || len(runs) == 0 { // the first begins at the beginning of the old file
			runs = append(runs, at)
		}
		at = run{new: p - back, old: q - back}
		scan = p + n
	}
	return runs
}

// next finds the next place p of the new file that is the same as a place q of the old one, for n bytes, and where the present offset
// is clearly worse. If there is none, p is the end.
func (x *index) next(new []byte, scan, offset int) (p, q, n int) {
	for p = scan; p+blockSize <= len(new); {
		if o := p + offset; o >= 0 && o+blockSize <= len(x.old) && bytes.Equal(x.old[o:o+blockSize], new[p:p+blockSize]) {
			p += same(x.old[o:], new[p:])
			continue
		}
		if q = x.find(new[p:]); q < 0 {
			p++
			continue
		}
		n = same(x.old[q:], new[p:])
		if n > minBetter+matches(x.old, p+offset, new[p:p+n]) {
			return p, q, n
		}
		p += n
	}
	return len(new), 0, 0
}

// same returns how many bytes are the same from the beginning.
func same(a, b []byte) int {
	n := min(len(a), len(b))
	i := 0
	for ; i+8 <= n; i += 8 {
		if d := binary.LittleEndian.Uint64(a[i:]) ^ binary.LittleEndian.Uint64(b[i:]); d != 0 {
			return i + bits.TrailingZeros64(d)/8
		}
	}
	for i < n && a[i] == b[i] {
		i++
	}
	return i
}

// matches counts the bytes of b that are the same in the old file at a place, which may lie outside.
func matches(old []byte, at int, b []byte) int {
	n := 0
	for i, c := range b {
		if o := at + i; o >= 0 && o < len(old) && old[o] == c {
			n++
		}
	}
	return n
}

// extend returns up to where b lies well upon a: where it has most bytes that are the same, less those that are not.
func extend(a, b []byte) int {
	best, score, size := 0, 0, 0
	for i := range min(len(a), len(b)) {
		if a[i] == b[i] {
			score++
		} else {
			score--
		}
		if score > best {
			best, size = score, i+1
		}
	}
	return size
}

// extendBack is extend from the ends backward.
func extendBack(a, b []byte) int {
	best, score, size := 0, 0, 0
	for i := 1; i <= min(len(a), len(b)); i++ {
		if a[len(a)-i] == b[len(b)-i] {
			score++
		} else {
			score--
		}
		if score > best {
			best, size = score, i
		}
	}
	return size
}

// split returns how many of the bytes of b go to the first of two places in the old file; the others go to the second.
func split(first, second, b []byte) int {
	best, score, size := 0, 0, 0
	for i, c := range b {
		if first[i] == c {
			score++
		}
		if second[i] == c {
			score--
		}
		if score > best {
			best, size = score, i+1
		}
	}
	return size
}

// patch returns the runs in the form of bspatch.go.
func patch(runs []run, old, new []byte) []byte {
	b := make([]byte, 0, len(new)+24*len(runs))
	for i, r := range runs {
		seek := 0
		if i+1 < len(runs) {
			seek = runs[i+1].old - (r.old + r.add)
		}
		b = appendOfftin(b, int64(r.add))
		b = appendOfftin(b, int64(r.copy))
		b = appendOfftin(b, int64(seek))
		for k, c := range new[r.new:][:r.add] {
			b = append(b, c-old[r.old+k])
		}
		b = append(b, new[r.new+r.add:][:r.copy]...)
	}
	return b
}

// piece is a stretch of the new file that is written as it is: a range of the old file, or literally.
type piece struct {
	old  int // -1 if it is literal
	size int
}

// pieces returns the runs as what can be written without a patch.
func pieces(runs []run, old, new []byte) []piece {
	var list []piece
	literal := func(n int) {
		if n == 0 {
			return
		}
		if k := len(list) - 1; k >= 0 && list[k].old < 0 {
			list[k].size += n
		} else {
			list = append(list, piece{-1, n})
		}
	}
	for _, r := range runs {
		for at := 0; at < r.add; {
			n := same(old[r.old+at:r.old+r.add], new[r.new+at:])
			if n >= minLiteral {
				list = append(list, piece{r.old + at, n})
				at += n
				n = 0
			}
			start := at
			for at += n; at < r.add && old[r.old+at] != new[r.new+at]; {
				at++
			}
			literal(at - start)
		}
		literal(r.copy)
	}
	return list
}

// What a description costs when it is compressed, about, in bytes.

func patchCost(runs []run, old, new []byte) int {
	n := 0
	for _, r := range runs {
		n += 8 + r.copy + r.add - matches(old, r.old, new[r.new:][:r.add])
	}
	return n
}

func piecesCost(list []piece) int {
	n := 0
	for _, p := range list {
		n += 8
		if p.old < 0 {
			n += p.size
		}
	}
	return n
}
