package pid1

import (
	"strings"
	"testing"
)

func TestPlan(t *testing.T) {
	modules, err := ParseModules([]byte("# comment\nboot /a/virtio-blk.ko\nboot /a/erofs.ko\n\nxfs /a/xfs.ko\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		line, want string
		signed     bool
	}{
		{"root=UUID=ab rw init=/bin/sh", `
load 2 kernel modules
measure enter-initrd if the stub measures
wait for UUID=ab, at most 30s
mount it at /sysroot
make the composefs image the root at /sysroot
find /sbin/init or /usr/lib/systemd/systemd in it
hand over what the stub left
measure leave-initrd if the stub measures
move /dev into it
move /proc into it
move /sys into it
move /run into it
delete the initramfs and switch to the new root
execute it
`, false},
		{"root=/dev/sda1 rootfstype=xfs,btrfs rootflags=noatime,x=y rootwait init=/app", `
load 2 kernel modules
measure enter-initrd if the stub measures
wait for /dev/sda1, for ever
mount it at /sysroot as xfs or btrfs, read-only, with x=y
make the composefs image the root at /sysroot
find /app in it, as init= says
hand over what the stub left
measure leave-initrd if the stub measures
move /dev into it
move /proc into it
move /sys into it
move /run into it
delete the initramfs and switch to the new root
execute it
`, true},
	} {
		r, err := ParseRequest(c.line, c.signed)
		if err != nil {
			t.Fatal(err)
		}
		if got := Format(Plan(r, modules)); got != c.want[1:] {
			t.Errorf("%s:\n%s", c.line, got)
		}
	}
}

func TestModules(t *testing.T) {
	list := []Module{{"boot", "/usr/lib/modules/6.1/virtio-blk.ko"}, {"btrfs", "/b.ko"}}
	got, err := ParseModules(FormatModules(list))
	if err != nil || len(got) != 2 || got[0] != list[0] || got[1] != list[1] || got[0].Name() != "virtio_blk" {
		t.Errorf("%+v, %v", got, err)
	}
	for text, want := range map[string]string{
		"boot":                         "line 1: ",
		"\nboot relative.ko":           "line 2: ",
		"boot /a/../../etc/shadow":     "line 1: ",
		"boot /a b":                    "line 1: ",
		"boot /a\x00":                  "line 1: ",
		strings.Repeat("b /a\n", 4097): "line 4097: more than 4096",
		strings.Repeat("#", 1<<20+1):   "larger than",
	} {
		if _, err := ParseModules([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v", text, err)
		}
	}
}

func FuzzParseModules(f *testing.F) {
	f.Add([]byte("boot /a.ko\n# x\nxfs /b.ko"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := ParseModules(b)
		if err != nil {
			return
		}
		again, err := ParseModules(FormatModules(list))
		if err != nil || len(again) != len(list) {
			t.Errorf("%+v, %v", again, err)
		}
	})
}
