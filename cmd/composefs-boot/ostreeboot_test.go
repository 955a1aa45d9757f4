package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// A Debian that was committed with ostree boots from its commit, verified, with its /usr/etc as /etc, and with the digest that other
// commands find for it.
func TestGuestBootsCommit(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	do := func(cmd *exec.Cmd) {
		t.Helper()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
	}
	do(exec.Command("cp", "-a", vm.Cache(t, "os/trixie"), in("tree")))
	// As OSTree wants it: the image's /etc in /usr, and no devices.
	if err := os.Rename(in("tree/etc"), in("tree/usr/etc")); err != nil {
		t.Fatal(err)
	}
	do(exec.Command("find", in("tree/dev"), "-mindepth", "1", "-delete"))
	if err := os.WriteFile(in("tree/usr/etc/hostname"), []byte("from-usr-etc\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	do(vm.Ostree(t, "--repo="+in("ostree"), "init", "--mode=archive"))
	do(vm.Ostree(t, "--repo="+in("ostree"), "commit", "--branch=os/stable", "--tree=dir="+in("tree")))

	source := "ostree:" + in("ostree") + ":os/stable"
	var id imageResult
	runJSON(t, &id, "--no-repo", "compute-id", "--bootable", source)
	var installed installResult
	runJSON(t, &installed, "install", source, "--disk", in("disk.img"), "--karg", "console=ttyS0",
		"--karg", "composefs.show", "--karg", "systemd.journald.forward_to_console=0")
	if installed.Digest != id.Digest {
		t.Errorf("installed %s, want %s", installed.Digest, id.Digest)
	}
	m := vm.Start(t, vm.Config{Disks: []string{in("disk.img")}})
	const never = "Kernel panic|does not boot|not found in|NOT verified|IS WRITABLE|STATE IS LOST|status: [0-9]+ error"
	m.Expect(`composefs-setup-root: the root is image `+installed.Digest+`, verified`, never)
	m.Expect(`from-usr-etc login:|Hostname set to <from-usr-etc>`, never)
	m.Expect(`composefs-show: composefs:`+installed.Digest+` / overlay ro,.*verity=require`, never)
	m.Expect(`composefs-show: boot 1, /etc and /var are writable`, never)
	m.Expect(`composefs-show: done`, never)
}
