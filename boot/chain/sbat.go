package chain

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/composefs-boot/composefs-boot/uki"
)

// generation is a line of SBAT: how often a component had to be revoked before this build of it. Defined by shim's SBAT.md.
type generation struct {
	component string
	number    int
}

// parseSBAT reads lines of at least so many fields: 6 in a program, 2 in a revocation list.
func parseSBAT(text string, fields int) ([]generation, error) {
	text = strings.TrimRight(text, "\x00")
	if !strings.HasPrefix(text, "sbat,") {
		return nil, fmt.Errorf("it does not begin with %q", "sbat,")
	}
	var list []generation
	number := 0
	for line := range strings.Lines(text) {
		number++
		line = strings.TrimRight(line, "\r\n")
		if line == "" {
			continue
		}
		parts := strings.Split(line, ",")
		if len(parts) < fields {
			return nil, fmt.Errorf("line %d: %d fields, want %d: %.80q", number, len(parts), fields, line)
		}
		n, err := strconv.Atoi(parts[1])
		if parts[0] == "" || err != nil || n < 1 {
			return nil, fmt.Errorf("line %d: want a component and its generation: %.80q", number, line)
		}
		list = append(list, generation{parts[0], n})
	}
	return list, nil
}

// sbat checks the .sbat of a program.
func (v *verifier) sbat(m *uki.Image, kind Kind, where string) Link {
	link := Link{Kind: kind, Where: where, Status: Broken}
	s := find(sectionsOf(m), ".sbat")
	if s == nil {
		link.Found = "no .sbat: shim does not start it, and no revocation list can name it"
		link.WayOut = "build it with \"uki build\", which makes one"
		return link
	}
	text, err := textOf(s)
	var own []generation
	if err == nil {
		own, err = parseSBAT(text, 6)
	}
	if err != nil {
		link.Found, link.WayOut = fmt.Sprintf(".sbat: %v", err), "build it again with another --sbat"
		return link
	}
	var names []string
	for _, g := range own {
		names = append(names, fmt.Sprintf("%s %d", g.component, g.number))
		for _, level := range v.levels {
			if level.component == g.component && g.number < level.number {
				link.Found = fmt.Sprintf("revoked: %s has generation %d, the list wants %d", g.component, g.number, level.number)
				link.WayOut = fmt.Sprintf("build it with a newer %s", g.component)
				return link
			}
		}
	}
	link.Status, link.Found = OK, strings.Join(names, ", ")
	if v.levels == nil {
		link.Status, link.WayOut = Unchecked, "no revocation list was given: name one with --sbat-level, or use --firmware"
	}
	return link
}
