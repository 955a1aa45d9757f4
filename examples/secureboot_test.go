package examples

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// The machine takes the keys and enforces them; systemd's own tools seal a secret to the signed policies and open it at the next
// boot, with the native initramfs before them; one byte of the command line, and the firmware does not start it.
func TestSecureBoot(t *testing.T) {
	dir := t.TempDir()
	run(t, []string{"BIN=" + vm.Programs(t), "TREE=" + vm.Cache(t, "os/trixie")}, "./secureboot/build", dir)
	config := vm.Config{Disks: []string{filepath.Join(dir, "disk.img")}, Variables: filepath.Join(dir, "variables"),
		TPMState: filepath.Join(dir, "tpm"), Reboots: 1}
	const never = "the TPM opens: Failed|Kernel panic|does not boot|NOT verified|IS WRITABLE|STATE IS LOST|status: [0-9]+ error"
	m := vm.Start(t, config)
	m.Expect(`successfully enrolled`, never)
	m.Expect(`composefs-setup-root: the root is image \w+, verified`, never)
	m.Expect(`composefs-show: Secure Boot: +1`, never)
	m.Expect(`composefs-show: sealed in the TPM: *\n`, never)
	m.Expect(`composefs-show: done`, never)
	m.Stop()
	m = vm.Start(t, config)
	m.Expect(`composefs-show: boot 2, /etc and /var are writable`, never)
	m.Expect(`composefs-show: the TPM opens: a secret`, never)
	m.Expect(`composefs-show: done`, never)
	m.Stop()

	esp := config.Disks[0] + "@@1M"
	uki := strings.TrimSpace(run(t, nil, "mdir", "-b", "-i", esp, "::/EFI/Linux"))
	file := filepath.Join(dir, "os.efi")
	run(t, nil, "mcopy", "-i", esp, uki, file)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	changed := bytes.Replace(b, []byte("composefs.show"), []byte("composefs.Xhow"), 1)
	if bytes.Equal(b, changed) {
		t.Fatal("no composefs.show in the UKI")
	}
	if err := os.WriteFile(file, changed, 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, nil, "mcopy", "-o", "-i", esp, file, uki)
	m = vm.Start(t, config)
	m.Expect(`(?i)access denied|security violation`, never+"|composefs-show|composefs-setup-root")
	m.Stop()
}
