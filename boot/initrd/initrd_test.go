package initrd

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/ulikunitz/xz"

	"github.com/composefs-boot/composefs-boot/boot/pid1"
)

// object is the smallest ELF file there is. It serves as /init and as a module.
func object(machine elf.Machine) []byte {
	var b bytes.Buffer
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Ehsize: 64, Phentsize: 56, Shentsize: 64}
	copy(h.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	binary.Write(&b, binary.LittleEndian, h)
	return b.Bytes()
}

func compressed(t *testing.T, data []byte, ending string) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	var err error
	switch ending {
	case ".xz":
		w, err = xz.NewWriter(&b)
	case ".zst":
		w, err = zstd.NewWriter(&b)
	case ".gz":
		w = gzip.NewWriter(&b)
	default:
		return data
	}
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// sample makes a program, a kernel with modules in every compression, firmware and microcode.
func sample(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	put := func(name string, data []byte) {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	program := object(elf.EM_X86_64)
	put("setup-root", program)
	put("lib/modules/6.1/modules.dep", []byte("k/virtio_blk.ko.xz:\nk/erofs.ko.zst: k/lz4.ko.gz\nk/lz4.ko.gz:\nk/xfs.ko:\n"))
	for _, name := range []string{"virtio_blk.ko.xz", "erofs.ko.zst", "lz4.ko.gz", "xfs.ko"} {
		_, ending := cutCompression(name)
		put("lib/modules/6.1/k/"+name, compressed(t, program, ending))
	}
	put("lib/firmware/maker/card.bin.xz", compressed(t, []byte("firmware"), ".xz"))
	put("lib/firmware/intel-ucode/06-01-01", []byte("intel one"))
	put("lib/firmware/intel-ucode/06-02-01", []byte("intel two"))
	put("lib/firmware/intel-ucode/list", []byte("not this"))
	put("lib/firmware/amd-ucode/microcode_amd.bin", []byte("amd"))
	put("lib/firmware/amd-ucode/microcode_amd.bin.asc", []byte("not this"))
	return Config{SetupRoot: filepath.Join(dir, "setup-root"), ModulesDir: filepath.Join(dir, "lib/modules/6.1"),
		Firmware: []string{"maker/*.bin"}, SetupConfig: []byte("[etc]\n"), Compression: None}
}

func archive(t *testing.T, c Config) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(context.Background(), &b, c); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func records(t *testing.T, b []byte) map[string]cpio.Record {
	t.Helper()
	all := map[string]cpio.Record{}
	r := cpio.EOFReader{RecordReader: cpio.Newc.Reader(bytes.NewReader(b))}
	for {
		rec, err := r.ReadRecord()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if dir := filepath.Dir(rec.Name); dir != "." && all[dir].Mode&cpio.S_IFMT != cpio.S_IFDIR {
			t.Errorf("%s comes before its directory", rec.Name)
		}
		all[rec.Name] = rec
	}
}

func content(t *testing.T, rec cpio.Record) string {
	t.Helper()
	b := make([]byte, rec.FileSize)
	if _, err := rec.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return string(b)
}

func TestArchive(t *testing.T) {
	c := sample(t)
	all := records(t, archive(t, c))
	program, err := os.ReadFile(c.SetupRoot)
	if err != nil {
		t.Fatal(err)
	}
	modules := "usr/lib/modules/6.1/k/"
	for name, want := range map[string]string{
		"init": string(program), modules + "virtio_blk.ko": string(program), modules + "erofs.ko": string(program),
		modules + "lz4.ko": string(program), modules + "xfs.ko": string(program), "usr/lib/firmware/maker/card.bin": "firmware",
		"usr/lib/composefs/setup-root-conf.toml": "[etc]\n", "lib": "usr/lib",
	} {
		rec, ok := all[name]
		if !ok || content(t, rec) != want {
			t.Errorf("%s: there %v, %d bytes", name, ok, rec.FileSize)
		}
		if rec.UID != 0 || rec.GID != 0 || rec.MTime != 0 || rec.NLink != 1 {
			t.Errorf("%s: %+v", name, rec.Info)
		}
	}
	if all["init"].Mode != cpio.S_IFREG|0o755 || all["dev/console"].Mode != cpio.S_IFCHR|0o600 || all["dev/console"].Rmajor != 5 {
		t.Errorf("%v, %v", all["init"], all["dev/console"])
	}
	list, err := pid1.ParseModules([]byte(content(t, all["usr/lib/composefs/modules"])))
	if err != nil || len(list) != 4 || list[1].Path != "/"+modules+"lz4.ko" || list[3] != (pid1.Module{When: "xfs", Path: "/" + modules + "xfs.ko"}) {
		t.Errorf("%+v, %v", list, err)
	}
	for name := range all {
		if strings.Contains(name, "bin/") || filepath.Base(name) == "sh" {
			t.Errorf("%s is in it", name)
		}
	}
}

// The same input gives the same bytes, in every compression, and what is compressed is the same archive.
func TestReproducible(t *testing.T) {
	c := sample(t)
	c.Time = time.Unix(1e9, 0)
	plain := archive(t, c)
	if m := records(t, plain)["init"].MTime; m != 1e9 {
		t.Errorf("time %d", m)
	}
	for _, compression := range []Compression{None, Gzip, Zstd} {
		c.Compression = compression
		one, two := archive(t, c), archive(t, c)
		if !bytes.Equal(one, two) {
			t.Errorf("%s: two builds differ", compression)
		}
		var r io.Reader = bytes.NewReader(one)
		var err error
		switch compression {
		case Gzip:
			r, err = gzip.NewReader(r)
		case Zstd:
			r, err = zstd.NewReader(r)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: %d bytes, not %d, %v", compression, len(got), len(plain), err)
		}
	}
	c.Time = time.Unix(1<<33, 0)
	if err := Write(context.Background(), io.Discard, c); err == nil {
		t.Error("a time after 2106 is accepted")
	}
}

// Microcode comes first, plain, with its data where processors can take it from.
func TestMicrocode(t *testing.T) {
	c := sample(t)
	c.MicrocodeDir = filepath.Join(c.ModulesDir, "../../firmware")
	c.Compression = Zstd
	b := archive(t, c)
	early := records(t, b)
	for name, want := range map[string]string{"AuthenticAMD.bin": "amd", "GenuineIntel.bin": "intel oneintel two"} {
		found := false
		for padded, rec := range early {
			if strings.TrimRight(padded, "\x00") == "kernel/x86/microcode/"+name {
				found = content(t, rec) == want
			}
		}
		if at := bytes.Index(b, []byte(want)); !found || at%16 != 0 {
			t.Errorf("%s: right %v, at %d", name, found, at)
		}
	}
	end := bytes.Index(b, []byte("\x28\xb5\x2f\xfd")) // zstd
	if end%512 != 0 || early["init"].Name != "" {
		t.Errorf("the other archive is at %d", end)
	}
	c.MicrocodeDir = t.TempDir()
	if _, err := c.Plan(context.Background()); err == nil || !strings.Contains(err.Error(), "no microcode in") {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	for want, change := range map[string]func(t *testing.T, c *Config){
		"no such file":                 func(t *testing.T, c *Config) { c.SetupRoot += "x" },
		"not a program":                func(t *testing.T, c *Config) { c.SetupRoot = filepath.Join(c.ModulesDir, "modules.dep") },
		"dynamically linked":           func(t *testing.T, c *Config) { c.SetupRoot = "/bin/sh" },
		"module x: this kernel":        func(t *testing.T, c *Config) { c.Modules = []string{"x"} },
		"firmware x: not in":           func(t *testing.T, c *Config) { c.Firmware = []string{"x"} },
		`firmware "../x": want a path`: func(t *testing.T, c *Config) { c.Firmware = []string{"../x"} },
		"run depmod":                   func(t *testing.T, c *Config) { c.ModulesDir = t.TempDir() },
		"no directory of modules":      func(t *testing.T, c *Config) { c.ModulesDir, c.Modules = "", []string{"x"} },
		"xfs.ko: not a module":         func(t *testing.T, c *Config) { overwrite(t, c.ModulesDir+"/k/xfs.ko", []byte("text")) },
		"lz4.ko.gz: gzip": func(t *testing.T, c *Config) {
			overwrite(t, c.ModulesDir+"/k/lz4.ko.gz", []byte("neither compressed nor a module"))
		},
		"erofs.ko.zst: ":      func(t *testing.T, c *Config) { overwrite(t, c.ModulesDir+"/k/erofs.ko.zst", []byte("text")) },
		"virtio_blk.ko.xz: ":  func(t *testing.T, c *Config) { overwrite(t, c.ModulesDir+"/k/virtio_blk.ko.xz", []byte("text")) },
		"for EM_AARCH64, but": func(t *testing.T, c *Config) { overwrite(t, c.ModulesDir+"/k/xfs.ko", object(elf.EM_AARCH64)) },
		"path escapes":        outside,
	} {
		c := sample(t)
		change(t, &c)
		if _, err := c.Plan(context.Background()); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func overwrite(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// outside makes a module a link to a file of the host.
func outside(t *testing.T, c *Config) {
	name := c.ModulesDir + "/k/xfs.ko"
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../../../setup-root", name); err != nil {
		t.Fatal(err)
	}
}
