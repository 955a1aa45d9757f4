package gvariant_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	. "github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

func must(t testing.TB, typ string, value any) Value {
	t.Helper()
	v, err := Encode(typ, value)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// The bytes are those that GLib 2.74 writes for the same values.
func TestGolden(t *testing.T) {
	long := strings.Repeat("x", 60)
	for _, c := range []struct {
		typ   string
		value any
		want  string
	}{
		{"b", true, "01"},
		{"y", byte(7), "07"},
		{"q", uint16(258), "0201"},
		{"x", int64(-2), "feffffffffffffff"},
		{"d", 1.5, "000000000000f83f"},
		{"s", "hé", "68c3a900"},
		{"as", []string{"", "a", "bc"}, "006100626300010306"},
		{"ay", []byte{1, 2}, "0102"},
		{"aay", List{[]byte{1}, []byte{}, []byte{2, 3}}, "010203010103"},
		{"as", []string{}, ""},
		{"()", Tuple{}, "00"},
		{"(yu)", Tuple{byte(1), uint32(2)}, "0100000002000000"},
		{"(uy)", Tuple{uint32(1), byte(2)}, "0100000002000000"},
		{"a(uy)", List{Tuple{uint32(1), byte(2)}, Tuple{uint32(3), byte(4)}}, "01000000020000000300000004000000"},
		{"(sss)", Tuple{"a", "bc", ""}, "6100626300000502"},
		{"(syas)", Tuple{"k", byte(1), []string{"x"}}, "6b000178000202"},
		{"v", must(t, "u", uint32(5)), "050000000075"},
		{"v", must(t, "v", must(t, "s", "x")), "780000730076"},
		{"a{sv}", List{Tuple{"a", must(t, "s", "b")}, Tuple{"n", must(t, "t", uint64(9))}, Tuple{"l", must(t, "as", []string{"p"})}},
			"610000000000000062000073020000006e00000000000000090000000000000000740200000000006c00000000000000700002006173020d2337"},
		{"mu", List{uint32(4)}, "04000000"},
		{"mu", List{}, ""},
		{"ms", List{"s"}, "730000"},
		{"mms", List{List{}}, "00"},
		{"(a{sv}aya(say)sstayay)", Tuple{Dict{"v": must(t, "s", "1")}, []byte{1}, List{}, "subject", "", uint64(1577836800), []byte{2, 3}, []byte{4}},
			"760000000000000031000073020d017375626a656374000000e10b5e000000000203042218170f0f0e"},
		{"a(sas)", List{Tuple{"a", []string{"b", "c"}}, Tuple{"d", []string{}}}, "610062006300020402640002090c"},
		{"as", []string{long, long, long, long, long}, strings.Repeat(strings.Repeat("78", 60)+"00", 5) + "3d007a00b700f4003101"},
	} {
		v := must(t, c.typ, c.value)
		if got := hex.EncodeToString(v.Bytes()); got != c.want {
			t.Errorf("%s of %v: %s, want %s", c.typ, c.value, got, c.want)
		}
		if err := v.Check(); err != nil {
			t.Errorf("%s of %v: %v", c.typ, c.value, err)
		}
		if again := must(t, c.typ, rebuild(t, v)); !bytes.Equal(again.Bytes(), v.Bytes()) {
			t.Errorf("%s of %v: %x when read and written again", c.typ, c.value, again.Bytes())
		}
	}
}

// rebuild takes a value apart, down to what Go has.
func rebuild(t testing.TB, v Value) any {
	t.Helper()
	part := func(x any, err error) any {
		if err != nil {
			t.Fatalf("%s %x: %v", v.Type(), v.Bytes(), err)
		}
		return x
	}
	kids := func() (list []any) {
		for i := range part(v.Len()).(int) {
			list = append(list, rebuild(t, part(v.At(i)).(Value)))
		}
		return list
	}
	switch v.Type()[0] {
	case 'b':
		return part(v.Bool())
	case 'y':
		return part(v.Byte())
	case 'n':
		return part(v.Int16())
	case 'q':
		return part(v.Uint16())
	case 'i', 'h':
		return part(v.Int32())
	case 'u':
		return part(v.Uint32())
	case 'x':
		return part(v.Int64())
	case 't':
		return part(v.Uint64())
	case 'd':
		return v // not every NaN would stay what it is
	case 's', 'o', 'g':
		return part(v.String())
	case 'v':
		inner := part(v.At(0)).(Value)
		return must(t, inner.Type(), rebuild(t, inner))
	case 'a', 'm':
		return List(kids())
	default:
		return Tuple(kids())
	}
}

func TestAccess(t *testing.T) {
	v := must(t, "(a{sv}aayut)", Tuple{
		Dict{"a": must(t, "s", "x"), "b": must(t, "v", must(t, "y", byte(3)))},
		List{[]byte("n\x00"), []byte("no end"), []byte("a\x00b\x00")}, uint32(0x01020304), uint64(1)})
	dict, _ := v.At(0)
	x, ok, err := dict.Lookup("a")
	if s, _ := x.String(); !ok || err != nil || s != "x" {
		t.Errorf("a: %q %v %v", s, ok, err)
	}
	if x, ok, err := dict.Lookup("b"); !ok || err != nil || x.Type() != "v" {
		t.Errorf("b: %q %v %v", x.Type(), ok, err)
	}
	if _, ok, err := dict.Lookup("c"); ok || err != nil {
		t.Errorf("c: %v %v", ok, err)
	}
	list, _ := v.At(1)
	for i, want := range []string{"n", "", ""} {
		b, _ := list.At(i)
		if s, err := b.ByteString(); string(s) != want || (err == nil) != (want != "") {
			t.Errorf("%d: %q %v", i, s, err)
		}
	}
	n, _ := v.At(2)
	if x, err := n.BigUint32(); x != 0x04030201 || err != nil {
		t.Errorf("%#x %v", x, err)
	}
	n, _ = v.At(3)
	if x, err := n.BigUint64(); x != 1<<56 || err != nil {
		t.Errorf("%#x %v", x, err)
	}
	if _, err := n.Uint32(); err == nil {
		t.Error("a t is read as a u")
	}
	if _, err := v.At(4); err == nil {
		t.Error("there is a fifth member")
	}
	if _, err := (Value{}).At(0); err == nil {
		t.Error("no value has a member")
	}
}

// deep returns n variants in one another.
func deep(n int) []byte {
	return append(bytes.Repeat([]byte{}, 0), []byte("\x01\x00y"+strings.Repeat("\x00v", n-1))...)
}

func TestHostile(t *testing.T) {
	for name, c := range map[string]struct {
		typ  string
		data string
		want string
	}{
		"fixed-too-short":            {"u", "\x01\x02\x03", "want 4"},
		"fixed-too-long":             {"(uy)", "\x01\x00\x00\x00\x02\x00\x00\x00\x00", "want 8"},
		"fixed-padding":              {"(uy)", "\x01\x00\x00\x00\x02\x00\x01\x00", "padding"},
		"unit-not-zero":              {"()", "\x01", "padding"},
		"bool-two":                   {"b", "\x02", "boolean"},
		"bool-two-in-array":          {"ab", "\x00\x02", "boolean"},
		"string-empty":               {"s", "", "no NUL"},
		"string-no-nul":              {"s", "abc", "no NUL"},
		"string-nul-inside":          {"s", "a\x00b\x00", "NUL"},
		"string-not-utf8":            {"s", "\xff\x00", "UTF-8"},
		"array-part-of-element":      {"au", "\x01\x02\x03\x04\x05", "no whole number of elements"},
		"array-offset-out-of-range":  {"as", "a\x00\x09", "out of range"},
		"array-offset-past-data":     {"as", "a\x00b\x00\x05\x04", "element 0"},
		"array-offsets-descending":   {"aay", "a\x00b\x00c\x00\x04\x02\x06", "element 1"},
		"array-no-offsets":           {"as", "a\x00\x03", "no whole number of framing offsets"},
		"array-gap":                  {"a(yu)", "\x01\x00\x00\x00\x01\x00\x00\x00\x01", "no whole number of elements"},
		"array-odd-offsets":          {"as", strings.Repeat("x", 299) + "\x00\x00\x2c\x01", "no whole number of framing offsets"},
		"array-padding":              {"aau", "\x01\x02\x03\x04\x01\x00\x00\x00\x01\x04", "element"},
		"tuple-no-room":              {"(ss)", "", "no room"},
		"tuple-offset-out-of-range":  {"(ss)", "a\x00b\x00\x40", "out of range"},
		"tuple-offset-past-data":     {"(ss)", "a\x00b\x00\x05", "member 0"},
		"tuple-offsets-descending":   {"(sss)", "a\x00b\x00c\x00\x01\x02", "member 1"},
		"tuple-data-behind":          {"(su)", "a\x00\x00\x00\x01\x00\x00\x00junk\x02", "member 1"},
		"tuple-padding":              {"(su)", "a\x00\x01\x00\x01\x00\x00\x00\x02", "padding"},
		"maybe-no-zero":              {"ms", "a\x00\x01", "no zero"},
		"maybe-wrong-size":           {"mu", "\x01", "want 4"},
		"variant-empty":              {"v", "", "no type"},
		"variant-no-type":            {"v", "\x01\x00", "ends too early"},
		"variant-unknown-type":       {"v", "\x01\x00w", "no type is"},
		"variant-two-types":          {"v", "\x01\x00yy", "more than one type"},
		"variant-long-type":          {"v", "\x01\x00" + strings.Repeat("a", 300) + "y", "at most 255"},
		"variant-deep-type":          {"v", "\x01\x00" + strings.Repeat("a", 100) + "y", "in one another"},
		"variant-open-tuple":         {"v", "\x01\x00(yy", "without its end"},
		"variant-dict-of-containers": {"v", "\x01\x00a{ayy}", "dict entry"},
		"variants-100-deep":          {"v", string(deep(100)), "in one another"},
		"dict-key-not-utf8":          {"a{sv}", "\xff\x00\x00\x00\x00\x00\x00\x00\x01\x00y\x02\x0c", "UTF-8"},
	} {
		v, err := New(c.typ, []byte(c.data))
		if err == nil {
			err = v.Check()
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	v, err := New("v", deep(60))
	if err == nil {
		err = v.Check()
	}
	if err != nil {
		t.Errorf("60 variants in one another: %v", err)
	}
}

// A container of more than 255 bytes whose offsets would fit one byte does not exist; one with offsets of two bytes must need them.
func TestWideOffsets(t *testing.T) {
	// 250 elements of no bytes: 250 offsets of one byte, but also 250 of two bytes.
	data := make([]byte, 500)
	v, err := New("aay", data)
	if err == nil {
		err = v.Check()
	}
	if !errors.Is(err, ErrNotNormal) {
		t.Errorf("%v", err)
	}
	v, err = New("aay", data[:250])
	if n, _ := v.Len(); err != nil || n != 250 {
		t.Errorf("%d elements: %v", n, err)
	}
}

func TestEncodeErrors(t *testing.T) {
	for _, c := range []struct {
		typ   string
		value any
	}{
		{"s", "a\x00b"}, {"s", "\xff"}, {"u", 5}, {"(uu)", Tuple{uint32(1)}}, {"ay", "text"}, {"ms", List{"a", "b"}}, {"v", Value{}},
		{"s", nil}, {"a{sv}", Dict{"a": Value{}}}, {"as", Value{}}, {"(", Tuple{}},
	} {
		if v, err := Encode(c.typ, c.value); err == nil {
			t.Errorf("%s of %v: %x", c.typ, c.value, v.Bytes())
		}
	}
}

// What passes Check is what Encode makes of its parts, and nothing else is.
func FuzzCheck(f *testing.F) {
	for _, typ := range types {
		f.Add(typ, []byte("a\x00b\x00\x02\x04"))
		f.Add(typ, make([]byte, 300))
	}
	f.Add("a(())", []byte("\x00\x01")) // an empty tuple is a zero byte
	f.Add("a{sv}", must(f, "a{sv}", Dict{"a": must(f, "s", "x"), "b": must(f, "v", must(f, "(ydas)", Tuple{byte(3), 1.5, []string{"p"}}))}).Bytes())
	f.Fuzz(func(t *testing.T, typ string, data []byte) {
		v, err := New(typ, data)
		if err != nil {
			return
		}
		if err := v.Check(); err == nil {
			if again := must(t, typ, rebuild(t, v)); !bytes.Equal(again.Bytes(), data) {
				t.Fatalf("%s: %x was taken for %x", typ, data, again.Bytes())
			}
		} else if strings.ContainsRune(err.Error(), '\n') {
			t.Fatal(err)
		}
	})
}

var types = []string{"a{sv}", "(a{sv}aya(say)sstayay)", "(a(say)a(sayay))", "(uuua(ayay))", "(uuuusa(ayay))", "(a(s(taya{sv}))a{sv})",
	"v", "av", "aay", "aas", "m(sms)", "a{s(ayv)}", "a()", "(b(yb)mb)", "(ya(tay))"}

func Example() {
	five, _ := Encode("t", uint64(5))
	v, _ := Encode("(sa{sv})", Tuple{"name", Dict{"size": five}})
	dict, _ := v.At(1)
	size, _, _ := dict.Lookup("size")
	n, err := size.Uint64()
	fmt.Println(n, err)
	// Output: 5 <nil>
}
