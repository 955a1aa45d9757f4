package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// commitScript runs in the guest, at each of its boots.
const commitScript = `#!/bin/sh
run() {
	"$@" > /run/out 2>&1
	echo "exit $?: $*" >> /run/out
	sed 's/^/upgrade-test: /' /run/out
}
boot=$(($(cat /var/lib/boot 2>/dev/null || echo 0) + 1))
echo $boot > /var/lib/boot
for k in $(seq 60); do grep -q '^e[^ ]*.00000000' /proc/net/route && break; sleep 1; done
echo "upgrade-test: boot $boot, version $(cat /usr/lib/version-of-test), etc $(cat /etc/kept 2>/dev/null || echo empty), $(cat /etc/version-of-test)"
case $boot in
1)
	echo changed > /etc/kept
	run composefs-boot upgrade --check
	run composefs-boot -q upgrade
	sync
	systemctl --no-block reboot ;;
2)
	run composefs-boot -q upgrade
	run composefs-boot status
	echo "upgrade-test: done" ;;
esac
`

// A Debian that was committed with ostree boots from its commit, verified, with its /usr/etc as /etc, and with the digest that other
// commands find for it. It upgrades itself to the second commit from a web server, from which it fetches the changed objects alone, by
// the key that the install has left there, and boots that. Kernel, initramfs and command line are unified images, made of the commits.
func TestGuestBootsCommit(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	upgradeTree(t, in("tree"), commitScript, "127.0.0.1:1")
	// As OSTree wants it: the image's /etc in /usr, and no devices.
	if err := os.Rename(in("tree/etc"), in("tree/usr/etc")); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("find", in("tree/dev"), "-mindepth", "1", "-delete").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	putFile(t, in("tree/usr/etc/hostname"), "from-usr-etc\n")
	version := func(tree, n string) string {
		putFile(t, in(tree+"/usr/lib/version-of-test"), n+"\n")
		putFile(t, in(tree+"/usr/lib/version-of-test.data"), strings.Repeat(n, 1<<20))
		putFile(t, in(tree+"/usr/etc/version-of-test"), "etc of "+n+"\n")
		return "dir=" + in(tree)
	}
	p := newPublisher(t, in("ostree"))
	key := newKey(t, in("key.gpg"))
	one := p.commit(1, key, version("tree", "one"))
	digest := func(source string) string {
		var id imageResult
		runJSON(t, &id, "--no-repo", "compute-id", "--bootable", source)
		return id.Digest
	}
	source := "ostree:" + in("ostree") + ":os/stable"
	first := digest(source)
	var installed installResult
	runJSON(t, &installed, "install", source, "--disk", in("disk.img"), "--uki", "--initrd", "native", "--karg", "console=ttyS0",
		"--karg", "composefs.show", "--karg", "systemd.journald.forward_to_console=0", "--gpg-key", in("key.gpg"),
		"--target-image", "ostree:"+strings.Replace(p.url(), "127.0.0.1", "10.0.2.2", 1)+":os/stable")
	if installed.Digest != first {
		t.Errorf("installed %s, want %s", installed.Digest, first)
	}
	before := len(p.objects())
	two := p.commit(2, key, "ref=os/stable", version("more", "two"))
	second := digest(source)
	changed := len(p.objects()) - before
	if changed != 3 || second == first || one == two {
		t.Fatalf("%d files have changed", changed)
	}
	p.requests("")

	m := vm.Start(t, vm.Config{Disks: []string{in("disk.img")}, Network: true, Reboots: 1})
	const never = "Kernel panic|does not boot|not found in|NOT verified|IS WRITABLE|STATE IS LOST|status: [0-9]+ error|upgrade-test: exit [1-9]"
	m.Expect(`composefs-setup-root: the root is image `+first+`, verified`, never)
	m.Expect(`from-usr-etc login:|Hostname set to <from-usr-etc>`, never)
	m.Expect(`upgrade-test: boot 1, version one, etc empty, etc of one`, never)
	m.Expect(`upgrade-test: commit   `+two, never)
	m.Expect(`upgrade-test: signed   by gpg `, never)
	offered := m.Expect(`upgrade-test: new      [0-9.]+ [KM]iB, ([0-9]+) objects`, never)[1]
	m.Expect(`upgrade-test: pulled   `+offered+` new objects, [0-9]+ metadata \+ 3 files of 3.0 MiB`, never)
	m.Expect(`upgrade-test: image   `+second, never)
	m.Expect(`upgrade-test: exit 0: composefs-boot -q upgrade`, never)
	m.Expect(`composefs-setup-root: the root is image `+second+`, verified`, never)
	m.Expect(`upgrade-test: boot 2, version two, etc changed, etc of two`, never)
	m.Expect(`upgrade-test: Up to date`, never)
	m.Expect(second[:12]+` .* booted, next .*ostree:10.0.2.2-`, never)
	m.Expect(`upgrade-test: done`, never)
	asked := p.requests("")
	objects := 0
	for _, path := range asked {
		if strings.HasSuffix(path, ".filez") {
			objects++
		}
	}
	if objects != changed || asked[len(asked)-1] != "summary" {
		t.Errorf("%d files were fetched, want the %d that have changed, and the summary at the end: %q", objects, changed, asked)
	}
}
