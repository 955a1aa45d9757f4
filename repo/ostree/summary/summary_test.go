package summary_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/composefs-boot/composefs-boot/repo/ostree/delta"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

func vector(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/vec.summary")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sum(t testing.TB, s string) [32]byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		t.Fatal(s, err)
	}
	return [32]byte(b)
}

const (
	first  = "6b4bf01eeb87e0073796f7e68e2ecb95407ee8f443360d06ac0792f04f1e0a94"
	second = "2828e5bbdf3f2082a488f64daf230e4cebc05ff3ca3f98f74519bd67ab7d474e"
)

// What ostree 2026.4 has written.
func TestVector(t *testing.T) {
	s, err := summary.Parse(vector(t))
	if err != nil {
		t.Fatal(err)
	}
	r, ok := s.Lookup("", "vec/x86_64/one")
	if !ok || r.Commit != sum(t, second) || r.Size != 316 || r.Version != "2" || r.Timestamp != time.Unix(1700000000, 0).UTC() {
		t.Errorf("%+v", r)
	}
	if _, ok := s.Lookup("org.example.Vec", "vec/x86_64/one"); !ok {
		t.Error("not in its own collection")
	}
	for _, where := range [][2]string{{"", "vec/x86_64"}, {"org.example.Other", "vec/x86_64/one"}} {
		if _, ok := s.Lookup(where[0], where[1]); ok {
			t.Errorf("%q is there", where)
		}
	}
	if len(s.Refs) != 2 || s.Collection != "org.example.Vec" || s.Mode != "archive-z2" || !s.IndexedDeltas || s.Tombstones || s.Other != nil ||
		s.LastModified.IsZero() || !s.Expires.IsZero() {
		t.Errorf("%+v", s)
	}
	want := map[delta.Name]bool{{From: sum(t, first), To: sum(t, second)}: true, {To: sum(t, first)}: true}
	for d := range s.Deltas {
		if !want[d] {
			t.Errorf("delta %v", d)
		}
	}
	if len(s.Deltas) != 2 {
		t.Errorf("%v", s.Deltas)
	}
	roundTrip(t, s)
}

func roundTrip(t testing.TB, s *summary.Summary) {
	t.Helper()
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	v, err := gvariant.New("(a(s(taya{sv}))a{sv})", b)
	if err == nil {
		err = v.Check()
	}
	if err != nil {
		t.Fatal(err)
	}
	again, err := summary.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := plain(again), plain(s); !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v\n%+v", got, want)
	}
}

// plain replaces the values of other keys by their bytes: the same value has another depth inside of others.
func plain(s *summary.Summary) (parts []any) {
	other := func(d gvariant.Dict) map[string]string {
		m := map[string]string{}
		for k, v := range d {
			m[k] = v.Type() + " " + string(v.Bytes())
		}
		return m
	}
	refs := func(list []summary.Ref) {
		list = slices.Clone(list)
		slices.SortFunc(list, func(a, b summary.Ref) int { return strings.Compare(a.Name, b.Name) })
		for _, r := range list {
			parts = append(parts, other(r.Other))
			r.Other = nil
			parts = append(parts, r)
		}
	}
	refs(s.Refs)
	for _, name := range slices.Sorted(maps.Keys(s.Collections)) {
		parts = append(parts, name)
		refs(s.Collections[name])
	}
	rest := *s
	rest.Refs, rest.Collections, rest.Other = nil, nil, nil
	return append(parts, rest, other(s.Other))
}

