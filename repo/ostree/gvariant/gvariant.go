// Package gvariant reads and writes serialised GVariant values, the format of OSTree's metadata.
//
// The bytes of a value do not tell its type: that is a string beside it.
//
//	b y n q i u x t d h   boolean, byte, integers of 2, 4, 8 bytes, double, handle; little endian, aligned to their size
//	s o g                 UTF-8 and a NUL
//	v                     a value, a NUL, its type; aligned to 8
//	aT                    an array; elements of fixed size follow each other
//	mT                    nothing, or a T; behind one of variable size stands a zero byte
//	(T...) {KT}           a tuple, a dict entry: the members, each aligned
//
// A container whose children differ in size ends with framing offsets: where the children end, from the container's beginning. An
// array has one for each element; a tuple for each member of variable size but its last, in reverse order. They are of 1, 2, 4 or 8
// bytes, the smallest that can tell the size of the whole container. A tuple of fixed size ends with padding to its alignment; the
// empty one is a zero byte.
//
// Of all the bytes that could be understood as a value only one form is normal: padding is zero, sizes are minimal, booleans are 0 or
// 1, strings are valid, children follow each other without gaps. GLib reads what is not normal as default values, an empty array or
// string. That would be another value for other readers, so it is an error here: where it is read, as to offsets, sizes and
// strings; [Value.Check] looks at everything, padding included. Paths (o) and signatures (g) are taken as strings. (GLib takes a
// tuple of no bytes for normal if its members can be empty, and never writes one; here it is an error if it lacks offsets.)
//
// Nothing is copied and nothing grows with what a value claims: its parts are looked up when asked for. Types are at most 255
// characters long; containers and variants are at most 64 deep in one another.
//
// The format is defined by "GVariant Specification" (Ryan Lortie) and by GLib's gvariant-serialiser.c.
package gvariant

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"
)

// ErrNotNormal tells of bytes that are not the normal form of a value of their type.
var ErrNotNormal = errors.New("not in normal form")

// Value is a typed view of bytes. The zero Value is of no type, and every method that can fail does.
type Value struct {
	l     *layout
	data  []byte
	depth int // of variants and containers around it
}

// New returns the value of this type that the bytes are. They are kept, and must not change. The type is one that the program
// names, not one that comes with the data.
func New(typ string, data []byte) (Value, error) {
	l, err := named(typ)
	if err != nil {
		return Value{}, err
	}
	return view(l, data, 0)
}

func view(l *layout, data []byte, depth int) (Value, error) {
	if depth+l.depth > maxDepth {
		return Value{}, fmt.Errorf("gvariant: more than %d containers in one another", maxDepth)
	}
	if l.size > 0 && len(data) != l.size {
		return Value{}, fmt.Errorf("gvariant: %s of %d bytes, want %d: %w", l.text, len(data), l.size, ErrNotNormal)
	}
	return Value{l, data, depth}, nil
}

// Type returns the type of the value.
func (v Value) Type() string {
	if v.l == nil {
		return ""
	}
	return v.l.text
}

// Bytes returns the serialised value; that of an ay is the bytes themselves.
func (v Value) Bytes() []byte { return v.data }

func (v Value) fail(format string, args ...any) error {
	return fmt.Errorf("gvariant: %s of %d bytes: %s: %w", v.Type(), len(v.data), fmt.Sprintf(format, args...), ErrNotNormal)
}

func (v Value) want(types string) error {
	return fmt.Errorf("gvariant: a value of type %q where %s is expected", v.Type(), types)
}

// kind returns the first character of the type.
func (v Value) kind() byte {
	if v.l == nil {
		return 0
	}
	return v.l.kind()
}

// offsetSize returns the size of framing offsets in a container of n bytes.
func offsetSize(n int) int {
	switch {
	case n <= math.MaxUint8:
		return 1
	case n <= math.MaxUint16:
		return 2
	case n <= math.MaxUint32:
		return 4
	}
	return 8
}

// offset reads the framing offset at a place. It is at most the size of the value.
func (v Value) offset(at int) (int, error) {
	var b [8]byte
	copy(b[:], v.data[at:at+offsetSize(len(v.data))])
	n := binary.LittleEndian.Uint64(b[:])
	if n > uint64(len(v.data)) {
		return 0, v.fail("the framing offset %d is out of range", n)
	}
	return int(n), nil
}

