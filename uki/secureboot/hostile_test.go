package secureboot

import (
	"bytes"
	"encoding/binary"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func with32(b []byte, off int, v uint32) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint32(b[off:], v)
	return b
}

// hostileLists are databases that are refused, by their defect, with the beginning of the error.
func hostileLists() map[string][]byte {
	hashes := Database{HashEntry(owner, [32]byte{1}), HashEntry(owner, [32]byte{2})}.Bytes()
	odd := Database{{Type(owner), owner, []byte("12345")}}.Bytes()
	return map[string][]byte{
		"head-cut":              hashes[:27],
		"list-cut":              hashes[:len(hashes)-1],
		"second-cut":            append(bytes.Clone(hashes), 1, 2, 3),
		"list-size-zero":        with32(hashes, 16, 0),
		"list-size-of-head":     with32(hashes, 16, 27),
		"list-size-huge":        with32(hashes, 16, 0xffffffff),
		"list-size-no-multiple": with32(append(bytes.Clone(hashes), 0), 16, uint32(len(hashes)+1)),
		"header":                with32(hashes, 20, 4),
		"header-huge":           with32(hashes, 20, 0xfffffff0),
		"entry-size-zero":       with32(hashes, 24, 0),
		"entry-size-zero-odd":   with32(odd, 24, 0),
		"entry-size-of-owner":   with32(odd, 24, 16),
		"entry-size-other":      with32(hashes, 24, 96),
		"entry-size-huge":       with32(hashes, 24, 0xffffffff),
		"too-large":             make([]byte, MaxDatabase+1),
	}
}

func TestHostileLists(t *testing.T) {
	for name, b := range hostileLists() {
		if d, err := ParseDatabase(b); err == nil {
			t.Errorf("%s: it is %d entries", name, len(d))
		}
	}
	second := append(Database{HashEntry(owner, [32]byte{1})}.Bytes(), 0)
	if _, err := ParseDatabase(second); err == nil || !strings.Contains(err.Error(), "offset 76:") {
		t.Errorf("the error does not name the offset: %v", err)
	}
	// A list without entries is one, and entries of unknown types are kept.
	empty := with32(Database{HashEntry(owner, [32]byte{1})}.Bytes()[:listHead], 16, listHead)
	odd := Database{{Type(owner), owner, []byte("12345")}, {Type(owner), owner, []byte("54321")}, {Type(owner), owner, []byte("1")}}
	d, err := ParseDatabase(append(empty, odd.Bytes()...))
	if err != nil || len(d) != 3 || !slices.EqualFunc(d, odd, Entry.same) {
		t.Errorf("%v, %v", d, err)
	}
}

// hostileUpdates are updates that are refused, by their defect.
func hostileUpdates(update []byte) map[string][]byte {
	all := map[string][]byte{
		"signature-size-small": with32(update, 16, 23),
		"signature-size-zero":  with32(update, 16, 0),
		"signature-size-huge":  with32(update, 16, 0xffffffff),
		"signature-size-past":  with32(update, 16, uint32(len(update))),
		"signature-size-none":  with32(update, 16, 24),
		"signature-size-less":  with32(update, 16, binary.LittleEndian.Uint32(update[16:])-1),
		"revision":             with32(update, 20, 0x0ef10100),
		"type-pkcs":            with32(update, 20, 0x00020200),
		"certificate-type":     with32(update, 24, 0),
		"time-year-zero":       with32(update, 0, 0x01010000),
		"time-nanoseconds":     with32(update, 8, 1),
		"time-zone":            with32(update, 12, 60),
		"payload-cut":          update[:len(update)-1],
		"der-long-form":        with32(update, 40, 0xffff8430),
		"der-indefinite":       with32(update, 40, 0x02008030),
		"too-large":            append(bytes.Clone(update), make([]byte, MaxDatabase)...),
	}
	for _, n := range []int{0, 1, 16, 24, 39, 40, 41, 100, 500} {
		all["cut-"+strconv.Itoa(n)] = update[:n]
	}
	for name, lists := range hostileLists() {
		size := updateHead - timeSize - 24 + int(binary.LittleEndian.Uint32(update[16:]))
		all["lists-"+name] = append(bytes.Clone(update[:timeSize+size]), lists...)
	}
	return all
}

