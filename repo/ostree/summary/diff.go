package summary

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A diff makes a subsummary of an earlier one. It is compressed with gzip, and has "xadf"; the number of operations; the operations; data.
// The numbers are of 32 bits, little endian: the upper four bits of an operation say what is done, the others to how many bytes.
const (
	diffMagic = "xadf"
	diffCopy  = 0 // take them from the old one
	diffSkip  = 1 // pass over them there
	diffData  = 2 // take them from the data
	diffMost  = 1<<28 - 1
)

// ApplyDiff makes the subsummary of an earlier one.
func (s Subsummary) ApplyDiff(old, diff []byte) ([]byte, error) {
	b, err := applyDiff(old, diff)
	if err != nil {
		return nil, fmt.Errorf("diff to subsummary %x: %w", s.Sum, err)
	}
	return b, s.check(b)
}

func applyDiff(old, diff []byte) ([]byte, error) {
	diff, err := gunzip(diff)
	if err != nil {
		return nil, err
	}
	if len(diff) < 8 || string(diff[:4]) != diffMagic {
		return nil, errors.New("not a diff of summaries")
	}
	n := uint64(binary.LittleEndian.Uint32(diff[4:]))
	if n*4 > uint64(len(diff)-8) {
		return nil, fmt.Errorf("%d operations in %d bytes", n, len(diff))
	}
	ops, data := diff[8:8+n*4], diff[8+n*4:]
	var out []byte
	take := func(from *[]byte, n int) ([]byte, error) {
		if n > len(*from) {
			return nil, fmt.Errorf("%d bytes of %d", n, len(*from))
		}
		b := (*from)[:n]
		*from = (*from)[n:]
		return b, nil
	}
	for at := 0; at < len(ops); at += 4 {
		op := binary.LittleEndian.Uint32(ops[at:])
		from := &old
		if op>>28 == diffData {
			from = &data
		}
		b, err := take(from, int(op&diffMost))
		if err == nil && op>>28 > diffData {
			err = errors.New("an unknown one")
		}
		if err != nil {
			return nil, fmt.Errorf("operation %d: %w", at/4, err)
		}
		if op>>28 != diffSkip {
			out = append(out, b...)
		}
	}
	return out, nil
}

// MakeDiff describes a subsummary by an earlier one, compressed.
func MakeDiff(old, new []byte) ([]byte, error) {
	var ops, data []byte
	count := uint32(0)
	op := func(kind uint32, n int) {
		for n > 0 {
			k := min(n, diffMost)
			ops = binary.LittleEndian.AppendUint32(ops, kind<<28|uint32(k))
			count++
			n -= k
		}
	}
	at := 0 // what is before in the old one has been used
	from := newAnchors(old)
	for start := 0; start < len(new); {
		there, here, n := from.next(at, new, start)
		op(diffSkip, there-at)
		op(diffData, here-start)
		data = append(data, new[start:here]...)
		op(diffCopy, n)
		at, start = there+n, here+n
	}
	b := append([]byte(diffMagic), binary.LittleEndian.AppendUint32(nil, count)...)
	return Compress(append(append(b, ops...), data...))
}

// anchors finds where bytes were in an old subsummary: by the blocks that begin at each eighth byte, as the entries of an array of refs do.
type anchors struct {
	old   []byte
	first map[[anchor]byte]int // number of the first block of this content
	later []int                // by number of the block: the next one of the same content, 0 if there is none
}

const (
	anchor = 32 // bytes of a block, which has some of a name or a checksum
	stride = 8
	tries  = 64 // blocks of the same content that are looked at
)

func newAnchors(old []byte) *anchors {
	a := &anchors{old, map[[anchor]byte]int{}, make([]int, max(len(old)-anchor+stride, 0)/stride)}
	for k := len(a.later) - 1; k >= 0; k-- {
		content := [anchor]byte(old[k*stride:])
		a.later[k] = a.first[content]
		a.first[content] = k
	}
	return a
}

// next returns the next bytes of a new subsummary, from start on, that are in the old one, from at on: where they are there, and here, and
// how many. If there are none, that is the end of the new one.
func (a *anchors) next(at int, new []byte, start int) (there, here, n int) {
	if n := same(a.old[at:], new[start:]); n >= stride {
		return at, start, n
	}
	for here := start; here+anchor <= len(new); here++ {
		k, ok := a.first[[anchor]byte(new[here:])]
		for try := 0; ok && k*stride < at && try < tries; try++ {
			k = a.later[k]
			ok = k > 0
		}
		if !ok || k*stride < at {
			continue
		}
		there := k * stride
		for there > at && here > start && a.old[there-1] == new[here-1] {
			there, here = there-1, here-1
		}
		return there, here, same(a.old[there:], new[here:])
	}
	return at, len(new), 0
}

// same returns how many bytes two begin with that are the same.
func same(a, b []byte) int {
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}
