package delta

import (
	"path/filepath"
	"testing"
)

func TestApply(t *testing.T) {
	a := vectors(t)
	for _, test := range []struct {
		name, file, from, to string
	}{
		{"from nothing", filepath.Join(string(a), "deltas/a0/vwHuuH4Ac3lvfmji7LlUB+6PRDNg0GrAeS8E8eCpQ/superblock"), "", first},
		{"from a commit", filepath.Join(string(a), "deltas/a0/vwHuuH4Ac3lvfmji7LlUB+6PRDNg0GrAeS8E8eCpQ-KCjlu98_IIKkiPZNryMOTOvAX_PKP5j3RRm9Z6t9R04/superblock"), first, second},
		{"one file", "testdata/offline.delta", first, second},
		{"one file without patches", "testdata/offline-nobsdiff.delta", first, second},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := openFile(t, test.file)
			if d.From != (Checksum{}) != (test.from != "") || d.To != checksum(t, test.to) {
				t.Fatalf("a delta %s", d.Name)
			}
			made, err := apply(d, Store{Part: parts(filepath.Dir(test.file)), Source: a.source})
			if err != nil {
				t.Fatal(err)
			}
			wantObjects(t, a, made, test.from, test.to)
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
