package karg_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func TestSplit(t *testing.T) {
	for line, want := range map[string][]karg.Arg{
		"":                       nil,
		" \t\n":                  nil,
		"a b=c":                  {{Key: "a"}, {Key: "b", Value: "c", HasValue: true}},
		"a=b=c a=":               {{Key: "a", Value: "b=c", HasValue: true}, {Key: "a", HasValue: true}},
		`a="b c" d`:              {{Key: "a", Value: "b c", HasValue: true}, {Key: "d"}},
		`"a=b c" d`:              {{Key: "a", Value: "b c", HasValue: true}, {Key: "d"}},
		`"a b" c`:                {{Key: "a b"}, {Key: "c"}},
		`a=b"c d"e f`:            {{Key: "a", Value: `b"c d"e`, HasValue: true}, {Key: "f"}},
		`a="b c`:                 {{Key: "a", Value: "b c", HasValue: true}},
		`a=' b'`:                 {{Key: "a", Value: "'", HasValue: true}, {Key: "b'"}},
		`a=\" b`:                 {{Key: "a", Value: `\" b`, HasValue: true}},
		"=a b":                   {{Key: "=a"}, {Key: "b"}},
		"a -- b=c":               {{Key: "a"}},
		"a --=x b":               {{Key: "a"}, {Key: "--", Value: "x", HasValue: true}, {Key: "b"}},
		"a\xa0b":                 {{Key: "a"}, {Key: "b"}},
		"a\x00b":                 {{Key: "a"}},
		"a\r\nb":                 {{Key: "a"}, {Key: "b"}},
		`"`:                      {{Key: ""}},
		`x="composefs=?1 y" z=1`: {{Key: "x", Value: "composefs=?1 y", HasValue: true}, {Key: "z", Value: "1", HasValue: true}},
	} {
		if got := karg.Split(line); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, want %+v", line, got, want)
		}
	}
}

var (
	h256 = strings.Repeat("1", 64)
	g256 = strings.Repeat("2", 64)
	h512 = strings.Repeat("3", 128)
	g512 = strings.Repeat("4", 128)
)

