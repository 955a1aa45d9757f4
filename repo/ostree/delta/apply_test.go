package delta

import (
	"path/filepath"
	"testing"
)

func TestApply(t *testing.T) {
	l := vectors(t)
	scratch, _ := ParseName(first)
	changes, _ := ParseName(first + "-" + second)
	for _, test := range []struct {
		name string
		file string
		is   Name
	}{
		{"from nothing", filepath.Join(l.Path, scratch.Path(), "superblock"), scratch},
		{"from a commit", filepath.Join(l.Path, changes.Path(), "superblock"), changes},
		{"one file", offline(t, "offline.delta"), changes},
		{"one file without patches", offline(t, "offline-nobsdiff.delta"), changes},
	} {
		t.Run(test.name, func(t *testing.T) {
			if d := applied(t, l, test.file); d.Name != test.is {
				t.Errorf("it is delta %s", d.Name)
			}
		})
	}
}

func TestNames(t *testing.T) {
	for _, test := range []struct{ name, path string }{
		{first, "deltas/a0/vwHuuH4Ac3lvfmji7LlUB+6PRDNg0GrAeS8E8eCpQ"},
		{first + "-" + second, "deltas/a0/vwHuuH4Ac3lvfmji7LlUB+6PRDNg0GrAeS8E8eCpQ-KCjlu98_IIKkiPZNryMOTOvAX_PKP5j3RRm9Z6t9R04"},
	} {
		n, err := ParseName(test.name)
		if err != nil || n.String() != test.name || n.Path() != test.path {
			t.Errorf("%s: %s, %s, %v", test.name, n, n.Path(), err)
		}
		if p, err := ParsePath(test.path); err != nil || p != n {
			t.Errorf("%s: %s, %v", test.path, p, err)
		}
	}
	for _, name := range []string{"", "-", first[1:], first + "-", "-" + first, first + "-" + second + "-", "X" + first[1:], first + "0"} {
		if n, err := ParseName(name); err == nil {
			t.Errorf("%q is read as %s", name, n)
		}
	}
	for _, path := range []string{"", "deltas", "deltas/a0", "deltas/a0/", "deltas/a0/x", "a0/vwHuuH4Ac3lvfmji7LlUB+6PRDNg0GrAeS8E8eCpQ",
		"deltas/a0/vwHuuH4Ac3lvfmji7LlUB+6PRDNg0GrAeS8E8eCpQ-", "deltas/a0/vwHuuH4Ac3lvfmji7LlUB+6PRDNg0GrAeS8E8eCpR"} {
		if n, err := ParsePath(path); err == nil {
			t.Errorf("%q is read as %s", path, n)
		}
	}
}
