package boot_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return string(out)
}

// An upgrade that never gets to its target is tried three times; then the version before it boots, with its addon, and marks
// itself as good.
func TestGuestCountsBoots(t *testing.T) {
	bin, dir, tree := vm.Programs(t), t.TempDir(), vm.Cache(t, "os/trixie")
	program, disk := filepath.Join(bin, "composefs-boot"), filepath.Join(dir, "disk.img")
	addon := filepath.Join(dir, "word.addon.efi")
	stubs := filepath.Join(tree, "usr/lib/systemd/boot/efi")
	run(t, program, "uki", "build", "--stub", filepath.Join(stubs, "addonx64.efi.stub"), "--cmdline", "word-of-the-addon", "-o", addon)
	var installed struct {
		Digest  string
		Options string `json:"kernel_command_line"`
		Disk    struct{ ESP struct{ Offset int64 } }
	}
	out := run(t, program, "--quiet", "--json", "install", tree, "--disk", disk, "--uki", "--initrd", "native", "--image-version", "1",
		"--setup-root", filepath.Join(bin, "composefs-setup-root"), "--addon", addon, "--karg", "console=ttyS0",
		"--karg", "composefs.show", "--karg", "systemd.journald.forward_to_console=0")
	if err := json.Unmarshal([]byte(out), &installed); err != nil {
		t.Fatal(err)
	}
	// The upgrade is the same, but for a root that is not there.
	esp := fmt.Sprintf("%s@@%d", disk, installed.Disk.ESP.Offset)
	id := "composefs-" + installed.Digest[:32]
	good, bad := filepath.Join(dir, "good.efi"), filepath.Join(dir, "bad.efi")
	run(t, "mcopy", "-i", esp, "::/EFI/Linux/"+id+"+3.efi", good)
	build := []string{"uki", "build", "--stub", filepath.Join(stubs, "linuxx64.efi.stub"), "-o", bad, "--os-release", "ID=debian\nIMAGE_VERSION=2\n",
		"--cmdline", strings.Replace(installed.Options, "root=UUID=", "rootwait=1 root=UUID=f", 1)}
	for _, section := range []string{"linux", "initrd"} {
		file := filepath.Join(dir, section)
		run(t, program, "uki", "extract", good, section, "-o", file)
		build = append(build, "--"+section, file)
	}
	run(t, program, build...)
	run(t, "mcopy", "-i", esp, bad, "::/EFI/Linux/upgrade+3.efi")
	for range 3 {
		m := vm.Start(t, vm.Config{Disks: []string{disk}})
		m.Expect(`composefs-setup-root: wait for UUID=f\S+, at most 1s: not found`, "composefs-show|Kernel panic")
		m.Stop()
	}
	m := vm.Start(t, vm.Config{Disks: []string{disk}})
	const never = "Kernel panic|does not boot|not found in|Failed to start systemd-bless-boot"
	m.Expect(`Command line: composefs.digest=\S+`+installed.Digest+` root=\S+ .* word-of-the-addon\s`, never)
	m.Expect(`Finished .*systemd-bless-boot`, never)
	m.Expect(`composefs-show: done`, never)
	m.Stop()
	names := run(t, "mdir", "-b", "-i", esp, "::/EFI/Linux")
	for _, want := range []string{"/" + id + ".efi\n", "/upgrade+0-3.efi\n"} {
		if !strings.Contains(names, want) {
			t.Errorf("no %q on the ESP:\n%s", want, names)
		}
	}
}
