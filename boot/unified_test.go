package boot_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
)

// The boot loader renames an entry when it counts: whatever its counter, it is the same entry, and there is one of it.
func TestESPCounters(t *testing.T) {
	const dir = "EFI/Linux/"
	for name, test := range map[string]struct {
		there   map[string]string // name -> content
		planned string
		fate    boot.Fate
		path    string // of the planned file, as it will be
		after   []string
	}{
		"new":             {nil, "a+3.efi", boot.Write, "a+3.efi", []string{"a+3.efi"}},
		"tried once":      {map[string]string{"a+2-1.efi": "uki"}, "a+3.efi", boot.Same, "a+2-1.efi", []string{"a+2-1.efi"}},
		"good":            {map[string]string{"a.efi": "uki"}, "a+3.efi", boot.Same, "a.efi", []string{"a.efi"}},
		"no counting now": {map[string]string{"a+1-2.efi": "uki"}, "a.efi", boot.Same, "a+1-2.efi", []string{"a+1-2.efi"}},
		"bad":             {map[string]string{"a+0-3.efi": "uki"}, "a+3.efi", boot.Write, "a+3.efi", []string{"a+3.efi"}},
		"changed":         {map[string]string{"a+1-2.efi": "UKI"}, "a+3.efi", boot.Write, "a+3.efi", []string{"a+3.efi"}},
		"changed, same":   {map[string]string{"a+3.efi": "UKI"}, "a+3.efi", boot.Write, "a+3.efi", []string{"a+3.efi"}},
		"odd counter":     {map[string]string{"a+02-01.efi": "uki"}, "a+3.efi", boot.Same, "a+02-01.efi", []string{"a+02-01.efi"}},
		"odd, changed":    {map[string]string{"a+03.efi": "UKI"}, "a+3.efi", boot.Write, "a+3.efi", []string{"a+3.efi"}},
		"twice": {map[string]string{"a.efi": "uki", "a+3.efi": "UKI", "a+0-3.efi": "uki"}, "a+3.efi", boot.Same, "a.efi",
			[]string{"a.efi"}},
		"others": {map[string]string{"b+3.efi": "uki", "a.efi.bak": "uki", "a+x.efi": "uki", "ab+1.efi": "uki"}, "a+3.efi", boot.Write,
			"a+3.efi", []string{"a+3.efi", "a+x.efi", "a.efi.bak", "ab+1.efi", "b+3.efi"}},
	} {
		t.Run(name, func(t *testing.T) {
			esp := t.TempDir()
			for name, content := range test.there {
				put(t, esp, dir+name, content)
			}
			e, err := boot.Plan{ESP: []boot.Place{place(dir+test.planned, "uki", false)}}.PlanESP(esp)
			if err == nil {
				err = e.Execute()
			}
			if err != nil {
				t.Fatal(err)
			}
			if f := e.Files[0]; f.Fate != test.fate || f.Path != dir+test.path {
				t.Errorf("%s %s, want %s %s", f.Fate, f.Path, test.fate, test.path)
			}
			var after []string
			files, _ := os.ReadDir(esp + "/" + dir)
			for _, f := range files {
				after = append(after, f.Name())
			}
			if !slices.Equal(after, test.after) {
				t.Errorf("%s, want %s", strings.Join(after, " "), strings.Join(test.after, " "))
			}
		})
	}
}
