package uki_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/uki"
)

// Offsets in the file that tinyPE makes.
const (
	tinyCOFF     = 64
	tinyOptional = tinyCOFF + 24
	tinyTable    = tinyOptional + 240
	tinyHeaders  = 1024
)

// tinyPE makes a stub with sections of 512 bytes, one after the other, and room for more.
func tinyPE(names ...string) []byte {
	b := make([]byte, tinyHeaders+512*len(names))
	le := binary.LittleEndian
	copy(b, "MZ")
	le.PutUint32(b[60:], tinyCOFF)
	copy(b[tinyCOFF:], "PE\x00\x00")
	le.PutUint16(b[tinyCOFF+4:], uint16(uki.X64))
	le.PutUint16(b[tinyCOFF+6:], uint16(len(names)))
	le.PutUint16(b[tinyCOFF+20:], 240)
	le.PutUint16(b[tinyOptional:], 0x20b)
	le.PutUint32(b[tinyOptional+32:], 4096)
	le.PutUint32(b[tinyOptional+36:], 512)
	le.PutUint32(b[tinyOptional+56:], uint32(4096*(1+len(names))))
	le.PutUint32(b[tinyOptional+60:], tinyHeaders)
	le.PutUint16(b[tinyOptional+70:], 0x160)
	le.PutUint32(b[tinyOptional+108:], 16)
	for k, name := range names {
		h := b[tinyTable+40*k:]
		copy(h, name)
		for n, v := range []uint32{500, uint32(4096 * (1 + k)), 512, uint32(tinyHeaders + 512*k)} {
			le.PutUint32(h[8+4*n:], v)
		}
		copy(b[tinyHeaders+512*k:], "content of "+name)
	}
	return b
}

func put32(off int, v uint32) func([]byte) []byte {
	return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[off:], v); return b }
}

func put16(off int, v uint16) func([]byte) []byte {
	return func(b []byte) []byte { binary.LittleEndian.PutUint16(b[off:], v); return b }
}

// Every defect gives an error that names the place.
func TestHostilePE(t *testing.T) {
	for name, c := range map[string]struct {
		change func([]byte) []byte
		want   string
	}{
		"empty":                       {func([]byte) []byte { return nil }, "offset 0: DOS header"},
		"not MZ":                      {put16(0, 0), "offset 0: no PE file"},
		"PE header before the DOS's":  {put32(60, 4), "offset 60"},
		"PE header past the end":      {put32(60, 0xfffffff0), "offset 60"},
		"PE header at the end":        {put32(60, tinyHeaders+1020), "offset 2044: COFF header"},
		"no signature":                {put32(tinyCOFF, 0), "offset 64: no PE signature"},
		"65535 sections":              {put16(tinyCOFF+6, 65535), "offset 70: 65535 sections"},
		"section table past the end":  {put16(tinyCOFF+6, 30), "offset 328: section table"},
		"no optional header":          {put16(tinyCOFF+20, 0), "offset 88"},
		"short optional header":       {put16(tinyCOFF+20, 100), "offset 88"},
		"long optional header":        {put16(tinyCOFF+20, 0xffff), "offset 88: optional header of 65535 bytes: the file ends"},
		"neither PE32 nor PE32+":      {put16(tinyOptional, 0x107), "offset 88"},
		"section alignment of zero":   {put32(tinyOptional+32, 0), "offset 120: alignment 0"},
		"file alignment of zero":      {put32(tinyOptional+36, 0), "offset 124: alignment 0"},
		"file alignment of 3":         {put32(tinyOptional+36, 3), "offset 124: alignment 3"},
		"file alignment of 128 KiB":   {put32(tinyOptional+36, 1<<17), "offset 124: alignment 131072: want a power of two up to 65536"},
		"file alignment of 2 GiB":     {put32(tinyOptional+36, 1<<31), "offset 124"},
		"headers of zero":             {put32(tinyOptional+60, 0), "offset 148: headers of 0"},
		"headers of 4 GiB":            {put32(tinyOptional+60, 0xffffffff), "offset 148"},
		"headers past the end":        {put32(tinyOptional+60, 5000), "offset 0: headers of 5000 bytes: the file ends"},
		"4294967295 data directories": {put32(tinyOptional+108, 0xffffffff), "offset 196"},
		"data past the end":           {put32(tinyTable+16, 1<<20), `offset 328: section ".text": data`},
		"data at 4 GiB":               {put32(tinyTable+20, 0xffffffff), `offset 328: section ".text": data`},
		"data overlaps":               {put32(tinyTable+60, tinyHeaders+8), `offset 368: section ".data": data at 1032 overlaps`},
		"addresses overlap":           {put32(tinyTable+52, 4097), `offset 368: section ".data": address 0x1001 overlaps`},
		"address past 4 GiB":          {put32(tinyTable+12, 0xffffffff), `offset 328: section ".text": 500 bytes at`},
		"certificate table odd":       {func(b []byte) []byte { return put32(tinyOptional+144, 1024)(put32(tinyOptional+148, 7)(b)) }, "certificate table of 7 bytes"},
		"certificate table past it":   {func(b []byte) []byte { return put32(tinyOptional+144, 2040)(put32(tinyOptional+148, 16)(b)) }, "certificate table of 16 bytes"},
		"certificate table unaligned": {func(b []byte) []byte { return put32(tinyOptional+144, 1025)(put32(tinyOptional+148, 16)(b)) }, "certificate table"},
	} {
		b := c.change(tinyPE(".text", ".data"))
		if _, _, err := uki.Read(bytes.NewReader(b), int64(len(b))); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	whole := tinyPE(".text", ".data")
	for n := range whole {
		_, _, err := uki.Read(bytes.NewReader(whole[:n]), int64(n))
		if err == nil || !strings.HasPrefix(err.Error(), "offset ") {
			t.Fatalf("truncated to %d bytes: %v", n, err)
		}
	}
	// A file that got shorter than it was said to be.
	if _, _, err := uki.Read(bytes.NewReader(whole[:100]), int64(len(whole))); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a file that shrinks: %v", err)
	}
}

