package vm

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
)

// Kernel is a kernel with its modules.
type Kernel struct {
	Version string
	Image   string
	modules string // directory with modules.dep
}

// Kernels returns the kernels that internal/setup has put in place, by the names "6.1", "6.12" and "7.2".
func Kernels(t testing.TB) map[string]Kernel {
	t.Helper()
	kernels := map[string]Kernel{}
	for name, dir := range map[string]string{"6.1": "kernel-6.1/lib/modules", "6.12": "os/trixie/usr/lib/modules",
		"7.2": "os/forky/usr/lib/modules"} {
		modules := Cache(t, dir)
		entries, err := os.ReadDir(modules)
		if err != nil || len(entries) != 1 {
			t.Fatalf("%s: %d kernels, %v", modules, len(entries), err)
		}
		k := Kernel{Version: entries[0].Name(), modules: filepath.Join(modules, entries[0].Name())}
		k.Image = filepath.Join(k.modules, "vmlinuz")
		if name == "6.1" {
			k.Image = Cache(t, "kernel-6.1/boot/vmlinuz-"+k.Version)
		}
		// forky is not released yet: its kernel moves on from 7.2.
		if !strings.HasPrefix(k.Version, map[string]string{"6.1": "6.1.", "6.12": "6.12.", "7.2": "7."}[name]) {
			t.Fatalf("%s: kernel %s, want %s", modules, k.Version, name)
		}
		kernels[name] = k
	}
	return kernels
}

// moduleFiles returns the files of modules and of what they need, in the order in which they must be loaded. A module that
// is not there is built in.
func (k Kernel) moduleFiles(t testing.TB, names []string) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string][]string{} // module -> its file and the files it needs
	for line := range strings.Lines(string(text)) {
		file, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
		name, _, _ := strings.Cut(filepath.Base(file), ".ko")
		byName[strings.ReplaceAll(name, "-", "_")] = append([]string{file}, strings.Fields(needs)...)
	}
	var order []string
	have := map[string]bool{}
	for _, name := range names {
		files := byName[name]
		// modules.dep lists what is needed last first.
		for k := len(files) - 1; k >= 0; k-- {
			if !have[files[k]] {
				have[files[k]] = true
				order = append(order, files[k])
			}
		}
	}
	return order
}

// Initrd makes an initramfs for the kernel with busybox, the modules that tests need, the given files (path in the guest ->
// path on the host) and a script, which is run by a shell when the usual file systems are mounted. When it ends, the guest
// prints "SCRIPT ENDED" and its exit code.
func Initrd(t testing.TB, k Kernel, files map[string]string, script string) string {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal("busybox: not found: run \"make setup\"")
	}
	var records []cpio.Record
	dirs := map[string]bool{}
	var add func(name string, mode uint64, content []byte)
	add = func(name string, mode uint64, content []byte) {
		if dir := filepath.Dir(name); dir != "." && !dirs[dir] {
			dirs[dir] = true
			add(dir, 0o40755, nil)
		}
		if mode&0o170000 == 0o40000 {
			records = append(records, cpio.Directory(name, mode&0o7777))
			return
		}
		records = append(records, cpio.StaticFile(name, string(content), mode&0o7777))
	}
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, dir := range []string{"proc", "sys", "dev", "run", "sysroot", "mnt"} {
		add(dir, 0o40755, nil)
	}
	add("bin/busybox", 0o755, read(busybox))
	load := ""
	for n, file := range k.moduleFiles(t, []string{"virtio_pci", "virtio_blk", "ext4", "erofs", "overlay", "fuse", "loop", "sha512_generic"}) {
		b := read(filepath.Join(k.modules, file))
		if strings.HasSuffix(file, ".xz") {
			cmd := exec.Command("xz", "-dc")
			cmd.Stdin = bytes.NewReader(b)
			if b, err = cmd.Output(); err != nil {
				t.Fatalf("xz: %v", err)
			}
		}
		name := fmt.Sprintf("modules/%02d-%s", n, strings.TrimSuffix(filepath.Base(file), ".xz"))
		add(name, 0o644, b)
		load += "insmod /" + name + "\n"
	}
	var names []string
	for name := range files {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		add(strings.TrimPrefix(name, "/"), 0o755, read(files[name]))
	}
	add("script", 0o755, []byte(script))
	add("init", 0o755, []byte(`#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
echo 6 > /proc/sys/kernel/printk
echo off > /proc/sys/kernel/printk_devkmsg 2>/dev/null
echo on > /proc/sys/kernel/printk_devkmsg
`+load+`
sh /script
echo "SCRIPT ENDED $?"
sync
poweroff -f
`))
	path := filepath.Join(t.TempDir(), "initrd")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := cpio.Newc.Writer(f)
	if err := cpio.WriteRecords(w, records); err == nil {
		err = cpio.WriteTrailer(w)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}
