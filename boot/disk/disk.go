// Package disk writes bootable disk images: a GPT, an EFI system partition with FAT32 and a root partition with ext4.
// It needs no root, no loop device and no mount, and two runs over the same [Layout] give the same bytes.
//
// # What is on the disk
//
//	sector 0           protective MBR
//	sectors 1-33       GPT
//	1 MiB              EFI system partition ("esp"), FAT32
//	then               root partition ("root"), ext4; takes what is left of the disk
//	last 33 sectors    backup GPT
//
// Partitions begin and end at multiples of 1 MiB, sectors have 512 bytes. The partition types are those of the
// Discoverable Partitions Specification, so systemd finds the root partition without a root= argument.
//
// # fs-verity without a kernel
//
// Every object of the repository has fs-verity enabled in the image, also where the building machine's kernel has no
// fs-verity. ext4 keeps the Merkle tree in the file itself, past its end. Such a file is written as:
//
//	0                      data
//	next multiple of 64K   Merkle tree, root level first (none for a file of at most one block)
//	then                   descriptor, 256 bytes, padded with zeros to a block whose last 4 bytes hold its size, 256
//
// and then gets its real size and the flag EXT4_VERITY_FL (kernel: fs/ext4/verity.c, fs/verity/open.c). The kernel
// checks all of it on opening the file; an object whose digest is not its name is refused here already.
//
// # Who does what
//
// go-diskfs writes GPT and FAT32; what it leaves open or gets wrong in FAT32 is set right afterwards (fatfix.go).
// mke2fs makes the empty ext4 and one debugfs process fills it, told file by file (debugfs.go), so that the order of
// everything is ours and only two files at a time have a temporary copy.
//
// # Reproducibility
//
// All identifiers are derived from [Layout.Seed], see [ID]. No time in the image is later than [Layout.Time]. Nothing
// depends on the user who runs it, on /etc/mke2fs.conf, or on the order in which the host lists directories. Another
// version of e2fsprogs may place blocks differently.
package disk

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

const (
	sectorSize = 512
	// align is what partitions begin and end at. It is also the room before the first and after the last partition,
	// of which the two GPT need 34 and 33 sectors.
	align = 1 << 20
)

// Layout says what is to be on a disk. It holds plain values; nothing is read or written before [Layout.Plan].
type Layout struct {
	// Size of the disk in bytes, rounded down to a multiple of 1 MiB. 0 means as small as the partitions allow.
	Size int64
	// Arch is the architecture as Go names it (amd64, arm64, riscv64, ...). It decides the root partition's type.
	Arch string
	// Seed is what the disk's identifiers are derived from. Disks that are to be in one machine need different seeds.
	Seed []byte
	// Time is SOURCE_DATE_EPOCH: the time of everything that has none, and the latest of all others. Before 1980 it
	// counts as 1980-01-01, the first day of FAT; it must be before 2038-01-19, where 32 bits end.
	Time time.Time
	ESP  ESP
	Root Root
	// Progress, if set, is called with the bytes of file content that are written and those that will be.
	Progress func(done, total int64)
}

// ESP is the EFI system partition.
type ESP struct {
	// Size of the partition in bytes, rounded down to a multiple of 1 MiB. 0 means as small as Files and Free allow.
	Size int64
	// Free is how many bytes must stay free beside Files, for what upgrades will add.
	Free int64
	// Label is the volume label, at most 11 characters; "" means "ESP".
	Label string
	Files []File
}

// File is a file to be put on the ESP.
type File struct {
	// Path with slashes, relative to the root of the file system: "EFI/BOOT/BOOTX64.EFI". Directories come with their
	// files; a path that ends with a slash is a directory that may stay empty, and has no Size and Open.
	Path string
	Size int64
	Open func() (io.ReadCloser, error)
}

