package fstree

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Printable returns a name as it can be shown: as it is, if that is printable, and with \n, \\ or \xHH for all other bytes.
// Nobody's file name moves the cursor.
func Printable(name string) string {
	odd := func(r rune) bool { return r == '\\' || r == utf8.RuneError || !unicode.IsPrint(r) }
	if strings.IndexFunc(name, odd) < 0 {
		return name
	}
	var b strings.Builder
	for len(name) > 0 {
		r, n := utf8.DecodeRuneInString(name)
		switch {
		case r == '\\':
			b.WriteString(`\\`)
		case r == '\n':
			b.WriteString(`\n`)
		case odd(r):
			for k := range n {
				fmt.Fprintf(&b, `\x%02x`, name[k])
			}
		default:
			b.WriteString(name[:n])
		}
		name = name[n:]
	}
	return b.String()
}
