package uki

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"unicode/utf8"
)

// texts are the sections that are text.
var texts = []string{".cmdline", ".osrel", ".uname", ".pcrpkey", ".pcrsig", ".sbat", ".profile"}

// binaries are the other ones that UKIs have.
var binaries = []string{".linux", ".initrd", ".ucode", ".splash", ".dtb", ".dtbauto", ".hwids", ".efifw", ".sbom"}

// Info is what there is to know about a section.
type Info struct {
	Name    string
	Size    int64 // bytes in the file
	Virtual int64 // bytes in memory
	SHA256  string
	Text    string // of a section that is text; a NUL in it reads \0
	IsText  bool
}

// Show tells whether a section is to be described, and whether as text.
type Show func(name string) (show, text bool)

// ShowKnown shows the sections that UKIs have; ShowAll shows the stub's own, too.
func ShowKnown(name string) (show, text bool) {
	text = slices.Contains(texts, name)
	return text || slices.Contains(binaries, name), text
}

// ShowAll shows every section.
func ShowAll(name string) (show, text bool) { return true, slices.Contains(texts, name) }

// Inspect describes the sections of all profiles, the base first.
func Inspect(m *Image, show Show) ([][]Info, error) {
	profiles := make([][]Info, len(m.Profiles))
	for n, p := range m.Profiles {
		for k := range p {
			want, text := show(p[k].Name)
			if !want {
				continue
			}
			i, err := p[k].inspect(text)
			if err != nil {
				return nil, err
			}
			profiles[n] = append(profiles[n], i)
		}
	}
	return profiles, nil
}

func (s *Section) inspect(text bool) (Info, error) {
	i := Info{Name: s.Name, Size: s.Size, Virtual: s.Virtual, IsText: text}
	var err error
	if i.SHA256, err = s.SHA256(); err != nil || !text {
		return i, err
	}
	b, err := s.load(maxText)
	if err != nil {
		return i, fmt.Errorf("section %s: %w", s.Name, err)
	}
	i.Text = "(not valid UTF-8)"
	if utf8.Valid(b) {
		i.Text = string(bytes.ReplaceAll(bytes.TrimRight(b, "\x00"), []byte{0}, []byte(`\0`)))
	}
	return i, nil
}

// Extract writes a section as it is in effect when profile n is booted.
func Extract(w io.Writer, m *Image, n int, name string) error {
	sections, err := m.Profile(n)
	if err != nil {
		return err
	}
	s := find(sections, name)
	if s == nil {
		return fmt.Errorf("section %s: there is none in profile %d", name, n)
	}
	_, err = io.Copy(w, s.Reader())
	return err
}