func TestHostileUpdates(t *testing.T) {
	d := newDir(t)
	update := contents(t, filepath.Join(d.Path, "db.auth"))
	if _, err := ParseUpdate(update); err != nil {
		t.Fatal(err)
	}
	for name, b := range hostileUpdates(update) {
		if u, err := ParseUpdate(b); err == nil {
			t.Errorf("%s: it is %+v", name, u)
		}
	}
}

// Each byte of an update is covered by the signature, or the update cannot be read without it.
func TestFlippedUpdates(t *testing.T) {
	d := newDir(t)
	update := contents(t, filepath.Join(d.Path, "db.auth"))
	size := timeSize + int(binary.LittleEndian.Uint32(update[timeSize:]))
	for at := range update {
		if at >= updateHead+60 && at < size-256 {
			continue // the certificate that comes with it, which is not what Verify believes
		}
		b := bytes.Clone(update)
		b[at] ^= 0x01
		u, err := ParseUpdate(b)
		if err == nil {
			err = u.Verify(DB, false, d.Certificates[KEK])
		}
		// Of the SignedData, versions and the list of hash functions are not looked at.
		if err == nil && (at < updateHead || at >= size-256) {
			t.Errorf("offset %d: a flipped bit is not found", at)
		}
	}
	u, err := ParseUpdate(update)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []Variable{PK, KEK, DBX, {"db", globalGUID}, {"dc", securityGUID}} {
		if u.Verify(v, false, d.Certificates[KEK]) == nil {
			t.Errorf("it is taken for one of %v", v)
		}
	}
	if u.Verify(DB, true, d.Certificates[KEK]) == nil || u.Verify(DB, false, d.Certificates[PK]) == nil {
		t.Error("it is taken for one that appends, or that PK signed")
	}
}

func TestTimes(t *testing.T) {
	d := newDir(t)
	key, err := d.open(DB)
	if err != nil {
		t.Fatal(err)
	}
	for _, year := range []int{1970, 1997, 2100, 9999} {
		if _, err := Sign(DB, false, time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC), nil, key, d.Certificates[DB]); err == nil {
			t.Errorf("year %d is signed", year)
		}
	}
	if _, err := Sign(DB, false, day, nil, key, d.Certificates[KEK]); err == nil {
		t.Error("signed with a certificate of another key")
	}
	if got, err := parseTime(putTime(day)); err != nil || !got.Equal(day) {
		t.Errorf("%v, %v", got, err)
	}
}

func FuzzDatabase(f *testing.F) {
	for _, b := range hostileLists() {
		if len(b) < 1000 {
			f.Add(b)
		}
	}
	f.Add(Database{HashEntry(owner, [32]byte{1}), {X509, owner, []byte("x")}, {Type(owner), owner, []byte("12345")}}.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDatabase(b)
		if err != nil {
			return
		}
		again, err := ParseDatabase(d.Bytes())
		if err != nil || !slices.EqualFunc(d, again, func(a, b Entry) bool { return a.same(b) && a.Owner == b.Owner }) {
			t.Errorf("%v is read again as %v, %v", d, again, err)
		}
		Trust(d, d)
	})
}

func FuzzUpdate(f *testing.F) {
	files, err := made()
	if err != nil {
		f.Fatal(err)
	}
	update := files[slices.IndexFunc(files, func(f File) bool { return f.Name == "db.auth" })].Data
	f.Add(update)
	hostile := hostileUpdates(update)
	for _, name := range slices.Sorted(maps.Keys(hostile)) {
		if len(hostile[name]) < 10_000 {
			f.Add(hostile[name])
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if u, err := ParseUpdate(b); err == nil {
			u.Covers()
		}
		parse(b, owner)
	})
}
