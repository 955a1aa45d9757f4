package uki

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/foxboron/go-uefi/authenticode"
	"github.com/foxboron/go-uefi/pkcs7"
)

// Sign writes the file with another signature, made with the key that the certificate is for. It has RSA and SHA-256, which is
// all that every firmware knows, and no attributes, as they would have the time in them: the same key gives the same bytes.
func Sign(w io.WriterAt, p *PE, key crypto.Signer, certificate *x509.Certificate) error {
	end, err := p.sign(key, certificate)
	if err != nil {
		return err
	}
	if err := p.copyTo(w, end.from); err != nil {
		return err
	}
	return end.write(w)
}

// SignInPlace writes only what changes into the file that p was read from.
func SignInPlace(file io.WriterAt, p *PE, key crypto.Signer, certificate *x509.Certificate) error {
	end, err := p.sign(key, certificate)
	if err != nil {
		return err
	}
	return end.write(file)
}

// Unsign writes the file without its signatures. It is an error if it has none.
func Unsign(w io.WriterAt, p *PE) error {
	if p.CertificateTable.Size == 0 {
		return ErrUnsigned
	}
	end, err := p.withTable(nil)
	if err != nil {
		return err
	}
	if err := p.copyTo(w, end.from); err != nil {
		return err
	}
	return end.write(w)
}

// ending is how a file gets other signatures: its end from an offset on, and two values in its headers.
type ending struct {
	from      int64
	padding   int // bytes before the table
	table     []byte
	directory int64 // offset of the table's place
	check     int64 // offset of the checksum
	checksum  uint32
}

// sign plans another signature.
func (p *PE) sign(key crypto.Signer, certificate *x509.Certificate) (ending, error) {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return ending{}, fmt.Errorf("key of type %T: firmware wants RSA: make one with \"keys new\"", key.Public())
	}
	if public.Size() < 256 {
		return ending{}, fmt.Errorf("RSA key of %d bits: firmware wants 2048 or more", public.Size()*8)
	}
	if !public.Equal(certificate.PublicKey) {
		return ending{}, fmt.Errorf("the certificate of %s is for another key", certificate.Subject)
	}
	table, err := p.certificates()
	if err != nil {
		return ending{}, err
	}
	spans, err := p.covered()
	if err == nil {
		err = p.checkGaps(spans)
	}
	if err != nil {
		return ending{}, err
	}
	digest := sha256.New()
	if err := p.hash(digest, spans); err != nil {
		return ending{}, err
	}
	content, err := authenticode.CreateSpcIndirectDataContent(digest.Sum(nil), crypto.SHA256)
	if err != nil {
		return ending{}, err
	}
	der, err := pkcs7.SignPKCS7(key, certificate, authenticode.OIDSpcIndirectDataContent, content, pkcs7.NoAttr())
	if err != nil {
		return ending{}, fmt.Errorf("sign: %w", err)
	}
	size := certificateHead + len(der)
	table = binary.LittleEndian.AppendUint32(table, uint32(alignUp(int64(size), 8)))
	table = binary.LittleEndian.AppendUint16(table, certificateV2)
	table = binary.LittleEndian.AppendUint16(table, certificatePKCS)
	table = append(table, der...)
	table = append(table, make([]byte, alignUp(int64(size), 8)-int64(size))...)
	return p.withTable(table)
}

// withTable plans the file with this certificate table, and makes its checksum.
func (p *PE) withTable(table []byte) (ending, error) {
	spans, err := p.covered()
	if err != nil {
		return ending{}, err
	}
	from := spans[len(spans)-1].to
	e := ending{from: from, padding: int(alignUp(from, 8) - from), table: table,
		directory: int64(p.security()), check: int64(p.optional + offCheckSum)}
	size := alignUp(from, 8) + int64(len(table))
	if size > 1<<32-1 {
		return e, errors.New("the file would pass 4 GiB, where PE files end")
	}
	sum := checksum{}
	buffer := make([]byte, 1<<18)
	for at := int64(0); at < from; at += int64(len(buffer)) {
		b := buffer[:min(int64(len(buffer)), alignUp(from, 8)-at)]
		data := b[:min(int64(len(b)), from-at)]
		if n, err := p.file.ReadAt(data, at); n < len(data) {
			return e, fmt.Errorf("offset %d: %w", at+int64(n), short(err))
		}
		clear(b[len(data):])
		if at == 0 {
			clear(b[e.check : e.check+4])
			copy(b[e.directory:e.directory+8], e.entry())
		}
		sum.add(b)
	}
	sum.add(table)
	e.checksum = sum.value(size)
	return e, nil
}

// entry is the place of the certificate table, as the headers have it.
func (e ending) entry() []byte {
	b := make([]byte, 8)
	if len(e.table) > 0 {
		binary.LittleEndian.PutUint32(b, uint32(e.from)+uint32(e.padding))
		binary.LittleEndian.PutUint32(b[4:], uint32(len(e.table)))
	}
	return b
}

// write writes what the planned file has else than the one it is made from.
func (e ending) write(w io.WriterAt) error {
	if _, err := w.WriteAt(append(make([]byte, e.padding), e.table...), e.from); err != nil {
		return err
	}
	if _, err := w.WriteAt(e.entry(), e.directory); err != nil {
		return err
	}
	_, err := w.WriteAt(binary.LittleEndian.AppendUint32(nil, e.checksum), e.check)
	return err
}

// copyTo writes the beginning of the file.
func (p *PE) copyTo(w io.WriterAt, size int64) error {
	n, err := io.Copy(io.NewOffsetWriter(w, 0), io.NewSectionReader(p.file, 0, size))
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	return err
}
