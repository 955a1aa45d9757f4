package initrd_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// system is a disk with a Debian, and what boots it.
type system struct {
	disk, digest, options string
	kernel                vm.Kernel
	native, dracut        string // initramfs files
	signed                string // the native one, which believes the command line
	esp                   string // of the disk, as mtools want it
	initrd                string // path on the ESP
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return string(out)
}

// newSystem installs the Debian that internal/setup has made, and makes a native initramfs for its kernel.
func newSystem(t *testing.T) system {
	t.Helper()
	dir := vm.Programs(t)
	tree := vm.Cache(t, "os/trixie")
	s := system{kernel: vm.Kernels(t)["6.12"], disk: filepath.Join(dir, "disk.img"), native: filepath.Join(dir, "initramfs.img")}
	modules := filepath.Join(tree, "usr/lib/modules", s.kernel.Version)
	s.dracut = filepath.Join(dir, "dracut.img")
	withProgram(t, filepath.Join(modules, "initramfs.img"), filepath.Join(dir, "composefs-setup-root"), s.dracut)
	program := filepath.Join(dir, "composefs-boot")
	var installed struct {
		Digest  string
		Options string `json:"kernel_command_line"`
		ESP     []struct{ Path string }
		Disk    struct{ ESP struct{ Offset int64 } }
	}
	out := run(t, program, "--quiet", "--json", "install", tree, "--disk", s.disk, "--karg", "console=ttyS0",
		"--karg", "composefs.show", "--karg", "systemd.journald.forward_to_console=0")
	if err := json.Unmarshal([]byte(out), &installed); err != nil {
		t.Fatal(err)
	}
	s.digest, s.options = installed.Digest, installed.Options
	s.esp = fmt.Sprintf("%s@@%d", s.disk, installed.Disk.ESP.Offset)
	for _, f := range installed.ESP {
		if strings.HasSuffix(f.Path, "/initrd") {
			s.initrd = f.Path
		}
	}
	build := []string{"initrd", "build", "--modules-dir", modules, "--setup-root", filepath.Join(dir, "composefs-setup-root")}
	run(t, program, append(build, "-o", s.native)...)
	s.signed = filepath.Join(dir, "signed.img")
	config := filepath.Join(dir, "setup-root-conf.toml")
	if err := os.WriteFile(config, []byte("[init]\nsigned-cmdline = true\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, program, append(build, "-o", s.signed, "--config", config)...)
	info, err := os.Stat(s.native)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > 8<<20 {
		t.Errorf("%d bytes with the modules of a cloud kernel, at most 8 MiB", info.Size())
	}
	return s
}

// withProgram puts the program that was just built into dracut's initramfs: of what is in two archives, the last one counts.
func withProgram(t *testing.T, initramfs, program, out string) {
	t.Helper()
	b, err := os.ReadFile(initramfs)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	image := bytes.NewBuffer(append(b, make([]byte, (4-len(b)%4)%4)...))
	w := cpio.Newc.Writer(image)
	err = w.WriteRecord(cpio.StaticFile("usr/bin/composefs-setup-root", string(content), 0o755))
	if err == nil {
		err = cpio.WriteTrailer(w)
	}
	if err == nil {
		err = os.WriteFile(out, image.Bytes(), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// copy makes a copy of the disk.
func (s system) copy(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	run(t, "cp", "--sparse=always", s.disk, path)
	return path
}

// start boots a copy of the disk with an initramfs and a command line.
func (s system) start(t *testing.T, initrd, cmdline string) *vm.Machine {
	t.Helper()
	return vm.Start(t, vm.Config{Kernel: s.kernel.Image, Initrd: initrd, Append: cmdline, Disks: []string{s.copy(t)}})
}

const (
	never = "Kernel panic|does not boot|NOT verified|IS WRITABLE|STATE IS LOST|status: [0-9]+ error"
	shell = "composefs-show|login:|Press Enter|Give root password|sh-[0-9.]*#|:/root#|Kernel panic"
)

// boots waits until the system tells what its root is, and returns when the kernel had it, in seconds after its start, and
// the mounts.
func (s system) boots(t *testing.T, m *vm.Machine) (seconds float64, mounts string) {
	t.Helper()
	root := m.Expect(`\[ *([0-9.]+)\] composefs-setup-root: the root is image `+s.digest+`, verified`, never)
	m.Expect(`composefs-show: composefs:`+s.digest+` / overlay ro,.*verity=require`, never)
	m.Expect(`composefs-show: boot 1, /etc and /var are writable`, never)
	m.Expect(`composefs-show: status: ok`, never)
	m.Expect(`composefs-show: done`, never)
	seconds, _ = strconv.ParseFloat(root[1], 64)
	for _, line := range regexp.MustCompile(`composefs-show: (\S+ /\S* .*)`).FindAllStringSubmatch(m.Console(), -1) {
		mounts += line[1] + "\n"
	}
	m.Stop()
	return seconds, mounts
}

// A Debian that was installed with dracut's initramfs boots with the native one: the same mounts, in half the time.
func TestGuestBoots(t *testing.T) {
	s := newSystem(t)
	t.Run("native-and-dracut", func(t *testing.T) {
		m := s.start(t, s.native, s.options+" init=/nonesuch") // does not count: nobody says that the line is signed
		native, mounts := s.boots(t, m)
		t.Logf("%s", regexp.MustCompile(`.*initramfs done.*`).FindString(m.Console()))
		dracut, same := s.boots(t, s.start(t, s.dracut, s.options))
		t.Logf("kernel start to root: %.1f s, dracut %.1f s", native, dracut)
		if native > dracut/2 {
			t.Errorf("root after %.1f s, dracut's after %.1f s", native, dracut)
		}
		if mounts != same || mounts == "" {
			t.Errorf("mounts:\n%sdracut:\n%s", mounts, same)
		}
	})
	// Firmware, boot loader, and no root= at all.
	t.Run("gpt-auto", func(t *testing.T) {
		c := s
		c.disk = s.copy(t)
		c.esp = c.disk + strings.TrimPrefix(s.esp, s.disk)
		run(t, "mcopy", "-o", "-i", c.esp, c.native, "::/"+c.initrd)
		name := "::/loader/entries/composefs-" + c.digest[:32] + ".conf"
		entry := run(t, "mtype", "-i", c.esp, name)
		changed := regexp.MustCompile(` root=\S+ rw`).ReplaceAllString(entry, "")
		if changed == entry {
			t.Fatalf("no root= in %s", entry)
		}
		file := filepath.Join(t.TempDir(), "entry.conf")
		if err := os.WriteFile(file, []byte(changed), 0o644); err != nil {
			t.Fatal(err)
		}
		run(t, "mcopy", "-o", "-i", c.esp, file, name)
		c.boots(t, vm.Start(t, vm.Config{Disks: []string{c.disk}}))
	})
	zeros := strings.Repeat("0", 128)
	for _, c := range []struct{ name, initrd, cmdline, want, end string }{
		{"no-such-device", s.native, strings.Replace(s.options, "root=UUID=", "root=UUID=f", 1) + " rootwait=2",
			`composefs-setup-root: wait for UUID=f\S+, at most 2s: not found in 2s: correct root= .*there is vda.*vda2 \(ext4 UUID=`, `halted`},
		{"wrong-digest", s.native, strings.Replace(s.options, s.digest, zeros, 1) + " init=/bin/sh rd.shell",
			`composefs-setup-root: make the composefs image the root at /sysroot: refused: image 0000.* is missing on the disk.*boot another entry`, `halted`},
		{"reboots", s.native, strings.Replace(s.options, s.digest, zeros, 1) + " quiet composefs.onfail=reboot",
			`composefs-setup-root: make the composefs image`, `(?s)restarting in 5s.*reboot: Restarting system`},
		{"no-argument", s.native, strings.Join(strings.Fields(s.options)[1:], " ") + " loglevel=0",
			`composefs-setup-root: make the composefs image the root at /sysroot: no composefs.digest= or composefs= argument`, `halted`},
		// The modules of both are loaded then: without them the kernel would not know the file systems.
		{"other-file-systems", s.native, s.options + " rootfstype=xfs,btrfs",
			`mount it at /sysroot as xfs or btrfs: /dev/vda2 as xfs: (invalid argument|structure needs cleaning); /dev/vda2 as btrfs: invalid argument`, `halted`},
		{"signed-init", s.signed, "init=/nonesuch " + s.options + " init=/bin/sh",
			`find /nonesuch in it, as init= says: nothing to execute in the image: .*no such file`, `halted`},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := s.start(t, c.initrd, c.cmdline)
			m.Expect(c.want, shell)
			m.Expect(c.end, shell)
			m.Stop()
			if count := strings.Count(m.Console(), "make the composefs image the root at"); count > 1 {
				t.Errorf("the reason is told %d times:\n%s", count, m.Console())
			}
		})
	}
}
