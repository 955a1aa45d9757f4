package karg

import "strings"

// Arg is one argument of a command line.
type Arg struct {
	Key      string
	Value    string
	HasValue bool // there is a "=", though maybe nothing after it
}

// Split cuts a command line into arguments, exactly as the kernel does (next_arg in lib/cmdline.c): white space separates
// except between double quotes, which may be anywhere; quotes around a value or a whole argument are removed, others stay;
// backslashes and apostrophes mean nothing. What follows an argument "--" is for init and is left out. A NUL ends the line.
func Split(cmdline string) []Arg {
	cmdline, _, _ = strings.Cut(cmdline, "\x00")
	var args []Arg
	for {
		for cmdline != "" && isSpace(cmdline[0]) {
			cmdline = cmdline[1:]
		}
		if cmdline == "" {
			return args
		}
		quoted := cmdline[0] == '"'
		if quoted {
			cmdline = cmdline[1:]
		}
		inQuote, equals, end := quoted, 0, 0
		for ; end < len(cmdline); end++ {
			if isSpace(cmdline[end]) && !inQuote {
				break
			}
			if equals == 0 && cmdline[end] == '=' {
				equals = end // at position 0 it is part of the name
			}
			if cmdline[end] == '"' {
				inQuote = !inQuote
			}
		}
		text := cmdline[:end]
		cmdline = cmdline[end:]
		a := Arg{Key: text}
		if equals > 0 {
			a = Arg{Key: text[:equals], Value: text[equals+1:], HasValue: true}
			if v, ok := strings.CutPrefix(a.Value, `"`); ok {
				a.Value = strings.TrimSuffix(v, `"`)
				quoted = quoted && v == a.Value // the closing quote is gone already
			}
		}
		if quoted {
			a.Key, a.Value = trimQuote(a)
		}
		if a.Key == "--" && !a.HasValue {
			return args
		}
		args = append(args, a)
	}
}

// trimQuote removes the quote that closes a whole argument.
func trimQuote(a Arg) (key, value string) {
	if a.HasValue {
		return a.Key, strings.TrimSuffix(a.Value, `"`)
	}
	return strings.TrimSuffix(a.Key, `"`), ""
}

// isSpace is the kernel's isspace, for which the no-break space of Latin-1 is one, too.
func isSpace(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' || c == 0xa0 }
