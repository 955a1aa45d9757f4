package gvariant

import (
	"errors"
	"fmt"
	"sync"
)

const (
	// maxType limits a type in characters, maxDepth how deep containers and variants are in one another, both in one type and
	// through variants in variants.
	maxType  = 255
	maxDepth = 64
)

// layout is a parsed type.
type layout struct {
	text  string
	align int       // in bytes: 1, 2, 4, 8
	size  int       // in bytes, 0 if values differ in size
	kids  []*layout // of an array or a maybe one, of a tuple or a dict entry its members
	depth int       // of containers
}

func (l *layout) kind() byte { return l.text[0] }

// basics has the types that have no members. A variant's content has a type of its own.
var basics = map[byte]*layout{
	'b': {text: "b", align: 1, size: 1},
	'y': {text: "y", align: 1, size: 1},
	'n': {text: "n", align: 2, size: 2},
	'q': {text: "q", align: 2, size: 2},
	'i': {text: "i", align: 4, size: 4},
	'u': {text: "u", align: 4, size: 4},
	'h': {text: "h", align: 4, size: 4},
	'x': {text: "x", align: 8, size: 8},
	't': {text: "t", align: 8, size: 8},
	'd': {text: "d", align: 8, size: 8},
	's': {text: "s", align: 1},
	'o': {text: "o", align: 1},
	'g': {text: "g", align: 1},
	'v': {text: "v", align: 8},
}

var bytesLayout = &layout{text: "ay", align: 1, kids: []*layout{basics['y']}, depth: 1}

// known has the types that the program itself has named. Those inside of variants are not kept: there is no end of them.
var known sync.Map // of string to *layout

// named parses a type that the program has named.
func named(text string) (*layout, error) {
	if l, ok := known.Load(text); ok {
		return l.(*layout), nil
	}
	l, err := parse(text)
	if err == nil {
		known.Store(text, l)
	}
	return l, err
}

// parse parses one complete type.
func parse(text string) (*layout, error) {
	if len(text) == 1 {
		if l := basics[text[0]]; l != nil {
			return l, nil
		}
	}
	if text == "ay" {
		return bytesLayout, nil
	}
	if len(text) > maxType {
		return nil, fmt.Errorf("gvariant: a type of %d characters: at most %d are possible", len(text), maxType)
	}
	l, rest, err := parseNext(text, 0)
	if err == nil && rest != "" {
		err = errors.New("more than one type")
	}
	if err != nil {
		return nil, fmt.Errorf("gvariant: type %q: %w", text, err)
	}
	return l, nil
}

// parseNext parses the type that the text begins with.
func parseNext(text string, depth int) (l *layout, rest string, err error) {
	if depth > maxDepth {
		return nil, "", fmt.Errorf("more than %d containers in one another", maxDepth)
	}
	if text == "" {
		return nil, "", errors.New("it ends too early")
	}
	switch c := text[0]; c {
	case 'a', 'm':
		kid, rest, err := parseNext(text[1:], depth+1)
		if err != nil {
			return nil, "", err
		}
		return &layout{text: text[:len(text)-len(rest)], align: kid.align, kids: []*layout{kid}, depth: kid.depth + 1}, rest, nil
	case '(', '{':
		end := byte(')')
		if c == '{' {
			end = '}'
		}
		l = &layout{align: 1}
		rest = text[1:]
		for rest != "" && rest[0] != end {
			var kid *layout
			if kid, rest, err = parseNext(rest, depth+1); err != nil {
				return nil, "", err
			}
			l.kids = append(l.kids, kid)
		}
		if rest == "" {
			return nil, "", fmt.Errorf("%q without its end", c)
		}
		rest = rest[1:]
		l.text = text[:len(text)-len(rest)]
		if c == '{' && (len(l.kids) != 2 || len(l.kids[0].kids) > 0 || l.kids[0].kind() == 'v' || l.kids[0].kind() == '(') {
			return nil, "", errors.New("a dict entry has a basic type and another one")
		}
		l.measure()
		return l, rest, nil
	default:
		if l := basics[c]; l != nil {
			return l, text[1:], nil
		}
		return nil, "", fmt.Errorf("no type is %q", c)
	}
}

// measure computes what the members of a tuple make of it.
func (l *layout) measure() {
	fixed := true
	for _, kid := range l.kids {
		l.align = max(l.align, kid.align)
		l.depth = max(l.depth, kid.depth)
		l.size = pad(l.size, kid.align) + kid.size
		fixed = fixed && kid.size > 0
	}
	l.depth++
	l.size = max(1, pad(l.size, l.align)) // the empty tuple is one byte
	if !fixed {
		l.size = 0
	}
}

// framed returns how many members of a tuple have a framing offset: all of variable size but the last.
func (l *layout) framed() int {
	n := 0
	for k, kid := range l.kids {
		if kid.size == 0 && k < len(l.kids)-1 {
			n++
		}
	}
	return n
}

func pad(n, align int) int { return (n + align - 1) &^ (align - 1) }
