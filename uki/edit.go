package uki

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Edit is what is to be changed in a UKI, an addon or a profile.
type Edit struct {
	// Profile is an index of Image.Profiles: 0 for the base, n+1 for what profile n has in place of it. In a file that is a
	// profile, and has no base, 0 is that.
	Profile int
	Set     []Section // they take the place of those with the same names, or the place that Build would give them
	Remove  []string  // names
}

// order is that in which Build puts the sections of a profile. Those with other names come between .ucode and .sbat.
var order = []string{
	".osrel", ".cmdline", ".dtb", ".dtbauto", ".hwids", ".uname", ".splash", ".pcrpkey", ".linux", ".initrd", ".efifw", ".ucode", "",
	".sbat", ".pcrsig",
}

// Apply lays the edited file out. It is not signed: a signature would not be right any more. All that is not named is as it
// was, byte for byte, and what comes out is what Build makes of the parts. A section that the stub brings, which is .sbat, can be
// replaced if it fits. The stub's flag NX_COMPAT does not come back when a kernel without it is replaced by one with it.
func (e Edit) Apply(p *PE) (*Layout, error) {
	if p.CertificateTable.Size > 0 {
		return nil, errors.New("it is signed: unsign it first, and sign it again")
	}
	own := p.stubSections()
	m := &Image{Profiles: [][]Section{nil}}
	for k := own; k < len(p.Sections); k++ {
		s := p.section(k)
		if s.Name == ".profile" {
			m.Profiles = append(m.Profiles, nil)
		}
		last := &m.Profiles[len(m.Profiles)-1]
		*last = append(*last, s)
	}
	if e.Profile == 0 && len(m.Profiles) == 2 && len(m.Profiles[0]) == 0 {
		e.Profile = 1
	}
	if e.Profile < 0 || e.Profile >= len(m.Profiles) {
		return nil, fmt.Errorf("profile %d: there are profiles 0 to %d", e.Profile-1, m.Bootable()-1)
	}
	stale := e.checkPolicies(m)
	stub, err := p.cut(own)
	if err != nil {
		return nil, err
	}
	inStub := func(name string) bool {
		return e.Profile == 0 && slices.ContainsFunc(stub.Sections, func(h Header) bool { return h.Name == name })
	}
	profile := &m.Profiles[e.Profile]
	for _, name := range e.Remove {
		if name == ".profile" {
			return nil, errors.New("section .profile: it begins a profile: build the UKI without that")
		}
		if inStub(name) {
			return nil, fmt.Errorf("section %s: it is the stub's own", name)
		}
		before := len(*profile)
		*profile = slices.DeleteFunc(*profile, func(s Section) bool { return s.Name == name })
		if len(*profile) == before {
			return nil, fmt.Errorf("section %s: there is none to remove", name)
		}
	}
	for _, s := range e.Set {
		if err := checkName(s.Name); err != nil {
			return nil, err
		}
		if inStub(s.Name) && s.Name != ".sbat" {
			return nil, fmt.Errorf("section %s: it is the stub's own", s.Name)
		}
		if err := set(profile, s, e.Profile == 0); err != nil {
			return nil, err
		}
	}
	if stale != nil {
		return nil, stale
	}
	if len(m.Sections()) == 0 {
		return nil, errors.New("nothing would be left but the stub")
	}
	return Append(stub, m)
}

// checkPolicies refuses to leave signed PCR policies behind that are for other sections.
func (e Edit) checkPolicies(m *Image) error {
	changed := func(name string) bool {
		return slices.Contains(e.Remove, name) || slices.ContainsFunc(e.Set, func(s Section) bool { return s.Name == name })
	}
	for n, profile := range m.Profiles {
		if e.Profile > 0 && n != e.Profile || !slices.ContainsFunc(profile, func(s Section) bool { return s.Name == ".pcrsig" }) {
			continue
		}
		if n == e.Profile && changed(".pcrsig") {
			continue
		}
		if slices.ContainsFunc(measured, changed) {
			return errors.New("section .pcrsig: the policies that are signed in it are for the sections as they are: remove it, or give another")
		}
	}
	return nil
}

// set puts a section into a profile.
func set(profile *[]Section, s Section, base bool) error {
	same := func(other Section) bool { return other.Name == s.Name }
	if at := slices.IndexFunc(*profile, same); at >= 0 {
		if slices.Contains(variants, s.Name) && slices.ContainsFunc((*profile)[at+1:], same) {
			return fmt.Errorf("section %s: there are several: build the UKI again", s.Name)
		}
		(*profile)[at] = s
		return nil
	}
	if s.Name == ".profile" {
		return errors.New("section .profile: it would begin a profile: build the UKI with it")
	}
	rank := func(name string) int {
		if k := slices.Index(order, name); k >= 0 {
			return k
		}
		return slices.Index(order, "")
	}
	at := slices.IndexFunc(*profile, func(other Section) bool { return other.Name != ".profile" && rank(other.Name) > rank(s.Name) })
	if at < 0 {
		at = len(*profile)
	}
	*profile = slices.Insert(*profile, at, s)
	return nil
}

// stubSections returns how many sections of the file are the stub's own. What is appended begins with the first name that
// Build gives; a .sbat before it is the stub's.
func (p *PE) stubSections() int {
	appended := func(h Header) bool {
		return h.Name == ".profile" || h.Name != ".sbat" && slices.Contains(order, h.Name)
	}
	if k := slices.IndexFunc(p.Sections, appended); k >= 0 {
		return k
	}
	return len(p.Sections)
}

// cut returns the file as it was before the sections from the n-th on were appended.
func (p *PE) cut(n int) (*PE, error) {
	end := p.Size
	rest := p.Sections[n:]
	size := uint32(0)
	for k, h := range rest {
		if k == 0 {
			end = int64(h.Raw.Offset)
		}
		if before := rest[:k]; k > 0 && h.Raw.Offset < before[k-1].Raw.Offset {
			return nil, fmt.Errorf("section %s: its data at %d is not in the order of the section table: build the UKI again", h.Name, h.Raw.Offset)
		}
		size += h.VirtualSize
	}
	last := int64(len(p.head))
	for k, h := range p.Sections {
		if h.Raw.Size == 0 {
			continue
		}
		if k < n && h.Raw.end() > end {
			return nil, fmt.Errorf("section %s: its data at %d is behind what was appended: build the UKI again", h.Name, h.Raw.Offset)
		}
		last = max(last, h.Raw.end())
	}
	if len(rest) > 0 && (last < p.Size || end < int64(len(p.head))) {
		return nil, fmt.Errorf("offset %d: data that belongs to no section: build the UKI again", last)
	}
	stub := *p
	stub.Sections, stub.Size = p.Sections[:n], end
	stub.head = slices.Clone(p.head)
	off := p.optional + 8 // SizeOfInitializedData
	binary.LittleEndian.PutUint32(stub.head[off:], binary.LittleEndian.Uint32(stub.head[off:])-size)
	return &stub, nil
}
