package disk_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// flip inverts a bit of a block of a file: the block with this number, the byte at this offset in it.
func flip(t *testing.T, image, partition string, p *disk.Plan, name string, logical, offset int64) {
	t.Helper()
	var physical int64
	fmt.Sscan(debugfs(t, partition, fmt.Sprintf("bmap %s %d", name, logical)), &physical)
	if physical == 0 {
		t.Fatalf("%s: block %d is a hole", name, logical)
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	at := p.Root.Offset + physical*4096 + offset
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// The kernel is the judge of the format: it measures every object right, and finds one flipped bit anywhere.
func TestGuestMeasures(t *testing.T) {
	kernels := vm.Kernels(t)
	measure := filepath.Join(t.TempDir(), "measure")
	build := exec.Command("go", "build", "-o", measure, "./testdata/measure")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	for _, version := range []string{"6.12", "7.2"} {
		t.Run(version, func(t *testing.T) {
			l := layout(t)
			objects := sampleRepository(t, l.Root.Dir)
			intact, _ := write(t, l)
			damaged, p := write(t, l)
			part := extract(t, damaged, p.Root)

			// Objects of more than one block, without zeros, so that there is a tree and no hole.
			var large []string
			for name, data := range objects {
				if len(data) > 65536 && !bytes.Equal(data[4096:8192], make([]byte, 4096)) {
					large = append(large, name)
				}
			}
			slices.Sort(large)
			tree := func(name string) int64 { return (int64(len(objects[name])) + 65535) / 65536 * 16 }
			wrong := map[string]error{
				large[0]: fmt.Errorf("read: %w", syscall.EIO),
				large[1]: fmt.Errorf("read: %w", syscall.EIO),
				large[2]: fmt.Errorf("open: %w", syscall.EINVAL),
			}
			flip(t, damaged, part, p, large[0], 1, 77)
			flip(t, damaged, part, p, large[1], tree(large[1]), 5)
			d, err := fsverity.ParseObjectPath(strings.TrimPrefix(large[2], "/composefs/objects/"))
			if err != nil {
				t.Fatal(err)
			}
			m, _, err := fsverity.MetadataOf(d.Algorithm(), bytes.NewReader(objects[large[2]]))
			if err != nil {
				t.Fatal(err)
			}
			flip(t, damaged, part, p, large[2], tree(large[2])+int64(len(m.Tree)/4096), 0) // the descriptor's version

			k := kernels[version]
			initrd := vm.Initrd(t, k, map[string]string{"/measure": measure}, `
mount -t ext4 /dev/vda2 /mnt && /measure /mnt/composefs
echo x > /mnt/writable && mkdir /mnt/composefs/objects/new && echo WRITABLE
for f in /mnt/composefs/objects/*/*; do echo x 2>/dev/null >> $f && echo CHANGED $f; done
umount /mnt
mount -t ext4 /dev/vdb2 /mnt && /measure /mnt/composefs
`)
			guest := vm.Start(t, vm.Config{Kernel: k.Image, Initrd: initrd, Disks: []string{intact, damaged}})
			guest.Expect(fmt.Sprintf(`(?m)^RIGHT %d\s`, len(objects)), "WRONG|RIGHT|SCRIPT ENDED|Kernel panic")
			guest.Expect(`(?m)^WRITABLE\s`, "CHANGED|SCRIPT ENDED")
			guest.Expect(fmt.Sprintf(`(?m)^RIGHT %d\s`, len(objects)-len(wrong)), "CHANGED|SCRIPT ENDED")
			console := guest.Console()
			for name, err := range wrong {
				want := fmt.Sprintf("WRONG %s: %v\n", strings.TrimPrefix(name, "/composefs"), err)
				if !strings.Contains(console, want) {
					t.Errorf("no %s in\n%s", want, console)
				}
			}
		})
	}
}