func TestParse(t *testing.T) {
	for line, want := range map[string][]string{
		"quiet composefs.digest=v1-sha512-12:" + h512 + " rw": {"composefs.digest=v1-sha512-12:" + h512},
		"composefs=" + h256:                      {"composefs=" + h256},
		"composefs=?" + h512:                     {"composefs=?" + h512},
		"composefs.digest=?v2-sha256-12:" + h256: {"composefs.digest=?v2-sha256-12:" + h256},
		// the order of the line
		"composefs=" + h256 + " composefs.digest=v1-sha256-12:" + g256: {"composefs=" + h256, "composefs.digest=v1-sha256-12:" + g256},
		// but never one without verification first
		"composefs=?" + h512 + " composefs.digest=v1-sha256-12:" + g256: {"composefs.digest=v1-sha256-12:" + g256, "composefs=?" + h512},
		// only the first of a kind
		"composefs=" + h256 + " composefs=" + g256:                        {"composefs=" + h256, "! composefs=" + g256},
		"composefs=?" + h256 + " composefs=" + g256:                       {"composefs=?" + h256, "! composefs=" + g256},
		"composefs=" + h256 + " composefs=garbage":                        {"composefs=" + h256, "! composefs=garbage"},
		`note="composefs=` + g256 + `" composefs=` + h256:                 {"composefs=" + h256},
		"composefs=" + h256 + " -- composefs.digest=v1-sha256-12:" + g256: {"composefs=" + h256},
	} {
		c, err := karg.Parse(line)
		if err != nil {
			t.Errorf("%q: %v", line, err)
			continue
		}
		var got []string
		for _, i := range c.Images {
			got = append(got, i.String())
		}
		for _, i := range c.Ignored {
			got = append(got, "! "+i)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for line, want := range map[string]string{
		"":                           karg.ErrNone.Error(),
		"composefsx=" + h256:         karg.ErrNone.Error(),
		"composefs":                  "0 characters",
		"composefs=":                 "0 characters",
		"composefs=os/current":       "want 64",
		"composefs=../../etc/passwd": "want 64",
		"composefs=" + strings.ToUpper("a"+h256[1:]): "upper case",
		"composefs=" + h256[1:]:                      "63 characters",
		"composefs=g" + h256[1:]:                     "not hexadecimal",
		"composefs=??" + h256:                        "65 characters",
		"composefs.digest=" + h512:                   "want VERSION",
		"composefs.digest=v3-sha512-12:" + h512:      `image format "v3"`,
		"composefs.digest=v1-sha512-16:" + h512:      "unknown fs-verity algorithm",
		"composefs.digest=v1-sha512-12:" + h256:      "is not sha512",
		"composefs.digest=v1-md5-12:" + h256:         "unknown fs-verity algorithm",
		"composefs.digest=v1-sha512-12":              "want VERSION",
		// malformed and first: what comes later does not count
		"composefs=x composefs=" + h256:             "want 64",
		"composefs=" + h256 + " composefs.digest=x": "want VERSION",
	} {
		if c, err := karg.Parse(line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v, want %q", line, c, err, want)
		}
	}
	if _, err := karg.Parse("a b"); !errors.Is(err, karg.ErrNone) {
		t.Errorf("%v", err)
	}
}

func TestMayReplace(t *testing.T) {
	image := func(arg string) karg.Image {
		c, err := karg.Parse(arg)
		if err != nil {
			t.Fatal(err)
		}
		return c.Images[0]
	}
	strong, weaker, none := image("composefs="+h512), image("composefs="+h256), image("composefs=?"+h512)
	for _, c := range []struct {
		i, missing karg.Image
		want       bool
	}{
		{strong, strong, true}, {strong, weaker, true}, {strong, none, true},
		{weaker, strong, false}, {weaker, weaker, true}, {none, weaker, false}, {none, strong, false},
		{none, image("composefs.digest=?v1-sha512-12:" + g512), true},
	} {
		if got := c.i.MayReplace(c.missing); got != c.want {
			t.Errorf("%v for %v: %v", c.i, c.missing, got)
		}
	}
}

// The golden arguments are read and written.
func TestGoldenArguments(t *testing.T) {
	for name, tree := range golden.Load(t).Trees {
		for kind, arg := range tree.Karg {
			c, err := karg.Parse(arg)
			if err != nil || c.Images[0].String() != arg {
				t.Errorf("%s %s: %v, %v", name, kind, c, err)
				continue
			}
			i := c.Images[0]
			if made := karg.Make(i.Digest, i.Version, false).String(); made != arg {
				t.Errorf("%s %s: made %s", name, kind, made)
			}
		}
	}
	d := fsverity.Of(fsverity.SHA256, nil)
	if got := karg.Make(d, 2, true).String(); got != "composefs=?"+d.String() {
		t.Error(got)
	}
}

// The cost of a line grows with its length only.
func TestLongLines(t *testing.T) {
	for name, c := range map[string]struct{ line, want string }{
		"one argument":       {strings.Repeat("x", 1<<20) + " composefs=" + h256, ""},
		"only spaces":        {strings.Repeat(" ", 1<<20) + "composefs=" + h256, ""},
		"many arguments":     {strings.Repeat("a ", 1<<19) + "composefs=" + h256, ""},
		"many of its kind":   {strings.Repeat("composefs="+h256+" ", 1<<13), ""},
		"long value":         {"composefs=" + strings.Repeat("0", 1<<20), "1048576 characters"},
		"quote never closed": {`x="` + strings.Repeat("y ", 1<<19) + " composefs=" + h256, karg.ErrNone.Error()},
	} {
		got, err := karg.Parse(c.line)
		switch {
		case c.want == "" && (err != nil || got.Images[0].String() != "composefs="+h256):
			t.Errorf("%s: %.300v, %.300v", name, got, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 600):
			t.Errorf("%s: %.600v", name, err)
		}
	}
}

// Whatever the line is, what was parsed parses again from its own text, and nothing without verification comes first. And if
// it is appended to a signed line, no other image is tried first.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{"composefs=" + h256 + " composefs.digest=?v1-sha512-12:" + h512, `"composefs=` + h256 + `"`,
		"a=\"unterminated composefs=" + h256, "composefs=" + strings.Repeat("x", 1<<12), "\x00composefs=" + h256, "-- " + h256,
		"composefs=" + h256 + "\r\n", "composefs=" + h256 + " composefs=" + g256, `composefs="` + h256, "=\"=\"  =", "\xa0\xa0", "composefs.digest=v1-sha512-12:" + g512, "\" composefs=" + g256 + "\""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		appended(t, line)
		c, err := karg.Parse(line)
		if err != nil {
			return
		}
		for k, i := range c.Images {
			again, err := karg.Parse(i.String())
			if err != nil || again.Images[0] != i {
				t.Errorf("%v parses as %v, %v", i, again, err)
			}
			if k > 0 && c.Images[0].Insecure && !i.Insecure {
				t.Errorf("%q: %v comes before %v", line, c.Images[0], i)
			}
		}
	})
}

func appended(t *testing.T, text string) {
	t.Helper()
	for _, signed := range []string{"composefs=" + h256, `composefs.digest="v1-sha512-12:` + h512 + `" x="a b"`,
		"composefs=?" + g256 + " composefs.digest=v1-sha256-12:" + h256, "composefs.digest=v2-sha256-12:" + h256 + " composefs=" + h512} {
		before, err := karg.Parse(signed)
		if err != nil {
			t.Fatal(err)
		}
		after, err := karg.Parse(signed + " " + text)
		if err != nil {
			continue // refused
		}
		for k, image := range before.Images {
			if after.Images[k] != image {
				t.Errorf("%q after %q: %v", text, signed, after.Images)
			}
		}
	}
}
