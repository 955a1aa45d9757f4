package oci

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

const (
	xattrPrefix  = "SCHILY.xattr."
	maxXattr     = 64 << 10 // bytes, of a value
	maxXattrName = 255
)

// extended is what the extended headers before an entry say: PAX records, and long names of GNU.
type extended struct {
	hasName, hasLink, hasMtime bool
	name, link                 string
	numbers                    map[string]int64 // uid, gid, size
	mtime                      fstree.Time
	xattrs                     []fstree.Xattr

	gnuSparse map[string]string
	sparseMap []extent // of version 0.0, which says every extent in records of its own
	offset    string   // of an extent whose length has not come yet
}

// add takes one extended header.
func (x *extended) add(kind byte, data []byte) error {
	switch kind {
	case typePAXGlobal:
		// What they say of all files, the version of a git archive for one, no other reader of layers takes for granted.
		return eachRecord(data, func(string, string) error { return nil })
	case typeGNUName, typeGNULink:
		text, _, _ := bytes.Cut(data, []byte{0})
		if kind == typeGNUName {
			x.name, x.hasName = string(text), true
		} else {
			x.link, x.hasLink = string(text), true
		}
		return nil
	}
	return eachRecord(data, x.record)
}

// eachRecord calls f for records "LENGTH KEY=VALUE\n", where the length is that of the whole record.
func eachRecord(data []byte, f func(key, value string) error) error {
	for len(data) > 0 {
		digits, _, ok := bytes.Cut(data[:min(len(data), 20)], []byte(" "))
		n, err := strconv.ParseUint(string(digits), 10, 31)
		if !ok || err != nil || int(n) > len(data) || int(n) < len(digits)+2 || data[n-1] != '\n' {
			return fmt.Errorf("PAX record %.40q: wrong length", data)
		}
		key, value, ok := strings.Cut(string(data[len(digits)+1:n-1]), "=")
		if !ok || key == "" {
			return fmt.Errorf("PAX record %.40q: no key", data)
		}
		if err := f(key, value); err != nil {
			return fmt.Errorf("PAX record %.40q: %w", key, err)
		}
		data = data[n:]
	}
	return nil
}

// record takes one PAX record. An empty value takes back what an earlier header has said.
func (x *extended) record(key, value string) (err error) {
	if name, ok := strings.CutPrefix(key, xattrPrefix); ok {
		return x.xattr(name, value)
	}
	switch key {
	case "path", "linkpath", "mtime", "uid", "gid", "size":
		if strings.ContainsRune(value, 0) {
			return errors.New("a NUL in the value")
		}
	}
	switch key {
	case "path":
		x.name, x.hasName = value, value != ""
	case "linkpath":
		x.link, x.hasLink = value, value != ""
	case "mtime":
		x.hasMtime = value != ""
		if x.hasMtime {
			x.mtime, err = parseTime(value)
		}
	case "uid", "gid", "size":
		if x.numbers == nil {
			x.numbers = map[string]int64{}
		}
		delete(x.numbers, key)
		if value != "" {
			x.numbers[key], err = strconv.ParseInt(value, 10, 64)
		}
	default:
		if name, ok := strings.CutPrefix(key, "GNU.sparse."); ok {
			return x.sparseRecord(name, value)
		}
	}
	return err
}

func (x *extended) xattr(name, value string) error {
	if name == "" || len(name) > maxXattrName || strings.ContainsRune(name, 0) {
		return fmt.Errorf("an extended attribute's name of %d bytes, or with a NUL: at most %d are possible", len(name), maxXattrName)
	}
	if len(value) > maxXattr {
		return fmt.Errorf("an extended attribute of %d bytes: at most %d are possible", len(value), maxXattr)
	}
	k, ok := slices.BinarySearchFunc(x.xattrs, name, func(a fstree.Xattr, n string) int { return strings.Compare(a.Name, n) })
	if ok {
		x.xattrs[k].Value = []byte(value) // the last one counts
		return nil
	}
	x.xattrs = slices.Insert(x.xattrs, k, fstree.Xattr{Name: name, Value: []byte(value)})
	return nil
}

// parseTime reads seconds with a decimal fraction, of which nine digits count.
func parseTime(s string) (fstree.Time, error) {
	whole, fraction, _ := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err != nil {
		return fstree.Time{}, err
	}
	digits := (fraction + "000000000")[:9]
	nsec, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || strings.Trim(fraction, "0123456789") != "" {
		return fstree.Time{}, fmt.Errorf("%q is not a time", s)
	}
	if strings.HasPrefix(whole, "-") && nsec > 0 { // -1.5 is half a second after -2
		sec, nsec = sec-1, 1e9-nsec
	}
	return fstree.Time{Sec: sec, Nsec: uint32(nsec)}, nil
}
