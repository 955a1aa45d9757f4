package uki

import (
	"fmt"
	"strings"
)

// The lines that every .sbat begins with and that a UKI or an addon has if none are given. SBAT is defined by shim's SBAT.md,
// these lines by the UAPI group's specification and systemd-stub(7).
const (
	sbatHead  = "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n"
	sbatUKI   = sbatHead + "uki,1,UKI,uki,1,https://uapi-group.org/specifications/specs/unified_kernel_image/\n"
	sbatAddon = sbatHead + "uki-addon,1,UKI Addon,addon,1,https://www.freedesktop.org/software/systemd/man/latest/systemd-stub.html\n"
)

// mergeSBAT returns one .sbat with the entries of the programs, so that each can be revoked, and of the texts given.
func mergeSBAT(programs []*PE, texts []string) (string, error) {
	merged := sbatHead
	for _, p := range programs {
		for k, h := range p.Sections {
			if h.Name != ".sbat" {
				continue
			}
			s := p.section(k)
			text, err := s.text()
			if err != nil {
				return "", err
			}
			if entries, ok := sbatEntries(text); ok {
				merged += entries
			}
		}
	}
	for _, text := range texts {
		entries, ok := sbatEntries(text)
		if !ok {
			return "", fmt.Errorf("SBAT %q: it does not begin with \"sbat,\"", firstLine(text))
		}
		merged += entries
	}
	return merged, nil
}

// sbatEntries returns the lines after the first, which says what it is.
func sbatEntries(text string) (string, bool) {
	if !strings.HasPrefix(text, "sbat,") {
		return "", false
	}
	text = strings.ReplaceAll(text, "\r\n", "\n")
	_, entries, _ := strings.Cut(text, "\n")
	if entries != "" && !strings.HasSuffix(entries, "\n") {
		entries += "\n"
	}
	return entries, true
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}
