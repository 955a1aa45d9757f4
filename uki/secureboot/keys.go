package secureboot

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"time"
)

// Options say what keys are like.
type Options struct {
	Name string    // of whose they are; certificates are named "Name PK" and so on
	Days int       // how long certificates are valid. Firmware does not look, people and other programs do
	Bits int       // of RSA: 2048, which every firmware can verify, 3072 or 4096
	Time time.Time // of the beginning; also that of the updates
}

const maxCommonName = 64 // bytes; RFC 5280, ub-common-name

// GenerateKey makes a private key for RSA.
func (o Options) GenerateKey() (*rsa.PrivateKey, error) {
	if o.Bits != 2048 && o.Bits != 3072 && o.Bits != 4096 {
		return nil, fmt.Errorf("RSA with %d bits: want 2048, 3072 or 4096; firmware verifies 2048 for sure", o.Bits)
	}
	return rsa.GenerateKey(rand.Reader, o.Bits)
}

// Certificate makes the self-signed certificate of a key with this common name. It is for signatures and not a certificate
// authority: nothing else is trusted because of it.
func (o Options) Certificate(commonName string, key crypto.Signer) (*x509.Certificate, error) {
	if commonName == "" || len(commonName) > maxCommonName || strings.ContainsAny(commonName, "\x00\r\n") {
		return nil, fmt.Errorf("common name %q: want 1 to %d bytes in one line", commonName, maxCommonName)
	}
	end := o.Time.AddDate(0, 0, o.Days)
	if o.Days < 1 || end.Year() > 9999 {
		return nil, fmt.Errorf("%d days: want at least 1, and an end before the year 10000", o.Days)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(1)),
		Subject:               pkix.Name{CommonName: commonName},
		NotBefore:             o.Time,
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		SignatureAlgorithm:    x509.SHA256WithRSA,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// File is a file to be made.
type File struct {
	Name    string // with directories in front, if any
	Private bool   // only its owner may read it
	Data    []byte
}

// PrivateKeyFile, PublicKeyFile and CertificateFile are PEM: PKCS #8, PKIX and X.509.
func PrivateKeyFile(name string, key *rsa.PrivateKey) (File, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	return File{name, true, pemOf("PRIVATE KEY", der)}, err
}

// PublicKeyFile is the public part.
func PublicKeyFile(name string, key crypto.PublicKey) (File, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	return File{name, false, pemOf("PUBLIC KEY", der)}, err
}

// CertificateFile is the certificate alone.
func CertificateFile(name string, c *x509.Certificate) File {
	return File{name, false, pemOf("CERTIFICATE", c.Raw)}
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// identity is a key that has just been made, with its certificate.
type identity struct {
	key         *rsa.PrivateKey
	certificate *x509.Certificate
}

func (o Options) identity(v Variable) (identity, error) {
	key, err := o.GenerateKey()
	if err != nil {
		return identity{}, err
	}
	c, err := o.Certificate(o.Name+" "+v.Name, key)
	return identity{key, c}, err
}

func (i identity) files(v Variable) ([]File, error) {
	private, err := PrivateKeyFile(v.Name+".key", i.key)
	return []File{private, CertificateFile(v.Name+".pem", i.certificate)}, err
}

// New makes the files of a directory of keys. Entries are put into KEK and db besides the own certificates.
func New(o Options, owner GUID, kek, db Database) ([]File, error) {
	if o.Name == "" {
		return nil, errors.New("no name for the keys")
	}
	made := map[Variable]identity{}
	files := []File{{"owner", false, []byte(owner.String() + "\n")}}
	for _, v := range []Variable{PK, KEK, DB} {
		i, err := o.identity(v)
		if err != nil {
			return nil, err
		}
		pair, err := i.files(v)
		if err != nil {
			return nil, err
		}
		made[v] = i
		files = append(files, pair...)
	}
	// Systems have TPMs that know no RSA keys but those of 2048 bits.
	pcr, err := Options{Bits: 2048}.GenerateKey()
	if err != nil {
		return nil, err
	}
	private, err := PrivateKeyFile("pcr.key", pcr)
	if err != nil {
		return nil, err
	}
	public, err := PublicKeyFile("pcr.pub", pcr.Public())
	if err != nil {
		return nil, err
	}
	files = append(files, private, public)
	more := map[Variable]Database{KEK: kek, DB: db}
	for _, v := range []Variable{PK, KEK, DB} {
		d := Database{CertificateEntry(owner, made[v].certificate)}.With(more[v]...)
		by := made[v.signer()]
		b, err := Sign(v, false, o.Time, d, by.key, by.certificate)
		if err != nil {
			return nil, err
		}
		files = append(files, File{v.Name + ".auth", false, b})
	}
	return files, nil
}
