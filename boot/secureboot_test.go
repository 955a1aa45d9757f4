package boot_test

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/uki"
)

// Own keys are enrolled, and from then on the whole chain holds: firmware, boot loader, UKI, initramfs, image, and the secrets
// that the TPM opens for them.
func TestGuestSecureBoot(t *testing.T) {
	w := newWorld(t)
	refused := w.refused(t)
	m := w.newMachine(t, w.unsealing(t))
	m.put(t, w.enrolment(t, refused["hash-in-dbx"]))
	// The first boot enrols, restarts, and finds itself enforced.
	first := m.boot(t, "a.efi")
	first.verified(t, w.one)
	first.wants(t, "sealed", "^kernel$")
	if t.Failed() {
		t.Fatal(first)
	}
	t.Run("machines", func(t *testing.T) {
		t.Run("secrets", func(t *testing.T) {
			t.Parallel()
			m.unseals(t)
		})
		t.Run("refusals", func(t *testing.T) {
			t.Parallel()
			w.refuses(t, m.variables, refused)
		})
	})
}

// addonText is what addons add to the command line.
const addonText = "added=by-addon"

// unsealing are the programs on the ESP of the machine whose TPM keeps secrets.
func (w *world) unsealing(t *testing.T) files {
	t.Helper()
	other := buildPE(t, w.addon, uki.Parts{Profile: uki.Text("ID=other\nTITLE=Other\n"), Cmdline: uki.Text(cmdline(w.one, "profile=other"))})
	a := w.build(t, cmdline(w.one, "version=1"), true, readImage(t, other))
	// The policies are those of another command line, one byte away.
	changed := bytes.Replace(a, []byte("version=1"), []byte("version=x"), 1)
	if bytes.Equal(a, changed) {
		t.Fatal("no version=1 in the UKI")
	}
	return files{
		"EFI/Linux/a.efi":       w.sign(t, a, "db"),
		"EFI/Linux/b.efi":       w.sign(t, w.build(t, cmdline(w.two, "version=2"), true), "db"),
		"EFI/Linux/changed.efi": w.sign(t, changed, "db"),
	}
}

// unseals shows what opens the secrets of the machine, and what does not.
func (m *machine) unseals(t *testing.T) {
	w, ukis := m.w, m.w.unsealing(t) // the same bytes as on the disk
	const policyOnly, all, none = "the one for PCR 11", "both", "none"
	addon := buildPE(t, w.addon, uki.Parts{Cmdline: uki.Text(addonText)})
	signed := w.sign(t, addon, "db")
	enrolled := m.variables
	for _, c := range []struct {
		name, entry string
		addon       []byte
		free        bool // on a firmware without keys
		config      uki.Config
		opens       string
	}{
		{name: "update", entry: "b.efi", opens: all},
		{name: "a-byte-of-cmdline", entry: "changed.efi", opens: none},
		{name: "profile-without-signature", entry: "a.efi@*", config: uki.Config{Profile: 1, Loader: "@1"}, opens: none},
		{name: "signed-addon", entry: "a.efi", addon: signed, config: uki.Config{Addons: []*uki.Image{readImage(t, signed)}}, opens: policyOnly},
		{name: "unsigned-addon-ignored", entry: "a.efi", addon: addon, opens: all},
		{name: "unsigned-addon-without-secure-boot", entry: "a.efi", addon: addon, free: true,
			config: uki.Config{Addons: []*uki.Image{readImage(t, addon)}}, opens: policyOnly},
	} {
		t.Run(c.name, func(t *testing.T) {
			m.variables = enrolled
			file, _, _ := strings.Cut(c.entry, "@")
			extra := "EFI/Linux/" + file + ".extra.d"
			if c.addon != nil {
				m.put(t, files{extra + "/more.addon.efi": c.addon})
				defer m.remove(t, extra)
			}
			if c.free {
				m.variables += ".free"
				m.remove(t, "loader/keys") // or they are enrolled
			}
			r := m.boot(t, c.entry)
			image := w.one
			if file == "b.efi" {
				image = w.two
			}
			if !c.free {
				r.verified(t, image)
			} else {
				r.wants(t, "SecureBoot", "^0$")
			}
			if len(c.config.Addons) > 0 {
				r.wants(t, "cmdline", addonText)
			} else {
				r.without(t, "cmdline", addonText)
			}
			w.measured(t, r, ukis["EFI/Linux/"+file], c.config)
			for name, opens := range map[string]bool{"kernel": c.opens != none, "config": c.opens == all} {
				if opens {
					r.wants(t, "unsealed", "^"+name+": the secret of "+name+"$")
				} else {
					// The TPM's own words: the policy that was signed is not that of PCR 11, or what it opens has another one.
					r.wants(t, "refused", "^"+name+`: .*(PolicyAuthorize: TPM_RC_VALUE|Unseal: TPM_RC_POLICY_FAIL)`)
					r.without(t, "unsealed", "^"+name)
				}
			}
		})
	}
}

// measured checks that PCR 11 and 12 in the guest are what is predicted for the UKI, after the initramfs.
func (w *world) measured(t *testing.T, r report, image []byte, config uki.Config) {
	t.Helper()
	all, err := uki.Measure(readImage(t, image), uki.Banks, []string{"enter-initrd:leave-initrd"})
	check(t, err)
	more, err := uki.MeasureConfig(config, uki.Banks)
	check(t, err)
	for _, p := range append(all, more...) {
		if p.Profile == config.Profile {
			r.wants(t, "pcr", fmt.Sprintf("^%d:%s=%s$", p.PCR, p.Bank, p.Value))
		}
	}
}

