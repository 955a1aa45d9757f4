// Package bls reads, writes and sorts boot loader entries as the UAPI Boot Loader Specification defines them.
//
// A type 1 entry is a file loader/entries/NAME.conf with a key and a value in each line. A type 2 entry is a unified kernel
// image EFI/Linux/NAME.efi. Either name may count boots: NAME+LEFT-DONE.conf has LEFT tries left, and DONE have been made.
//
// Entries that others made are none of our business: what is not understood is kept as it was, byte for byte, and what
// cannot be read is listed and left alone.
package bls

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Limits of an entry.
const (
	maxEntry = 1 << 20 // bytes
	maxLine  = 1 << 18 // bytes
)

// Entry is a type 1 entry.
type Entry struct {
	lines []line
}

// line is a line of an entry. Text is how it was read; key is "" for comments and empty lines.
type line struct {
	text, key, value string
}

// Parse reads the content of a type 1 entry. The error names the line.
func Parse(b []byte) (*Entry, error) {
	if len(b) > maxEntry {
		return nil, fmt.Errorf("%d bytes, at most %d are read", len(b), maxEntry)
	}
	e := &Entry{}
	text := string(b)
	for number := 1; text != ""; number++ {
		var l line
		l.text, text, _ = strings.Cut(text, "\n")
		if len(l.text) > maxLine {
			return nil, fmt.Errorf("line %d: %d bytes, at most %d are read", number, len(l.text), maxLine)
		}
		if strings.IndexByte(l.text, 0) >= 0 {
			return nil, fmt.Errorf("line %d: a NUL byte", number)
		}
		trimmed := strings.TrimSpace(l.text)
		if trimmed != "" && trimmed[0] != '#' {
			end := strings.IndexAny(trimmed, " \t")
			if end < 0 {
				l.key = trimmed // a key without a value
			} else {
				l.key, l.value = trimmed[:end], strings.TrimSpace(trimmed[end:])
			}
		}
		e.lines = append(e.lines, l)
	}
	return e, nil
}

// Get returns the value of a key, "" if it is not there. Of several the last one counts, as for systemd-boot.
func (e *Entry) Get(key string) string {
	value := ""
	for _, l := range e.lines {
		if l.key == key {
			value = l.value
		}
	}
	return value
}

// All returns all values of a key: options and initrd may be given several times.
func (e *Entry) All(key string) []string {
	var values []string
	for _, l := range e.lines {
		if l.key == key {
			values = append(values, l.value)
		}
	}
	return values
}

// Options returns the kernel command line: all options joined by blanks.
func (e *Entry) Options() string { return strings.Join(e.All("options"), " ") }

// Set gives a key this value alone, where the key is, or at the end.
func (e *Entry) Set(key, value string) error { return e.SetAll(key, []string{value}) }

// SetAll gives a key these values; none removes it.
func (e *Entry) SetAll(key string, values []string) error {
	if key == "" || strings.ContainsAny(key, " \t\r\n\x00#") {
		return fmt.Errorf("key %q: not a word", key)
	}
	for _, v := range values {
		if strings.ContainsAny(v, "\r\n\x00") || strings.TrimSpace(v) != v || v == "" {
			return fmt.Errorf("%s %.80q: not a value for one line", key, v)
		}
	}
	var lines, fresh []line
	for _, v := range values {
		fresh = append(fresh, line{key + " " + v, key, v})
	}
	for _, l := range e.lines {
		if l.key != key {
			lines = append(lines, l)
			continue
		}
		lines = append(lines, fresh...)
		fresh = nil
	}
	e.lines = append(lines, fresh...)
	return nil
}

// Bytes returns the entry as a file: what was not set is as it was read.
func (e *Entry) Bytes() []byte {
	var b strings.Builder
	for _, l := range e.lines {
		b.WriteString(l.text)
		b.WriteByte('\n')
	}
	return []byte(b.String())
}

// Name is the name of an entry's file, taken apart.
type Name struct {
	ID      string // without counters and extension
	Ext     string // ".conf" or ".efi"
	Counted bool
	Left    uint // tries left, if counted
	Done    uint // tries made, if counted
}

// maxTries limits the counters of a name.
const maxTries = 1 << 20

// ErrNotEntry tells that a file is not a boot entry by its name.
var ErrNotEntry = errors.New("not the name of a boot entry: want .conf or .efi")

// ParseName takes the name of a file in loader/entries or EFI/Linux apart. Counters that are malformed belong to the ID, as
// for systemd-boot.
func ParseName(file string) (Name, error) {
	n := Name{}
	for _, ext := range []string{".conf", ".efi"} {
		if len(file) > len(ext) && strings.EqualFold(file[len(file)-len(ext):], ext) {
			n.ID, n.Ext = file[:len(file)-len(ext)], file[len(file)-len(ext):]
		}
	}
	if n.Ext == "" || strings.ContainsAny(file, "/\x00") {
		return n, fmt.Errorf("%.80q: %w", file, ErrNotEntry)
	}
	plus := strings.LastIndexByte(n.ID, '+')
	if plus < 1 {
		return n, nil
	}
	left, done, both := strings.Cut(n.ID[plus+1:], "-")
	l, err := parseTries(left)
	if err != nil {
		return n, nil
	}
	var d uint
	if both {
		if d, err = parseTries(done); err != nil {
			return n, nil
		}
	}
	n.ID, n.Counted, n.Left, n.Done = n.ID[:plus], true, l, d
	return n, nil
}

func parseTries(s string) (uint, error) {
	if s == "" || s[0] == '+' || s[0] == '-' {
		return 0, errors.New("not a number")
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > maxTries {
		return 0, errors.New("not a number of tries")
	}
	return uint(n), nil
}

// String returns the name of the file.
func (n Name) String() string {
	if !n.Counted {
		return n.ID + n.Ext
	}
	if n.Done == 0 {
		return fmt.Sprintf("%s+%d%s", n.ID, n.Left, n.Ext)
	}
	return fmt.Sprintf("%s+%d-%d%s", n.ID, n.Left, n.Done, n.Ext)
}

// Bad reports whether the entry has been tried as often as it may, and never was marked good.
func (n Name) Bad() bool { return n.Counted && n.Left == 0 }
