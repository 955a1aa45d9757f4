package uki

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Layout is a PE file that is planned to the last byte but the checksum: a stub with sections appended.
type Layout struct {
	Size   int64
	head   []byte // with the section table
	check  int    // offset of the checksum
	pieces []Content
}

// zeros is content that is all zeros.
type zeros struct{}

func (zeros) ReadAt(b []byte, _ int64) (int, error) { clear(b); return len(b), nil }

// layouter collects what a layout consists of.
type layouter struct {
	stub   *PE
	head   []byte
	table  []Header
	pieces []Content // after the head
	end    int64     // of the file so far
}

// Append lays out a PE file from the stub and the sections of an image, in their order. A section of the base that the stub
// has as well, as .sbat, is put into the stub's place and must fit there. The stub's alignments, machine, time stamp and flags
// are kept, so that the same parts give the same bytes; only the flag NX_COMPAT goes if the kernel does not have it, as both
// are run as one.
func Append(stub *PE, m *Image) (*Layout, error) {
	if stub.CertificateTable.Size > 0 {
		return nil, fmt.Errorf("the stub is signed at offset %d: take the unsigned one", stub.CertificateTable.Offset)
	}
	if len(stub.Sections) == 0 {
		return nil, errors.New("the stub has no sections")
	}
	l := &layouter{stub: stub, table: slices.Clone(stub.Sections)}
	added := map[*Section]bool{}
	inPlace := map[int]*Section{} // section of the stub -> what replaces it
	count := len(l.table)
	for k, profile := range m.Profiles {
		for n := range profile {
			s := &profile[n]
			own := slices.IndexFunc(stub.Sections, func(h Header) bool { return h.Name == s.Name })
			if k == 0 && own >= 0 && !slices.Contains(variants, s.Name) {
				inPlace[own] = s
				continue
			}
			added[s] = true
			count++
		}
	}
	if err := l.makeHead(count); err != nil {
		return nil, err
	}
	if err := l.copyStub(inPlace); err != nil {
		return nil, err
	}
	for _, s := range m.Sections() {
		if !added[s] {
			continue
		}
		if err := l.append(s); err != nil {
			return nil, fmt.Errorf("section %s: %w", s.Name, err)
		}
	}
	l.finish()
	check := stub.optional + offCheckSum
	return &Layout{l.end, l.head, check, append([]Content{Bytes(l.head)}, l.pieces...)}, nil
}

func (l *layouter) u32(off int) uint32      { return binary.LittleEndian.Uint32(l.head[off:]) }
func (l *layouter) put32(off int, v uint32) { binary.LittleEndian.PutUint32(l.head[off:], v) }
func (l *layouter) align(n int64) int64     { return alignUp(n, int64(l.stub.FileAlignment)) }
func (l *layouter) add(c Content)           { l.pieces, l.end = append(l.pieces, c), l.end+c.Size }
func (l *layouter) pad(to int64)            { l.add(Content{zeros{}, to - l.end}) }
func (l *layouter) copy(from, to int64) {
	l.add(Content{io.NewSectionReader(l.stub.file, from, to-from), to - from})
}
func (l *layouter) aligned(n int64) int64 { return alignUp(n, int64(l.stub.SectionAlignment)) }

// memory is where the sections so far end in memory.
func (l *layouter) memory() int64 {
	end := int64(0)
	for _, h := range l.table {
		end = max(end, int64(h.VirtualAddress)+int64(h.VirtualSize))
	}
	return l.aligned(end)
}

// makeHead makes the head with room for a number of sections: there is always some up to the next multiple of the file
// alignment, and as much as is wanted up to the address of the first section.
func (l *layouter) makeHead(sections int) error {
	size := l.align(int64(len(l.stub.head)))
	need := l.align(int64(l.stub.table + sections*headerSize))
	first := int64(l.stub.Sections[0].VirtualAddress)
	for _, h := range l.stub.Sections {
		first = min(first, int64(h.VirtualAddress))
	}
	if need > size {
		if need > first {
			room := (first - int64(l.stub.table)) / headerSize
			return fmt.Errorf("%d sections: the stub's header has room for %d: leave profiles out", sections, room)
		}
		size = need
	}
	l.head = make([]byte, size)
	copy(l.head, l.stub.head[:l.stub.table+len(l.stub.Sections)*headerSize])
	l.put32(l.stub.optional+offSizeOfHeaders, uint32(size))
	l.end = size
	return nil
}

// copyStub takes the stub over, with sections in place of its own. Data that is not aligned, as in old stubs, is moved.
func (l *layouter) copyStub(inPlace map[int]*Section) error {
	pos := int64(len(l.stub.head)) // in the stub
	for k := range l.table {
		h := &l.table[k]
		s := inPlace[k]
		if h.Raw.Size == 0 {
			if s != nil {
				return fmt.Errorf("section %s: the stub has one without data", s.Name)
			}
			continue
		}
		from := int64(h.Raw.Offset)
		if from < pos {
			return fmt.Errorf("stub: section %s: its data at %d is not in the order of the section table", h.Name, from)
		}
		l.copy(pos, from)
		l.pad(l.align(l.end))
		pos = h.Raw.end()
		h.Raw = Range{uint32(l.end), uint32(l.align(int64(h.Raw.Size)))}
		end := h.Raw.end()
		if s == nil {
			l.copy(from, pos)
		} else {
			if room := l.room(*h); s.Virtual > room {
				return fmt.Errorf("section %s: %d bytes, the stub has room for %d: take a newer stub", s.Name, s.Virtual, room)
			}
			h.VirtualSize = uint32(s.Virtual)
			l.add(s.Content)
		}
		l.pad(end)
	}
	if l.dropSymbols(pos) {
		return nil
	}
	l.copy(pos, l.stub.Size)
	return nil
}

