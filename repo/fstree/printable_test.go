package fstree_test

import (
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

func TestPrintable(t *testing.T) {
	for name, want := range map[string]string{"a b": "a b", "ä": "ä", "\xff": `\xff`, "\n\x1b[2J": `\n\x1b[2J`, `\`: `\\`, "\u202e": `\xe2\x80\xae`} {
		if got := fstree.Printable(name); got != want {
			t.Errorf("%q: %s, want %s", name, got, want)
		}
	}
}
