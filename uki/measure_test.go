package uki_test

import (
	"crypto/sha256"
	"encoding/hex"
	"testing"
	"testing/fstest"

	"github.com/composefs-boot/composefs-boot/uki"
)

// PCR 12 is extended with the boot loader's options, the profile's number, the command line, and the addons' parts, in the stub's order.
func TestMeasureConfig(t *testing.T) {
	section := func(name, text string) uki.Section { return uki.NewSection(name, uki.Text(text)) }
	addon := func(sections ...uki.Section) *uki.Image { return &uki.Image{Profiles: [][]uki.Section{sections}} }
	c := uki.Config{Profile: 2, Loader: "@2", Cmdline: " a\tb\n", Addons: []*uki.Image{
		addon(section(".cmdline", "one"), section(".ucode", "U1"), section(".initrd", "I1")),
		addon(section(".dtb", "D"), section(".initrd", "I2")),
		addon(section(".cmdline", "é\n\x00"), section(".ucode", "U2")),
	}}
	var want [32]byte
	for _, event := range []string{"@\x002\x00\x00\x00", "2\x00\x00\x00", "a\x00 \x00b\x00\x00\x00", "o\x00n\x00e\x00 \x00\xe9\x00\x00\x00", "D", "U2", "U1", "I1", "I2"} {
		sum := sha256.Sum256([]byte(event))
		want = sha256.Sum256(append(want[:], sum[:]...))
	}
	got, err := uki.MeasureConfig(c, []uki.Bank{"sha256"})
	if err != nil || len(got) != 1 || got[0].Value != hex.EncodeToString(want[:]) || got[0].PCR != 12 {
		t.Errorf("%+v, %v, want %x", got, err, want)
	}
	got, err = uki.MeasureConfig(uki.Config{}, []uki.Bank{"sha1"})
	if err != nil || got[0].Value != "0000000000000000000000000000000000000000" {
		t.Errorf("nothing measured: %+v, %v", got, err)
	}
	c.Addons = []*uki.Image{addon(section(".linux", "k"), section(".cmdline", "x"))}
	if _, err := uki.MeasureConfig(c, uki.Banks); err == nil {
		t.Error("a UKI is an addon")
	}
}

// An .efifw is what the stub reads: four words, the ID with a NUL, the image.
func TestFirmware(t *testing.T) {
	c, err := uki.Firmware("abc", fstest.MapFS{"fw.bin": {Data: []byte("image")}})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, c.Size)
	c.ReadAt(b, 0)
	if want := "\xad\xde\xed\xfe\x10\x00\x00\x00\x04\x00\x00\x00\x05\x00\x00\x00abc\x00image"; string(b) != want {
		t.Errorf("%q, want %q", b, want)
	}
	for name, dir := range map[string]fstest.MapFS{"no file": {}, "two files": {"a": {}, "b": {}}, "an empty file": {"a": {}}} {
		if _, err := uki.Firmware("abc", dir); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for name, text := range map[string]string{
		"no JSON":     `{`,
		"no type":     `{"name": "a", "compatible": "b", "hwids": []}`,
		"wrong kind":  `{"type": "uefi-fw", "name": "a", "compatible": "b", "hwids": []}`,
		"not a UUID":  `{"type": "devicetree", "name": "a", "compatible": "b", "hwids": ["x"]}`,
		"a short one": `{"type": "devicetree", "name": "a", "compatible": "b", "hwids": ["0123"]}`,
	} {
		if _, err := uki.HWIDs(fstest.MapFS{"d/x.json": {Data: []byte(text)}}); err == nil {
			t.Errorf("hardware IDs, %s: no error", name)
		}
	}
}
