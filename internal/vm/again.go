package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// again names the directory in which a test finds fs-verity, when it runs in a guest.
const again = "VM_TEST_DIR"

// WithVerity runs a test once more in a guest, since it needs a file system with fs-verity, which hosts seldom have. There f gets
// the mount point of an empty one; here the guest's console decides. Name is that of the test; the kernel is 6.12, with an
// ext4 of 64 MiB.
func WithVerity(t *testing.T, name string, f func(dir string)) {
	t.Helper()
	if dir := os.Getenv(again); dir != "" {
		f(dir)
		return
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "test")
	cmd := exec.Command("go", "test", "-c", "-ldflags=-s -w", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	disk := filepath.Join(dir, "disk.img")
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "verity", disk, "64M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	k := Kernels(t)["6.12"]
	m := Start(t, Config{Kernel: k.Image, Disks: []string{disk}, Initrd: Initrd(t, k, map[string]string{"bin/program.test": program},
		"mount /dev/vda /mnt && mkdir -p /tmp && "+again+"=/mnt program.test -test.run '^"+name+"$' -test.v")})
	m.Expect("SCRIPT ENDED 0", "SCRIPT ENDED [1-9]|Kernel panic")
}
