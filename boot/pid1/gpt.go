package pid1

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"runtime"
	"unicode/utf16"
)

// Partition is an entry of a GUID partition table.
type Partition struct {
	Number     int    // from 1, as the kernel counts
	Type, UUID string // lower case, 8-4-4-4-12
	Label      string
	NoAuto     bool // not to be used without being asked for
	ReadOnly   bool
}

// maxGPTEntries limits the table: it usually has 128 entries of 128 bytes.
const maxGPTEntries = 1024

// Attributes of partitions: Discoverable Partitions Specification.
const (
	gptReadOnly = 1 << 60
	gptNoAuto   = 1 << 63
)

// rootTypes are the types of root partitions, by architecture: Discoverable Partitions Specification.
var rootTypes = map[string]string{
	"amd64":   "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
	"arm64":   "b921b045-1df0-41c3-af44-4c6f280d3fae",
	"riscv64": "72ec70a6-cf74-40e6-bd49-4bda08e8f224",
}

const unusedType = "00000000-0000-0000-0000-000000000000"

// ErrNoGPT tells that a disk has no GUID partition table.
var ErrNoGPT = errors.New("no GPT")

// ReadGPT reads the partition table of a disk whose logical blocks have this many bytes: the first of the two copies, as the
// kernel does, whose partitions these are. It reads at most a block and 128 KiB. UEFI Specification, chapter 5.3.
func ReadGPT(disk io.ReaderAt, block int64) ([]Partition, error) {
	if block < 512 || block > 1<<16 {
		return nil, fmt.Errorf("GPT: blocks of %d bytes: want 512 to 65536", block)
	}
	h := make([]byte, block)
	if _, err := disk.ReadAt(h, block); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, ErrNoGPT
		}
		return nil, err
	}
	if string(h[:8]) != "EFI PART" {
		return nil, ErrNoGPT
	}
	le := binary.LittleEndian
	size := int64(le.Uint32(h[12:]))
	if size < 92 || size > block {
		return nil, fmt.Errorf("GPT: header of %d bytes", size)
	}
	sum := le.Uint32(h[16:])
	clear(h[16:20])
	if crc32.ChecksumIEEE(h[:size]) != sum {
		return nil, errors.New("GPT: header with a wrong checksum")
	}
	first, count, width := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if first < 2 || first > 1<<40 || count > maxGPTEntries || width != 128 {
		return nil, fmt.Errorf("GPT: %d entries of %d bytes at block %d", count, width, first)
	}
	table := make([]byte, int64(count)*int64(width))
	if _, err := disk.ReadAt(table, int64(first)*block); err != nil {
		return nil, fmt.Errorf("GPT: entries: %w", err)
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil, errors.New("GPT: entries with a wrong checksum")
	}
	var list []Partition
	for k := range int(count) {
		e := table[k*128 : k*128+128]
		p := Partition{Number: k + 1, Type: formatGUID(e), UUID: formatGUID(e[16:])}
		if p.Type == unusedType {
			continue
		}
		attributes := le.Uint64(e[48:])
		p.NoAuto, p.ReadOnly = attributes&gptNoAuto != 0, attributes&gptReadOnly != 0
		p.Label = utf16Text(e[56:128])
		list = append(list, p)
	}
	return list, nil
}

// autoRoot chooses the root among the partitions of the disk that the boot loader was started from: the first one of the
// type for this architecture that may be used without being asked for.
func autoRoot(partitions []Partition, loader string) (Partition, bool) {
	for _, l := range partitions {
		if l.UUID != loader {
			continue
		}
		for _, p := range partitions {
			if p.Type == rootTypes[runtime.GOARCH] && !p.NoAuto {
				return p, true
			}
		}
	}
	return Partition{}, false
}

// utf16Text decodes little-endian UTF-16 up to a NUL.
func utf16Text(b []byte) string {
	var units []uint16
	for ; len(b) >= 2; b = b[2:] {
		u := binary.LittleEndian.Uint16(b)
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return string(utf16.Decode(units))
}
