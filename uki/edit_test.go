package uki_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/uki"
)

// built returns the file that is made of the parts.
func built(t *testing.T, stub []byte, parts uki.Parts) []byte {
	t.Helper()
	out := &memory{}
	if _, _, err := uki.Build(out, parse(t, stub), parts); err != nil {
		t.Fatal(err)
	}
	return out.b
}

func edited(t *testing.T, b []byte, e uki.Edit) []byte {
	t.Helper()
	l, err := e.Apply(parse(t, b))
	if err != nil {
		t.Fatal(err)
	}
	out := &memory{}
	if err := l.Write(out); err != nil {
		t.Fatal(err)
	}
	return out.b
}

// An edited file is the one that Build makes of the parts; with nothing changed it is the same.
func TestEdit(t *testing.T) {
	u := vm.NewUkify(t)
	c := content(t, u.Stub("linuxx64.efi.stub"))
	systemd := make([]byte, c.Size)
	if _, err := c.ReadAt(systemd, 0); err != nil {
		t.Fatal(err)
	}
	text := func(name, s string) uki.Section { return uki.NewSection(name, uki.Text(s)) }
	rescue := &uki.Image{Profiles: [][]uki.Section{nil, {text(".profile", "ID=rescue"), text(".cmdline", "old rescue"), text(".initrd", "R")}}}
	kernel := uki.Bytes(tinyPE(".text"))
	full := uki.Parts{Linux: kernel, Uname: uki.Text("6.1"), Initrd: []uki.Content{uki.Bytes(noise(1, 5000))}, OSRelease: uki.Text("ID=x\n"),
		Cmdline: uki.Text("old"), DTBAuto: []uki.Content{uki.Text("one"), uki.Text("two")}, Extra: []uki.Section{text(".own", "mine")},
		Join: []*uki.Image{rescue}}
	for name, stub := range map[string][]byte{"systemd's stub": systemd, "a stub without .sbat": tinyPE(".text", ".data")} {
		for what, parts := range map[string]uki.Parts{"UKI": full, "addon": {Cmdline: uki.Text("old")}, "profile": {Cmdline: uki.Text("old"), Profile: uki.Text("ID=p")},
			"empty section": {Linux: kernel, Extra: []uki.Section{text(".none", "")}}} {
			b := built(t, stub, parts)
			if !bytes.Equal(edited(t, b, uki.Edit{}), b) {
				t.Errorf("%s, %s: edited to the same, it differs", name, what)
			}
		}
		for what, c := range map[string]struct {
			edit   uki.Edit
			change func(*uki.Parts)
		}{
			"a longer one": {uki.Edit{Set: []uki.Section{text(".cmdline", strings.Repeat("new ", 3000))}},
				func(p *uki.Parts) { p.Cmdline = uki.Text(strings.Repeat("new ", 3000)) }},
			"an empty one": {uki.Edit{Set: []uki.Section{text(".initrd", "")}}, func(p *uki.Parts) { p.Initrd = []uki.Content{uki.Text("")} }},
			"new ones": {uki.Edit{Set: []uki.Section{text(".ucode", "M"), text(".splash", "BM"), text(".more", "1")}},
				func(p *uki.Parts) {
					p.Microcode, p.Splash, p.Extra = uki.Text("M"), uki.Text("BM"), append(slices.Clone(p.Extra), text(".more", "1"))
				}},
			"removed": {uki.Edit{Remove: []string{".osrel", ".own", ".dtbauto"}},
				func(p *uki.Parts) { p.OSRelease, p.Extra, p.DTBAuto = uki.Content{}, nil, nil }},
			"the kernel": {uki.Edit{Set: []uki.Section{uki.NewSection(".linux", uki.Bytes(tinyPE(".a", ".b")))}},
				func(p *uki.Parts) { p.Linux = uki.Bytes(tinyPE(".a", ".b")) }},
			"a profile's": {uki.Edit{Profile: 2, Set: []uki.Section{text(".cmdline", "rescue")}, Remove: []string{".initrd"}},
				func(p *uki.Parts) {
					p.Join = []*uki.Image{{Profiles: [][]uki.Section{nil, {text(".profile", "ID=rescue"), text(".cmdline", "rescue")}}}}
				}},
		} {
			parts := full
			c.change(&parts)
			if !bytes.Equal(edited(t, built(t, stub, full), c.edit), built(t, stub, parts)) {
				t.Errorf("%s: %s: the edited file is not the one that is built", name, what)
			}
		}
	}
	// The .sbat of the stub is replaced where it is.
	const sbat = "sbat,1,x\nmine,1,x,x,1,x\n"
	b := edited(t, built(t, systemd, full), uki.Edit{Set: []uki.Section{text(".sbat", sbat)}})
	var out bytes.Buffer
	if err := uki.Extract(&out, read(t, b), 0, ".sbat"); err != nil || strings.TrimRight(out.String(), "\x00") != sbat {
		t.Errorf("%q, %v", out.String(), err)
	}
	if n := len(parse(t, b).Sections); n != len(parse(t, built(t, systemd, full)).Sections) {
		t.Errorf("%d sections", n)
	}
}

