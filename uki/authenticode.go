package uki

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"github.com/foxboron/go-uefi/authenticode"
	"github.com/foxboron/go-uefi/pkcs7"
)

// Signatures of PE files are defined by Microsoft's "Windows Authenticode Portable Executable Signature Format" and the UEFI
// specification, chapter 32. They stand in a table at the end of the file; each is a PKCS #7 SignedData over the file's digest.
const (
	certificateHead = 8      // length, revision and type before a signature
	certificateV2   = 0x0200 // revision
	certificatePKCS = 0x0002 // type
	maxCertificates = 1 << 20
)

// span is a part of a file, from and to an offset.
type span struct{ from, to int64 }

// covered are the parts of the file that a signature covers, in the order in which firmware hashes them: the headers without
// the checksum and the place of the certificate table, the sections by their offset, and what is left before the table.
func (p *PE) covered() ([]span, error) {
	check, directory := int64(p.optional+offCheckSum), int64(p.security())
	counter := p.optional + p.directories - 4
	if count := binary.LittleEndian.Uint32(p.head[counter:]); count <= securityDirectory {
		return nil, fmt.Errorf("offset %d: %d data directories: there is no place for a signature", counter, count)
	}
	if p.optional%2 != 0 {
		return nil, fmt.Errorf("offset 60: PE header at the odd offset %d", p.coff)
	}
	headers := int64(len(p.head))
	spans := []span{{0, check}, {check + 4, directory}, {directory + 8, headers}}
	sum := headers
	sections := slices.DeleteFunc(slices.Clone(p.Sections), func(h Header) bool { return h.Raw.Size == 0 })
	slices.SortFunc(sections, func(a, b Header) int { return int(int64(a.Raw.Offset) - int64(b.Raw.Offset)) })
	for _, h := range sections {
		spans = append(spans, span{int64(h.Raw.Offset), h.Raw.end()})
		sum += int64(h.Raw.Size)
	}
	end := p.Size
	if c := p.CertificateTable; c.Size > 0 {
		// Firmware takes the last bytes of the file for the table, wherever it is.
		if c.end() != p.Size {
			return nil, fmt.Errorf("offset %d: certificate table ends at %d, want the end of the file at %d", directory, c.end(), p.Size)
		}
		end = int64(c.Offset)
	}
	if sum > end {
		return nil, fmt.Errorf("offset %d: headers and sections have %d bytes, the file only %d before its signatures", p.table, sum, end)
	}
	return append(spans, span{sum, end}), nil
}

// checkGaps tells whether a signature covers each byte once. Files with gaps between their sections have bytes that no
// signature covers: they can be verified as firmware does, but are not signed.
func (p *PE) checkGaps(spans []span) error {
	at := int64(len(p.head))
	for _, s := range spans[3:] {
		if s.from != at {
			return fmt.Errorf("offset %d: gap up to %d, which a signature would not cover", at, s.from)
		}
		at = s.to
	}
	return nil
}

// Authenticode returns the digest of the file that firmware knows it by: what a signature covers, and what db and dbx may
// list. Signatures and the checksum are not part of it.
func (p *PE) Authenticode() (digest [sha256.Size]byte, err error) {
	b, err := p.digest(crypto.SHA256)
	copy(digest[:], b)
	return digest, err
}

func (p *PE) digest(f crypto.Hash) ([]byte, error) {
	spans, err := p.covered()
	if err != nil {
		return nil, err
	}
	h := f.New()
	if err := p.hash(h, spans); err != nil {
		return nil, err
	}
	return h.Sum(nil), nil
}

func (p *PE) hash(h hash.Hash, spans []span) error {
	buffer := make([]byte, 1<<18)
	size := int64(0)
	for _, s := range spans {
		n, err := io.CopyBuffer(h, io.NewSectionReader(p.file, s.from, s.to-s.from), buffer)
		if err != nil || n < s.to-s.from {
			return fmt.Errorf("offset %d: %w", s.from+n, short(err))
		}
		size = s.to
	}
	h.Write(make([]byte, alignUp(size, 8)-size))
	return nil
}

// Signature is a signature of a PE file.
type Signature struct {
	Signer       *x509.Certificate   // whose key made it
	Certificates []*x509.Certificate // all that are in it, to find the way from Signer to a certificate that is trusted
	Hash         crypto.Hash
	Digest       []byte // that it says the file has

	content   []byte // that is signed
	encrypted []byte
	attribute []byte // DER of the attributes, which are signed in place of the content; nil if there are none
}

// Signatures returns the signatures of the file, without checking them; Verify does. It is an error if one cannot be read.
func (p *PE) Signatures() ([]Signature, error) {
	table, err := p.certificates()
	if err != nil {
		return nil, err
	}
	var list []Signature
	for at := 0; at < len(table); {
		where := int64(p.CertificateTable.Offset) + int64(at)
		b := table[at:]
		if len(b) < certificateHead {
			return nil, fmt.Errorf("offset %d: %d bytes left in the certificate table", where, len(b))
		}
		size := int64(binary.LittleEndian.Uint32(b))
		if size < certificateHead || size > int64(len(b)) {
			return nil, fmt.Errorf("offset %d: signature of %d bytes: the certificate table has %d left", where, size, len(b))
		}
		if kind := binary.LittleEndian.Uint16(b[6:]); kind != certificatePKCS {
			return nil, fmt.Errorf("offset %d: certificate of type %d, want PKCS #7, %d", where, kind, certificatePKCS)
		}
		s, err := parseSignature(b[certificateHead:size])
		if err != nil {
			return nil, fmt.Errorf("offset %d: signature: %w", where, err)
		}
		list = append(list, s)
		at += int(alignUp(size, 8))
	}
	return list, nil
}

