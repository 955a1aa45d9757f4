package gvariant

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"unicode/utf8"
)

// Tuple has the members of a tuple or a dict entry, for Encode.
type Tuple []any

// List has the elements of an array, or of a maybe none or one, for Encode.
type List []any

// Dict has the entries of an a{sv}, for Encode, which writes them sorted by key. An order of its own has a List of Tuples.
type Dict map[string]Value

// Encode makes a value of this type, in its normal form, out of
//
//	b               bool
//	y               byte
//	n q i u x t d h int16, uint16, int32, uint32, int64, uint64, float64, int32
//	s o g           string
//	v               Value
//	ay, as          []byte, []string
//	a{sv}           Dict
//	aT mT           List
//	(T...) {KT}     Tuple
//	any type        Value of that type, which must be normal and is not checked
//
// The error tells of another Go type, or of a string that is not UTF-8 or has a NUL in it.
func Encode(typ string, value any) (Value, error) {
	l, err := named(typ)
	if err != nil {
		return Value{}, err
	}
	b, err := encode(nil, l, value)
	if err != nil {
		return Value{}, err
	}
	return view(l, b, 0)
}

// encode appends a value. Where b ends, the value is aligned relative to the beginning of b, as every container is.
func encode(b []byte, l *layout, value any) ([]byte, error) {
	b = align(b, l.align)
	wrong := fmt.Errorf("gvariant: a value of type %s cannot be made of a %T", l.text, value)
	le := binary.LittleEndian
	kind := l.kind()
	is := func(kinds string) bool { return strings.IndexByte(kinds, kind) >= 0 }
	switch x := value.(type) {
	case Value:
		if kind == 'v' && x.kind() != 0 {
			b = append(b, x.data...)
			return append(append(b, 0), x.l.text...), nil
		}
		if x.Type() == l.text {
			return append(b, x.data...), nil
		}
	case bool:
		if is("b") {
			if x {
				return append(b, 1), nil
			}
			return append(b, 0), nil
		}
	case byte:
		if is("y") {
			return append(b, x), nil
		}
	case int16:
		if is("n") {
			return le.AppendUint16(b, uint16(x)), nil
		}
	case uint16:
		if is("q") {
			return le.AppendUint16(b, x), nil
		}
	case int32:
		if is("ih") {
			return le.AppendUint32(b, uint32(x)), nil
		}
	case uint32:
		if is("u") {
			return le.AppendUint32(b, x), nil
		}
	case int64:
		if is("x") {
			return le.AppendUint64(b, uint64(x)), nil
		}
	case uint64:
		if is("t") {
			return le.AppendUint64(b, x), nil
		}
	case float64:
		if is("d") {
			return le.AppendUint64(b, math.Float64bits(x)), nil
		}
	case string:
		if is("sog") {
			if !utf8.ValidString(x) || strings.IndexByte(x, 0) >= 0 {
				return nil, fmt.Errorf("gvariant: string %.60q: not UTF-8 without NUL", x)
			}
			return append(append(b, x...), 0), nil
		}
	case []byte:
		if l.text == "ay" {
			return append(b, x...), nil
		}
	case []string:
		if l.text == "as" {
			list := make(List, len(x))
			for i, s := range x {
				list[i] = s
			}
			return encodeArray(b, l.kids[0], list)
		}
	case Dict:
		if l.text == "a{sv}" {
			list := make(List, 0, len(x))
			for _, key := range slices.Sorted(maps.Keys(x)) {
				list = append(list, Tuple{key, x[key]})
			}
			return encodeArray(b, l.kids[0], list)
		}
	case List:
		if is("a") {
			return encodeArray(b, l.kids[0], x)
		}
		if is("m") && len(x) <= 1 {
			return encodeMaybe(b, l.kids[0], x)
		}
	case Tuple:
		if is("({") {
			return encodeTuple(b, l, x)
		}
	}
	return nil, wrong
}

func align(b []byte, to int) []byte {
	for len(b)%to != 0 {
		b = append(b, 0)
	}
	return b
}

func encodeArray(b []byte, kid *layout, list List) ([]byte, error) {
	start := len(b)
	var ends []int
	for _, x := range list {
		var err error
		if b, err = encode(b, kid, x); err != nil {
			return nil, err
		}
		ends = append(ends, len(b)-start)
	}
	if kid.size > 0 {
		return b, nil
	}
	return frame(b, start, ends), nil
}

func encodeMaybe(b []byte, kid *layout, list List) ([]byte, error) {
	if len(list) == 0 {
		return b, nil
	}
	b, err := encode(b, kid, list[0])
	if err == nil && kid.size == 0 {
		b = append(b, 0)
	}
	return b, err
}

func encodeTuple(b []byte, l *layout, t Tuple) ([]byte, error) {
	if len(t) != len(l.kids) {
		return nil, fmt.Errorf("gvariant: %s of %d members, want %d", l.text, len(t), len(l.kids))
	}
	start := len(b)
	var ends []int
	for i, kid := range l.kids {
		var err error
		if b, err = encode(b, kid, t[i]); err != nil {
			return nil, err
		}
		if kid.size == 0 && i < len(l.kids)-1 {
			ends = append(ends, len(b)-start)
		}
	}
	if l.size > 0 {
		return append(b, make([]byte, l.size-(len(b)-start))...), nil
	}
	slices.Reverse(ends)
	return frame(b, start, ends), nil
}

// frame appends the framing offsets of a container that begins at start.
func frame(b []byte, start int, ends []int) []byte {
	size, width := len(b)-start, 1
	for width < 8 && offsetSize(size+len(ends)*width) > width {
		width *= 2
	}
	for _, end := range ends {
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], uint64(end))
		b = append(b, word[:width]...)
	}
	return b
}
