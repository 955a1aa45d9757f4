// Package dracut holds the dracut module; its test boots whole systems with it.
package dracut

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// installed is what "composefs-boot install --json" prints.
type installed struct {
	Digest string
	Disk   struct{ Root struct{ Offset int64 } }
}

func install(t *testing.T, suite, path string) installed {
	t.Helper()
	tree := vm.Cache(t, "os/"+suite)
	program := filepath.Join(vm.Top(t), "bin/composefs-boot")
	cmd := exec.Command(program, "--quiet", "--json", "install", tree, "--disk", path, "--karg", "console=ttyS0",
		"--karg", "composefs.show", "--karg", "systemd.journald.forward_to_console=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: run \"make build\"", program, err)
	}
	var result installed
	if err := json.Unmarshal(out, &result); err != nil {
		t.Fatal(err)
	}
	return result
}

// flip changes a byte of a file in the root file system of a disk image.
func flip(t *testing.T, disk string, offset int64, file string, at int64) {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", fmt.Sprintf("bmap %s %d", file, at/4096), fmt.Sprintf("%s?offset=%d", disk, offset)).Output()
	block, err2 := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil || err2 != nil || block == 0 {
		t.Fatalf("debugfs: %v, %v: %s", err, err2, out)
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], offset+block*4096+at%4096); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], offset+block*4096+at%4096); err != nil {
		t.Fatal(err)
	}
}

// A Debian becomes a disk that boots through firmware, boot loader, dracut's initramfs and systemd to its target, with its root
// verified, twice; and that refuses to boot, without a shell, when one byte of its image has changed.
func TestWholeSystems(t *testing.T) {
	for suite, kernel := range map[string]string{"trixie": `6\.12\.`, "forky": `7\.`} {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "disk.img")
			disk := install(t, suite, path)
			for boot := 1; boot <= 2; boot++ {
				m := vm.Start(t, vm.Config{Disks: []string{path}})
				const never = "Kernel panic|emergency|composefs: halted|NOT verified|IS WRITABLE|STATE IS LOST|status: [0-9]+ error"
				m.Expect(`composefs-setup-root: the root is image `+disk.Digest+`, verified`, never)
				m.Expect(`composefs-show: `+kernel, never)
				m.Expect(`composefs-show: composefs:`+disk.Digest+` / overlay ro,.*verity=require`, never)
				m.Expect(`composefs-show: overlay /etc overlay rw,.*upperdir`, never)
				m.Expect(`composefs-show: \S+ /var ext4 rw`, never)
				m.Expect(fmt.Sprintf(`composefs-show: boot %d, /etc and /var are writable`, boot), never+"|objects:")
				m.Expect(`composefs-show: objects: (\d+)/(\d+) ok`, never)
				m.Expect(`composefs-show: status: ok`, never)
				m.Expect(`composefs-show: done`, never)
				m.Stop()
			}
			flip(t, path, disk.Disk.Root.Offset, "/composefs/objects/"+disk.Digest[:2]+"/"+disk.Digest[2:], 1300)
			m := vm.Start(t, vm.Config{Disks: []string{path}})
			const shell = "composefs-show|login:|Press Enter|Give root password|sh-[0-9.]*#|:/root#"
			m.Expect(`composefs-setup-root: .*the image cannot be read, its content was changed`, shell)
			m.Expect(`composefs: halted|System halted`, shell)
			m.Stop()
		})
	}
}