// What would not be right any more is refused.
func TestRefusesToEdit(t *testing.T) {
	text := func(name string) uki.Section { return uki.NewSection(name, uki.Text("x")) }
	stub := tinyPE(".text", ".sbat")
	b := built(t, stub, uki.Parts{Cmdline: uki.Text("x"), Profile: uki.Text("ID=a"), Linux: uki.Bytes(tinyPE(".text")), Uname: uki.Text("1"),
		DTBAuto: []uki.Content{uki.Text("1"), uki.Text("2")}, Extra: []uki.Section{text(".pcrsig")},
		Join: []*uki.Image{{Profiles: [][]uki.Section{nil, {text(".profile"), text(".cmdline")}}}}})
	n := len(b)
	signed := put32(tinyOptional+144, uint32(n))(put32(tinyOptional+148, 16)(append(bytes.Clone(b), make([]byte, 16)...)))
	sections := parse(t, b).Sections
	header := tinyTable + 40*(len(sections)-1)
	for name, c := range map[string]struct {
		file []byte
		edit uki.Edit
		want string
	}{
		"signed":              {signed, uki.Edit{}, "unsign it first"},
		"policies":            {b, uki.Edit{Set: []uki.Section{text(".cmdline")}}, ".pcrsig: the policies"},
		"no such section":     {b, uki.Edit{Remove: []string{".ucode"}}, "none to remove"},
		"a stub's, removed":   {b, uki.Edit{Remove: []string{".sbat"}}, "the stub's own"},
		"a stub's, replaced":  {b, uki.Edit{Set: []uki.Section{text(".text")}}, "the stub's own"},
		"profile removed":     {b, uki.Edit{Profile: 1, Remove: []string{".profile"}}, "begins a profile"},
		"profile added":       {b, uki.Edit{Set: []uki.Section{text(".profile")}}, "begin a profile"},
		"one of several":      {b, uki.Edit{Set: []uki.Section{text(".dtbauto"), text(".pcrsig")}}, "several"},
		"no such profile":     {b, uki.Edit{Profile: 3}, "profile 2: there are profiles 0 to 1"},
		"a bad name":          {b, uki.Edit{Set: []uki.Section{text(".123456789")}}, "1 to 8 bytes"},
		"SBAT does not fit":   {b, uki.Edit{Set: []uki.Section{uki.NewSection(".sbat", uki.Text(strings.Repeat("x", 600))), text(".pcrsig")}}, "room for 512"},
		"only the stub":       {built(t, stub, uki.Parts{Cmdline: uki.Text("x"), SBAT: []string{"sbat,1\n"}}), uki.Edit{Remove: []string{".cmdline"}}, "nothing would be left"},
		"data at the end":     {append(bytes.Clone(b), 1), uki.Edit{}, "belongs to no section"},
		"data at the front":   {put32(header+20, 0)(put32(header+16, 0)(bytes.Clone(b))), uki.Edit{}, "not in the order"},
		"data before the end": {put32(tinyTable+40*2+20, 0)(put32(tinyTable+40*2+16, 0)(bytes.Clone(b))), uki.Edit{}, "build the UKI again"},
	} {
		_, err := c.edit.Apply(parse(t, c.file))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
