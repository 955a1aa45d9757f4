package gvariant

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ParseText reads a value in the text format of GLib ("GVariant Text Format" in its reference), which people type on command lines:
//
//	true  5  -7  0x1f  2.5  'text'  "text"  b'bytes'  [1, 2]  ('a', 5)  {'key': 5}  <'a variant'>  just 5  nothing
//	uint32 5   byte 0x41   objectpath '/a'   @a{sv} {}   @ay []
//
// Numbers are of type i, or d if they have a point, and texts of type s, unless a type stands before them or other elements of the array
// have one. Types that nothing tells must be given.
func ParseText(text string) (Value, error) {
	if !utf8.ValidString(text) {
		return Value{}, errors.New("gvariant text: not UTF-8")
	}
	p := &textParser{rest: text}
	n, err := p.value(0)
	if err == nil && p.space() != "" {
		err = fmt.Errorf("%.40q behind the value", p.rest)
	}
	var typ string
	if err == nil {
		typ, err = settle(n.pattern)
	}
	var made any
	if err == nil {
		made, err = n.make(typ)
	}
	if err != nil {
		return Value{}, fmt.Errorf("gvariant text: %w", err)
	}
	return Encode(typ, made)
}

// node is a parsed value. Its pattern is a type, in which N is any number, S any text and * any type.
type node struct {
	pattern string
	text    string // of a basic value
	kids    []*node
}

type textParser struct{ rest string }

func (p *textParser) space() string {
	p.rest = strings.TrimLeft(p.rest, " \t\r\n")
	return p.rest
}

// take removes what the text begins with, if it does.
func (p *textParser) take(prefix string) bool {
	var ok bool
	p.rest, ok = strings.CutPrefix(p.space(), prefix)
	return ok
}

// word takes letters and digits, and what numbers have besides.
func (p *textParser) word() string {
	rest := p.space()
	k := strings.IndexFunc(rest, func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || strings.ContainsRune("+-._", r))
	})
	if k < 0 {
		k = len(rest)
	}
	p.rest = rest[k:]
	return rest[:k]
}

var keywords = map[string]string{"boolean": "b", "byte": "y", "int16": "n", "uint16": "q", "int32": "i", "uint32": "u", "int64": "x",
	"uint64": "t", "handle": "h", "double": "d", "string": "s", "objectpath": "o", "signature": "g"}

func (p *textParser) value(depth int) (*node, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("more than %d values in one another", maxDepth)
	}
	rest := p.space()
	switch {
	case rest == "":
		return nil, errors.New("it ends too early")
	case rest[0] == '@':
		k := strings.IndexAny(rest, " \t\r\n")
		if k < 0 {
			return nil, fmt.Errorf("%.40q: want a value behind the type", rest)
		}
		typ := rest[1:k]
		if _, err := parse(typ); err != nil {
			return nil, err
		}
		p.rest = rest[k:]
		return p.typed(typ, depth)
	case rest[0] == '\'' || rest[0] == '"':
		text, err := p.quoted(false)
		return &node{pattern: "S", text: text}, err
	case strings.HasPrefix(rest, "b'") || strings.HasPrefix(rest, `b"`):
		p.rest = rest[1:]
		text, err := p.quoted(true)
		return &node{pattern: "ay", text: text + "\x00"}, err
	case p.take("["):
		return p.array(depth)
	case p.take("("):
		kids, err := p.list(")", depth)
		n := &node{pattern: "(", kids: kids}
		for _, kid := range kids {
			n.pattern += kid.pattern
		}
		n.pattern += ")"
		return n, err
	case p.take("{"):
		return p.dictionary(depth)
	case p.take("<"):
		kid, err := p.value(depth + 1)
		if err == nil && !p.take(">") {
			err = fmt.Errorf("%.40q: want >", p.rest)
		}
		return &node{pattern: "v", kids: []*node{kid}}, err
	}
	return p.named(depth)
}

