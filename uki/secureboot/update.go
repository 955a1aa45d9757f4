package secureboot

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unicode/utf16"

	"github.com/foxboron/go-uefi/pkcs7"
)

// An update, a file *.auth, is an EFI_VARIABLE_AUTHENTICATION_2: a time; the head of a certificate (length, revision, type, and
// a GUID that says PKCS #7); the signature; and then the database itself. The signature is a PKCS #7 SignedData, without the
// ContentInfo around it that the rest of the world has: firmware before 2023 (edk2) looks for the hash function at a fixed
// offset and refuses it otherwise. It covers the variable's name, GUID and attributes, the time, and the database.
const (
	timeSize     = 16
	updateHead   = timeSize + 8 + guidSize
	revision     = 0x0200
	typeEFIGUID  = 0x0ef1
	maxSignature = 1 << 16
)

var pkcs7GUID = mustGUID("4aafd29d-68df-49ee-8aa9-347d375665a7")

// Attributes of variables: kept over boots, there for boot loader and system, signed with a time; and the wish to append.
const (
	attributes  = 0x01 | 0x02 | 0x04 | 0x20
	attrsAppend = 0x40
)

// Update is a signed update of a variable. What it is an update of stands in the signature alone.
type Update struct {
	Time         time.Time // UTC, in seconds
	Database     Database
	Certificates []*x509.Certificate // that came with the signature

	payload   []byte
	time      []byte
	encrypted []byte // the signature's value

	// Other programs sign attributes, which have the digest of the content, in place of the content.
	attributes *pkcs7.Attributes
}

// Sign makes an update of v that replaces it, or appends to it, signed with the key that the certificate is for. The same
// input gives the same bytes. Firmware knows RSA and SHA-256 only; it takes an update that replaces only if the time is
// after that of the last one.
func Sign(v Variable, add bool, t time.Time, d Database, key crypto.Signer, certificate *x509.Certificate) ([]byte, error) {
	if err := checkKey(key, certificate); err != nil {
		return nil, err
	}
	if y := t.UTC().Year(); y < 1998 || y > 2099 {
		return nil, fmt.Errorf("time %s: firmware takes the years 1998 to 2099: set SOURCE_DATE_EPOCH", t.UTC().Format(time.DateOnly))
	}
	stamp, payload := putTime(t), d.Bytes()
	der, err := pkcs7.SignPKCS7(key, certificate, pkcs7.OIDData, signed(v, add, stamp, payload), pkcs7.NoAttr())
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", v.Name, err)
	}
	var info struct {
		Type    asn1.ObjectIdentifier
		Content asn1.RawValue // in a tag of its own
	}
	if _, err := asn1.Unmarshal(der, &info); err != nil {
		return nil, fmt.Errorf("sign %s: %w", v.Name, err)
	}
	b := stamp
	b = binary.LittleEndian.AppendUint32(b, uint32(updateHead-timeSize+len(info.Content.Bytes)))
	b = binary.LittleEndian.AppendUint16(b, revision)
	b = binary.LittleEndian.AppendUint16(b, typeEFIGUID)
	b = append(b, pkcs7GUID[:]...)
	b = append(b, info.Content.Bytes...)
	return append(b, payload...), nil
}

// checkKey tells whether firmware can verify what the key signs, and the certificate is the key's.
func checkKey(key crypto.Signer, certificate *x509.Certificate) error {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("key of type %T: firmware wants RSA: make one with \"keys new\"", key.Public())
	}
	if public.Size() < 256 {
		return fmt.Errorf("RSA key of %d bits: firmware wants 2048 or more", public.Size()*8)
	}
	if !public.Equal(certificate.PublicKey) {
		return fmt.Errorf("the certificate of %s is for another key", certificate.Subject)
	}
	return nil
}

// signed is what the signature of an update covers.
func signed(v Variable, add bool, stamp, payload []byte) []byte {
	var b []byte
	for _, unit := range utf16.Encode([]rune(v.Name)) {
		b = binary.LittleEndian.AppendUint16(b, unit)
	}
	b = append(b, v.GUID[:]...)
	attrs := uint32(attributes)
	if add {
		attrs |= attrsAppend
	}
	b = binary.LittleEndian.AppendUint32(b, attrs)
	return append(append(b, stamp...), payload...)
}

