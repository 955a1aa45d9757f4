package main

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// With fs-verity, the kernel verifies what is mounted: an image by its digest, and every file when it is read.
func TestMountOCI(t *testing.T) {
	dir := t.TempDir()
	layout := filepath.Join(dir, "layout")
	if err := os.CopyFS(layout, golden.Files(t, "oci/oci-boot")); err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"bin/composefs-boot": filepath.Join(vm.Programs(t), "composefs-boot")}
	err := filepath.WalkDir(layout, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			files[rel] = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk.img")
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "verity", disk, "64M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	k := vm.Kernels(t)["6.12"]
	m := vm.Start(t, vm.Config{Kernel: k.Image, Disks: []string{disk}, Initrd: vm.Initrd(t, k, files, `set -e
mount /dev/vda /mnt
mkdir -p /tmp /m
R="composefs-boot -q --repo /mnt/r"
$R init
$R oci pull --bootable oci:/layout os
$R oci mount os /m
grep "/m overlay ro.*verity=require" /proc/mounts
test "$(cat /m/opt/changed | wc -c)" = 300
test "$(cat /m/etc/hostname)" = vec
test -e /m/boot/stale
umount /m
$R oci mount --bootable os /m
if test -e /m/boot/stale; then exit 1; fi
umount /m
echo BOTH MOUNTED
# A file that is replaced by another one cannot be read, with fs-verity or without it; the others can.
O=$($R oci dump os | grep ^/opt/changed | cut -d' ' -f9)
cp /mnt/r/objects/$O /tmp/o
echo x >> /tmp/o
cp /tmp/o /mnt/r/objects/new
mv /mnt/r/objects/new /mnt/r/objects/$O
$R oci mount os /m
if cat /m/opt/changed; then exit 1; fi
test "$(head -c 4 /m/usr/lib/modules/6.12.0/vmlinuz | wc -c)" = 4
umount /m
# Nor does an image that was replaced come to be mounted.
I=$(readlink /mnt/r/images/1aa47ce279e4*)
cp /mnt/r/images/$I /tmp/i
rm /mnt/r/images/$I
cp /tmp/i /mnt/r/images/$I
if $R oci mount os /m; then exit 1; fi
if grep "/m overlay" /proc/mounts; then exit 1; fi
echo DAMAGE REFUSED
`)})
	const never = "SCRIPT ENDED [1-9]|Kernel panic"
	m.Expect("BOTH MOUNTED", never)
	m.Expect("DAMAGE REFUSED", never)
	m.Expect("SCRIPT ENDED 0", never)
}