// Len returns how many children an array, tuple, dict entry, maybe or variant has.
func (v Value) Len() (int, error) {
	switch v.kind() {
	case 'a':
		_, n, err := v.elements()
		return n, err
	case 'm':
		return min(1, len(v.data)), nil
	case '(', '{':
		return len(v.l.kids), nil
	case 'v':
		return 1, nil
	}
	return 0, v.want("a container")
}

// elements returns where the elements of an array end and how many there are.
func (v Value) elements() (end, n int, err error) {
	size := len(v.data)
	if fixed := v.l.kids[0].size; fixed > 0 {
		if size%fixed != 0 {
			return 0, 0, v.fail("no whole number of elements of %d bytes", fixed)
		}
		return size, size / fixed, nil
	}
	if size == 0 {
		return 0, 0, nil
	}
	width := offsetSize(size)
	if end, err = v.offset(size - width); err != nil {
		return 0, 0, err
	}
	if n = (size - end) / width; n == 0 || (size-end)%width != 0 {
		return 0, 0, v.fail("no whole number of framing offsets from %d", end)
	}
	if width > 1 && offsetSize(end+n*(width/2)) < width {
		return 0, 0, v.fail("framing offsets of %d bytes are too large", width)
	}
	return end, n, nil
}

// At returns child i, from 0.
func (v Value) At(i int) (Value, error) {
	n, err := v.Len()
	if err != nil {
		return Value{}, err
	}
	if i < 0 || i >= n {
		return Value{}, fmt.Errorf("gvariant: %s: child %d of %d", v.Type(), i, n)
	}
	switch v.kind() {
	case 'a':
		return v.element(i)
	case 'm':
		return v.just()
	case 'v':
		return v.content()
	}
	start, end, err := v.member(i)
	if err != nil {
		return Value{}, err
	}
	return view(v.l.kids[i], v.data[start:end], v.depth+1)
}

func (v Value) element(i int) (Value, error) {
	kid := v.l.kids[0]
	if kid.size > 0 {
		return view(kid, v.data[i*kid.size:(i+1)*kid.size], v.depth+1)
	}
	last, _, err := v.elements()
	if err != nil {
		return Value{}, err
	}
	width := offsetSize(len(v.data))
	start := 0
	if i > 0 {
		if start, err = v.offset(last + (i-1)*width); err != nil {
			return Value{}, err
		}
	}
	end, err := v.offset(last + i*width)
	if err != nil {
		return Value{}, err
	}
	if start = pad(start, kid.align); start > end || end > last {
		return Value{}, v.fail("element %d from %d to %d", i, start, end)
	}
	return view(kid, v.data[start:end], v.depth+1)
}

func (v Value) just() (Value, error) {
	data := v.data
	if v.l.kids[0].size == 0 {
		if data[len(data)-1] != 0 {
			return Value{}, v.fail("no zero at the end")
		}
		data = data[:len(data)-1]
	}
	return view(v.l.kids[0], data, v.depth+1)
}

func (v Value) content() (Value, error) {
	at := bytes.LastIndexByte(v.data, 0)
	if at < 0 {
		return Value{}, v.fail("no type")
	}
	l, err := parse(string(v.data[at+1:]))
	if err != nil {
		return Value{}, err
	}
	return view(l, v.data[:at], v.depth+1)
}

// member returns where member i of a tuple starts and ends.
func (v Value) member(i int) (start, end int, err error) {
	if v.l.size > 0 {
		for _, kid := range v.l.kids[:i+1] {
			start = pad(end, kid.align)
			end = start + kid.size
		}
		return start, end, nil
	}
	width := offsetSize(len(v.data))
	last := len(v.data) - v.l.framed()*width
	if last < 0 {
		return 0, 0, v.fail("no room for %d framing offsets", v.l.framed())
	}
	frame := len(v.data)
	for k, kid := range v.l.kids[:i+1] {
		start = pad(end, kid.align)
		switch {
		case kid.size > 0:
			end = start + kid.size
		case k == len(v.l.kids)-1:
			end = last
		default:
			frame -= width
			if end, err = v.offset(frame); err != nil {
				return 0, 0, err
			}
		}
		if start > end || end > last || k == len(v.l.kids)-1 && end != last {
			return 0, 0, v.fail("member %d from %d to %d", k, start, end)
		}
	}
	return start, end, nil
}