// Root is the root partition.
type Root struct {
	// Dir is a directory of the host whose content the file system gets. Everything in it will belong to root. If it
	// has a composefs repository at "composefs", what is in it also gets the permissions of a repository, and the
	// objects and meta.json get fs-verity.
	Dir string
	// Overlay is laid over Dir: its directories are merged, its other files replace what has their name. It is for what
	// a user without privileges cannot have in Dir: owners, extended attributes, device nodes. May be nil.
	Overlay *fstree.Tree
	// Open opens the contents of Overlay's files that are not inline.
	Open fstree.Open
	// Free is how many bytes must stay free, for state and upgrades.
	Free int64
	// Label is the volume label, at most 16 bytes; "" means "root".
	Label string
}

// Plan is a layout after every size is known and found to fit.
type Plan struct {
	Size int64 // of the disk, in bytes
	ESP  Partition
	Root Partition

	layout Layout
	fat    fatGeometry
	nodes  []*node
}

// Partition is a partition of a plan, in bytes.
type Partition struct {
	Offset, Size int64
	Used         int64 // by the content; for ext4 an upper bound
	Free         int64 // for more content; for ext4 a lower bound
}

// Write plans and writes a disk to out, which must be a regular file open for reading and writing. What it held is lost.
// The file is sparse; after an error its content is undefined. Nothing is synced.
func Write(ctx context.Context, out *os.File, l Layout) error {
	p, err := l.Plan()
	if err != nil {
		return err
	}
	return p.Write(ctx, out)
}

// Plan looks at everything the disk will hold and decides the sizes. It errs if the content does not fit, with the sizes
// that are needed and available, and if a program that Write needs is missing.
func (l Layout) Plan() (*Plan, error) {
	if first := time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC); l.Time.Before(first) {
		l.Time = first
	}
	l.Time = l.Time.UTC().Truncate(time.Second)
	if l.Time.Unix() > 1<<31-1 {
		return nil, fmt.Errorf("disk image: time %s: ext4 and FAT hold 32 bits here: choose one before 2038-01-19",
			l.Time.Format(time.RFC3339))
	}
	if _, err := rootType(l.Arch); err != nil {
		return nil, err
	}
	if l.ESP.Label == "" {
		l.ESP.Label = "ESP"
	}
	if l.Root.Label == "" {
		l.Root.Label = "root"
	}
	p := &Plan{layout: l}
	if err := p.planESP(); err != nil {
		return nil, fmt.Errorf("EFI system partition: %w", err)
	}
	if err := p.planRoot(); err != nil {
		return nil, fmt.Errorf("root partition: %w", err)
	}
	return p, nil
}

// Write writes the planned disk, see the function [Write].
func (p *Plan) Write(ctx context.Context, out *os.File) error {
	info, err := out.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("disk image: %s: not a regular file: write an image file, then copy it to the device", out.Name())
	}
	// Cutting it to nothing first makes all of it a hole: everybody after may count on zeros.
	if err := out.Truncate(0); err != nil {
		return err
	}
	if err := out.Truncate(p.Size); err != nil {
		return err
	}
	if err := p.writeGPT(out); err != nil {
		return fmt.Errorf("partition table: %s: %w", out.Name(), err)
	}
	done := p.newMeter()
	if err := p.writeESP(ctx, out, done); err != nil {
		return fmt.Errorf("EFI system partition: %s: %w", out.Name(), err)
	}
	if err := p.writeRoot(ctx, out, done); err != nil {
		return fmt.Errorf("root partition: %s: %w", out.Name(), err)
	}
	return nil
}

// newMeter returns the function that everything that writes content tells how many bytes it wrote.
func (p *Plan) newMeter() func(n int64) {
	if p.layout.Progress == nil {
		return func(int64) {}
	}
	var done, total int64
	for _, f := range p.layout.ESP.Files {
		total += f.Size
	}
	for _, n := range p.nodes {
		total += n.size
	}
	return func(n int64) {
		done += n
		p.layout.Progress(done, total)
	}
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// sizeOf renders a size for error messages: people think in MiB, but two sizes must not look the same.
func sizeOf(n int64) string {
	return fmt.Sprintf("%d bytes (%.1f MiB)", n, float64(n)/(1<<20))
}
