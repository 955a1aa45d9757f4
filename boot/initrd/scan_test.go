package initrd

import (
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"strings"
	"testing"
)

// scanned returns the contents of the files of an initramfs, by their paths.
func scanned(b []byte) (map[string]string, error) {
	all := map[string]string{}
	err := Scan(bytes.NewReader(b), func(path string, mode uint32, content io.Reader) error {
		text, err := io.ReadAll(content)
		all[path] = string(text)
		return err
	})
	return all, err
}

// What Write writes, Scan reads: in every compression, with microcode in front, and with other archives behind.
func TestScan(t *testing.T) {
	c := sample(t)
	plain := archive(t, c)
	c.MicrocodeDir = c.ModulesDir + "/../../firmware"
	program := string(object(elf.EM_X86_64))
	for _, compression := range []Compression{None, Gzip, Zstd} {
		c.Compression = compression
		all, err := scanned(archive(t, c))
		if err != nil {
			t.Fatalf("%s: %v", compression, err)
		}
		for name, want := range map[string]string{"init": program, "lib": "usr/lib", "usr/lib/modules/6.1/k/xfs.ko": program,
			"usr/lib/composefs/setup-root-conf.toml": "[etc]\n", "kernel/x86/microcode/GenuineIntel.bin": "intel oneintel two"} {
			if all[name] != want {
				t.Errorf("%s: %s is %.40q, want %.40q", compression, name, all[name], want)
			}
		}
	}
	late := compressed(t, plain, ".xz")
	early := compressed(t, []byte(strings.ReplaceAll(string(plain), "etc", "abc")), ".gz")
	all, err := scanned(append(append(early, 0, 0, 0, 0), late...))
	if err != nil || all["init"] != program || all["usr/lib/composefs/setup-root-conf.toml"] != "[etc]\n" {
		t.Errorf("gzip and then xz: %v", err)
	}
}

// Every defect gives an error that names the offset of the part.
func TestScanHostile(t *testing.T) {
	entry := func(name, size, length, text string) string {
		h := "070701" + strings.Repeat("00000000", 6) + size + strings.Repeat("00000000", 4) + length + "00000000" + name
		return h + strings.Repeat("\x00", (4-len(h)%4)%4) + text
	}
	good := entry("abc\x00", "00000004", "00000004", "text")
	trailer := entry("TRAILER!!!\x00", "00000000", "0000000b", "")
	if all, err := scanned([]byte(good + trailer + "\x00\x00" + good + trailer)); err != nil || all["abc"] != "text" {
		t.Fatalf("two archives: %q, %v", all, err)
	}
	for name, c := range map[string]struct{ text, want string }{
		"another compression": {"\x89LZO....", "offset 0: " + ErrCompression.Error()},
		"no trailer":          {good, "header of an entry: EOF"},
		"truncated":           {good[:len(good)-2], "2 bytes of its content are missing"},
		"huge file":           {entry("abc\x00", "ffffffff", "00000004", "text"), "bytes of its content are missing"},
		"huge name":           {entry("abc\x00", "00000004", "ffffffff", "text"), "name of 4294967295 bytes"},
		"no name":             {entry("", "00000004", "00000000", "text"), "name of 0 bytes"},
		"no number":           {entry("abc\x00", "0000000x", "00000004", "text"), "no number"},
		"second part":         {good + trailer + "\x00what", "offset "},
		"not an archive":      {"07070", "header of an entry"},
		"old archive":         {"070707" + strings.Repeat("0", 200), "no header of a newc"},
		"gzip of nonsense":    {string(compressed(t, []byte("nonsense"), ".gz")), ErrCompression.Error()},
		"gzip of gzip":        {string(compressed(t, compressed(t, []byte(good), ".gz"), ".gz")), "compressed twice"},
		"gzip cut off":        {string(compressed(t, []byte(good), ".gz")[:30]), "EOF"},
	} {
		if _, err := scanned([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "initramfs: offset ") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	stop := errors.New("enough")
	if err := Scan(strings.NewReader(good), func(string, uint32, io.Reader) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("a visitor's error: %v", err)
	}
}

func FuzzScan(f *testing.F) {
	f.Add([]byte("070701" + strings.Repeat("0", 88) + "0000000b" + "00000000TRAILER!!!\x00\x00\x00\x00"))
	f.Add([]byte("\x1f\x8b\x08\x00"))
	f.Add([]byte("\x28\xb5\x2f\xfd\x00"))
	f.Add([]byte("\xfd7zXZ\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		Scan(bytes.NewReader(b), func(path string, _ uint32, content io.Reader) error {
			if len(path) > maxName {
				t.Errorf("a path of %d bytes", len(path))
			}
			_, err := io.CopyN(io.Discard, content, 100)
			if err == io.EOF {
				return nil
			}
			return err
		})
	})
}
