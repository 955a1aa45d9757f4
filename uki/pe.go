package uki

import (
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"
)

// PE is the head of a PE file: a stub, a kernel, an addon or a UKI. The format is defined by Microsoft's "PE Format"; numbers
// are little endian.
type PE struct {
	Machine          Machine
	SectionAlignment uint32
	FileAlignment    uint32
	SizeOfImage      uint32
	Sections         []Header
	CertificateTable Range // of signatures; Size 0 if there is none
	Size             int64 // of the file

	file        io.ReaderAt
	head        []byte // of the file: SizeOfHeaders bytes
	coff        int    // offsets in head: of the COFF header,
	optional    int    // of the optional header,
	table       int    // of the section table
	directories int    // and of the data directories in the optional header
}

// Range is a part of a file.
type Range struct {
	Offset, Size uint32
}

func (r Range) end() int64 { return int64(r.Offset) + int64(r.Size) }

// Header is what the section table says about a section.
type Header struct {
	Name            string
	VirtualSize     uint32
	VirtualAddress  uint32
	Raw             Range // in the file
	Characteristics uint32
}

// Machine is the processor that a PE file is for.
type Machine uint16

// Machines that stubs exist for.
const (
	X64     Machine = 0x8664
	AArch64 Machine = 0xaa64
	RISCV64 Machine = 0x5064
	IA32    Machine = 0x14c
	ARM     Machine = 0x1c2
)

// String returns the name that UEFI has for the machine.
func (m Machine) String() string {
	names := map[Machine]string{X64: "x64", AArch64: "aa64", RISCV64: "riscv64", IA32: "ia32", ARM: "arm"}
	if name, ok := names[m]; ok {
		return name
	}
	return fmt.Sprintf("machine 0x%x", uint16(m))
}

// Sizes and offsets of the format, and bounds of what is read.
const (
	dosSize     = 64
	coffSize    = 24 // with the signature before it
	headerSize  = 40 // of a section
	maxPEOffset = 1 << 16
	maxHead     = 1 << 20

	maxSectionAlign = 1 << 24
	maxFileAlign    = 1 << 16 // as the format has it

	offAlignments    = 32 // in the optional header
	offSizeOfImage   = 56
	offSizeOfHeaders = 60
	offCheckSum      = 64
	offDLLFlags      = 70

	securityDirectory = 4 // number of the data directory
	dllNXCompat       = 0x100
)

// Section flags.
const (
	flagCode        = 0x20
	flagInitialized = 0x40
	flagRead        = 0x40000000
)

// ParsePE reads the head of a PE file. Whatever it says about the file lies within it, sections do not overlap, and
// alignments are powers of two. Errors name the offset in the file.
func ParsePE(file io.ReaderAt, size int64) (*PE, error) {
	p := &PE{file: file, Size: size}
	dos, err := p.read(0, dosSize, "DOS header")
	if err != nil {
		return nil, err
	}
	if string(dos[:2]) != "MZ" {
		return nil, fmt.Errorf("offset 0: no PE file: it does not begin with MZ")
	}
	at := int64(binary.LittleEndian.Uint32(dos[60:]))
	if at < dosSize || at > maxPEOffset {
		return nil, fmt.Errorf("offset 60: PE header at %d: want %d to %d", at, dosSize, maxPEOffset)
	}
	coff, err := p.read(at, coffSize, "COFF header")
	if err != nil {
		return nil, err
	}
	if string(coff[:4]) != "PE\x00\x00" {
		return nil, fmt.Errorf("offset %d: no PE signature", at)
	}
	p.coff, p.optional = int(at), int(at)+coffSize
	p.Machine = Machine(binary.LittleEndian.Uint16(coff[4:]))
	sections := int(binary.LittleEndian.Uint16(coff[6:]))
	if sections > maxSections {
		return nil, fmt.Errorf("offset %d: %d sections, at most %d are read", at+6, sections, maxSections)
	}
	optionalSize := int(binary.LittleEndian.Uint16(coff[20:]))
	p.table = p.optional + optionalSize
	if err := p.parseOptional(optionalSize); err != nil {
		return nil, err
	}
	if end := p.table + sections*headerSize; end > len(p.head) {
		return nil, fmt.Errorf("offset %d: section table of %d sections ends at %d, the headers at %d", p.table, sections, end, len(p.head))
	}
	for k := range sections {
		p.Sections = append(p.Sections, parseHeader(p.head[p.table+k*headerSize:]))
	}
	return p, p.check()
}

// read returns a part of the file.
func (p *PE) read(off int64, n int, what string) ([]byte, error) {
	if off+int64(n) > p.Size {
		return nil, fmt.Errorf("offset %d: %s of %d bytes: the file ends at %d", off, what, n, p.Size)
	}
	b := make([]byte, n)
	if got, err := p.file.ReadAt(b, off); got < n {
		return nil, fmt.Errorf("offset %d: %s: %w", off, what, short(err))
	}
	return b, nil
}

