package secureboot

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/composefs-boot/composefs-boot/uki"
)

// Type says what an entry of a database is.
type Type GUID

// Types that are understood; entries of others are kept as they are.
var (
	X509       = Type(mustGUID("a5c059a1-94e4-4aa7-87b5-ab155c2bf072")) // a certificate, DER
	SHA256     = Type(mustGUID("c1c41626-504c-4092-aca9-41f936934328")) // Authenticode hash of a file
	X509SHA256 = Type(mustGUID("3bd2a492-96c0-4079-b420-fcf98ef103ed")) // hash of a TBSCertificate, and since when it is revoked
	X509SHA384 = Type(mustGUID("7076876e-80c2-4ee6-aad2-28b349a6865b"))
	X509SHA512 = Type(mustGUID("446dbf63-2502-4cda-bcfa-2465d2b0fe9d"))
)

// String returns the name of the type, or the GUID of one that is not known.
func (t Type) String() string {
	switch t {
	case X509:
		return "x509"
	case SHA256:
		return "sha256"
	case X509SHA256:
		return "x509-sha256"
	case X509SHA384:
		return "x509-sha384"
	case X509SHA512:
		return "x509-sha512"
	}
	return GUID(t).String()
}

// MarshalText makes JSON of it.
func (t Type) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// size is how many bytes an entry has, 0 if that is not fixed.
func (t Type) size() int {
	switch t {
	case SHA256:
		return sha256.Size
	case X509SHA256:
		return sha256.Size + timeSize
	case X509SHA384:
		return 48 + timeSize
	case X509SHA512:
		return 64 + timeSize
	}
	return 0
}

// Entry is one certificate or hash.
type Entry struct {
	Type  Type
	Owner GUID // who put it there
	Data  []byte
}

// Database is what a variable has: certificates and hashes in the order of the file.
type Database []Entry

// CertificateEntry is a certificate, to be trusted or revoked.
func CertificateEntry(owner GUID, c *x509.Certificate) Entry { return Entry{X509, owner, c.Raw} }

// HashEntry is the hash of a file, as (*uki.PE).Authenticode returns it.
func HashEntry(owner GUID, hash [sha256.Size]byte) Entry { return Entry{SHA256, owner, hash[:]} }

// RevokedEntry is a certificate for dbx by its hash. Signatures with a time stamp before since are still good; the zero time
// is for none.
func RevokedEntry(owner GUID, c *x509.Certificate, since time.Time) Entry {
	hash := sha256.Sum256(c.RawTBSCertificate)
	return Entry{X509SHA256, owner, append(hash[:], putTime(since)...)}
}

// Certificate returns the certificate of an entry of type X509.
func (e Entry) Certificate() (*x509.Certificate, error) {
	if e.Type != X509 {
		return nil, fmt.Errorf("entry of type %v: no certificate", e.Type)
	}
	c, err := x509.ParseCertificate(e.Data)
	if err != nil {
		return nil, fmt.Errorf("certificate of owner %v: %w", e.Owner, err)
	}
	return c, nil
}

// Revoked returns the hash of an entry of type X509SHA256 and since when it is revoked; the zero time means always.
func (e Entry) Revoked() (tbs [sha256.Size]byte, since time.Time, err error) {
	if e.Type != X509SHA256 {
		return tbs, since, fmt.Errorf("entry of type %v: no hash of a certificate", e.Type)
	}
	copy(tbs[:], e.Data)
	since, err = parseTime(e.Data[sha256.Size:])
	return tbs, since, err
}

// same tells whether two entries mean the same, whoever put them there.
func (e Entry) same(other Entry) bool { return e.Type == other.Type && bytes.Equal(e.Data, other.Data) }

// Has tells whether there is such an entry, of any owner.
func (d Database) Has(e Entry) bool { return slices.ContainsFunc(d, e.same) }

// With returns the database with the entries that it has not yet.
func (d Database) With(entries ...Entry) Database {
	d = slices.Clone(d)
	for _, e := range entries {
		if !d.Has(e) {
			d = append(d, e)
		}
	}
	return d
}

// Without returns the database without the entries.
func (d Database) Without(entries ...Entry) Database {
	return slices.DeleteFunc(slices.Clone(d), Database(entries).Has)
}