// named parses what begins with a word: a keyword, or a number.
func (p *textParser) named(depth int) (*node, error) {
	word := p.word()
	if typ, ok := keywords[word]; ok {
		return p.typed(typ, depth)
	}
	switch word {
	case "true", "false":
		return &node{pattern: "b", text: word}, nil
	case "nothing":
		return &node{pattern: "m*"}, nil
	case "just":
		kid, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		return &node{pattern: "m" + kid.pattern, kids: []*node{kid}}, nil
	case "":
		return nil, fmt.Errorf("%.40q: want a value", p.rest)
	}
	number := strings.ToLower(strings.TrimLeft(word, "+-"))
	if number == "" || (number[0] < '0' || number[0] > '9') && number[0] != '.' && number != "inf" && number != "nan" {
		return nil, fmt.Errorf("%.40q: want a value (texts stand in quotes)", word)
	}
	if !strings.HasPrefix(number, "0x") && strings.ContainsAny(number, ".ein") {
		return &node{pattern: "d", text: word}, nil
	}
	return &node{pattern: "N", text: word}, nil
}

// typed parses a value that is of this type.
func (p *textParser) typed(typ string, depth int) (*node, error) {
	n, err := p.value(depth + 1)
	if err != nil {
		return nil, err
	}
	n.pattern, err = unify(typ, n.pattern)
	return n, err
}

// list parses values up to the end, with commas between them.
func (p *textParser) list(end string, depth int) (kids []*node, err error) {
	for !p.take(end) {
		if len(kids) > 0 && !p.take(",") {
			return nil, fmt.Errorf("%.40q: want , or %s", p.rest, end)
		}
		if len(kids) == 1 && end == ")" && p.take(end) { // a tuple of one has a comma
			return kids, nil
		}
		kid, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		kids = append(kids, kid)
	}
	return kids, nil
}

func (p *textParser) array(depth int) (*node, error) {
	kids, err := p.list("]", depth)
	n := &node{kids: kids}
	element := "*"
	for _, kid := range kids {
		if element, err = unify(element, kid.pattern); err != nil {
			return nil, err
		}
	}
	n.pattern = "a" + element
	return n, err
}

// dictionary parses what stands behind {: entries with a colon, or a single entry with a comma, which is no array.
func (p *textParser) dictionary(depth int) (*node, error) {
	n := &node{}
	key, value := "*", "*"
	for !p.take("}") {
		if len(n.kids) > 0 && !p.take(",") {
			return nil, fmt.Errorf("%.40q: want , or }", p.rest)
		}
		k, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		single := len(n.kids) == 0 && p.take(",")
		if !single && !p.take(":") {
			return nil, fmt.Errorf("%.40q: want :", p.rest)
		}
		v, err := p.value(depth + 1)
		if err == nil {
			key, err = unify(key, k.pattern)
		}
		if err == nil {
			value, err = unify(value, v.pattern)
		}
		if err != nil {
			return nil, err
		}
		entry := &node{kids: []*node{k, v}}
		if single {
			entry.pattern = "{" + key + value + "}"
			if !p.take("}") {
				err = fmt.Errorf("%.40q: want }", p.rest)
			}
			return entry, err
		}
		n.kids = append(n.kids, entry)
	}
	n.pattern = "a{" + key + value + "}"
	return n, nil
}

// quoted parses a text in quotes. Bytes may be written as \ooo, characters of a string as \uXXXX.
func (p *textParser) quoted(bytes bool) (string, error) {
	quote := p.rest[0]
	var out []byte
	for k := 1; k < len(p.rest); k++ {
		c := p.rest[k]
		switch {
		case c == quote:
			p.rest = p.rest[k+1:]
			return string(out), nil
		case c != '\\':
			out = append(out, c)
			continue
		}
		k++
		if k == len(p.rest) {
			break
		}
		digits, base := 0, 16
		switch c := p.rest[k]; {
		case strings.IndexByte("abfnrtv", c) >= 0:
			out = append(out, "\a\b\f\n\r\t\v"[strings.IndexByte("abfnrtv", c)])
			continue
		case bytes && c >= '0' && c <= '7':
			for digits < 3 && k+digits < len(p.rest) && p.rest[k+digits] >= '0' && p.rest[k+digits] <= '7' {
				digits++
			}
			k, base = k-1, 8
		case !bytes && c == 'u':
			digits = 4
		case !bytes && c == 'U':
			digits = 8
		default:
			out = append(out, c)
			continue
		}
		if k+digits >= len(p.rest) {
			break
		}
		r, err := strconv.ParseUint(p.rest[k+1:k+1+digits], base, 32)
		if err != nil || bytes && r > 255 || !bytes && !utf8.ValidRune(rune(r)) {
			return "", fmt.Errorf("%.40q: not a character", p.rest[k-1:])
		}
		k += digits
		if bytes {
			out = append(out, byte(r))
		} else {
			out = utf8.AppendRune(out, rune(r))
		}
	}
	return "", fmt.Errorf("%.40q: no quote at its end", p.rest)
}

