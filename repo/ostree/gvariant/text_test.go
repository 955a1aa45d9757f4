package gvariant

import (
	"fmt"
	"strings"
	"testing"
)

func TestParseText(t *testing.T) {
	for text, want := range map[string]string{
		`true`:              "b 01",
		` -7 `:              "i f9ffffff",
		`0x1f`:              "i 1f000000",
		`1e0`:               "d 000000000000f03f",
		`byte 0x41`:         "y 41",
		`uint32 5`:          "u 05000000",
		`@t 5`:              "t 0500000000000000",
		`double 1`:          "d 000000000000f03f",
		`'it\'s \u00fc'`:    "s 69742773 20c3bc 00",
		`"a\n"`:             "s 610a00",
		`objectpath '/a'`:   "o 2f6100",
		`b'a\0011'`:         "ay 61013100",
		`['a', "b"]`:        "as 61006200 0204",
		`[1, uint16 2]`:     "aq 01000200",
		`@ay []`:            "ay ",
		`@ay [0x1, 2]`:      "ay 0102",
		`()`:                "() 00",
		`(1,)`:              "(i) 01000000",
		`(byte 1, 'x')`:     "(ys) 017800",
		`<5>`:               "v 05000000 00 69",
		`{'a': <byte 1>}`:   "a{sv} 6100000000000000 01 00 79 02 0c",
		`{'a': 1, 'b': 2}`:  "a{si} 61000000 01000000 02 000000 62000000 02000000 02 09 15",
		`{'a', 1}`:          "{si} 61000000 01000000 02",
		`just 5`:            "mi 05000000",
		`@mi nothing`:       "mi ",
		`[just 5, nothing]`: "ami 05000000 0404",
		`[[], [1]]`:         "aai 01000000 0004",
		`@a{sv} {}`:         "a{sv} ",
	} {
		v, err := ParseText(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		typ, bytes, _ := strings.Cut(want, " ")
		if got := fmt.Sprintf("%x", v.Bytes()); v.Type() != typ || got != strings.ReplaceAll(bytes, " ", "") {
			t.Errorf("%s: %s %s, want %s", text, v.Type(), got, want)
		}
		if err := v.Check(); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
	for text, want := range map[string]string{
		``:                                     "ends too early",
		`[`:                                    "ends too early",
		`(1`:                                   "want , or )",
		`x`:                                    "want a value (texts stand in quotes)",
		`'a`:                                   "no quote at its end",
		`'a\`:                                  "no quote at its end",
		`'\u12'`:                               "no quote at its end",
		`'\ud800'`:                             "not a character",
		`b'\777'`:                              "not a character",
		`5 5`:                                  "behind the value",
		`300000000000`:                         "out of range",
		`byte -1`:                              "invalid syntax",
		`byte 256`:                             "out of range",
		`@zz 5`:                                "type",
		`@ai`:                                  "want a value behind the type",
		`@ai 'x'`:                              "a value of type S where one of type ai is expected",
		`[1, 'x']`:                             "a value of type S where one of type N is expected",
		`[]`:                                   "nothing tells the type",
		`<[]>`:                                 "nothing tells the type",
		`{1: 2`:                                "want , or }",
		`{1}`:                                  "want :",
		`<1`:                                   "want >",
		"\xff":                                 "not UTF-8",
		strings.Repeat("[", 1<<16):             "more than 64 values in one another",
		strings.Repeat("<", 1<<16):             "more than 64 values in one another",
		strings.Repeat("@v ", 1000):            "more than 64 values in one another",
		"(1" + strings.Repeat(",1", 300) + ")": "type of 303 characters",
		`{[1]: 2}`:                             "type",
		`+`:                                    "want a value",
		`@a{sv} 5`:                             "where one of type a{sv} is expected",
		`objectpath 5`:                         "where one of type o is expected",
	} {
		if v, err := ParseText(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, %v, want %q", text, v.Type(), err, want)
		}
	}
}

// Whatever the text is, there is an error or a normal value.
func FuzzParseText(f *testing.F) {
	for _, text := range []string{"{'a': <[1, 2.5]>}", "@a(sv) []", "just b'\\001'", "'\\u00fc'", "[nothing, just (1,)]"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if v, err := ParseText(text); err == nil {
			if err := v.Check(); err != nil {
				t.Errorf("%q: %v", text, err)
			}
		}
	})
}
