// Package examples boots what the examples make.
package examples

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", name, err, out, said.String())
	}
	return string(out)
}

// A static program as the operating system: a disk of less than 40 MB, up within seconds, that cannot be changed.
func TestAppliance(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk.img")
	tree := vm.Cache(t, "os/trixie")
	run(t, []string{"BIN=" + vm.Programs(t), "STUBS=" + filepath.Join(tree, "usr/lib/systemd/boot/efi")}, "./appliance/build", disk,
		filepath.Join(tree, "usr/lib/modules", vm.Kernels(t)["6.12"].Version))
	info, err := os.Stat(disk)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() >= 40e6 {
		t.Errorf("a disk of %d bytes", info.Size())
	}
	m := vm.Start(t, vm.Config{Disks: []string{disk}})
	const never = "Kernel panic|does not boot|not found|cannot"
	m.Expect(`appliance: the root is composefs:[0-9a-f]{128}, overlay ro,.*verity=require`, never)
	m.Expect(`appliance: it cannot be changed: .*read-only file system`, "")
	seconds := m.Expect(`appliance: up ([0-9.]+) seconds after the kernel`, never)
	t.Logf("up after %s s", seconds[1])
	m.Expect(`appliance: serving: HTTP/1.0 200 OK`, never)
}

// An operating system whose UKI was made inside of it, for its own digest: it is installed as it is and boots, though nobody
// outside told it which disk it is on; and with one file changed it is refused.
func TestUnified(t *testing.T) {
	bin, dir := vm.Programs(t), t.TempDir()
	tree, disk := filepath.Join(dir, "tree"), filepath.Join(dir, "disk.img")
	run(t, nil, "cp", "-a", vm.Cache(t, "os/trixie"), tree)
	program := filepath.Join(bin, "composefs-boot")
	run(t, nil, "cp", program, filepath.Join(bin, "composefs-setup-root"), filepath.Join(tree, "usr/bin"))
	run(t, []string{"KARGS=composefs.show systemd.journald.forward_to_console=0"}, "./unified/build", tree)
	var installed struct {
		Digest  string
		Options string `json:"kernel_command_line"`
	}
	out := run(t, nil, program, "--quiet", "--json", "install", tree, "--disk", disk)
	if err := json.Unmarshal([]byte(out), &installed); err != nil {
		t.Fatal(err)
	}
	if installed.Options != "" {
		t.Errorf("options %q from outside", installed.Options)
	}
	m := vm.Start(t, vm.Config{Disks: []string{disk}})
	const never = "Kernel panic|does not boot|NOT verified|IS WRITABLE|STATE IS LOST|status: [0-9]+ error"
	m.Expect(`composefs-setup-root: the root is image `+installed.Digest+`, verified`, never)
	m.Expect(`composefs-show: composefs:`+installed.Digest+` / overlay ro,.*verity=require`, never)
	m.Expect(`composefs-show: done`, never)
	m.Stop()
	if err := os.WriteFile(filepath.Join(tree, "etc/new"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	said, err := exec.Command(program, "--quiet", "install", tree, "--disk", disk, "--dry-run").CombinedOutput()
	if err == nil || !strings.Contains(string(said), "names composefs.digest=v1-sha512-12:"+installed.Digest+", but this tree's image is") {
		t.Errorf("%v\n%s", err, said)
	}
}
