package uki

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
)

// Trust is what firmware decides by under Secure Boot whether it starts a PE file: its variables db and dbx.
type Trust struct {
	Certificates []*x509.Certificate // whose keys may sign, or sign certificates that may
	Hashes       [][sha256.Size]byte // of files, as Authenticode gives them
	Revoked      Revocations
}

// Revocations are what is refused although it would be trusted.
type Revocations struct {
	Certificates []*x509.Certificate
	Hashes       [][sha256.Size]byte // of files
	TBS          [][sha256.Size]byte // SHA-256 of the signed part of certificates (TBSCertificate)
}

// Why a file is not started. Verify wraps one of them.
var (
	ErrUnsigned  = errors.New("not signed")
	ErrUntrusted = errors.New("not signed by a key that is trusted")
	ErrRevoked   = errors.New("revoked")
	ErrTampered  = errors.New("signature is not right")
)

// maxEmbedded limits the certificates in a signature: each of them may be one on the way to a trusted one.
const maxEmbedded = 32

// Verify decides as firmware does, after the UEFI specification, chapter 32.5: nothing in dbx may name the file or a
// certificate of any signature, and db names the file or a certificate of one. Like firmware, it does not look at the dates of
// certificates. It returns the signature that counts, or none if db has the hash of the file.
func (p *PE) Verify(t Trust) (Signature, error) {
	digest, err := p.Authenticode()
	if err != nil {
		return Signature{}, err
	}
	if slices.Contains(t.Revoked.Hashes, digest) {
		return Signature{}, fmt.Errorf("%w: dbx has the hash of the file, %x", ErrRevoked, digest)
	}
	signatures, err := p.Signatures()
	if err != nil {
		return Signature{}, err
	}
	var good *Signature
	why := fmt.Errorf("%w: sign it with \"uki sign\"", ErrUnsigned)
	for k := range signatures {
		s := &signatures[k]
		if err := p.verify(s, digest, t); errors.Is(err, ErrRevoked) {
			return Signature{}, err
		} else if err != nil {
			why = err
		} else if good == nil {
			good = s
		}
	}
	switch {
	case good != nil:
		return *good, nil
	case slices.Contains(t.Hashes, digest):
		return Signature{}, nil
	}
	return Signature{}, why
}

func (p *PE) verify(s *Signature, digest [sha256.Size]byte, t Trust) error {
	have := digest[:]
	if s.Hash != crypto.SHA256 {
		var err error
		if have, err = p.digest(s.Hash); err != nil {
			return err
		}
	}
	if err := s.check(have); err != nil {
		return fmt.Errorf("%w: %w", ErrTampered, err)
	}
	return t.follow(s)
}

// follow looks for a way from the signer to a certificate of db that does not pass one of dbx.
func (t Trust) follow(s *Signature) error {
	known := slices.Concat(s.Certificates, t.Certificates, t.Revoked.Certificates)
	seen := []*x509.Certificate{s.Signer}
	trusted := false
	for at := 0; at < len(seen); at++ {
		c := seen[at]
		if t.Revoked.has(c) {
			return fmt.Errorf("%w: dbx has the certificate of %s", ErrRevoked, c.Subject)
		}
		trusted = trusted || contains(t.Certificates, c)
		for _, parent := range known {
			if bytes.Equal(c.RawIssuer, parent.RawSubject) && !contains(seen, parent) && c.CheckSignatureFrom(parent) == nil {
				seen = append(seen, parent)
			}
		}
	}
	if !trusted {
		return fmt.Errorf("%w: signed by %s, serial number %x", ErrUntrusted, s.Signer.Subject, s.Signer.SerialNumber)
	}
	return nil
}

func (r Revocations) has(c *x509.Certificate) bool {
	return contains(r.Certificates, c) || slices.Contains(r.TBS, sha256.Sum256(c.RawTBSCertificate))
}

func contains(list []*x509.Certificate, c *x509.Certificate) bool {
	return slices.ContainsFunc(list, c.Equal)
}
