package uki_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/uki"
)

// esp makes a disk that is one FAT file system, with files (path on it -> path here).
func esp(t *testing.T, files map[string]string) string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	run := func(program string, args ...string) {
		if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v: %s", program, args, err, out)
		}
	}
	run("truncate", "-s", "128M", disk)
	run("mkfs.fat", "-F32", "-s", "1", disk)
	made := map[string]bool{"::/.": true}
	for path, from := range files {
		dir := "::"
		for part := range strings.SplitSeq(filepath.Dir(path), "/") {
			if dir += "/" + part; !made[dir] {
				made[dir] = true
				run("mmd", "-i", disk, dir)
			}
		}
		run("mcopy", "-i", disk, from, "::/"+path)
	}
	return disk
}

// deviceTree is the smallest device tree (Devicetree Specification, chapter 5): a root without anything in it.
func deviceTree() []byte {
	var b []byte
	for _, word := range []uint32{0xd00dfeed, 40 + 16 + 16, 40 + 16, 40 + 16 + 16, 40, 17, 16, 0, 0, 16, // header
		0, 0, 0, 0, // no reservations
		1, 0, 2, 9} { // begin of a node without a name, its end, end
		b = binary.BigEndian.AppendUint32(b, word)
	}
	return b
}

// buildSigned builds with signed policies.
func buildSigned(t *testing.T, s *uki.PE, parts uki.Parts, path string) []byte {
	t.Helper()
	m, err := parts.Image(s)
	if err != nil {
		t.Fatal(err)
	}
	behind, err := m.Behind(s)
	if err != nil {
		t.Fatal(err)
	}
	hashes, err := uki.HashSections(behind, uki.Banks)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.AddPolicies(hashes, []uki.PolicyKey{{Signer: newKey(t), Phases: []string{""}}}, nil); err != nil {
		t.Fatal(err)
	}
	l, err := uki.Append(s, m)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := l.Write(f); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A machine that boots what is built has in its TPM what was predicted, with addons and in another profile.
func TestGuestMeasures(t *testing.T) {
	kernel := vm.Kernels(t)["7.2"]
	initrd := vm.Initrd(t, kernel, nil, `
echo "CMDLINE $(cat /proc/cmdline)"
echo "POLICIES $(sha256sum < /.extra/tpm2-pcr-signature.json)"
for bank in sha1 sha256 sha384 sha512; do for pcr in 11 12; do
	echo "VALUE $pcr:$bank=$(cat /sys/class/tpm/tpm0/pcr-$bank/$pcr | tr A-F a-f)"
done; done
`)
	u := vm.NewUkify(t)
	dir := t.TempDir()
	addonStub, linuxStub := stub(t, u.Stub("addonx64.efi.stub")), stub(t, u.Stub("linuxx64.efi.stub"))
	profile := build(t, addonStub, uki.Parts{Profile: uki.Text("ID=other\nTITLE=Other\n"), Cmdline: uki.Text("console=ttyS0 other"),
		OSRelease: uki.Text("ID=else\n")}, filepath.Join(dir, "profile.efi"))
	osRelease := "ID=test\nNAME=Test\nVERSION_ID=1\nPRETTY_NAME=Test\n"
	image := buildSigned(t, linuxStub, uki.Parts{Linux: content(t, kernel.Image), Initrd: []uki.Content{content(t, initrd)},
		Cmdline: uki.Text("console=ttyS0 base"), OSRelease: uki.Text(osRelease), Splash: uki.Bytes(noise(1, 333)),
		Extra: []uki.Section{uki.NewSection(".pcrpkey", uki.Text("a key"))}, Join: []*uki.Image{read(t, profile)}}, filepath.Join(dir, "os.efi"))
	one := build(t, addonStub, uki.Parts{Cmdline: uki.Text(" addon=1\n")}, filepath.Join(dir, "one.addon.efi"))
	two := build(t, addonStub, uki.Parts{Cmdline: uki.Text("addon=2"), DTB: uki.Bytes(deviceTree()), Initrd: []uki.Content{content(t, initrd), uki.Text("x")},
		Microcode: uki.Bytes(make([]byte, 1000))}, filepath.Join(dir, "two.addon.efi"))
	addons := []*uki.Image{read(t, one), read(t, two)}
	// The firmware's shell runs this where there is nothing else to boot.
	script := filepath.Join(dir, "startup.nsh")
	if err := os.WriteFile(script, []byte("fs0:\\os.efi @1\r\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		files   map[string]string
		config  uki.Config
		cmdline string
	}{
		"addons": {map[string]string{
			"EFI/BOOT/BOOTX64.EFI":                         dir + "/os.efi",
			"EFI/BOOT/BOOTX64.EFI.extra.d/two.addon.efi":   dir + "/two.addon.efi",
			"EFI/BOOT/BOOTX64.EFI.extra.d/one.addon.efi":   dir + "/one.addon.efi",
			"EFI/BOOT/BOOTX64.EFI.extra.d/another.txt.efi": script,
		}, uki.Config{Addons: addons}, "console=ttyS0 base addon=1 addon=2"},
		"profile": {map[string]string{
			"os.efi":      dir + "/os.efi",
			"startup.nsh": script,
		}, uki.Config{Profile: 1}, "console=ttyS0 other"},
	} {
		t.Run(name, func(t *testing.T) {
			m := vm.Start(t, vm.Config{Disks: []string{esp(t, c.files)}, TPM: true})
			m.Expect(`SCRIPT ENDED 0`, `panic|error:`)
			console := strings.ReplaceAll(m.Console(), "\r", "")
			if !strings.Contains(console, "CMDLINE "+c.cmdline+"\n") {
				t.Errorf("command line: want %q", c.cmdline)
			}
			// systemd has not begun to count phases.
			all, err := uki.Measure(read(t, image), uki.Banks, []string{""})
			if err != nil {
				t.Fatal(err)
			}
			more, err := uki.MeasureConfig(c.config, uki.Banks)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range append(all, more...) {
				if want := fmt.Sprintf("VALUE %d:%s=%s\n", p.PCR, p.Bank, p.Value); p.Profile == c.config.Profile && !strings.Contains(console, want) {
					t.Errorf("the TPM has not %s", want)
				}
			}
			// The initramfs has the policies of this profile.
			sections, err := read(t, image).Profile(c.config.Profile)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range sections {
				if sum, err := s.SHA256(); s.Name == ".pcrsig" && (err != nil || !strings.Contains(console, "POLICIES "+sum)) {
					t.Errorf("policies in the guest: want SHA-256 %s, %v", sum, err)
				}
			}
			if t.Failed() {
				t.Log(console)
			}
		})
	}
}