// unify returns the pattern of what fits both.
func unify(a, b string) (string, error) {
	var out strings.Builder
	x, y := a, b
	for x != "" && y != "" {
		var c byte
		switch {
		case x[0] == '*':
			n := complete(y)
			out.WriteString(y[:n])
			x, y = x[1:], y[n:]
			continue
		case y[0] == '*':
			n := complete(x)
			out.WriteString(x[:n])
			x, y = x[n:], y[1:]
			continue
		case x[0] == y[0], y[0] == 'N' && strings.IndexByte("ynqiuxthd", x[0]) >= 0, y[0] == 'S' && strings.IndexByte("sog", x[0]) >= 0:
			c = x[0]
		case x[0] == 'N' && strings.IndexByte("ynqiuxthd", y[0]) >= 0, x[0] == 'S' && strings.IndexByte("sog", y[0]) >= 0:
			c = y[0]
		default:
			return "", fmt.Errorf("a value of type %s where one of type %s is expected", b, a)
		}
		out.WriteByte(c)
		x, y = x[1:], y[1:]
	}
	if x != "" || y != "" {
		return "", fmt.Errorf("a value of type %s where one of type %s is expected", b, a)
	}
	return out.String(), nil
}

// complete returns the length of the first complete pattern.
func complete(s string) int {
	n := 0
	for n < len(s) && (s[n] == 'a' || s[n] == 'm') {
		n++
	}
	for open := 0; n < len(s); n++ {
		switch s[n] {
		case '(', '{':
			open++
		case ')', '}':
			open--
		}
		if open <= 0 {
			return n + 1
		}
	}
	return len(s)
}

// settle makes a type of a pattern.
func settle(pattern string) (string, error) {
	typ := strings.NewReplacer("N", "i", "S", "s").Replace(pattern)
	if strings.Contains(typ, "*") {
		return "", errors.New("nothing tells the type of what is empty: write it, @a{sv} {} for example")
	}
	_, err := parse(typ)
	return typ, err
}

// make returns what Encode takes for a value of this type.
func (n *node) make(typ string) (any, error) {
	switch typ[0] {
	case 'b':
		return n.text == "true", nil
	case 's', 'o', 'g':
		return n.text, nil
	case 'd':
		return strconv.ParseFloat(n.text, 64)
	case 'v':
		inner, err := settle(n.kids[0].pattern)
		if err != nil {
			return nil, err
		}
		made, err := n.kids[0].make(inner)
		if err != nil {
			return nil, err
		}
		return Encode(inner, made)
	case 'a', 'm':
		if typ == "ay" && n.kids == nil {
			return []byte(n.text), nil
		}
		list := List{}
		for _, kid := range n.kids {
			made, err := kid.make(typ[1:])
			if err != nil {
				return nil, err
			}
			list = append(list, made)
		}
		return list, nil
	case '(', '{':
		tuple, rest := Tuple{}, typ[1:len(typ)-1]
		for _, kid := range n.kids {
			k := complete(rest)
			made, err := kid.make(rest[:k])
			if err != nil {
				return nil, err
			}
			tuple, rest = append(tuple, made), rest[k:]
		}
		return tuple, nil
	}
	return number(n.text, typ[0])
}

// number reads an integer.
func number(text string, typ byte) (any, error) {
	bits := map[byte]int{'y': 8, 'n': 16, 'q': 16, 'i': 32, 'h': 32, 'u': 32, 'x': 64, 't': 64}[typ]
	if strings.IndexByte("yqut", typ) < 0 {
		n, err := strconv.ParseInt(text, 0, bits)
		return map[byte]any{'n': int16(n), 'i': int32(n), 'h': int32(n), 'x': n}[typ], err
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(text, "+"), 0, bits)
	return map[byte]any{'y': byte(n), 'q': uint16(n), 'u': uint32(n), 't': n}[typ], err
}
