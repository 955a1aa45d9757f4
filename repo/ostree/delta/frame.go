package delta

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
)

// A superblock with parts inside and the payload of a part can be larger than memory. So the outermost containers are taken apart
// here, where they lie, by the framing offsets of GVariant; package gvariant has what they are, and reads what is inside.

var (
	errFrame    = errors.New("framing offsets that are out of range or descend")
	errTooLarge = errors.New("it is too large")
)

// frameWidth returns the size of framing offsets in a container of this size.
func frameWidth(size int64) int64 {
	switch {
	case size <= math.MaxUint8:
		return 1
	case size <= math.MaxUint16:
		return 2
	case size <= math.MaxUint32:
		return 4
	}
	return 8
}

// tuple returns the framing offsets that a tuple ends with, in the order of its members, and where they begin.
func tuple(r *io.SectionReader, n int) (ends []int64, limit int64, err error) {
	width := frameWidth(r.Size())
	limit = r.Size() - int64(n)*width
	if limit < 0 {
		return nil, 0, errFrame
	}
	if ends, err = offsets(r, limit, n); err != nil {
		return nil, 0, err
	}
	for i := range n / 2 {
		ends[i], ends[n-1-i] = ends[n-1-i], ends[i]
	}
	return ends, limit, ascending(ends, limit)
}

// offsets reads n framing offsets.
func offsets(r *io.SectionReader, at int64, n int) ([]int64, error) {
	width := frameWidth(r.Size())
	b := make([]byte, int64(n)*width)
	if _, err := r.ReadAt(b, at); err != nil && err != io.EOF {
		return nil, err
	}
	ends := make([]int64, n)
	for i := range ends {
		var word [8]byte
		copy(word[:], b[int64(i)*width:][:width])
		ends[i] = int64(min(binary.LittleEndian.Uint64(word[:]), math.MaxInt64))
	}
	return ends, nil
}

func ascending(ends []int64, limit int64) error {
	last := int64(0)
	for _, end := range ends {
		if end < last || end > limit {
			return errFrame
		}
		last = end
	}
	return nil
}

func align8(n int64) int64 { return (n + 7) &^ 7 }

// part returns a range of r.
func part(r *io.SectionReader, from, to int64) (*io.SectionReader, error) {
	if from < 0 || from > to || to > r.Size() {
		return nil, errFrame
	}
	return io.NewSectionReader(r, from, to-from), nil
}

// load reads a range of r that has at most this size.
func load(r *io.SectionReader, from, to, limit int64) ([]byte, error) {
	s, err := part(r, from, to)
	if err != nil {
		return nil, err
	}
	if s.Size() > limit {
		return nil, fmt.Errorf("%w: %d bytes, at most %d are read", errTooLarge, s.Size(), limit)
	}
	b := make([]byte, s.Size())
	if _, err := io.ReadFull(s, b); err != nil {
		return nil, err
	}
	return b, nil
}

const (
	maxEntries = 1 << 20 // of a dictionary
	maxKey     = 4096    // bytes
	maxType    = 255     // bytes, as in package gvariant
)

// dictEntry is an entry of an a{sv}: the value inside of the variant, and its type.
type dictEntry struct {
	key, typ string
	value    *io.SectionReader
}

// dictionary returns the entries of an a{sv}.
func dictionary(r *io.SectionReader) ([]dictEntry, error) {
	if r.Size() == 0 {
		return nil, nil
	}
	width := frameWidth(r.Size())
	last, err := offsets(r, r.Size()-width, 1)
	if err != nil {
		return nil, err
	}
	n := (r.Size() - last[0]) / width
	if last[0] > r.Size() || n == 0 || n > maxEntries {
		return nil, errFrame
	}
	ends, err := offsets(r, last[0], int(n))
	if err == nil {
		err = ascending(ends, last[0])
	}
	if err != nil {
		return nil, err
	}
	entries := make([]dictEntry, 0, n)
	start := int64(0)
	for _, end := range ends {
		s, err := part(r, align8(start), end)
		if err != nil {
			return nil, err
		}
		e, err := entry(s)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
		start = end
	}
	return entries, nil
}

// entry reads an {sv}.
func entry(r *io.SectionReader) (dictEntry, error) {
	ends, limit, err := tuple(r, 1)
	if err != nil {
		return dictEntry{}, err
	}
	key, err := load(r, 0, ends[0], maxKey)
	if err != nil {
		return dictEntry{}, err
	}
	name, ok := strings.CutSuffix(string(key), "\x00")
	if !ok {
		return dictEntry{}, errors.New("a key without NUL at its end")
	}
	// The type of a variant stands at its end, behind a NUL.
	start := align8(ends[0])
	tail, err := load(r, max(start, limit-maxType-1), limit, maxType+1)
	if err != nil {
		return dictEntry{}, err
	}
	nul := strings.LastIndexByte(string(tail), 0)
	if nul < 0 {
		return dictEntry{}, fmt.Errorf("%.60q: no type", name)
	}
	typ := string(tail[nul+1:])
	value, err := part(r, start, limit-int64(len(typ))-1)
	return dictEntry{name, typ, value}, err
}
