package chain

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/uki"
)

// maxText limits a section that is read as text, in bytes.
const maxText = 1 << 20

// find returns the first section of a name, nil if there is none.
func find(sections []*uki.Section, name string) *uki.Section {
	for _, s := range sections {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// sectionsOf returns the sections of the first profile: those of a program that has no profiles.
func sectionsOf(m *uki.Image) []*uki.Section {
	sections, _ := m.Profile(0)
	return sections
}

// textOf returns what a section says, up to the first NUL, where the stub stops.
func textOf(s *uki.Section) (string, error) {
	if s.Size > maxText {
		return "", fmt.Errorf("section %s: %d bytes, at most %d are read", s.Name, s.Size, maxText)
	}
	b, err := io.ReadAll(s.Reader())
	text, _, _ := strings.Cut(string(b), "\x00")
	return text, err
}

// signature checks the signature of a program.
func (v *verifier) signature(p *uki.PE, kind Kind, where string) Link {
	link := Link{Kind: kind, Where: where}
	trust := uki.Trust{}
	if v.Trust != nil {
		trust = *v.Trust
	} else if list, err := p.Signatures(); err == nil {
		// Without trust it can still be told whether the file is the one that was signed.
		for _, s := range list {
			trust.Certificates = append(trust.Certificates, s.Signer)
		}
	}
	s, err := p.Verify(trust)
	by := "the hash of the file"
	if s.Signer != nil {
		by = s.Signer.Subject.String()
	}
	switch {
	case err == nil && v.Trust == nil:
		link.Status, link.Found = Unchecked, "signed by "+by+"; whether the firmware trusts that is not known"
		link.WayOut = "no trust was given: name the certificate with --db, or use --firmware"
	case err == nil:
		link.Status, link.Found = OK, "signed by "+by
		if s.Signer == nil {
			link.Found = "db has " + by
		}
	default:
		link.Status, link.Found = Broken, err.Error()
		switch {
		case errors.Is(err, uki.ErrUnsigned):
			link.Found, link.WayOut = uki.ErrUnsigned.Error(), "sign it with \"uki sign\""
		case errors.Is(err, uki.ErrUntrusted):
			link.WayOut = "sign it with a key of db, or enrol this one"
		case errors.Is(err, uki.ErrTampered):
			link.WayOut = "write the file again from where it was made"
		case errors.Is(err, uki.ErrRevoked):
			link.WayOut = "build it again, and sign it with a key that is not revoked"
		}
	}
	return link
}

// program checks what is true of every program for UEFI: it can be read, its signature and its SBAT.
func (v *verifier) program(name string, kinds [2]Kind, where string) (*uki.Image, []Link) {
	c, err := v.open(name)
	var m *uki.Image
	var p *uki.PE
	if err == nil {
		m, p, err = uki.Read(c, c.Size)
	}
	if err != nil {
		return nil, []Link{{kinds[0], where, Broken, "cannot be read: " + err.Error(), "write the file again"}}
	}
	return m, []Link{v.signature(p, kinds[0], where), v.sbat(m, kinds[1], where)}
}

// boot is what a kernel is started with, by a profile of a UKI or a type 1 entry.
type boot struct {
	where   string
	linux   uki.Content
	uname   string // that it is said to have, or ""
	initrd  uki.Content
	osrel   string
	isUKI   bool // osrel is meant to be there
	images  []karg.Image
	sources [3]*uki.Section // of linux, initrd and osrel, to see which profiles share them
}

// uki verifies a unified kernel image and the addons in these directories and beside it.
func (v *verifier) uki(name string, global []string) (Entry, error) {
	e := Entry{Path: name, Type: Type2}
	m, links := v.program(name, [2]Kind{Signature, SBAT}, "")
	e.Links = links
	if m == nil {
		return e, nil
	}
	if find(sectionsOf(m), ".linux") == nil {
		e.Links = append(e.Links, Link{Kernel, "", Unchecked, "no .linux: it is no UKI, and what it starts is not known", ""})
		return e, nil
	}
	var boots []boot
	for n := range m.Bootable() {
		b, more, err := v.profile(m, n)
		if err != nil {
			return e, err
		}
		e.Links = append(e.Links, more...)
		boots = append(boots, b)
	}
	e.Links = append(e.Links, v.addons(append(global, extras(name)...))...)
	e.Links = append(e.Links, v.initramfs(boots)...)
	more, err := v.rest(boots)
	e.Links = append(e.Links, more...)
	return e, err
}

// profile checks the command line of a profile, and collects what it boots.
func (v *verifier) profile(m *uki.Image, n int) (b boot, links []Link, err error) {
	sections, err := m.Profile(n)
	if err != nil {
		return b, nil, err
	}
	b.isUKI = true
	if m.Bootable() > 1 {
		b.where = strings.TrimSpace(fmt.Sprintf("profile @%d %s", n, m.ID(n)))
	}
	text := func(name string) string {
		s := find(sections, name)
		if s == nil {
			return ""
		}
		t, bad := textOf(s)
		if bad != nil {
			err = errors.Join(err, bad)
		}
		return t
	}
	b.sources = [3]*uki.Section{find(sections, ".linux"), find(sections, ".initrd"), find(sections, ".osrel")}
	if s := b.sources[0]; s != nil {
		b.linux = s.Content
	}
	if s := b.sources[1]; s != nil {
		b.initrd = s.Content
	}
	b.uname, b.osrel = strings.TrimSpace(text(".uname")), text(".osrel")
	line := find(sections, ".cmdline")
	if line == nil || line.Size == 0 {
		return b, []Link{{Cmdline, b.where, Broken, "none: whoever starts it chooses one, and no signature covers that", "build it with --image"}}, err
	}
	links, b.images = v.cmdline(text(".cmdline"), b.where)
	return b, links, err
}

// once calls check for each of the boots that has another source than those before it.
func once(boots []boot, source int, check func(boot) []Link) []Link {
	var seen []*uki.Section
	var links []Link
	for _, b := range boots {
		s := b.sources[source]
		if s != nil && slices.Contains(seen, s) {
			continue
		}
		seen = append(seen, s)
		links = append(links, check(b)...)
	}
	return links
}
