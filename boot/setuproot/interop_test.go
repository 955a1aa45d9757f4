//go:build interop

package setuproot_test

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// TestInteropTime mounts the same root with composefs-setup-root of composefs-rs and with this one, in turns in one guest,
// and tells how long they took. Whoever comes first pays for what the kernel does for the first time, so there is a guest
// for either order. The disk is ours: that the peer boots from it is part of the test.
func TestInteropTime(t *testing.T) {
	peer := vm.Cache(t, "cargo/bin/composefs-setup-root")
	ours := filepath.Join(vm.Top(t), "bin/composefs-setup-root")
	files := map[string]string{"bin/peer": peer, "bin/ours": ours}
	libraries, err := exec.Command("ldd", peer).Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(/\S+) \(`).FindAllSubmatch(libraries, -1) {
		files[string(m[1])] = string(m[1])
	}
	d := newRootDisk(t)
	for _, order := range []string{"peer ours", "ours peer"} {
		t.Run(order, func(t *testing.T) { timeBoth(t, d, files, order) })
	}
}

func timeBoth(t *testing.T, d rootDisk, files map[string]string, order string) {
	const rounds = 10
	k := vm.Kernels(t)["6.12"]
	// The peer needs a /tmp, and the state directories. /proc/uptime has hundredths of seconds.
	m := vm.Start(t, vm.Config{Kernel: k.Image, Disks: []string{d.copy(t, "", 0)}, Initrd: vm.Initrd(t, k, files, fmt.Sprintf(`
		mkdir -p /tmp
		mount /dev/vda2 /sysroot; mkdir -p /sysroot/state/deploy/%[1]v/etc /sysroot/state/deploy/%[1]v/var; umount /sysroot
		now() { read up rest < /proc/uptime; now=$(echo $up | tr -d .); }
		cold_peer=; cold_ours=; sum_peer=0; sum_ours=0
		for round in $(seq 0 %[3]d); do for p in %[4]s; do
			mount /dev/vda2 /sysroot
			now; before=$now
			$p --cmdline '%[2]v' 2>/run/messages || exit 1
			now; took=$((now - before))
			grep -q "/sysroot overlay.*verity=require" /proc/mounts || exit 1
			if [ $round = 0 ]; then eval cold_$p=$took; else eval "sum_$p=\$((sum_$p + took))"; fi
			while umount /sysroot/etc /sysroot/var /sysroot/sysroot /sysroot 2>/dev/null || umount /sysroot 2>/dev/null; do :; done
		done; done
		echo "TOOK $cold_peer $sum_peer $cold_ours $sum_ours"
	`, d.one, karg.Make(d.one, 1, false), rounds, order))})
	took := m.Expect(`TOOK (\d+) (\d+) (\d+) (\d+)`, "SCRIPT ENDED|Kernel panic")
	var ms [4]int
	for n := range ms {
		ms[n], _ = strconv.Atoi(took[n+1])
		ms[n] *= 10
	}
	t.Logf("composefs-rs: %d ms at first, then %d ms; ours: %d ms, then %d ms", ms[0], ms[1]/rounds, ms[2], ms[3]/rounds)
}
