package oci

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// maxExtents limits the pieces of a sparse file.
const maxExtents = 1 << 16

// extent is a piece of a sparse file that has data. Everything else is zeros.
type extent struct{ offset, size int64 }

// sparse tells what the data of an entry are that has holes. GNU tar has had four ways to say it: a header of its own type with
// the first extents in it and more in blocks behind it; and three kinds of PAX records, which have the map in records of their
// own (0.0), in one record (0.1), or before the data (1.0).
//
// The layer keeps the data as they are in the archive; the file with its holes is made when layers are merged.
type sparse struct {
	name    string // of the file, where the entry has another one
	size    int64  // of the file
	extents []extent
	inData  bool // the map stands before the data
}

func (x *extended) sparseRecord(key, value string) error {
	number := func(s string) (int64, error) {
		n, err := strconv.ParseInt(s, 10, 64)
		if err == nil && n < 0 {
			err = errors.New("negative")
		}
		return n, err
	}
	switch key {
	case "offset":
		x.offset = value
		return nil
	case "numbytes":
		at, err := number(x.offset)
		if err != nil {
			return err
		}
		n, err := number(value)
		if err == nil && len(x.sparseMap) >= maxExtents {
			err = fmt.Errorf("more than %d extents", maxExtents)
		}
		x.sparseMap = append(x.sparseMap, extent{at, n})
		return err
	case "map":
		x.sparseMap = nil
		fields := strings.Split(value, ",")
		if len(fields) > 2*maxExtents || len(fields)%2 != 0 {
			return fmt.Errorf("a map of %d numbers", len(fields))
		}
		for k := 0; k < len(fields); k += 2 {
			at, err := number(fields[k])
			n, err2 := number(fields[k+1])
			if err := errors.Join(err, err2); err != nil {
				return err
			}
			x.sparseMap = append(x.sparseMap, extent{at, n})
		}
		return nil
	}
	if x.gnuSparse == nil {
		x.gnuSparse = map[string]string{}
	}
	x.gnuSparse[key] = value
	return nil
}

// sparse returns what the records say of holes, nil if they say nothing.
func (x *extended) sparse(stored int64) (*sparse, error) {
	g := x.gnuSparse
	if g == nil && x.sparseMap == nil {
		return nil, nil
	}
	s := &sparse{name: g["name"], extents: x.sparseMap}
	size := g["size"]
	if g["major"] == "1" && g["minor"] == "0" {
		size, s.inData, s.extents = g["realsize"], true, nil
	}
	if size == "" {
		size = g["realsize"]
	}
	var err error
	if s.size, err = strconv.ParseInt(size, 10, 64); err != nil || s.size < 0 {
		return nil, fmt.Errorf("sparse file: its size is %q", size)
	}
	if !s.inData {
		err = s.check(stored)
	}
	return s, err
}

// oldSparse reads the map of GNU's own type: four extents in the header, and blocks of 21 more.
func (t *tarReader) oldSparse(h header) (*sparse, error) {
	stored, err := h.number(124, 12)
	if err != nil {
		return nil, err
	}
	s := &sparse{}
	if s.size, err = h.number(483, 12); err != nil {
		return nil, err
	}
	take := func(h header, at, count int) error {
		for ; count > 0; at, count = at+24, count-1 {
			if h[at] == 0 {
				return nil
			}
			var e extent
			if e.offset, err = h.number(at, 12); err == nil {
				e.size, err = h.number(at+12, 12)
			}
			if err != nil {
				return fmt.Errorf("sparse file: %w", err)
			}
			if len(s.extents) >= maxExtents {
				return fmt.Errorf("sparse file: more than %d extents", maxExtents)
			}
			s.extents = append(s.extents, e)
		}
		return nil
	}
	if err := take(h, 386, 4); err != nil {
		return nil, err
	}
	for more := h[482]; more != 0; more = t.block[504] {
		if err := t.readBlock(); err != nil {
			return nil, fmt.Errorf("sparse file: %w", io.ErrUnexpectedEOF)
		}
		if err := take(t.block[:], 0, 21); err != nil {
			return nil, err
		}
	}
	return s, s.check(stored)
}

// check tells why a map cannot be right: extents are in order, inside of the file, and have as many bytes as are stored.
func (s *sparse) check(stored int64) error {
	end, sum := int64(0), int64(0)
	for _, e := range s.extents {
		if e.offset < end || e.size < 0 || e.size > s.size-e.offset {
			return fmt.Errorf("sparse file of %d bytes: %d bytes at %d, where %d is reached", s.size, e.size, e.offset, end)
		}
		end, sum = e.offset+e.size, sum+e.size
	}
	if sum != stored || s.size < 0 {
		return fmt.Errorf("sparse file: %d bytes in its map, and %d stored", sum, stored)
	}
	return nil
}

// expand returns the file with its holes, from the data as they are stored.
func (s *sparse) expand(data io.Reader, stored int64) (io.Reader, error) {
	if s.inData {
		in := bufio.NewReader(io.LimitReader(data, stored))
		used, err := s.readMap(in)
		if err != nil {
			return nil, fmt.Errorf("sparse file: %w", err)
		}
		if err := s.check(stored - used); err != nil {
			return nil, err
		}
		data = in
	}
	var parts []io.Reader
	end := int64(0)
	for _, e := range s.extents {
		parts = append(parts, io.LimitReader(zeros{}, e.offset-end), io.LimitReader(data, e.size))
		end = e.offset + e.size
	}
	return io.MultiReader(append(parts, io.LimitReader(zeros{}, s.size-end))...), nil
}

// readMap reads the map that stands before the data: numbers on lines, how many extents, then offset and size of each, up to
// the end of a block.
func (s *sparse) readMap(in *bufio.Reader) (used int64, err error) {
	number := func() (int64, error) {
		for n, digits := int64(0), 0; ; digits++ {
			c, err := in.ReadByte()
			if err != nil {
				return 0, io.ErrUnexpectedEOF
			}
			used++
			if c == '\n' && digits > 0 {
				return n, nil
			}
			if c < '0' || c > '9' || digits > 18 {
				return 0, errors.New("its map has something else than numbers")
			}
			n = n*10 + int64(c-'0')
		}
	}
	count, err := number()
	if err != nil {
		return used, err
	}
	if count < 0 || count > maxExtents {
		return used, fmt.Errorf("%d extents: at most %d are read", count, maxExtents)
	}
	for range count {
		var e extent
		if e.offset, err = number(); err != nil {
			return used, err
		}
		if e.size, err = number(); err != nil {
			return used, err
		}
		s.extents = append(s.extents, e)
	}
	padding := -used & (blockSize - 1)
	n, err := in.Discard(int(padding))
	return used + int64(n), err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
