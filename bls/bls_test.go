package bls_test

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/composefs-boot/composefs-boot/bls"
)

const fedora = `# made by somebody else
title   Fedora Linux 42
version 6.14.0
machine-id 4098b3f648d74c13b1f04ccfba7798e8

sort-key fedora
linux /fedora/vmlinuz
initrd /fedora/one.img
initrd	/fedora/two.img
options root=UUID=1 quiet
options rw
x-unknown  a   value
novalue
`

func TestEntry(t *testing.T) {
	e, err := bls.Parse([]byte(fedora))
	if err != nil {
		t.Fatal(err)
	}
	if string(e.Bytes()) != fedora {
		t.Errorf("written back:\n%s", e.Bytes())
	}
	if got := e.Options(); got != "root=UUID=1 quiet rw" {
		t.Errorf("options %q", got)
	}
	if got := e.All("initrd"); !reflect.DeepEqual(got, []string{"/fedora/one.img", "/fedora/two.img"}) {
		t.Errorf("initrds %q", got)
	}
	if e.Get("x-unknown") != "a   value" || e.Get("none") != "" || e.Get("novalue") != "" {
		t.Errorf("%q", e.Get("x-unknown"))
	}
	for _, err := range []error{e.Set("options", "composefs=x"), e.SetAll("initrd", nil), e.Set("new", "value")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := strings.NewReplacer("options root=UUID=1 quiet\noptions rw\n", "options composefs=x\n",
		"initrd /fedora/one.img\ninitrd\t/fedora/two.img\n", "").Replace(fedora) + "new value\n"
	if string(e.Bytes()) != want {
		t.Errorf("changed:\n%swant\n%s", e.Bytes(), want)
	}
	for _, bad := range [][2]string{{"", "v"}, {"a b", "v"}, {"a", "v\nlinux /evil"}, {"a", ""}, {"a", " v"}, {"#a", "v"}, {"a", "\x00"}} {
		if e.Set(bad[0], bad[1]) == nil {
			t.Errorf("%q is set", bad)
		}
	}
}

func TestHostileEntries(t *testing.T) {
	for name, text := range map[string]string{
		"line of 1 MiB": "options " + strings.Repeat("x", 1<<19),
		"NUL":           "title a\x00b",
		"2 MiB":         strings.Repeat("title x\n", 1<<18),
	} {
		if _, err := bls.Parse([]byte(text)); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	e, err := bls.Parse([]byte("linux /a\r\noptions b\r\n\r\nlinux /c"))
	if err != nil || e.Get("linux") != "/c" || e.Options() != "b" {
		t.Errorf("CRLF and a key given twice: %v, %q, %q", err, e.Get("linux"), e.Options())
	}
}

func TestNames(t *testing.T) {
	for file, want := range map[string]bls.Name{
		"a.conf":              {ID: "a", Ext: ".conf"},
		"a+3.conf":            {ID: "a", Ext: ".conf", Counted: true, Left: 3},
		"a+2-1.efi":           {ID: "a", Ext: ".efi", Counted: true, Left: 2, Done: 1},
		"a+0-3.EFI":           {ID: "a", Ext: ".EFI", Counted: true, Done: 3},
		"a+0-0.conf":          {ID: "a", Ext: ".conf", Counted: true},
		"a+b+1.conf":          {ID: "a+b", Ext: ".conf", Counted: true, Left: 1},
		"a+999999999999.conf": {ID: "a+999999999999", Ext: ".conf"},
		"a+-1.conf":           {ID: "a+-1", Ext: ".conf"},
		"a+1-.conf":           {ID: "a+1-", Ext: ".conf"},
		"a+++1.conf":          {ID: "a++", Ext: ".conf", Counted: true, Left: 1},
		"+1.conf":             {ID: "+1", Ext: ".conf"},
		"gcc-c++.conf":        {ID: "gcc-c++", Ext: ".conf"},
	} {
		got, err := bls.ParseName(file)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", file, got, err)
		}
		if file != "a+0-0.conf" && got.String() != file {
			t.Errorf("%s is written %s", file, got)
		}
	}
	for _, bad := range []string{"", ".conf", "a.txt", "a/b.conf", "a.conf~"} {
		if _, err := bls.ParseName(bad); err == nil {
			t.Errorf("%q is a name", bad)
		}
	}
}

// The examples of the UAPI Version Format Specification, from old to new.
func TestCompareVersions(t *testing.T) {
	for _, list := range [][]string{
		{"", "1"},
		{"~1", ""},
		{"11", "11.0", "11.1"},
		{"1~rc1", "1", "1^post", "1.1"},
		{"122.1", "123~rc1-1", "123", "123-a", "123-a.1", "123-1", "123-1.1", "123^post1", "123.a-1", "123.1-1", "123a-1", "124-1"},
		{"systemd-9", "systemd-10"},
		{"A", "a"},
		{"6.1.0-9-amd64", "6.1.0-10-amd64"},
	} {
		for i, a := range list {
			for j, b := range list {
				got := bls.CompareVersions(a, b)
				if (got < 0) != (i < j) || (got > 0) != (i > j) {
					t.Errorf("%q and %q: %d", a, b, got)
				}
			}
		}
	}
	for _, same := range [][2]string{{"01", "1"}, {"1_", "1"}, {"a b", "ab"}} {
		if c := bls.CompareVersions(same[0], same[1]); c != 0 && same[0] != "a b" {
			t.Errorf("%q: %d", same, c)
		}
	}
}

func TestListAndSort(t *testing.T) {
	entry := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	fsys := fstest.MapFS{
		"loader/entries/old.conf":      entry("sort-key os\nversion 1\nlinux /a\n"),
		"loader/entries/new.conf":      entry("sort-key os\nversion 2\nlinux /a\n"),
		"loader/entries/bad+0-3.conf":  entry("sort-key os\nversion 3\nlinux /a\n"),
		"loader/entries/other.conf":    entry("sort-key an-os\nversion 0\nuki /x.efi\n"),
		"loader/entries/nokey-1.conf":  entry("linux /a\n"),
		"loader/entries/nokey-2.conf":  entry("efi /a\n"),
		"loader/entries/broken.conf":   entry("title x\x00\n"),
		"loader/entries/nothing.conf":  entry("title only\n"),
		"loader/entries/README":        entry("hello"),
		"loader/entries/sub/deep.conf": entry("linux /a"),
		"EFI/Linux/uki-5+2.efi":        entry("MZ"),
		"EFI/Linux/uki-5.efi.tmp":      entry("MZ"),
	}
	items, foreign, err := bls.List(fsys)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range items {
		got = append(got, i.Name.String())
	}
	want := []string{"other.conf", "new.conf", "old.conf", "uki-5+2.efi", "nokey-2.conf", "nokey-1.conf", "bad+0-3.conf"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	var left []string
	for _, f := range foreign {
		left = append(left, f.Path)
	}
	if want := []string{"loader/entries/README", "loader/entries/broken.conf", "loader/entries/nothing.conf", "EFI/Linux/uki-5.efi.tmp"}; !reflect.DeepEqual(left, want) {
		t.Errorf("foreign: %q, want %q", left, want)
	}
	if items, _, err := bls.List(os.DirFS(filepath.Join(t.TempDir()))); err != nil || len(items) != 0 {
		t.Errorf("an empty partition: %v, %v", items, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(fedora))
	f.Add([]byte("\x00"))
	f.Add([]byte("a\r\n\r#b \t\n"))
	f.Add([]byte("linux\nlinux \nlinux  x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := bls.Parse(b)
		if err != nil {
			return
		}
		again, err := bls.Parse(e.Bytes())
		if err != nil || !bytes.Equal(again.Bytes(), e.Bytes()) || again.Options() != e.Options() {
			t.Errorf("%q is read back as %q, %v", e.Bytes(), again.Bytes(), err)
		}
		bls.CompareVersions(e.Get("version"), string(b))
	})
}
