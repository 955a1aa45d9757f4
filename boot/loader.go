package boot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/uki"
)

// efiNames are the names of the boot loader by architecture: in the tree and at the place where firmware looks.
var efiNames = map[string][2]string{
	"amd64":   {"systemd-bootx64.efi", "BOOTX64.EFI"},
	"arm64":   {"systemd-bootaa64.efi", "BOOTAA64.EFI"},
	"riscv64": {"systemd-bootriscv64.efi", "BOOTRISCV64.EFI"},
}

// loaderFiles are systemd-boot, from the tree, and its configuration.
func loaderFiles(s System, d Deployment) ([]Place, error) {
	names, ok := efiNames[d.Arch]
	if !ok {
		return nil, fmt.Errorf("architecture %s: no boot loader is known for it", d.Arch)
	}
	loader := loaderOf(s, names[0], d.Sign != nil)
	if loader == nil {
		return nil, fmt.Errorf("no boot loader in the tree: add %s%s (Debian: systemd-boot-efi)", loaderDir[1:], names[0])
	}
	config := "timeout 3\nconsole-mode keep\neditor no\n"
	if d.Enroll != nil {
		config += "secure-boot-enroll if-safe\n" // by itself in virtual machines only: some hardware does not survive it
	}
	c, err := d.loader(s, *loader)
	if err != nil {
		return nil, err
	}
	list := []Place{contentPlace("EFI/BOOT/"+names[1], c), contentPlace("EFI/systemd/"+names[0], c), text("loader/loader.conf", config)}
	for k := range list {
		list[k].Loader = true
	}
	if d.Enroll != nil {
		list = append(list, d.Enroll.files...)
	}
	return list, nil
}

// loaderDir is where a tree has systemd-boot.
const loaderDir = "/usr/lib/systemd/boot/efi/"

// loaderOf returns systemd-boot in the tree, nil if it has none: signed by its distribution, if it is not to be signed here.
func loaderOf(s System, name string, sign bool) *File {
	loader := regular(s.Tree, loaderDir+name+".signed")
	if loader == nil || sign {
		if unsigned := regular(s.Tree, loaderDir+name); unsigned != nil {
			loader = unsigned
		}
	}
	return loader
}

// loader opens systemd-boot in the tree, and signs it.
func (d Deployment) loader(s System, f File) (c uki.Content, err error) {
	c, err = d.Scratch.content(s, f)
	if err == nil && d.Sign != nil {
		c, err = d.Sign.sign(c, d.Scratch)
	}
	if err == nil {
		err = d.verify(c)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", f.Path, err)
	}
	return c, err
}

// LoaderUpdate is what becomes of the boot loader on an ESP when a system is installed beside others.
type LoaderUpdate struct {
	From  string   `json:"from,omitempty"` // the version that is there, if it is systemd-boot
	To    string   `json:"to,omitempty"`   // the version in the system, if that brings systemd-boot
	Files []string `json:"files"`          // that are replaced
	Left  string   `json:"left,omitempty"` // why it stays, if its owner would expect something else
}

