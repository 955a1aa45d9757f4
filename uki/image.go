// Package uki builds, reads and measures unified kernel images.
//
// A unified kernel image (UKI) is a PE program for UEFI: a stub, with the kernel, the initramfs, the command line and what
// else belongs to them appended as PE sections. Firmware starts the stub, which measures the sections into the TPM and starts
// the kernel with them. One signature over the program covers all of it. The format is defined by the UAPI group's
// specification "Unified Kernel Image" and by systemd-stub(7); ukify(1) and systemd-measure(1) are the reference tools.
//
// An Image is a list of profiles, and a profile is a list of sections. The first, the base, is what stands before the first
// section .profile; each .profile begins another. Who boots profile N gets the base's sections, with those of profile N in
// place of the base's of the same name. An addon is the same with a stub of its own and without a kernel: a command line,
// device tree, microcode or initramfs that the stub adds to a UKI's.
//
// Everything works on that list: Options.Image makes it from the parts, Append lays it out behind a stub, Read finds it in a
// file, and Measure predicts from it what the TPM will hold. Contents stay where they are, in files as a rule, and are read
// when they are written or measured.
package uki

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Content is data that can be read anywhere, and its size in bytes.
type Content struct {
	io.ReaderAt
	Size int64
}

// Bytes returns the bytes as content.
func Bytes(b []byte) Content { return Content{bytes.NewReader(b), int64(len(b))} }

// Text returns the text as content.
func Text(s string) Content { return Content{strings.NewReader(s), int64(len(s))} }

// IsSet tells whether there is content at all; it may be empty.
func (c Content) IsSet() bool { return c.ReaderAt != nil }

// Reader returns a reader of the whole content.
func (c Content) Reader() *io.SectionReader { return io.NewSectionReader(c, 0, c.Size) }

// load returns the content in memory, if it has not more than limit bytes.
func (c Content) load(limit int64) ([]byte, error) {
	if c.Size > limit {
		return nil, fmt.Errorf("%d bytes, at most %d are read", c.Size, limit)
	}
	b := make([]byte, c.Size)
	if _, err := c.ReadAt(b, 0); err != nil && err != io.EOF {
		return nil, err
	}
	return b, nil
}

// Section is a PE section.
type Section struct {
	Name string // at most 8 bytes of printable ASCII
	Content

	// Virtual is the size in memory, which is what the stub uses and measures: Size, or more, and then zeros follow.
	Virtual int64
}

// NewSection returns a section that is in memory as it is in the file.
func NewSection(name string, c Content) Section { return Section{name, c, c.Size} }

// Image is the list of profiles. Profiles[0] is the base, which may be empty; each of the others begins with .profile.
type Image struct {
	Profiles [][]Section
}

// Limits of what is read and built.
const (
	maxSections = 4096    // in a PE file; the stub knows 256 profiles
	maxText     = 1 << 24 // bytes of a section that is read as text
)

// measured are the sections that the stub measures into PCR 11, in its order, which is not that of the file.
var measured = []string{
	".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey", ".profile", ".dtbauto",
	".hwids", ".efifw",
}

// Sections with these names may be there several times: the stub takes the one that fits the hardware.
var variants = []string{".dtbauto", ".efifw"}

// add appends a section to the last profile, or begins another one with it.
func (m *Image) add(s Section) error {
	if err := checkName(s.Name); err != nil {
		return err
	}
	if s.Name == ".profile" || len(m.Profiles) == 0 {
		if len(m.Profiles) == 0 && s.Name == ".profile" {
			m.Profiles = append(m.Profiles, nil)
		}
		m.Profiles = append(m.Profiles, []Section{s})
		return nil
	}
	last := &m.Profiles[len(m.Profiles)-1]
	same := func(other Section) bool { return other.Name == s.Name }
	if !slices.Contains(variants, s.Name) && slices.ContainsFunc(*last, same) {
		return fmt.Errorf("section %s: twice in the same profile", s.Name)
	}
	*last = append(*last, s)
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > 8 {
		return fmt.Errorf("section %q: a name has 1 to 8 bytes", name)
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("section %q: a name is printable ASCII", name)
	}
	return nil
}

// Sections returns all sections in the order of the file.
func (m *Image) Sections() []*Section {
	var all []*Section
	for _, p := range m.Profiles {
		for k := range p {
			all = append(all, &p[k])
		}
	}
	return all
}

