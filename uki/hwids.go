package uki

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
)

// Kinds of entries of .hwids.
const (
	hwDeviceTree = 1
	hwFirmware   = 2
	deviceSize   = 28 // kind and size, GUID, two offsets of strings
)

// device is what a hardware ID stands for: a device tree by its compatible string, or firmware by its ID.
type device struct {
	kind         uint32
	name, target string
}

// hwidFile is a file of hardware IDs.
type hwidFile struct {
	Type       string   `json:"type"` // devicetree or uefi-fw
	Name       string   `json:"name"`
	Compatible string   `json:"compatible"` // of a device tree
	FWID       string   `json:"fwid"`       // of firmware
	HWIDs      []string `json:"hwids"`
}

// HWIDs makes the content of .hwids from the *.json files of a directory and those below it: a table of devices, and the
// strings that it refers to. The stub looks the machine's hardware IDs up in it to choose a .dtbauto or .efifw.
func HWIDs(dir fs.FS) (Content, error) {
	devices := map[device][][16]byte{}
	var order []device
	err := fs.WalkDir(dir, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(name, ".json") {
			return err
		}
		b, err := fs.ReadFile(dir, name)
		if err != nil {
			return err
		}
		d, ids, err := parseHWIDs(b)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, ok := devices[d]; !ok {
			order = append(order, d)
		}
		devices[d] = append(devices[d], ids...)
		return nil
	})
	if err != nil {
		return Content{}, fmt.Errorf("hardware IDs: %w", err)
	}
	names := map[string]uint32{}
	entries := 1 // the one at the end is all zeros
	for d, ids := range devices {
		slices.SortFunc(ids, func(a, b [16]byte) int { return bytes.Compare(a[:], b[:]) })
		devices[d] = slices.Compact(ids)
		entries += len(devices[d])
		names[d.name], names[d.target] = 0, 0
	}
	var text []byte
	for _, s := range slices.Sorted(maps.Keys(names)) {
		names[s] = uint32(entries*deviceSize + len(text))
		text = append(append(text, s...), 0)
	}
	var b []byte
	for _, d := range order {
		for _, id := range devices[d] {
			b = binary.LittleEndian.AppendUint32(b, deviceSize|d.kind<<28)
			b = append(b, guid(id)...)
			b = binary.LittleEndian.AppendUint32(b, names[d.name])
			b = binary.LittleEndian.AppendUint32(b, names[d.target])
		}
	}
	b = append(b, make([]byte, deviceSize)...)
	return Bytes(append(b, text...)), nil
}

func parseHWIDs(b []byte) (d device, ids [][16]byte, err error) {
	var f hwidFile
	if err := json.Unmarshal(b, &f); err != nil {
		return d, nil, err
	}
	switch {
	case f.Type == "devicetree" && f.Compatible != "" && f.FWID == "":
		d.kind = hwDeviceTree
	case f.Type == "uefi-fw" && f.FWID != "" && f.Compatible == "":
		d.kind = hwFirmware
	default:
		return d, nil, fmt.Errorf("type %q: want devicetree with \"compatible\" or uefi-fw with \"fwid\"", f.Type)
	}
	d.name, d.target = f.Name, cmp.Or(f.Compatible, f.FWID)
	for _, text := range f.HWIDs {
		raw, err := hex.DecodeString(strings.NewReplacer("-", "", "{", "", "}", "").Replace(text))
		if err != nil || len(raw) != 16 {
			return d, nil, fmt.Errorf("hardware ID %q: no UUID", text)
		}
		ids = append(ids, [16]byte(raw))
	}
	return d, ids, nil
}

// guid returns a UUID in the byte order of EFI, where the first three numbers are little endian.
func guid(u [16]byte) []byte {
	return []byte{u[3], u[2], u[1], u[0], u[5], u[4], u[7], u[6], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]}
}

// Firmware makes the content of an .efifw from a directory with one file, the firmware image; id is its ID. It is a header of
// four little-endian words (a magic number, the sizes of the header, the ID with a NUL, and the image), the ID and the image.
// ukify 262 writes one byte for the magic number, which its stub does not read; this is what the stub reads.
func Firmware(id string, dir fs.FS) (Content, error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return Content{}, err
	}
	if len(entries) != 1 {
		return Content{}, fmt.Errorf("firmware %q: %d files in the directory, want one", id, len(entries))
	}
	image, err := fs.ReadFile(dir, entries[0].Name())
	if err != nil {
		return Content{}, err
	}
	if len(image) == 0 {
		return Content{}, fmt.Errorf("firmware %q: %s is empty", id, entries[0].Name())
	}
	const magic, size = 0xfeeddead, 16
	var b []byte
	for _, v := range []uint32{magic, size, uint32(len(id) + 1), uint32(len(image))} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	b = append(append(b, id...), 0)
	return Bytes(append(b, image...)), nil
}