// UpdateLoader adds systemd-boot to the plan where an older one is on the ESP, as "bootctl update" does: in EFI/systemd, and in EFI/BOOT if
// that is systemd-boot. Another boot loader stays, and so does one that the firmware would start but the new one perhaps not: one that is
// signed, if there is no key to sign with and the system does not bring one of the same signer.
func (p *Plan) UpdateLoader(esp string, s System, d Deployment) (u LoaderUpdate, err error) {
	u.Files = []string{}
	names, ok := efiNames[d.Arch]
	if !ok {
		return u, nil
	}
	root, err := os.OpenRoot(esp)
	if err != nil {
		return u, err
	}
	defer root.Close()
	var there []loaderThere
	for _, name := range []string{"EFI/systemd/" + names[0], "EFI/BOOT/" + names[1]} {
		l, err := readLoader(root, name)
		if err != nil {
			return u, fmt.Errorf("%s: %w", esp, err)
		}
		if l.version == "" {
			continue
		}
		there = append(there, l)
		if u.From == "" || bls.CompareVersions(l.version, u.From) < 0 {
			u.From = l.version
		}
	}
	if len(there) == 0 {
		u.Left = "it is not systemd-boot"
		return u, nil
	}
	f := loaderOf(s, names[0], d.Sign != nil)
	if f == nil {
		return u, nil
	}
	plain, err := d.Scratch.content(s, *f)
	if err == nil {
		u.To, err = loaderVersion(plain.Reader())
	}
	if err != nil {
		return u, fmt.Errorf("%s: %w", f.Path, err)
	}
	there = slices.DeleteFunc(there, func(l loaderThere) bool { return bls.CompareVersions(l.version, u.To) >= 0 })
	if len(there) == 0 {
		return u, nil
	}
	if d.Sign == nil && slices.ContainsFunc(there, func(l loaderThere) bool { return !l.startsAlso(plain) }) {
		u.Left = fmt.Sprintf("it is signed, and systemd-boot %s in the image is not, or by somebody else: say --secureboot-private-key and "+
			"--secureboot-certificate", u.To)
		return u, nil
	}
	c, err := d.loader(s, *f)
	if err != nil {
		return u, err
	}
	var places []Place
	for _, l := range there {
		place := contentPlace(l.path, c)
		place.Loader = true
		places, u.Files = append(places, place), append(u.Files, l.path)
		p.ESPSize += place.Size
	}
	p.ESP = append(places, p.ESP...) // what makes the system appear in the menu comes last
	return u, nil
}

// loaderThere is a boot loader on an ESP.
type loaderThere struct {
	path       string
	version    string // "" if it is not systemd-boot
	signed     bool
	signatures []uki.Signature
}

func readLoader(root *os.Root, name string) (l loaderThere, err error) {
	l.path = name
	info, err := root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return l, nil
	}
	if err != nil {
		return l, err
	}
	f, err := root.Open(name)
	if err != nil {
		return l, err
	}
	defer f.Close()
	if l.version, err = loaderVersion(f); err != nil {
		return l, err
	}
	if p, err := uki.ParsePE(f, info.Size()); err == nil {
		l.signatures, err = p.Signatures()
		l.signed = err != nil || len(l.signatures) > 0
	}
	return l, nil
}

// startsAlso reports whether firmware that starts this boot loader starts another one as well, as far as that can be told: signed is signed
// by the same key.
func (l loaderThere) startsAlso(other uki.Content) bool {
	if !l.signed {
		return true
	}
	var trust uki.Trust
	for _, s := range l.signatures {
		trust.Certificates = append(trust.Certificates, s.Signer)
	}
	p, err := uki.ParsePE(other, other.Size)
	if err == nil {
		_, err = p.Verify(trust)
	}
	return err == nil
}

// loaderFate decides about a boot loader's file that differs from what is there. Another boot loader stays, for other systems
// may need it; so does a newer systemd-boot, and a configuration, which has become its owner's.
func (f Place) loaderFate(there *os.File) (Fate, error) {
	if _, err := there.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	theirs, err := loaderVersion(there)
	if err != nil || theirs == "" {
		return Kept, err
	}
	r, err := f.Open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	ours, err := loaderVersion(r)
	if err != nil || bls.CompareVersions(theirs, ours) > 0 {
		return Kept, err
	}
	return Write, nil
}

// maxLoader limits what is searched of a boot loader, in bytes; systemd-boot has about 150 KiB.
const maxLoader = 16 << 20

// loaderVersion finds the mark that systemd-boot has in its binary, "#### LoaderInfo: systemd-boot VERSION ####", by which
// bootctl knows it, too. It returns the version, or "" for anything else.
func loaderVersion(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxLoader))
	if err != nil {
		return "", err
	}
	_, after, _ := bytes.Cut(b, []byte("#### LoaderInfo: systemd-boot "))
	version, _, ended := bytes.Cut(after[:min(len(after), 256)], []byte(" ####"))
	if !ended {
		return "", nil
	}
	return string(version), nil
}