// refusal is why the firmware must not start a program.
var refusals = map[string]error{
	"flip-in-linux": uki.ErrTampered, "flip-in-initrd": uki.ErrTampered, "flip-in-cmdline": uki.ErrTampered,
	"unsigned": uki.ErrUnsigned, "stripped": uki.ErrUnsigned, "other-key": uki.ErrUntrusted,
	"revoked-key": uki.ErrRevoked, "revoked-later": uki.ErrRevoked, "hash-in-dbx": uki.ErrRevoked, "unsigned-loader": uki.ErrUnsigned,
}

// refused makes the programs.
func (w *world) refused(t *testing.T) files {
	t.Helper()
	unsigned := w.build(t, cmdline(w.one, "refused"), false)
	signed := w.sign(t, unsigned, "db")
	flip := func(section string) []byte {
		b := bytes.Clone(signed)
		p := parsePE(t, b)
		for _, h := range p.Sections {
			if h.Name == section {
				b[h.Raw.Offset+h.VirtualSize/2] ^= 1
				return b
			}
		}
		t.Fatalf("no section %s", section)
		return nil
	}
	var stripped buffer
	check(t, uki.Unsign(&stripped, parsePE(t, signed)))
	return files{
		"flip-in-linux": flip(".linux"), "flip-in-initrd": flip(".initrd"), "flip-in-cmdline": flip(".cmdline"),
		"unsigned": unsigned, "stripped": stripped, "other-key": w.sign(t, unsigned, "stranger"),
		"revoked-key": w.sign(t, unsigned, "revoked"), "revoked-later": w.sign(t, unsigned, "late"), "unsigned-loader": w.loader,
		"hash-in-dbx": w.sign(t, w.build(t, cmdline(w.one, "an old version"), false), "db"),
	}
}

// refuses shows that a firmware with the keys starts none of the programs, nor does systemd-boot, and that the initramfs does
// not start an image that is not the one of its command line.
func (w *world) refuses(t *testing.T, variables string, refused files) {
	content := files{"EFI/Linux/good.efi": w.sign(t, w.build(t, cmdline(w.one, "good"), false), "db"),
		"EFI/Linux/tampered.efi": refused["flip-in-cmdline"]}
	var list, names []string
	for name, b := range refused {
		content["EFI/refused/"+name+".efi"] = b
		list, names = append(list, name+"=/EFI/refused/"+name+".efi"), append(names, name)
		if _, err := parsePE(t, b).Verify(w.trust); refusals[name] == nil || !errors.Is(err, refusals[name]) {
			t.Errorf("%s: %v, want %v", name, err, refusals[name])
		}
	}
	list = append(list, "good=/EFI/BOOT/BOOTX64.EFI")
	// Signed with a key that is revoked by what it does.
	order := cmdline(w.two, "guest.boot="+strings.Join(list, ",")+" guest.write=wrong/"+dbxFile+" guest.write="+dbxFile)
	content["EFI/Linux/order.efi"] = w.sign(t, w.build(t, order, false), "late")
	content["EFI/Linux/other.efi"] = w.sign(t, w.build(t, cmdline(w.two, ""), false), "db")
	for _, name := range []string{"good", "other"} {
		if _, err := parsePE(t, content["EFI/Linux/"+name+".efi"]).Verify(w.trust); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := w.newMachine(t, content)
	if out, err := exec.Command("cp", variables, m.variables).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}

	r := m.boot(t, "order.efi")
	r.wants(t, "boot", "^order "+fmt.Sprint(len(list))+"$")
	r.wants(t, "variable", "^wrong/"+dbxFile+" refused: .*(permission|invalid)")
	r.wants(t, "variable", "^"+dbxFile+" written$")
	guest := m.start(t, "good.efi")
	const never = "Kernel panic|guest: cmdline .*(refused|old)|Shell>"
	guest.Expect(`guest: SecureBoot 1`, never)
	guest.Expect(`guest: done`, never)
	guest.Stop()
	for _, name := range names {
		if !regexp.MustCompile(`BdsDxe: failed to load Boot1\w+ "` + name + `" from \S+: (Access Denied|Security Violation)`).MatchString(guest.Console()) {
			t.Errorf("%s: not refused:\n%s", name, guest.Console())
		}
	}

	guest = m.start(t, "tampered.efi")
	guest.Expect(`tampered\.efi.*(Access denied|Security violation)`, never)
	guest.Stop()

	m.swapImages(t)
	guest = m.start(t, "other.efi")
	guest.Expect(`composefs-setup-root: make the composefs image the root at /sysroot: .*has the fs-verity digest `+w.one.String()[:8], never+"|guest: ")
	guest.Expect(`this system does not boot: halted`, "guest: ")
	guest.Stop()
}

// swapImages puts the first image in the place of the second, as somebody could who has the disk.
func (m *machine) swapImages(t *testing.T) {
	t.Helper()
	one, two := "/composefs/objects/"+m.w.one.ObjectPath(), "/composefs/objects/"+m.w.two.ObjectPath()
	cmd := exec.Command("debugfs", "-w", "-f", "-", fmt.Sprintf("%s?offset=%d", m.disk, m.plan.Root.Offset))
	cmd.Stdin = strings.NewReader("unlink " + two + "\nln " + one + " " + two + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("debugfs: %v: %s", err, out)
	}
}

func parsePE(t *testing.T, b []byte) *uki.PE {
	t.Helper()
	p, err := uki.ParsePE(bytes.NewReader(b), int64(len(b)))
	check(t, err)
	return p
}
