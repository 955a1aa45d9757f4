package secureboot

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/composefs-boot/composefs-boot/uki"
)

// Kind says what a file is.
type Kind string

// What Read reads.
const (
	KindCertificate Kind = "certificate" // X.509, PEM or DER; PEM may have several
	KindLists       Kind = "esl"         // EFI signature lists
	KindUpdate      Kind = "auth"        // signed update
	KindVariable    Kind = "variable"    // file of efivarfs, with the variable's GUID in its name
	KindProgram     Kind = "efi"         // PE file, which stands for its Authenticode hash
)

// Contents are what a file says, in the words of a database.
type Contents struct {
	Kind     Kind
	Database Database
	Update   *Update // of a signed update
}

var variableName = regexp.MustCompile(`-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// Read reads a file of any kind, by its content. Owner is whose the entries are that have none: those of certificates and PE
// files.
func Read(path string, owner GUID) (*Contents, error) {
	c, err := read(path, owner)
	if err != nil {
		var of *os.PathError
		if !errors.As(err, &of) {
			err = fmt.Errorf("%s: %w", path, err)
		}
		return nil, err
	}
	return c, nil
}

func read(path string, owner GUID) (*Contents, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	magic := make([]byte, 2)
	if n, _ := f.ReadAt(magic, 0); n == 2 && string(magic) == "MZ" {
		info, err := f.Stat()
		if err != nil {
			return nil, err
		}
		p, err := uki.ParsePE(f, info.Size())
		if err != nil {
			return nil, err
		}
		hash, err := p.Authenticode()
		if err != nil {
			return nil, err
		}
		return &Contents{Kind: KindProgram, Database: Database{HashEntry(owner, hash)}}, nil
	}
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	if variableName.MatchString(filepath.Base(path)) && len(b) >= attributesSize {
		d, err := ParseDatabase(b[attributesSize:])
		return &Contents{Kind: KindVariable, Database: d}, err
	}
	return parse(b, owner)
}

// parse finds out what a file is that is no PE file.
func parse(b []byte, owner GUID) (*Contents, error) {
	if bytes.Contains(b, []byte("-----BEGIN ")) {
		c := &Contents{Kind: KindCertificate}
		for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "CERTIFICATE" {
				return nil, fmt.Errorf("PEM of type %s, want CERTIFICATE", block.Type)
			}
			certificate, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, err
			}
			c.Database = append(c.Database, CertificateEntry(owner, certificate))
		}
		if len(c.Database) == 0 {
			return nil, errors.New("PEM without a certificate")
		}
		return c, nil
	}
	if isUpdate(b) {
		u, err := ParseUpdate(b)
		if err != nil {
			return nil, err
		}
		return &Contents{KindUpdate, u.Database, u}, nil
	}
	// DER has a sequence of 256 bytes to 64 KiB. A list would need a type that begins like that.
	if len(b) > 2 && b[0] == 0x30 && b[1] == 0x82 {
		certificate, err := x509.ParseCertificate(b)
		if err != nil {
			return nil, err
		}
		return &Contents{Kind: KindCertificate, Database: Database{CertificateEntry(owner, certificate)}}, nil
	}
	d, err := ParseDatabase(b)
	if err == nil && len(d) == 0 {
		err = errors.New("empty")
	}
	if err != nil {
		return nil, fmt.Errorf("no certificate, signature list, signed update or PE file: %w", err)
	}
	return &Contents{Kind: KindLists, Database: d}, nil
}
