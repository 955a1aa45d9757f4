package pid1

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// sgdisk's table is read as it shows it.
func TestReadRealGPT(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 8<<20); err != nil {
		t.Fatal(err)
	}
	const a, b = "11111111-2222-3333-4444-aabbccddeeff", "99999999-8888-7777-6666-000000000001"
	out, err := exec.Command("sgdisk", "-n", "1:2048:4095", "-t", "1:ef00", "-u", "1:"+a, "-c", "1:ESP", "-n", "3:4096:6143",
		"-t", "3:8304", "-u", "3:"+b, "-c", "3:Wurzel \u00fc", "-A", "3:set:60", file).CombinedOutput()
	if err != nil {
		t.Fatalf("sgdisk: %v: %s", err, out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := ReadGPT(f, 512)
	want := []Partition{{Number: 1, Type: "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", UUID: a, Label: "ESP"},
		{Number: 3, Type: rootTypes["amd64"], UUID: b, Label: "Wurzel \u00fc", ReadOnly: true}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := ReadGPT(f, 4096); err != ErrNoGPT {
		t.Errorf("blocks of another size: %v", err)
	}
}

// gpt makes a table of entries; header changes it before the checksums are made right.
func gpt(entries int, header func(h []byte)) []byte {
	disk := make([]byte, 512*(2+entries/4+1))
	table := disk[1024:][:entries*128]
	for k := range entries {
		table[k*128] = byte(k + 1) // type
		table[k*128+16] = byte(k)
	}
	h := disk[512:1024]
	copy(h, "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00")
	le := binary.LittleEndian
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], uint32(entries))
	le.PutUint32(h[84:], 128)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(table))
	if header != nil {
		header(h)
	}
	le.PutUint32(h[16:], 0)
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	return disk
}

func TestHostileGPT(t *testing.T) {
	le := binary.LittleEndian
	good := gpt(8, nil)
	if list, err := ReadGPT(bytes.NewReader(good), 512); err != nil || len(list) != 8 {
		t.Fatalf("%d entries, %v", len(list), err)
	}
	flipped := bytes.Clone(good)
	flipped[1024+5] ^= 1
	for name, c := range map[string]struct {
		disk []byte
		want string
	}{
		"empty":                {nil, "no GPT"},
		"one-block":            {good[:512], "no GPT"},
		"only-header":          {good[:1024], "entries: EOF"},
		"table-cut":            {good[:1024+300], "entries: EOF"},
		"wrong-magic":          {gpt(8, func(h []byte) { h[0] = 'e' }), "no GPT"},
		"header-checksum":      {append(append(bytes.Clone(good[:540]), 1), good[541:]...), "header with a wrong checksum"},
		"entries-checksum":     {flipped, "entries with a wrong checksum"},
		"header-size-zero":     {gpt(8, func(h []byte) { le.PutUint32(h[12:], 0) }), "header of 0 bytes"},
		"header-size-huge":     {gpt(8, func(h []byte) { le.PutUint32(h[12:], 1<<31) }), "header of 2147483648 bytes"},
		"four-billion-entries": {gpt(8, func(h []byte) { le.PutUint32(h[80:], 1<<32-1) }), "4294967295 entries"},
		"entry-size-zero":      {gpt(8, func(h []byte) { le.PutUint32(h[84:], 0) }), "entries of 0 bytes"},
		"entry-size-huge":      {gpt(8, func(h []byte) { le.PutUint32(h[84:], 1<<31) }), "entries of 2147483648 bytes"},
		"table-at-header":      {gpt(8, func(h []byte) { le.PutUint64(h[72:], 1) }), "at block 1"},
		"table-beyond-end":     {gpt(8, func(h []byte) { le.PutUint64(h[72:], 1<<39) }), "entries: EOF"},
		"table-offset-wraps":   {gpt(8, func(h []byte) { le.PutUint64(h[72:], 1<<63) }), "at block 9223372036854775808"},
	} {
		if _, err := ReadGPT(bytes.NewReader(c.disk), 512); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	for _, block := range []int64{0, -512, 1 << 40} {
		if _, err := ReadGPT(bytes.NewReader(good), block); err == nil {
			t.Errorf("blocks of %d bytes", block)
		}
	}
}

func FuzzReadGPT(f *testing.F) {
	f.Add(gpt(8, nil), int64(512))
	f.Add(gpt(0, nil), int64(512))
	f.Fuzz(func(t *testing.T, disk []byte, block int64) {
		// With checksums that are right, so that what comes after them is reached.
		if len(disk) >= 1024+128 {
			table := int64(binary.LittleEndian.Uint32(disk[512+80:])) * 128
			if table <= int64(len(disk)-1024) {
				binary.LittleEndian.PutUint32(disk[512+88:], crc32.ChecksumIEEE(disk[1024:1024+table]))
			}
			clear(disk[512+16 : 512+20])
			binary.LittleEndian.PutUint32(disk[512+16:], crc32.ChecksumIEEE(disk[512:512+92]))
		}
		list, err := ReadGPT(bytes.NewReader(disk), block)
		if err != nil {
			return
		}
		for _, p := range list {
			if p.Number < 1 || p.Number > maxGPTEntries || len(p.UUID) != 36 || len(p.Label) > 36*4 {
				t.Errorf("%+v", p)
			}
		}
	})
}
