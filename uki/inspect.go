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

// Known tells whether a section is one of a UKI, and not of its stub alone.
func (s *Section) Known() bool {
	return slices.Contains(texts, s.Name) || slices.Contains(binaries, s.Name)
}

// Inspect describes the sections of all profiles, the base first. Those that are not a UKI's are left out unless all is set.
func Inspect(m *Image, all bool) ([][]Info, error) {
	var profiles [][]Info
	for _, p := range m.Profiles {
		var infos []Info
		for k := range p {
			if !all && !p[k].Known() {
				continue
			}
			i, err := p[k].inspect()
			if err != nil {
				return nil, err
			}
			infos = append(infos, i)
		}
		profiles = append(profiles, infos)
	}
	return profiles, nil
}

func (s *Section) inspect() (Info, error) {
	i := Info{Name: s.Name, Size: s.Size, Virtual: s.Virtual, IsText: slices.Contains(texts, s.Name)}
	var err error
	if i.SHA256, err = s.SHA256(); err != nil || !i.IsText {
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
