package uki

import (
	"errors"
	"fmt"
	"io"
	"slices"
)

// Parts are what a UKI, an addon or a profile is made of. What is not set is left out.
type Parts struct {
	Linux     Content // without it, it is an addon or a profile
	Initrd    []Content
	Microcode Content
	Splash    Content
	DTB       Content
	DTBAuto   []Content
	HWIDs     Content // as HWIDs makes it
	Firmware  []Content
	Cmdline   Content
	OSRelease Content
	Uname     Content // if not set, it is read from the kernel
	PCRPKey   Content
	Extra     []Section // with names of their own

	// SBAT has texts for .sbat besides what stub and kernel say; if there are none, the generic line for a UKI or an addon.
	SBAT []string

	// Profile is the .profile of the base. With it and without Join, the result is no UKI but a profile to be joined.
	Profile Content
	Join    []*Image // profiles to be joined
}

// joinable are the sections that are taken from a profile.
var joinable = []string{
	".linux", ".osrel", ".cmdline", ".initrd", ".efifw", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".profile",
}

// Build writes a UKI, an addon or a profile made of the parts behind the stub. It returns the image, without the stub.
func Build(w io.WriterAt, stub *PE, parts Parts) (*Image, *Layout, error) {
	m, err := parts.Image(stub)
	if err != nil {
		return nil, nil, err
	}
	l, err := Append(stub, m)
	if err != nil {
		return nil, nil, err
	}
	return m, l, l.Write(w)
}

// Image makes the list of sections, in the order in which ukify writes them. The stub is read for its SBAT entries.
func (p Parts) Image(stub *PE) (*Image, error) {
	var programs []*PE
	sbat := p.SBAT
	if p.Linux.IsSet() {
		var err error
		if p.Linux, err = Kernel(p.Linux); err != nil {
			return nil, fmt.Errorf("kernel: %w", err)
		}
		kernel, err := ParsePE(p.Linux, p.Linux.Size)
		if err != nil {
			return nil, fmt.Errorf("kernel: %w", err)
		}
		// A 32-bit firmware starts the stub of its kind, and that a 64-bit kernel.
		if m := stub.Machine; m != kernel.Machine && !(m == IA32 && kernel.Machine == X64) {
			return nil, fmt.Errorf("the kernel is for %v, the stub for %v: name another with --stub", kernel.Machine, m)
		}
		if !p.Uname.IsSet() {
			release, err := Uname(p.Linux)
			if err != nil {
				return nil, err
			}
			if release != "" {
				p.Uname = Text(release)
			}
		}
		programs = []*PE{stub, kernel}
		if len(sbat) == 0 {
			sbat = []string{sbatUKI}
		}
	} else if len(sbat) == 0 {
		sbat = []string{sbatAddon}
	}
	onlyProfile := p.Profile.IsSet() && len(p.Join) == 0
	if len(p.Join) > 0 && !p.Profile.IsSet() {
		p.Profile = Text("ID=main")
	}
	var list []Section
	add := func(name string, contents ...Content) {
		for _, c := range contents {
			if c.IsSet() {
				list = append(list, NewSection(name, c))
			}
		}
	}
	if onlyProfile {
		add(".profile", p.Profile)
	}
	add(".osrel", p.OSRelease)
	add(".cmdline", p.Cmdline)
	add(".dtb", p.DTB)
	add(".dtbauto", p.DTBAuto...)
	add(".hwids", p.HWIDs)
	add(".uname", p.Uname)
	add(".splash", p.Splash)
	add(".pcrpkey", p.PCRPKey)
	add(".linux", p.Linux)
	if len(p.Initrd) > 0 {
		add(".initrd", Join(p.Initrd...))
	}
	add(".efifw", p.Firmware...)
	add(".ucode", p.Microcode)
	list = append(list, p.Extra...)
	if !onlyProfile {
		text, err := mergeSBAT(programs, sbat)
		if err != nil {
			return nil, err
		}
		add(".sbat", Text(text))
		add(".profile", p.Profile)
	}
	m := &Image{}
	for _, s := range list {
		if err := m.add(s); err != nil {
			return nil, err
		}
	}
	for k, joined := range p.Join {
		if err := m.join(joined, p.OSRelease.IsSet()); err != nil {
			return nil, fmt.Errorf("profile %d to be joined: %w", k+1, err)
		}
	}
	if len(m.Sections()) == 0 {
		return nil, errors.New("nothing to build: give a kernel, a command line or another section")
	}
	return m, nil
}

// join appends the sections of a profile.
func (m *Image) join(profile *Image, osRelease bool) error {
	if len(profile.Profiles) != 2 {
		return fmt.Errorf("%d sections .profile, want one: build it with --profile", max(0, len(profile.Profiles)-1))
	}
	for _, s := range profile.Profiles[0] {
		if slices.Contains(joinable, s.Name) {
			return fmt.Errorf("section %s before .profile: build it with --profile", s.Name)
		}
	}
	for _, s := range profile.Profiles[1] {
		if !slices.Contains(joinable, s.Name) || s.Name == ".osrel" && !osRelease {
			continue
		}
		if err := m.add(NewSection(s.Name, s.Content)); err != nil {
			return err
		}
	}
	return nil
}