// An EFI signature list (ESL) is: the type, the size of the list, the size of a header, which no type has, and the size of an
// entry; then the entries, each with its owner in front. A database is lists one after the other.
const (
	listHead = 28
	guidSize = 16
	// MaxDatabase limits what is read. Firmware has room for 32 to 64 KiB in a variable.
	MaxDatabase = 1 << 20
)

// ParseDatabase reads signature lists. Errors name the offset.
func ParseDatabase(b []byte) (Database, error) {
	if len(b) > MaxDatabase {
		return nil, fmt.Errorf("%d bytes, at most %d are read", len(b), MaxDatabase)
	}
	var d Database
	for at := 0; at < len(b); {
		size, entries, err := parseList(b[at:])
		if err != nil {
			return nil, fmt.Errorf("offset %d: signature list: %w", at, err)
		}
		d = append(d, entries...)
		at += size
	}
	return d, nil
}

// parseList reads the list that b begins with.
func parseList(b []byte) (size int, entries Database, err error) {
	if len(b) < listHead {
		return 0, nil, fmt.Errorf("%d bytes, the head alone has %d", len(b), listHead)
	}
	t := Type(b[:guidSize])
	length, head, each := binary.LittleEndian.Uint32(b[16:]), binary.LittleEndian.Uint32(b[20:]), binary.LittleEndian.Uint32(b[24:])
	switch {
	case length < listHead || int64(length) > int64(len(b)):
		return 0, nil, fmt.Errorf("%d bytes, want %d to %d", length, listHead, len(b))
	case head != 0:
		return 0, nil, fmt.Errorf("type %v: header of %d bytes: no type has one", t, head)
	case each <= guidSize || t.size() != 0 && int64(each) != int64(guidSize+t.size()):
		return 0, nil, fmt.Errorf("type %v: entries of %d bytes", t, each)
	case (length-listHead)%each != 0:
		return 0, nil, fmt.Errorf("type %v: %d bytes are no multiple of entries of %d", t, length-listHead, each)
	}
	for rest := b[listHead:length]; len(rest) > 0; rest = rest[each:] {
		entries = append(entries, Entry{t, GUID(rest[:guidSize]), bytes.Clone(rest[guidSize:each])})
	}
	return int(length), entries, nil
}

// Bytes returns the database as signature lists. Hashes of one type that follow each other are one list; each certificate has
// its own.
func (d Database) Bytes() []byte {
	var b []byte
	for len(d) > 0 {
		n := 1
		for n < len(d) && d[0].Type != X509 && d[n].Type == d[0].Type && len(d[n].Data) == len(d[0].Data) {
			n++
		}
		each := guidSize + len(d[0].Data)
		b = append(b, d[0].Type[:]...)
		b = binary.LittleEndian.AppendUint32(b, uint32(listHead+n*each))
		b = binary.LittleEndian.AppendUint32(b, 0)
		b = binary.LittleEndian.AppendUint32(b, uint32(each))
		for _, e := range d[:n] {
			b = append(append(b, e.Owner[:]...), e.Data...)
		}
		d = d[n:]
	}
	return b
}

// Trust returns what firmware with these databases starts. Times of revocations are not looked at: signatures have no time
// that one could trust. An error is what cannot be judged, as leaving it out would trust too much.
func Trust(db, dbx Database) (uki.Trust, error) {
	var t uki.Trust
	for _, e := range db {
		switch e.Type {
		case X509:
			c, err := e.Certificate()
			if err != nil {
				return t, fmt.Errorf("db: %w", err)
			}
			t.Certificates = append(t.Certificates, c)
		case SHA256:
			t.Hashes = append(t.Hashes, [sha256.Size]byte(e.Data))
		}
	}
	for _, e := range dbx {
		switch e.Type {
		case X509:
			c, err := e.Certificate()
			if err != nil {
				return t, fmt.Errorf("dbx: %w", err)
			}
			t.Revoked.Certificates = append(t.Revoked.Certificates, c)
		case SHA256:
			t.Revoked.Hashes = append(t.Revoked.Hashes, [sha256.Size]byte(e.Data))
		case X509SHA256:
			t.Revoked.TBS = append(t.Revoked.TBS, [sha256.Size]byte(e.Data))
		default:
			return t, fmt.Errorf("dbx: entry of type %v: %w", e.Type, errors.ErrUnsupported)
		}
	}
	return t, nil
}