// ParseUpdate reads a file *.auth. The signature is not checked; Verify does that.
func ParseUpdate(b []byte) (*Update, error) {
	if !isUpdate(b) {
		return nil, fmt.Errorf("offset %d: no head of a signed update", timeSize)
	}
	if len(b) > MaxDatabase {
		return nil, fmt.Errorf("%d bytes, at most %d are read", len(b), MaxDatabase)
	}
	size := int64(binary.LittleEndian.Uint32(b[timeSize:])) - (updateHead - timeSize)
	if size < 0 || size > maxSignature || size > int64(len(b)-updateHead) {
		return nil, fmt.Errorf("offset %d: signature of %d bytes: %d are left, and at most %d are read", timeSize, size, len(b)-updateHead, maxSignature)
	}
	u := &Update{time: b[:timeSize], payload: b[updateHead+size:]}
	var err error
	if u.Time, err = parseTime(u.time); err != nil {
		return nil, fmt.Errorf("offset 0: %w", err)
	}
	if err := u.parseSignature(b[updateHead : updateHead+size]); err != nil {
		return nil, fmt.Errorf("offset %d: signature: %w", updateHead, err)
	}
	if u.Database, err = ParseDatabase(u.payload); err != nil {
		return nil, fmt.Errorf("after the signature of %d bytes: %w", updateHead+size, err)
	}
	return u, nil
}

func isUpdate(b []byte) bool {
	return len(b) >= updateHead && binary.LittleEndian.Uint16(b[timeSize+4:]) == revision &&
		binary.LittleEndian.Uint16(b[timeSize+6:]) == typeEFIGUID && bytes.Equal(b[timeSize+8:updateHead], pkcs7GUID[:])
}

func (u *Update) parseSignature(der []byte) error {
	p, err := pkcs7.ParsePKCS7(der)
	if err != nil {
		return err
	}
	if len(p.SignerInfo) != 1 {
		return fmt.Errorf("%d signers, want 1", len(p.SignerInfo))
	}
	s := p.SignerInfo[0]
	if !s.DigestAlgorithm.Algorithm.Equal(pkcs7.OIDDigestAlgorithmSHA256) {
		return fmt.Errorf("hash function %v, want SHA-256", s.DigestAlgorithm.Algorithm)
	}
	u.Certificates, u.encrypted, u.attributes = p.Certs, s.EncryptedDigest, s.AuthenticatedAttributes
	return nil
}

// Verify tells whether it is an update of v, to replace or to append, signed with the key of the certificate.
func (u *Update) Verify(v Variable, add bool, certificate *x509.Certificate) error {
	key, ok := certificate.PublicKey.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("certificate of %s: its key is not RSA", certificate.Subject)
	}
	digest := sha256.Sum256(signed(v, add, u.time, u.payload))
	if a := u.attributes; a != nil {
		if !a.ContentType.Equal(pkcs7.OIDData) || !bytes.Equal(a.MessageDigest, digest[:]) {
			return fmt.Errorf("no update of %s: the attributes are signed for another content", v.Name)
		}
		digest = sha256.Sum256(a.RawBytes)
	}
	if err := rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], u.encrypted); err != nil {
		return fmt.Errorf("no update of %s signed by the key of %s", v.Name, certificate.Subject)
	}
	return nil
}

// Covers finds out what it is an update of and by whom it is signed, with the certificates that came with the signature.
func (u *Update) Covers() (v Variable, add bool, signer *x509.Certificate, err error) {
	for _, c := range u.Certificates {
		for _, v := range Variables {
			for _, add := range []bool{false, true} {
				if u.Verify(v, add, c) == nil {
					return v, add, c, nil
				}
			}
		}
	}
	return v, false, nil, errors.New("the signature is not that of an update of PK, KEK, db or dbx by a certificate in it")
}

// An EFI_TIME has the year, 2 bytes, month, day, hour, minute and second, a byte each, and then what firmware wants to be zero:
// a byte, nanoseconds, the time zone, and two bytes. All zeros are no time.
func putTime(t time.Time) []byte {
	b := make([]byte, timeSize)
	if t.IsZero() {
		return b
	}
	t = t.UTC()
	binary.LittleEndian.PutUint16(b, uint16(t.Year()))
	b[2], b[3], b[4], b[5], b[6] = byte(t.Month()), byte(t.Day()), byte(t.Hour()), byte(t.Minute()), byte(t.Second())
	return b
}

// parseTime takes months and days that there are not over into the next or last ones: sbvarsign counts months from 0.
func parseTime(b []byte) (time.Time, error) {
	b = b[:timeSize]
	if bytes.Equal(b, make([]byte, timeSize)) {
		return time.Time{}, nil
	}
	year := int(binary.LittleEndian.Uint16(b))
	if !bytes.Equal(b[7:], make([]byte, timeSize-7)) || year < 1900 || year > 9999 {
		return time.Time{}, fmt.Errorf("time %x: want a year of 1900 to 9999, month, day, hour, minute and second, and then zeros", b)
	}
	return time.Date(year, time.Month(b[2]), int(b[3]), int(b[4]), int(b[5]), int(b[6]), 0, time.UTC), nil
}