// parseOptional reads the optional header, and the head up to SizeOfHeaders.
func (p *PE) parseOptional(size int) error {
	b, err := p.read(int64(p.optional), size, "optional header")
	if err != nil {
		return err
	}
	p.directories = 112
	if size >= 2 && binary.LittleEndian.Uint16(b) == 0x10b {
		p.directories = 96 // PE32
	} else if size < 2 || binary.LittleEndian.Uint16(b) != 0x20b {
		return fmt.Errorf("offset %d: optional header is neither PE32 nor PE32+", p.optional)
	}
	if size < p.directories {
		return fmt.Errorf("offset %d: optional header of %d bytes, want at least %d", p.optional, size, p.directories)
	}
	u32 := func(off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }
	p.SectionAlignment, p.FileAlignment = u32(offAlignments), u32(offAlignments+4)
	most := []uint32{maxSectionAlign, maxFileAlign}
	for k, a := range []uint32{p.SectionAlignment, p.FileAlignment} {
		if a == 0 || a&(a-1) != 0 || a > most[k] {
			return fmt.Errorf("offset %d: alignment %d: want a power of two up to %d", p.optional+offAlignments+4*k, a, most[k])
		}
	}
	p.SizeOfImage = u32(offSizeOfImage)
	headers := u32(offSizeOfHeaders)
	if headers > maxHead || int(headers) < p.table {
		return fmt.Errorf("offset %d: headers of %d bytes, want %d to %d", p.optional+offSizeOfHeaders, headers, p.table, maxHead)
	}
	if p.head, err = p.read(0, int(headers), "headers"); err != nil {
		return err
	}
	count := int64(u32(p.directories - 4))
	if int64(p.directories)+8*count > int64(size) {
		return fmt.Errorf("offset %d: %d data directories: the optional header ends at %d", p.optional+p.directories-4, count, p.table)
	}
	if count > securityDirectory {
		at := p.directories + 8*securityDirectory
		p.CertificateTable = Range{u32(at), u32(at + 4)}
	}
	return nil
}

func parseHeader(b []byte) Header {
	u32 := func(off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }
	name, _, _ := strings.Cut(string(b[:8]), "\x00")
	return Header{name, u32(8), u32(12), Range{u32(20), u32(16)}, u32(36)}
}

// put writes the header into the section table.
func (h Header) put(b []byte) {
	clear(b[:headerSize])
	copy(b[:8], h.Name)
	for off, v := range map[int]uint32{8: h.VirtualSize, 12: h.VirtualAddress, 16: h.Raw.Size, 20: h.Raw.Offset, 36: h.Characteristics} {
		binary.LittleEndian.PutUint32(b[off:], v)
	}
}

// check looks for sections and certificates that are not within the file or overlap.
func (p *PE) check() error {
	where := func(k int) string {
		return fmt.Sprintf("offset %d: section %q", p.table+k*headerSize, p.Sections[k].Name)
	}
	byFile, byAddress := []int{}, []int{}
	for k, h := range p.Sections {
		if h.Raw.Size > 0 {
			if h.Raw.end() > p.Size {
				return fmt.Errorf("%s: data from %d to %d: the file ends at %d", where(k), h.Raw.Offset, h.Raw.end(), p.Size)
			}
			byFile = append(byFile, k)
		}
		if int64(h.VirtualAddress)+int64(h.VirtualSize) > 1<<32 {
			return fmt.Errorf("%s: %d bytes at address 0x%x: past 4 GiB", where(k), h.VirtualSize, h.VirtualAddress)
		}
		if h.VirtualSize > 0 {
			byAddress = append(byAddress, k)
		}
	}
	slices.SortFunc(byFile, func(a, b int) int { return int(int64(p.Sections[a].Raw.Offset) - int64(p.Sections[b].Raw.Offset)) })
	slices.SortFunc(byAddress, func(a, b int) int {
		return int(int64(p.Sections[a].VirtualAddress) - int64(p.Sections[b].VirtualAddress))
	})
	for n := 1; n < len(byFile); n++ {
		a, b := p.Sections[byFile[n-1]], p.Sections[byFile[n]]
		if a.Raw.end() > int64(b.Raw.Offset) {
			return fmt.Errorf("%s: data at %d overlaps that of %q, which ends at %d", where(byFile[n]), b.Raw.Offset, a.Name, a.Raw.end())
		}
	}
	for n := 1; n < len(byAddress); n++ {
		a, b := p.Sections[byAddress[n-1]], p.Sections[byAddress[n]]
		if end := int64(a.VirtualAddress) + int64(a.VirtualSize); end > int64(b.VirtualAddress) {
			return fmt.Errorf("%s: address 0x%x overlaps %q, which ends at 0x%x", where(byAddress[n]), b.VirtualAddress, a.Name, end)
		}
	}
	if c := p.CertificateTable; c.Size > 0 && (c.Size%8 != 0 || c.Offset%8 != 0 || c.end() > p.Size) {
		return fmt.Errorf("offset %d: certificate table of %d bytes at %d: want multiples of 8 within the %d bytes of the file",
			p.security(), c.Size, c.Offset, p.Size)
	}
	return nil
}

// security is the offset in head of where the certificate table's place is.
func (p *PE) security() int { return p.optional + p.directories + 8*securityDirectory }

// section returns the k-th section with its content.
func (p *PE) section(k int) Section {
	h := p.Sections[k]
	size := int64(min(h.VirtualSize, h.Raw.Size))
	return Section{h.Name, Content{io.NewSectionReader(p.file, int64(h.Raw.Offset), size), size}, int64(h.VirtualSize)}
}

// Read returns the image that a PE file holds. The stub's own sections are part of its base.
func Read(file io.ReaderAt, size int64) (*Image, *PE, error) {
	p, err := ParsePE(file, size)
	if err != nil {
		return nil, nil, err
	}
	return p.image(), p, nil
}

func (p *PE) image() *Image {
	m := &Image{Profiles: [][]Section{nil}}
	for k, h := range p.Sections {
		if h.Name == ".profile" {
			m.Profiles = append(m.Profiles, nil)
		}
		last := &m.Profiles[len(m.Profiles)-1]
		*last = append(*last, p.section(k))
	}
	return m
}
