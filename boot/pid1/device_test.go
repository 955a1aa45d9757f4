package pid1

import (
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unicode/utf16"
)

const (
	espUUID  = "0000000a-0000-0000-0000-000000000000"
	rootUUID = "0000000b-0000-0000-0000-000000000000"
)

// machine makes a machine with a disk vda, whose second partition is an ext4 root, and others that must not be in the way.
func machine(t *testing.T, noAuto bool) blocks {
	t.Helper()
	dir := t.TempDir()
	b := blocks{filepath.Join(dir, "class"), filepath.Join(dir, "dev")}
	put := func(name, content string) {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	add := func(path, size, partition string, content []byte) {
		name := filepath.Base(path)
		put("devices/"+path+"/size", size+"\n")
		if partition != "" {
			put("devices/"+path+"/partition", partition+"\n")
		}
		put("dev/"+name, string(content))
		os.MkdirAll(b.sys, 0o755)
		if err := os.Symlink("../devices/"+path, filepath.Join(b.sys, name)); err != nil {
			t.Fatal(err)
		}
	}
	disk := gpt(4, func(h []byte) {})
	table := disk[1024:]
	clear(table[:512])
	copy(table[128:], guid(t, "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"))
	copy(table[128+16:], guid(t, espUUID))
	copy(table[256:], guid(t, rootTypes[runtime.GOARCH]))
	copy(table[256+16:], guid(t, rootUUID))
	for k, u := range utf16.Encode([]rune("root")) {
		binary.LittleEndian.PutUint16(table[256+56+2*k:], u)
	}
	if noAuto {
		table[256+55] |= 0x80
	}
	// The checksums, for what has been changed.
	fixed := gpt(4, func(h []byte) { binary.LittleEndian.PutUint32(h[88:], crc32.ChecksumIEEE(table[:512])) })
	copy(disk[:1024], fixed[:1024])
	add("pci/vda", "100", "", disk)
	add("pci/vda/vda2", "1", "2", nil)
	add("pci/vda/vda3", "90", "3", device(8192, map[int]string{1080: "\x53\xef", 1128: raw, 1144: "data"}))
	add("pci/sr0", "0", "", nil)
	add("pci/fd0", "8", "", nil)
	add("pci/vdb", "8", "", device(8192, map[int]string{0: "LUKS\xba\xbe"}))
	return b
}

func guid(t *testing.T, text string) []byte {
	t.Helper()
	var b [16]byte
	hex := strings.ReplaceAll(text, "-", "")
	for k := range b {
		var v byte
		for _, c := range hex[2*k : 2*k+2] {
			v = v<<4 | byte(strings.IndexRune("0123456789abcdef", c))
		}
		b[k] = v
	}
	b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7] = b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]
	return b[:]
}

func TestFind(t *testing.T) {
	b := machine(t, false)
	for _, c := range []struct {
		root   Source
		loader string
		want   string
	}{
		{Source{ByUUID, "01234567-89ab-cdef-0123-456789abcdef"}, "", "vda3"},
		{Source{ByLabel, "data"}, "", "vda3"},
		{Source{ByPartUUID, rootUUID}, "", "vda3"},
		{Source{ByPartLabel, "root"}, "", "vda3"},
		{Source{ByPath, "/dev/vda3"}, "", "vda3"},
		{Source{ByPath, "/dev/vdb"}, "", "vdb"},
		{Source{Kind: Auto}, espUUID, "vda3"},
		{Source{Kind: Auto}, "0000000f-0000-0000-0000-000000000000", ""},
		{Source{ByUUID, "01234567"}, "", ""},
		{Source{ByPartUUID, "00000000-0000-0000-0000-000000000000"}, "", ""},
		{Source{ByPath, "/dev/vda"}, "", "vda"},
		{Source{ByPath, "/dev/sr0"}, "", ""},
		{Source{ByPath, "/dev/vda4"}, "", ""},
	} {
		d, ok, seen, err := b.find(c.root, c.loader)
		if err != nil || ok != (c.want != "") || d.Name != c.want || !ok && len(seen) == 0 {
			t.Errorf("%v: %+v, %v, %q, %v", c.root, d, ok, seen, err)
		}
	}
	_, _, seen, _ := b.find(Source{ByLabel, "none"}, "")
	want := "vda, vda2, vda3 (ext4 UUID=01234567-89ab-cdef-0123-456789abcdef LABEL=data), vdb (LUKS UUID= LABEL=)"
	if got := strings.Join(seen, ", "); got != want {
		t.Errorf("seen %s", got)
	}
	_, _, seen, _ = b.find(Source{ByPartLabel, "none"}, "")
	if got := strings.Join(seen, ", "); !strings.Contains(got, "3 PARTUUID="+rootUUID+" PARTLABEL=root") || !strings.Contains(got, "vdb (no GPT)") {
		t.Errorf("seen %s", got)
	}
	if _, ok, _, _ := machine(t, true).find(Source{Kind: Auto}, espUUID); ok {
		t.Error("a partition is used that says it must not be")
	}
}

func TestLoaderPartition(t *testing.T) {
	dir := t.TempDir()
	write := func(text string) {
		b := []byte{6, 0, 0, 0}
		for _, u := range utf16.Encode([]rune(text)) {
			b = binary.LittleEndian.AppendUint16(b, u)
		}
		if err := os.WriteFile(filepath.Join(dir, loaderVariable), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := loaderPartition(dir); err == nil {
		t.Error("no variable is accepted")
	}
	write(strings.ToUpper(rootUUID) + "\x00")
	if got, err := loaderPartition(dir); got != rootUUID || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{"", "short", strings.Repeat("x", 100)} {
		write(bad)
		if _, err := loaderPartition(dir); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}