// room is how long a section of the stub can be, in the file and in memory.
func (l *layouter) room(h Header) int64 {
	room := int64(h.Raw.Size)
	for _, next := range l.stub.Sections {
		if next.VirtualAddress > h.VirtualAddress {
			room = min(room, int64(next.VirtualAddress-h.VirtualAddress))
		}
	}
	return room
}

// dropSymbols drops the symbols that old stubs have at their end, where no program has any use for them.
func (l *layouter) dropSymbols(pos int64) bool {
	const size = 18 // of a symbol
	coff := l.stub.coff
	at, count := int64(l.u32(coff+12)), int64(l.u32(coff+16))
	if at == 0 || at < pos {
		return false
	}
	end := at + size*count
	if b, err := l.stub.read(end, 4, "string table"); err == nil {
		end += int64(binary.LittleEndian.Uint32(b))
	}
	if end != l.stub.Size {
		return false
	}
	l.copy(pos, at)
	l.put32(coff+12, 0)
	l.put32(coff+16, 0)
	return true
}

// append puts a section at the end.
func (l *layouter) append(s *Section) error {
	if err := checkName(s.Name); err != nil {
		return err
	}
	l.pad(l.align(l.end))
	address := l.memory()
	const limit = 1<<32 - 1
	if s.Virtual > limit || l.end+l.align(s.Virtual) > limit || address+l.aligned(s.Virtual) > limit {
		return fmt.Errorf("%d bytes: the file would pass 4 GiB, where PE files end", s.Virtual)
	}
	h := Header{s.Name, uint32(s.Virtual), uint32(address), Range{uint32(l.end), uint32(l.align(s.Virtual))}, flagRead | flagInitialized}
	if s.Name == ".linux" {
		h.Characteristics = flagRead | flagCode // old kernels are run in place
		if kernel, err := ParsePE(s.Content, s.Size); err == nil {
			off := l.stub.optional + offDLLFlags
			if binary.LittleEndian.Uint16(kernel.head[kernel.optional+offDLLFlags:])&dllNXCompat == 0 {
				binary.LittleEndian.PutUint16(l.head[off:], binary.LittleEndian.Uint16(l.head[off:])&^dllNXCompat)
			}
		}
	}
	l.add(s.Content)
	l.pad(h.Raw.end())
	l.table = append(l.table, h)
	off := l.stub.optional + 8 // SizeOfInitializedData
	l.put32(off, l.u32(off)+h.VirtualSize)
	return nil
}

// finish writes the section table and what follows from it.
func (l *layouter) finish() {
	for k, h := range l.table {
		if k < len(l.stub.Sections) { // only what has changed: the rest is the stub's
			b := l.head[l.stub.table+k*headerSize:]
			binary.LittleEndian.PutUint32(b[8:], h.VirtualSize)
			binary.LittleEndian.PutUint32(b[16:], h.Raw.Size)
			binary.LittleEndian.PutUint32(b[20:], h.Raw.Offset)
			continue
		}
		h.put(l.head[l.stub.table+k*headerSize:])
	}
	binary.LittleEndian.PutUint16(l.head[l.stub.coff+6:], uint16(len(l.table)))
	l.put32(l.stub.optional+offSizeOfImage, uint32(l.memory()))
	l.put32(l.stub.optional+offCheckSum, 0)
}

// Write writes the file. Contents are read once and in order; the checksum is written last.
func (l *Layout) Write(w io.WriterAt) error {
	sum := checksum{}
	buffer := make([]byte, 0, 1<<20)
	at := int64(0)
	flush := func() error {
		sum.add(buffer)
		_, err := w.WriteAt(buffer, at)
		at += int64(len(buffer))
		buffer = buffer[:0]
		return err
	}
	for _, p := range l.pieces {
		for done := int64(0); done < p.Size; {
			room := buffer[len(buffer):cap(buffer)]
			room = room[:min(int64(len(room)), p.Size-done)]
			if got, err := p.ReadAt(room, done); got < len(room) {
				return fmt.Errorf("offset %d: %w", at+int64(len(buffer)+got), short(err))
			}
			buffer = buffer[:len(buffer)+len(room)]
			done += int64(len(room))
			if len(buffer) == cap(buffer) {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	if err := flush(); err != nil {
		return err
	}
	_, err := w.WriteAt(binary.LittleEndian.AppendUint32(nil, sum.value(l.Size)), int64(l.check))
	return err
}

// checksum is that of PE files: the sum of all 16-bit words, with the carry added, plus the size of the file.
type checksum struct{ sum uint64 }

// add takes the next bytes, an even number of them but at the end.
func (c *checksum) add(b []byte) {
	// Sums of 32-bit words, with the carry added, are the same modulo 0xffff.
	for ; len(b) >= 8; b = b[8:] {
		v := binary.LittleEndian.Uint64(b)
		c.sum += v&0xffffffff + v>>32
	}
	for ; len(b) >= 2; b = b[2:] {
		c.sum += uint64(binary.LittleEndian.Uint16(b))
	}
	if len(b) == 1 {
		c.sum += uint64(b[0])
	}
}

func (c *checksum) value(size int64) uint32 {
	sum := c.sum
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint32(sum) + uint32(size)
}