func TestEncode(t *testing.T) {
	other, err := gvariant.Encode("s", "kept")
	if err != nil {
		t.Fatal(err)
	}
	a := summary.Ref{Name: "a/b", Commit: sum(t, first), Size: 300, Other: gvariant.Dict{"my.key": other}}
	b := summary.Ref{Name: "a/a", Commit: sum(t, second), Size: 1, Timestamp: time.Unix(5, 0).UTC(), Version: "7"}
	s := &summary.Summary{
		Refs: []summary.Ref{b, a}, Collection: "org.example.A", Collections: map[string][]summary.Ref{"org.example.B": {a}},
		Expires: time.Unix(9, 0).UTC(), LastModified: time.Unix(8, 0).UTC(), Mode: "archive-z2", Tombstones: true,
		Other: gvariant.Dict{"my.other": other},
	}
	roundTrip(t, s)
	if r, ok := s.Lookup("org.example.B", "a/b"); !ok || r.Commit != a.Commit {
		t.Errorf("%+v, %v", r, ok)
	}
	for name, refs := range map[string][]summary.Ref{"twice": {a, a}, "bad name": {{Name: "../a"}}} {
		if _, err := (&summary.Summary{Refs: refs}).Encode(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// The order in which refs are given does not matter.
	x, _ := (&summary.Summary{Refs: []summary.Ref{a, b}}).Encode()
	y, _ := (&summary.Summary{Refs: []summary.Ref{b, a}}).Encode()
	if !bytes.Equal(x, y) {
		t.Error("it depends on the order")
	}
}

func value(t testing.TB, typ string, x any) gvariant.Value {
	t.Helper()
	v, err := gvariant.Encode(typ, x)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestHostile(t *testing.T) {
	long := strings.Repeat("a", 256)
	entry := func(name string, sum []byte, metadata any) gvariant.Tuple {
		return gvariant.Tuple{name, gvariant.Tuple{uint64(1), sum, metadata}}
	}
	ref := func(name string) gvariant.Tuple { return entry(name, make([]byte, 32), gvariant.List{}) }
	text := func(s string) gvariant.Value { return value(t, "s", s) }
	number := func(n uint64) gvariant.Value { return value(t, "t", n) }
	type list = gvariant.List
	type tuple = gvariant.Tuple
	for name, c := range map[string]struct {
		refs list
		dict list
		err  string
	}{
		"nothing":                    {nil, nil, ""},
		"a ref":                      {list{ref("a")}, nil, ""},
		"twice":                      {list{ref("a"), ref("b"), ref("a")}, nil, "stands there twice"},
		"no name":                    {list{ref("")}, nil, "not a name"},
		"dots":                       {list{ref("a/../b")}, nil, "not a name"},
		"absolute":                   {list{ref("/a")}, nil, "not a name"},
		"ends in a slash":            {list{ref("a/")}, nil, "not a name"},
		"hidden":                     {list{ref(".a")}, nil, "not a name"},
		"newline":                    {list{ref("a\nb")}, nil, "not a name"},
		"an option":                  {list{ref("-a")}, nil, "not a name"},
		"a remote":                   {list{ref("a:b")}, nil, "not a name"},
		"long":                       {list{ref(long)}, nil, "not a name"},
		"short checksum":             {list{entry("a", make([]byte, 31), list{})}, nil, "no checksum"},
		"no checksum":                {list{entry("a", nil, list{})}, nil, "no checksum"},
		"timestamp that is a string": {list{entry("a", make([]byte, 32), list{tuple{"ostree.commit.timestamp", text("x")}})}, nil, "ostree.commit.timestamp"},
		"timestamp out of all time":  {list{entry("a", make([]byte, 32), list{tuple{"ostree.commit.timestamp", number(1<<64 - 1)}})}, nil, "is no time"},
		"version that is a number":   {list{entry("a", make([]byte, 32), list{tuple{"ostree.commit.version", number(1)}})}, nil, "ostree.commit.version"},
		"key twice":                  {nil, list{tuple{"x", text("1")}, tuple{"x", text("2")}}, "stands there twice"},
		"last modified is a string":  {nil, list{tuple{"ostree.summary.last-modified", text("x")}}, "last-modified"},
		"collection map is a string": {nil, list{tuple{"ostree.summary.collection-map", text("x")}}, "type s"},
		"deltas are a string":        {nil, list{tuple{"ostree.static-deltas", text("x")}}, "type s"},
		"delta that is a path":       {nil, list{tuple{"ostree.static-deltas", value(t, "a{sv}", list{tuple{"../x", text("x")}})}}, "delta"},
	} {
		v := value(t, "(a(s(taya{sv}))a{sv})", tuple{c.refs, c.dict})
		_, err := summary.Parse(v.Bytes())
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %v, want %q", name, err, c.err)
		}
	}
	whole := vector(t)
	for n := range whole {
		if _, err := summary.Parse(whole[:n]); err == nil && n > 0 {
			t.Fatalf("cut after %d bytes of %d: no error", n, len(whole))
		}
	}
}

func zip(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// diff makes a diff of operations, each of them a kind and a size.
func diff(t testing.TB, data string, ops ...uint32) []byte {
	b := binary.LittleEndian.AppendUint32([]byte("xadf"), uint32(len(ops)/2))
	for i := 0; i < len(ops); i += 2 {
		b = binary.LittleEndian.AppendUint32(b, ops[i]<<28|ops[i+1])
	}
	return zip(t, append(b, data...))
}

func TestIndex(t *testing.T) {
	old, now := []byte("the old summary"), []byte("the new and longer summary")
	s := sha256.Sum256(now)
	before := sha256.Sum256(old)
	v := value(t, "(a{s(ayaaya{sv})}a{sv})", gvariant.Tuple{
		gvariant.List{gvariant.Tuple{"x86_64", gvariant.Tuple{s[:], gvariant.List{before[:]}, gvariant.List{}}}},
		gvariant.List{},
	})
	x, err := summary.ParseIndex(v.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	sub := x.Subsummaries["x86_64"]
	if sub.Sum != s || len(sub.Previous) != 1 || sub.Previous[0] != before {
		t.Fatalf("%+v", sub)
	}
	if got, want := sub.Path(), "summaries/"+hex.EncodeToString(s[:])+".gz"; got != want {
		t.Error(got)
	}
	if got, want := sub.DiffPath(before), "summaries/"+hex.EncodeToString(before[:])+"-"+hex.EncodeToString(s[:])+".delta"; got != want {
		t.Error(got)
	}
	if b, err := sub.Decompress(zip(t, now)); err != nil || !bytes.Equal(b, now) {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := sub.Decompress(zip(t, old)); err == nil {
		t.Error("another summary")
	}
	if b, err := sub.ApplyDiff(old, diff(t, "new and longer", 0, 4, 2, 14, 1, 3, 0, 8)); err != nil || !bytes.Equal(b, now) {
		t.Errorf("%q, %v", b, err)
	}
	for name, d := range map[string][]byte{
		"not gzip":               []byte("xadf"),
		"no header":              zip(t, []byte("xadf")),
		"other magic":            zip(t, []byte("xadg\x00\x00\x00\x00")),
		"too many operations":    zip(t, []byte("xadf\xff\xff\xff\xff")),
		"more than the old has":  diff(t, "", 0, 100),
		"passes over too much":   diff(t, "", 1, 100),
		"more than the data has": diff(t, "x", 2, 2),
		"unknown operation":      diff(t, "", 3, 1),
		"another result":         diff(t, "", 0, 4),
		"nothing":                diff(t, ""),
	} {
		if _, err := sub.ApplyDiff(old, d); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := summary.ParseIndex(vector(t)); err == nil {
		t.Error("a summary is an index")
	}
}

func FuzzSummary(f *testing.F) {
	f.Add(vector(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := summary.Parse(b)
		if err != nil {
			return
		}
		for _, r := range s.Refs {
			if got, ok := s.Lookup("", r.Name); !ok || got.Commit != r.Commit {
				t.Errorf("%q is not found", r.Name)
			}
		}
		// What was kept of other keys may not be in normal form.
		if _, err := s.Encode(); err != nil {
			t.Error(err)
		}
	})
}

func FuzzIndex(f *testing.F) {
	f.Add([]byte{}, []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, index, old, diff []byte) {
		summary.ParseIndex(index)
		if b, err := (summary.Subsummary{}).ApplyDiff(old, diff); err == nil {
			t.Errorf("%q has the SHA-256 zero", b)
		}
	})
}
