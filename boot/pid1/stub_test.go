package pid1

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHandOver(t *testing.T) {
	root, run := t.TempDir(), t.TempDir()
	if err := handOver(root, run); err != nil {
		t.Fatal(err)
	}
	if list, _ := os.ReadDir(run); len(list) != 0 {
		t.Errorf("%v from nothing", list)
	}
	os.Mkdir(filepath.Join(root, ".extra"), 0o755)
	write := func(name, content string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, ".extra", name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("tpm2-pcr-signature.json", "{}")
	write("boot-secret", "s")
	write("other", "not known")
	if err := handOver(root, run); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct {
		content string
		mode    os.FileMode
	}{"systemd/tpm2-pcr-signature.json": {"{}", 0o444}, "systemd/stub/boot-secret": {"s", 0o400}} {
		b, err := os.ReadFile(filepath.Join(run, name))
		info, err2 := os.Stat(filepath.Join(run, name))
		if err != nil || err2 != nil || string(b) != want.content || info.Mode() != want.mode {
			t.Errorf("%s: %q, %v, %v", name, b, info, err)
		}
	}
	write("profile", strings.Repeat("x", maxHanded+1))
	if err := handOver(root, t.TempDir()); err == nil || !strings.Contains(err.Error(), "/.extra/profile: more than 1048576 bytes") {
		t.Errorf("too large: %v", err)
	}
	os.Remove(filepath.Join(root, ".extra/profile"))
	os.Symlink("/etc/passwd", filepath.Join(root, ".extra/profile"))
	if err := handOver(root, t.TempDir()); err == nil {
		t.Error("a link is followed")
	}
}

// tpm is a TPM that gives an answer.
type tpm struct {
	command, answer []byte
	err             error
}

func (f *tpm) Write(b []byte) (int, error) { f.command = bytes.Clone(b); return len(b), f.err }
func (f *tpm) Read(b []byte) (int, error)  { return copy(b, f.answer), nil }

func TestEvent(t *testing.T) {
	f := &tpm{answer: []byte("\x80\x02\x00\x00\x00\x0a\x00\x00\x00\x00")}
	if err := pcrEvent(f, "word"); err != nil {
		t.Fatal(err)
	}
	want := "\x80\x02\x00\x00\x00\x21\x00\x00\x01\x3c\x00\x00\x00\x0b\x00\x00\x00\x09\x40\x00\x00\x09\x00\x00\x00\x00\x00\x00\x04word"
	if string(f.command) != want {
		t.Errorf("%q", f.command)
	}
	for answer, want := range map[string]string{
		"":                                     "answers with 0 bytes",
		"\x80\x01\x00\x00\x00\x0a\x00\x00\x01": "answers with 9 bytes",
		"\x80\x01\x00\x00\x00\x0a\x00\x00\x01\x01": "code 0x101",
	} {
		if err := pcrEvent(&tpm{answer: []byte(answer)}, "word"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", answer, err)
		}
	}
	if err := pcrEvent(&tpm{err: errors.New("gone")}, "word"); err == nil {
		t.Error("an error of the device is lost")
	}
}