// Lookup returns the value of a key of a dictionary with keys of type s; that of an a{sv} without the variant around it. The first
// entry counts.
func (v Value) Lookup(key string) (Value, bool, error) {
	if v.l == nil || len(v.l.text) < 4 || v.l.text[:3] != "a{s" {
		return Value{}, false, v.want("a dictionary of strings")
	}
	n, err := v.Len()
	if err != nil {
		return Value{}, false, err
	}
	for i := range n {
		k, value, err := v.Entry(i)
		if err != nil {
			return Value{}, false, err
		}
		if k == key {
			return value, true, nil
		}
	}
	return Value{}, false, nil
}

// Entry returns entry i of a dictionary with keys of type s; the value of an a{sv} without the variant around it.
func (v Value) Entry(i int) (key string, value Value, err error) {
	e, err := v.At(i)
	if err != nil {
		return "", Value{}, err
	}
	k, err := e.At(0)
	if err != nil {
		return "", Value{}, err
	}
	if key, err = k.String(); err != nil {
		return "", Value{}, err
	}
	if value, err = e.At(1); err == nil && value.kind() == 'v' {
		value, err = value.At(0)
	}
	return key, value, err
}

// String returns a string, of type s, o or g.
func (v Value) String() (string, error) {
	if k := v.kind(); k != 's' && k != 'o' && k != 'g' {
		return "", v.want("a string")
	}
	n := len(v.data) - 1
	if n < 0 || bytes.IndexByte(v.data, 0) != n {
		return "", v.fail("no NUL at the end, or one before it")
	}
	if !utf8.Valid(v.data[:n]) {
		return "", v.fail("not UTF-8")
	}
	return string(v.data[:n]), nil
}

// ByteString returns an ay that ends with a NUL and has no other one, without it.
func (v Value) ByteString() ([]byte, error) {
	if v.Type() != "ay" {
		return nil, v.want("a byte string")
	}
	n := len(v.data) - 1
	if n < 0 || bytes.IndexByte(v.data, 0) != n {
		return nil, v.fail("no NUL at the end, or one before it")
	}
	return v.data[:n], nil
}

// number returns the bytes of a value of one of the basic types.
func (v Value) number(kinds string) ([]byte, error) {
	for _, k := range []byte(kinds) {
		if v.kind() == k {
			return v.data, nil
		}
	}
	return nil, v.want(kinds)
}

// Bool returns a boolean.
func (v Value) Bool() (bool, error) {
	b, err := v.number("b")
	if err != nil {
		return false, err
	}
	if b[0] > 1 {
		return false, v.fail("a boolean that is %d", b[0])
	}
	return b[0] == 1, nil
}

// Byte returns a byte, of type y.
func (v Value) Byte() (byte, error) {
	b, err := v.number("y")
	if err != nil {
		return 0, err
	}
	return b[0], nil
}

// Int16 returns a number of type n.
func (v Value) Int16() (int16, error) {
	b, err := v.number("n")
	if err != nil {
		return 0, err
	}
	return int16(binary.LittleEndian.Uint16(b)), nil
}

// Uint16 returns a number of type q.
func (v Value) Uint16() (uint16, error) {
	b, err := v.number("q")
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint16(b), nil
}

// Int32 returns a number of type i or a handle, of type h.
func (v Value) Int32() (int32, error) {
	b, err := v.number("ih")
	if err != nil {
		return 0, err
	}
	return int32(binary.LittleEndian.Uint32(b)), nil
}

// Uint32 returns a number of type u.
func (v Value) Uint32() (uint32, error) {
	b, err := v.number("u")
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b), nil
}

// Int64 returns a number of type x.
func (v Value) Int64() (int64, error) {
	b, err := v.number("x")
	if err != nil {
		return 0, err
	}
	return int64(binary.LittleEndian.Uint64(b)), nil
}

// Uint64 returns a number of type t.
func (v Value) Uint64() (uint64, error) {
	b, err := v.number("t")
	if err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(b), nil
}

// Double returns a number of type d.
func (v Value) Double() (float64, error) {
	b, err := v.number("d")
	if err != nil {
		return 0, err
	}
	return math.Float64frombits(binary.LittleEndian.Uint64(b)), nil
}

// BigUint32 returns a number of type u that is stored big endian, against the format, as OSTree does.
func (v Value) BigUint32() (uint32, error) {
	b, err := v.number("u")
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b), nil
}

// BigUint64 returns a number of type t that is stored big endian, against the format, as OSTree does.
func (v Value) BigUint64() (uint64, error) {
	b, err := v.number("t")
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}