// memory is a file in memory.
type memory struct{ b []byte }

func (m *memory) WriteAt(b []byte, off int64) (int, error) {
	if grow := int(off) + len(b) - len(m.b); grow > 0 {
		m.b = append(m.b, make([]byte, grow)...)
	}
	return copy(m.b[off:], b), nil
}

func parse(t testing.TB, b []byte) *uki.PE {
	t.Helper()
	p, err := uki.ParsePE(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// What cannot be built is refused, with what would help.
func TestRefusesToBuild(t *testing.T) {
	kernel := uki.Bytes(tinyPE(".text"))
	signed := put32(tinyOptional+144, 1024)(put32(tinyOptional+148, 16)(tinyPE(".text")))
	profile := func(sections ...uki.Section) *uki.Image { return &uki.Image{Profiles: [][]uki.Section{nil, sections}} }
	text := func(name string) uki.Section { return uki.NewSection(name, uki.Text("x")) }
	many := make([]*uki.Image, 200)
	for k := range many {
		many[k] = profile(text(".profile"))
	}
	for name, c := range map[string]struct {
		stub  []byte
		parts uki.Parts
		want  string
	}{
		"signed stub":         {signed, uki.Parts{Cmdline: uki.Text("x")}, "the stub is signed at offset 1024"},
		"no sections":         {tinyPE(), uki.Parts{Cmdline: uki.Text("x")}, "no sections"},
		"kernel is no PE":     {tinyPE(".text"), uki.Parts{Linux: uki.Text("\x7fELF")}, "no kernel that UEFI can start"},
		"kernel is lzo":       {tinyPE(".text"), uki.Parts{Linux: uki.Text("\x89LZO\x00\r\n\x1a\n")}, "decompress it first"},
		"kernel is bad xz":    {tinyPE(".text"), uki.Parts{Linux: uki.Text("\xfd7zXZ\x00\x00\x00")}, "kernel: unexpected EOF"},
		"kernel is bad gzip":  {tinyPE(".text"), uki.Parts{Linux: uki.Text("\x1f\x8b\x08\x00")}, "EOF"},
		"gzip of no kernel":   {tinyPE(".text"), uki.Parts{Linux: uki.Bytes(gzipped([]byte("hello")))}, "when decompressed"},
		"other machine":       {put16(tinyCOFF+4, 0xaa64)(tinyPE(".text")), uki.Parts{Linux: kernel}, "the kernel is for x64, the stub for aa64"},
		"bad SBAT":            {tinyPE(".text"), uki.Parts{Linux: kernel, SBAT: []string{"x"}}, `does not begin with "sbat,"`},
		"SBAT does not fit":   {tinyPE(".sbat"), uki.Parts{Linux: kernel, SBAT: []string{"sbat,1\n" + strings.Repeat("x", 600)}}, "room for 512"},
		"SBAT reaches .next":  {put32(tinyTable+40+12, 4096+100)(put32(tinyTable+8, 90)(tinyPE(".sbat", ".next"))), uki.Parts{Linux: kernel}, "room for 100: take a newer stub"},
		"twice":               {tinyPE(".text"), uki.Parts{Cmdline: uki.Text("x"), Extra: []uki.Section{text(".cmdline")}}, "twice"},
		"name too long":       {tinyPE(".text"), uki.Parts{Extra: []uki.Section{text(".123456789")}}, "1 to 8 bytes"},
		"name with a space":   {tinyPE(".text"), uki.Parts{Extra: []uki.Section{text(". x")}}, "printable"},
		"no profile":          {tinyPE(".text"), uki.Parts{Linux: kernel, Join: []*uki.Image{{}}}, "profile 1 to be joined: 0 sections .profile"},
		"two profiles":        {tinyPE(".text"), uki.Parts{Linux: kernel, Join: []*uki.Image{{Profiles: make([][]uki.Section, 3)}}}, "2 sections"},
		"too many profiles":   {tinyPE(".text"), uki.Parts{Linux: kernel, Join: many}, "the stub's header has room for 94"},
		"5 GiB":               {tinyPE(".text"), uki.Parts{Initrd: []uki.Content{{ReaderAt: bytes.NewReader(nil), Size: 5 << 30}}}, "4 GiB"},
		"initrd that shrinks": {tinyPE(".text"), uki.Parts{Initrd: []uki.Content{{ReaderAt: bytes.NewReader(nil), Size: 5}}}, "unexpected EOF"},
	} {
		if _, _, err := uki.Build(&memory{}, parse(t, c.stub), c.parts); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// A header that is full is made longer, up to the first section in memory; and the data of old stubs is moved to where it is
// aligned, without their symbols.
func TestMakesRoom(t *testing.T) {
	b := tinyPE(".text", ".data")
	symbols := len(b)
	b = append(b, make([]byte, 18*2)...)
	b = binary.LittleEndian.AppendUint32(b, 4)
	b = put32(tinyCOFF+12, uint32(symbols))(put32(tinyCOFF+16, 2)(b))
	b = put32(tinyTable+40+16, 300)(b) // .data is not padded
	b = append(b[:tinyHeaders+512+300], b[tinyHeaders+1024:]...)
	b = put32(tinyCOFF+12, uint32(symbols-212))(b)
	parts := uki.Parts{Cmdline: uki.Text("a b")}
	for k := range 30 {
		parts.Extra = append(parts.Extra, uki.NewSection(".x"+string(rune('a'+k)), uki.Bytes(noise(byte(k), 100*k))))
	}
	var out memory
	m, l, err := uki.Build(&out, parse(t, b), parts)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(out.b)) != l.Size || binary.LittleEndian.Uint32(out.b[tinyCOFF+12:]) != 0 {
		t.Errorf("%d bytes, want %d", len(out.b), l.Size)
	}
	p := parse(t, out.b)
	for _, h := range p.Sections {
		if h.Raw.Offset%512 != 0 || h.Raw.Size%512 != 0 || h.VirtualAddress%4096 != 0 {
			t.Errorf("%+v is not aligned", h)
		}
	}
	sections := read(t, out.b).Sections()
	if len(sections) != 2+len(m.Sections()) {
		t.Fatalf("%d sections", len(sections))
	}
	for k, want := range m.Sections() {
		got := sections[2+k]
		a, err := got.SHA256()
		if err != nil {
			t.Fatal(err)
		}
		if b, _ := want.SHA256(); a != b || got.Name != want.Name || got.Size != want.Size || got.Virtual != want.Size {
			t.Errorf("%s differs", want.Name)
		}
	}
	data := make([]byte, 16)
	sections[1].ReadAt(data, 0)
	if string(data) != "content of .data" {
		t.Errorf(".data is %q", data)
	}
}

// A profile has the base's sections but for its own; what is longer in memory is measured with zeros.
func TestProfiles(t *testing.T) {
	text := func(name, s string) uki.Section { return uki.NewSection(name, uki.Text(s)) }
	m := &uki.Image{Profiles: [][]uki.Section{
		{text(".linux", "k"), text(".cmdline", "base"), text(".cmdline", "not this")},
		{text(".profile", "ID=a\n")},
		{text(".profile", "TITLE=x\nID=\"b\"\n"), text(".cmdline", "")},
	}}
	for n, want := range []string{".linux .cmdline .profile", ".linux .profile .cmdline"} {
		sections, err := m.Profile(n)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range sections {
			names = append(names, s.Name)
		}
		if strings.Join(names, " ") != want {
			t.Errorf("profile %d: %q, want %q", n, names, want)
		}
	}
	for _, c := range []struct {
		name string
		want int
	}{{"0", 0}, {"a", 0}, {"@1", 1}, {"b", 1}, {"c", -1}, {"2", -1}, {"", -1}} {
		if n, err := m.Find(c.name); err == nil && n != c.want || err != nil && c.want >= 0 {
			t.Errorf("%q is %d, %v", c.name, n, err)
		}
	}
	zeros := &uki.Image{Profiles: [][]uki.Section{{text(".cmdline", "x\x00\x00")}}}
	longer := &uki.Image{Profiles: [][]uki.Section{{text(".cmdline", "x")}}}
	longer.Profiles[0][0].Virtual = 3
	var values []string
	for _, m := range []*uki.Image{zeros, longer} {
		all, err := uki.Measure(m, uki.Banks[:1], uki.Phases[:1])
		if err != nil {
			t.Fatal(err)
		}
		values = append(values, all[0].Value)
	}
	if values[0] != values[1] {
		t.Errorf("%q", values)
	}
	longer.Profiles[0][0].Virtual = 1 << 40
	if _, err := uki.Measure(longer, uki.Banks, uki.Phases); err == nil {
		t.Error("a section of 1 TiB in memory is measured")
	}
	if _, err := uki.Measure(zeros, []uki.Bank{"md5"}, nil); err == nil {
		t.Error("md5 is a bank")
	}
}

// Contents that are joined read the same in pieces of any size.
func TestJoin(t *testing.T) {
	want := []byte("abcde\x00\x00\x00fghijklmn\x00\x00\x00")
	c := uki.Join(uki.Text("abcde"), uki.Text(""), uki.Text("fgh"+"ijkl"+"mn"))
	if c.Size != int64(len(want)) {
		t.Fatalf("%d bytes, want %d", c.Size, len(want))
	}
	for from := range want {
		for to := from; to <= len(want); to++ {
			b := make([]byte, to-from)
			if n, err := c.ReadAt(b, int64(from)); n != len(b) || !bytes.Equal(b, want[from:to]) || err != nil {
				t.Fatalf("%d to %d: %q, %v", from, to, b[:n], err)
			}
		}
	}
	if n, err := c.ReadAt(make([]byte, 5), c.Size-2); n != 2 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
}

// FuzzRead: what can be read can be described and measured, and as a stub gives a file that can be read again with all of it.
func FuzzRead(f *testing.F) {
	f.Add(tinyPE(".text", ".data"))
	f.Add(tinyPE(".sbat", ".linux", ".cmdline", ".profile", ".cmdline", ".profile"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, p, err := uki.Read(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			if !strings.HasPrefix(err.Error(), "offset ") {
				t.Errorf("no place in: %v", err)
			}
			return
		}
		if _, err := uki.Inspect(m, uki.ShowAll); err != nil {
			t.Error(err)
		}
		uki.Measure(m, uki.Banks[:1], uki.Phases[:1])
		var out memory
		l, err := uki.Append(p, &uki.Image{Profiles: [][]uki.Section{{uki.NewSection(".new", uki.Text("text"))}}})
		if err != nil {
			return
		}
		if l.Size > 1<<24 {
			return
		}
		if err := l.Write(&out); err != nil {
			t.Fatal(err)
		}
		again, _, err := uki.Read(bytes.NewReader(out.b), int64(len(out.b)))
		if err != nil {
			t.Fatalf("cannot be read again: %v", err)
		}
		before, after := m.Sections(), again.Sections()
		if len(after) != len(before)+1 && !slices.ContainsFunc(before, func(s *uki.Section) bool { return s.Name == ".new" }) {
			t.Fatalf("%d sections, then %d", len(before), len(after))
		}
		for k, s := range before {
			// Padding to the file alignment may be part of what is in memory.
			a, b := make([]byte, s.Size), make([]byte, s.Size)
			s.ReadAt(a, 0)
			if after[k].ReadAt(b, 0); s.Name != ".new" && (!bytes.Equal(a, b) || s.Virtual != after[k].Virtual) {
				t.Errorf("section %d %q differs", k, s.Name)
			}
		}
	})
}
