package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInitrdBuild(t *testing.T) {
	dir := t.TempDir()
	program, modules, out := filepath.Join(dir, "setup-root"), filepath.Join(dir, "6.1"), filepath.Join(dir, "out")
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64}
	copy(h.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, h)
	for name, data := range map[string]string{program: b.String(), modules + "/modules.dep": "erofs.ko:\nxfs.ko:\n",
		modules + "/erofs.ko": b.String(), modules + "/xfs.ko": b.String(), dir + "/good": "[init]\nsigned-cmdline = true\n", dir + "/bad": "[usr]"} {
		os.MkdirAll(filepath.Dir(name), 0o755)
		if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	build := func(args ...string) (int, string, string) {
		return command(append([]string{"initrd", "build", "--setup-root", program, "--modules-dir", modules}, args...)...)
	}
	code, text, errText := build("--dry-run", "--config", dir+"/good")
	for _, want := range []string{"nothing is written", "64 B  init\n", "usr/lib/composefs/setup-root-conf.toml", "load boot   /usr/lib/modules/6.1/erofs.ko",
		"load xfs    /usr/lib/modules/6.1/xfs.ko"} {
		if code != 0 || !strings.Contains(text, want) {
			t.Errorf("no %q: %d, %s%s", want, code, text, errText)
		}
	}
	code, text, errText = build("--json", "-o", out, "--compress", "gzip")
	var result initrdResult
	if err := json.Unmarshal([]byte(text), &result); code != 0 || err != nil {
		t.Fatalf("%d, %v, %s%s", code, err, text, errText)
	}
	info, err := os.Stat(out)
	if err != nil || info.Size() != result.Size || info.Mode() != 0o644 || result.Path != out || len(result.Modules) != 2 {
		t.Errorf("%v, %v, %+v", info, err, result)
	}
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{2, "-o is missing", nil},
		{2, `compression "lz4": want`, []string{"-o", out, "--compress", "lz4"}},
		{1, `bad: line 1: table "[usr]"`, []string{"-o", out, "--config", dir + "/bad"}},
		{1, "module nonesuch: this kernel has none", []string{"-o", out, "--module", "nonesuch"}},
		{1, "firmware x.bin: not in", []string{"-o", out, "--firmware", "x.bin"}},
	} {
		code, _, errText := build(c.args...)
		if code != c.code || !strings.Contains(errText, c.want) || strings.Count(errText, "\n") != 1 {
			t.Errorf("%q: %d, %s", c.args, code, errText)
		}
	}
	if left, _ := filepath.Glob(dir + "/.composefs-*"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