// Bootable returns how many profiles can be booted: @0 is always one of them.
func (m *Image) Bootable() int { return max(1, len(m.Profiles)-1) }

// Profile returns the sections that are in effect when profile n is booted, by "@n" at the front of the command line: those
// of the base, and those of the n-th .profile in their place. Of sections with the same name in one profile the first counts,
// but for .dtbauto and .efifw, which are all there.
func (m *Image) Profile(n int) ([]*Section, error) {
	if n < 0 || n >= m.Bootable() {
		return nil, fmt.Errorf("profile %d: there are profiles 0 to %d", n, m.Bootable()-1)
	}
	var in []*Section
	if len(m.Profiles) > 0 {
		in = effective(m.Profiles[0])
	}
	if n+1 < len(m.Profiles) {
		own := effective(m.Profiles[n+1])
		in = slices.DeleteFunc(in, func(s *Section) bool { return find(own, s.Name) != nil })
		in = append(in, own...)
	}
	return in, nil
}

func effective(sections []Section) []*Section {
	var in []*Section
	for k := range sections {
		s := &sections[k]
		if slices.Contains(variants, s.Name) || find(in, s.Name) == nil {
			in = append(in, s)
		}
	}
	return in
}

// find returns the first section of a name, or nil.
func find(sections []*Section, name string) *Section {
	for _, s := range sections {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// text returns what a section says, without the NUL bytes at its end.
func (s *Section) text() (string, error) {
	b, err := s.load(maxText)
	if err != nil {
		return "", fmt.Errorf("section %s: %w", s.Name, err)
	}
	return string(bytes.TrimRight(b, "\x00")), nil
}

// ID returns the ID= of profile n, or "" if it has none.
func (m *Image) ID(n int) string {
	sections, err := m.Profile(n)
	if err != nil {
		return ""
	}
	if s := find(sections, ".profile"); s != nil {
		if text, err := s.text(); err == nil {
			return envValue(text, "ID")
		}
	}
	return ""
}

// envValue returns a value of a file like os-release.
func envValue(text, key string) string {
	value := ""
	for line := range strings.Lines(text) {
		k, v, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && k == key {
			value = strings.Trim(v, `"'`)
		}
	}
	return value
}

// Find returns the number of the profile that is named: by its number or by its ID.
func (m *Image) Find(profile string) (int, error) {
	for n := range m.Bootable() {
		if profile == fmt.Sprint(n) || profile == "@"+fmt.Sprint(n) || profile != "" && profile == m.ID(n) {
			return n, nil
		}
	}
	return 0, fmt.Errorf("profile %q: there is none of that number or ID, 0 to %d are there", profile, m.Bootable()-1)
}

// IsAddon tells that there is no kernel, but something that a stub adds to a UKI.
func (m *Image) IsAddon() bool {
	sections, err := m.Profile(0)
	if err != nil || find(sections, ".linux") != nil {
		return false
	}
	return slices.ContainsFunc(sections, func(s *Section) bool {
		return slices.Contains([]string{".cmdline", ".dtb", ".dtbauto", ".initrd", ".ucode"}, s.Name)
	})
}

// joined is contents one after the other, each padded with zeros to a multiple of 4 bytes.
type joined struct {
	parts  []Content
	starts []int64
}

// Join returns the contents as one, each padded with zeros to a multiple of 4 bytes, as the kernel wants several initramfs
// archives. One alone is left as it is.
func Join(parts ...Content) Content {
	if len(parts) == 1 {
		return parts[0]
	}
	j := &joined{parts: parts}
	size := int64(0)
	for _, p := range parts {
		j.starts = append(j.starts, size)
		size = alignUp(size+p.Size, 4)
	}
	return Content{j, size}
}

func (j *joined) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	n := 0
	for k, p := range j.parts {
		end := alignUp(j.starts[k]+p.Size, 4)
		if off >= end {
			continue
		}
		in := off - j.starts[k]
		want := b[n:min(int64(len(b)), int64(n)+end-off)]
		data := want[:max(0, min(int64(len(want)), p.Size-in))]
		if len(data) > 0 {
			if got, err := p.ReadAt(data, in); got < len(data) {
				return n + got, short(err)
			}
		}
		clear(want[len(data):])
		n, off = n+len(want), off+int64(len(want))
		if n == len(b) {
			return n, nil
		}
	}
	return n, io.EOF
}

// short is the error of a read that ended before the size that was promised.
func short(err error) error {
	if err == nil || err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }
