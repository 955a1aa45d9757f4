package pid1

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Filesystem is what a superblock tells.
type Filesystem struct {
	Type  string // ext4, xfs or btrfs, as the kernel names it; "LUKS" for an encrypted volume
	UUID  string // lower case, 8-4-4-4-12
	Label string
}

// signature is how a file system is recognized: magic at an offset, UUID and label at others, all in bytes.
type signature struct {
	name         string
	magic        string
	at           int64
	uuid         int64
	label, width int64
}

// The superblocks, from the kernel: fs/ext4/ext4.h (struct ext4_super_block, at 1024), fs/xfs/libxfs/xfs_format.h (struct
// xfs_dsb, at 0), fs/btrfs/ctree.h (struct btrfs_super_block, at 65536). ext4's driver mounts ext2 and ext3 as well.
var signatures = []signature{
	{name: "ext4", magic: "\x53\xef", at: 1024 + 56, uuid: 1024 + 104, label: 1024 + 120, width: 16},
	{name: "xfs", magic: "XFSB", at: 0, uuid: 32, label: 108, width: 12},
	{name: "btrfs", magic: "_BHRfS_M", at: 65536 + 64, uuid: 65536 + 32, label: 65536 + 299, width: 256},
}

const luksMagic = "LUKS\xba\xbe"

// ErrUnknown tells that there is no superblock of a known file system.
var ErrUnknown = errors.New("no ext4, xfs or btrfs")

// Identify reads the superblock of a device. It reads at most 2 KiB, at fixed places, and believes what it finds: the kernel
// checks the rest when it mounts. The error is ErrUnknown, or that of the device, or tells that there are several.
func Identify(device io.ReaderAt) (Filesystem, error) {
	var found []Filesystem
	read := func(at, size int64) ([]byte, error) {
		b := make([]byte, size)
		_, err := device.ReadAt(b, at)
		if errors.Is(err, io.EOF) {
			return nil, nil // too small for this one
		}
		return b, err
	}
	if b, err := read(0, int64(len(luksMagic))); err != nil {
		return Filesystem{}, err
	} else if string(b) == luksMagic {
		return Filesystem{Type: "LUKS"}, nil
	}
	for _, s := range signatures {
		magic, err := read(s.at, int64(len(s.magic)))
		if err != nil {
			return Filesystem{}, err
		}
		if string(magic) != s.magic {
			continue
		}
		uuid, err := read(s.uuid, 16)
		if err != nil {
			return Filesystem{}, err
		}
		label, err := read(s.label, s.width)
		if err != nil {
			return Filesystem{}, err
		}
		if uuid == nil || label == nil {
			continue // it ends within the superblock
		}
		label, _, _ = bytes.Cut(label, []byte{0})
		found = append(found, Filesystem{s.name, formatUUID(uuid), string(label)})
	}
	switch len(found) {
	case 0:
		return Filesystem{}, ErrUnknown
	case 1:
		return found[0], nil
	}
	var names []string
	for _, f := range found {
		names = append(names, f.Type)
	}
	return Filesystem{}, fmt.Errorf("signatures of %s: remove the wrong one with wipefs", strings.Join(names, " and "))
}

// formatUUID formats 16 bytes in the order in which they are stored.
func formatUUID(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// formatGUID formats 16 bytes as EFI stores them: the first three groups with the lowest byte first.
func formatGUID(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}
