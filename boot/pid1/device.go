package pid1

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Device is a block device that was found.
type Device struct {
	Name string // of the kernel
	Path string // below /dev
	// Disk is the name of the disk of which it is a partition, and Partition its number there; "" and 0 for a disk.
	Disk      string
	Partition int
	block     int64 // bytes of a logical block, of disks
	ReadOnly  bool  // by its entry in the partition table, if it was found by that
}

// blocks are the block devices of the machine: directories like /sys/class/block and /dev.
type blocks struct{ sys, dev string }

// maxDevices limits how many are looked at.
const maxDevices = 4096

// list returns the devices that have a size, sorted by name.
func (b blocks) list() ([]Device, error) {
	entries, err := os.ReadDir(b.sys)
	if err != nil {
		return nil, err
	}
	var list []Device
	for _, e := range entries[:min(len(entries), maxDevices)] {
		name := e.Name()
		// Opening a floppy drive without a disk takes seconds; memory disks hold no root.
		if strings.HasPrefix(name, "fd") || strings.HasPrefix(name, "ram") || strings.HasPrefix(name, "zram") {
			continue
		}
		dir := filepath.Join(b.sys, name)
		if number(dir, "size") == 0 {
			continue
		}
		// The kernel writes "!" for the slash of names like cciss/c0d0.
		d := Device{Name: name, Path: filepath.Join(b.dev, strings.ReplaceAll(name, "!", "/"))}
		if d.Partition = int(number(dir, "partition")); d.Partition > 0 {
			real, err := filepath.EvalSymlinks(dir)
			if err != nil {
				continue // it has just gone
			}
			d.Disk = filepath.Base(filepath.Dir(real))
		} else if d.block = number(dir, "queue/logical_block_size"); d.block == 0 {
			d.block = 512
		}
		list = append(list, d)
	}
	return list, nil
}

// number reads a number from a file of sysfs; 0 if there is none.
func number(dir, file string) int64 {
	text, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// find looks for the physical root once. Loader is the partition that the boot loader was started from, for Auto. If it is
// not there, seen tells what is, as text for people.
func (b blocks) find(s Source, loader string) (found Device, ok bool, seen []string, err error) {
	list, err := b.list()
	if err != nil {
		return Device{}, false, nil, err
	}
	for _, d := range list {
		var text string
		switch s.Kind {
		case ByPath:
			ok, text = d.Path == filepath.Join(b.dev, strings.TrimPrefix(s.Value, "/dev/")), d.Name
		case ByUUID, ByLabel:
			ok, text = d.has(s)
		default:
			if d.Disk != "" {
				continue
			}
			var p Partition
			if p, ok, text = d.partition(s, loader); ok {
				d, ok = member(list, d.Name, p)
			}
		}
		if ok {
			return d, true, nil, nil
		}
		seen = append(seen, text)
	}
	return Device{}, false, seen, nil
}

// has reports whether a device has the file system that is looked for, and what it has.
func (d Device) has(s Source) (ok bool, text string) {
	f, err := d.Identify()
	switch {
	case errors.Is(err, ErrUnknown):
		return false, d.Name
	case err != nil:
		return false, fmt.Sprintf("%s (%v)", d.Name, err)
	case s.Kind == ByUUID:
		ok = f.UUID == s.Value
	default:
		ok = f.Label == s.Value
	}
	return ok, fmt.Sprintf("%s (%s UUID=%s LABEL=%s)", d.Name, f.Type, f.UUID, f.Label)
}

// partition looks for an entry in the disk's partition table, and tells what there is.
func (d Device) partition(s Source, loader string) (p Partition, ok bool, text string) {
	f, err := os.Open(d.Path)
	if err != nil {
		return p, false, fmt.Sprintf("%s (%v)", d.Name, err)
	}
	defer f.Close()
	partitions, err := ReadGPT(f, d.block)
	if err != nil {
		return p, false, fmt.Sprintf("%s (%v)", d.Name, err)
	}
	if s.Kind == Auto {
		p, ok = autoRoot(partitions, loader)
	}
	var names []string
	for _, e := range partitions {
		if !ok && (s.Kind == ByPartUUID && e.UUID == s.Value || s.Kind == ByPartLabel && e.Label == s.Value) {
			p, ok = e, true
		}
		names = append(names, fmt.Sprintf("%d PARTUUID=%s PARTLABEL=%s", e.Number, e.UUID, e.Label))
	}
	return p, ok, fmt.Sprintf("%s (%s)", d.Name, strings.Join(names, ", "))
}

// member returns the device of a partition.
func member(list []Device, disk string, p Partition) (Device, bool) {
	for _, d := range list {
		if d.Disk == disk && d.Partition == p.Number {
			d.ReadOnly = p.ReadOnly
			return d, true
		}
	}
	return Device{}, false
}

// Identify reads the device's superblock.
func (d Device) Identify() (Filesystem, error) {
	f, err := os.Open(d.Path)
	if err != nil {
		return Filesystem{}, err
	}
	defer f.Close()
	return Identify(f)
}

// loaderVariable is where a boot loader tells the partition that it was started from.
const loaderVariable = "LoaderDevicePartUUID-" + loaderVendor

// loaderPartition reads the variable: attributes of four bytes, then the GUID as UTF-16.
func loaderPartition(efivars string) (string, error) {
	b, err := os.ReadFile(filepath.Join(efivars, loaderVariable))
	if err != nil {
		return "", err
	}
	if len(b) < 4 || len(b) > 4+2*64 {
		return "", fmt.Errorf("%s: %d bytes", loaderVariable, len(b))
	}
	text := strings.ToLower(utf16Text(b[4:]))
	if len(text) != 36 {
		return "", fmt.Errorf("%s: %q: want a UUID", loaderVariable, text)
	}
	return text, nil
}
