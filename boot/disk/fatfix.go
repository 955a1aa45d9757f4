package disk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"
)

// finishFAT sets right what go-diskfs leaves open or writes against the specification (Microsoft's "FAT32 File System
// Specification" 1.03), in the order of the disk:
//
//   - boot sector: the serial number, the sectors before the partition;
//   - FSInfo: the number of free clusters and the next one, so that nobody has to count;
//   - FAT: files of no bytes have no cluster;
//   - directories: all times, and the ".." of a directory in the root is 0, not the root's own number.
func (p *Plan) finishFAT(part *region) error {
	fix := &fatFixer{part: part, g: p.fat, stamp: fatTime(p.layout.Time)}
	fix.fat = make([]byte, (p.fat.clusters+2)*4)
	if _, err := part.ReadAt(fix.fat, reservedSectors*sectorSize); err != nil {
		return err
	}
	const rootCluster = 2
	if err := fix.dir(rootCluster); err != nil {
		return fmt.Errorf("checking the directories: %w", err)
	}
	free, next := uint32(0), uint32(0)
	for n := int64(2); n < p.fat.clusters+2; n++ {
		if fix.entry(uint32(n)) == 0 {
			if free++; next == 0 {
				next = uint32(n)
			}
		}
	}
	for _, at := range []int64{reservedSectors, reservedSectors + p.fat.fatSectors} {
		if _, err := part.WriteAt(fix.fat, at*sectorSize); err != nil {
			return err
		}
	}
	for _, patch := range []struct {
		at    int64
		value uint32
	}{
		{28, uint32(p.ESP.Offset / sectorSize)},
		{67, espSerial(p.layout.Seed)},
		{sectorSize + 488, free},
		{sectorSize + 492, next},
	} {
		b := binary.LittleEndian.AppendUint32(nil, patch.value)
		for _, sector := range []int64{0, 6} { // the copies of both sectors begin at sector 6
			if _, err := part.WriteAt(b, sector*sectorSize+patch.at); err != nil {
				return err
			}
		}
	}
	return nil
}

type fatFixer struct {
	part  *region
	g     fatGeometry
	fat   []byte
	stamp [4]byte // time and date
}

func (x *fatFixer) entry(n uint32) uint32 {
	return binary.LittleEndian.Uint32(x.fat[4*n:]) & 0x0fffffff
}

// dir goes through a directory and those below it. What it reads was written a moment ago, by us: it is checked only so
// far that a mistake of the library is an error and not an endless loop.
func (x *fatFixer) dir(first uint32) error {
	steps := x.g.clusters
	for n := first; n < 0x0ffffff8; n = x.entry(n) {
		if steps--; n < 2 || int64(n) >= x.g.clusters+2 || steps < 0 {
			return fmt.Errorf("directory at cluster %d: cluster %d in its chain", first, n)
		}
		at := (reservedSectors+2*x.g.fatSectors)*sectorSize + int64(n-2)*x.g.cluster
		block := make([]byte, x.g.cluster)
		if _, err := x.part.ReadAt(block, at); err != nil {
			return err
		}
		for e := block; len(e) > 0 && e[0] != 0; e = e[32:] {
			if err := x.dirEntry(e[:32]); err != nil {
				return err
			}
		}
		if _, err := x.part.WriteAt(block, at); err != nil {
			return err
		}
	}
	return nil
}

func (x *fatFixer) dirEntry(e []byte) error {
	const longName, volumeLabel, directory = 0x0f, 0x08, 0x10
	attr := e[11]
	if attr == longName {
		return nil
	}
	copy(e[22:26], x.stamp[:])
	if attr&volumeLabel != 0 {
		clear(e[13:20])
		return nil
	}
	e[13] = 0 // hundredths of a second
	copy(e[14:18], x.stamp[:])
	copy(e[18:20], x.stamp[2:])
	first := uint32(binary.LittleEndian.Uint16(e[20:]))<<16 | uint32(binary.LittleEndian.Uint16(e[26:]))
	switch {
	case bytes.HasPrefix(e, []byte("..  ")):
		if first == 2 {
			clear(e[20:22])
			clear(e[26:28])
		}
	case bytes.HasPrefix(e, []byte(".   ")):
	case attr&directory != 0:
		return x.dir(first)
	case binary.LittleEndian.Uint32(e[28:]) == 0 && first != 0:
		if int64(first) >= x.g.clusters+2 {
			return fmt.Errorf("empty file at cluster %d", first)
		}
		clear(x.fat[4*first : 4*first+4])
		clear(e[20:22])
		clear(e[26:28])
	}
	return nil
}

// fatTime packs a time the way of directory entries: two bytes of time in steps of two seconds, two of date.
func fatTime(t time.Time) (b [4]byte) {
	binary.LittleEndian.PutUint16(b[0:], uint16(t.Hour()<<11|t.Minute()<<5|t.Second()/2))
	binary.LittleEndian.PutUint16(b[2:], uint16((t.Year()-1980)<<9|int(t.Month())<<5|t.Day()))
	return b
}