// certificates reads the certificate table.
func (p *PE) certificates() ([]byte, error) {
	c := p.CertificateTable
	if c.Size > maxCertificates {
		return nil, fmt.Errorf("offset %d: certificate table of %d bytes, at most %d are read", c.Offset, c.Size, maxCertificates)
	}
	if c.Size == 0 {
		return nil, nil
	}
	return p.read(int64(c.Offset), int(c.Size), "certificate table")
}

func parseSignature(der []byte) (s Signature, err error) {
	a, err := authenticode.ParseAuthenticode(der)
	if err != nil {
		return s, err
	}
	if len(a.Pkcs.SignerInfo) != 1 {
		return s, fmt.Errorf("%d signers, want 1", len(a.Pkcs.SignerInfo))
	}
	if n := len(a.Pkcs.Certs); n > maxEmbedded {
		return s, fmt.Errorf("%d certificates, at most %d are read", n, maxEmbedded)
	}
	info := a.Pkcs.SignerInfo[0]
	s = Signature{Certificates: a.Pkcs.Certs, Digest: a.Digest, encrypted: info.EncryptedDigest}
	if s.Hash, err = hashOf(a.Algid.Algorithm); err != nil {
		return s, err
	}
	if h, err := hashOf(info.DigestAlgorithm.Algorithm); err != nil || h != s.Hash {
		return s, fmt.Errorf("signer's hash function %v is not that of the digest, %v", info.DigestAlgorithm.Algorithm, s.Hash)
	}
	for _, c := range a.Pkcs.Certs {
		if bytes.Equal(c.RawIssuer, info.IssuerAndSerialnumber.RawIssuer) && c.SerialNumber.Cmp(info.IssuerAndSerialnumber.SerialNumber) == 0 {
			s.Signer = c
		}
	}
	if s.Signer == nil {
		return s, errors.New("the signer's certificate is not in it")
	}
	if s.content, err = innerDER(a.Pkcs.ContentInfo); err != nil {
		return s, err
	}
	if attributes := info.AuthenticatedAttributes; attributes != nil {
		// The library does not compare: without this, the attributes of any signature would do for any content.
		h := s.Hash.New()
		h.Write(s.content)
		if !bytes.Equal(attributes.MessageDigest, h.Sum(nil)) {
			return s, errors.New("the attributes are signed for another content")
		}
		if !attributes.ContentType.Equal(authenticode.OIDSpcIndirectDataContent) {
			return s, fmt.Errorf("the attributes are signed for a content of type %v", attributes.ContentType)
		}
		s.attribute = attributes.RawBytes
	}
	return s, nil
}

func hashOf(oid fmt.Stringer) (crypto.Hash, error) {
	switch oid.String() {
	case pkcs7.OIDDigestAlgorithmSHA256.String():
		return crypto.SHA256, nil
	case pkcs7.OIDDigestAlgorithmSHA384.String():
		return crypto.SHA384, nil
	case pkcs7.OIDDigestAlgorithmSHA512.String():
		return crypto.SHA512, nil
	}
	return 0, fmt.Errorf("hash function %v: want SHA-256, SHA-384 or SHA-512", oid)
}

// check tells whether the signature is the signer's and covers a file that has this digest.
func (s Signature) check(digest []byte) error {
	if !bytes.Equal(s.Digest, digest) {
		return fmt.Errorf("signed was a file with digest %x, this one has %x: it was changed after it had been signed", s.Digest, digest)
	}
	signed := s.content
	if s.attribute != nil {
		signed = s.attribute
	}
	algorithm := map[crypto.Hash]x509.SignatureAlgorithm{
		crypto.SHA256: x509.SHA256WithRSA, crypto.SHA384: x509.SHA384WithRSA, crypto.SHA512: x509.SHA512WithRSA,
	}[s.Hash]
	if err := s.Signer.CheckSignature(algorithm, signed, s.encrypted); err != nil {
		return fmt.Errorf("not made by the key of %s: %w", s.Signer.Subject, err)
	}
	return nil
}

// SignatureInfo is what there is to know about a signature without knowing whom to trust.
type SignatureInfo struct {
	Signer  string `json:"signer"`
	Issuer  string `json:"issuer"`
	Serial  string `json:"serial"` // hexadecimal
	Hash    string `json:"hash"`   // "SHA-256"
	Problem string `json:"problem,omitempty"`
}

// ExplainSignatures lists the signatures of a file, and says which are not right; never nil without an error.
func ExplainSignatures(p *PE) ([]SignatureInfo, error) {
	signatures, err := p.Signatures()
	if err != nil {
		return nil, err
	}
	list := []SignatureInfo{}
	for _, s := range signatures {
		i := SignatureInfo{s.Signer.Subject.String(), s.Signer.Issuer.String(), s.Signer.SerialNumber.Text(16), s.Hash.String(), ""}
		digest, err := p.digest(s.Hash)
		if err != nil {
			return nil, err
		}
		if err := s.check(digest); err != nil {
			i.Problem = err.Error()
		}
		list = append(list, i)
	}
	return list, nil
}

// innerDER returns the value of a DER sequence, without tag and length: that is what PKCS #7 signs.
func innerDER(der []byte) ([]byte, error) {
	var v asn1.RawValue
	if _, err := asn1.Unmarshal(der, &v); err != nil {
		return nil, fmt.Errorf("content: %w", err)
	}
	return v.Bytes, nil
}
