package sign

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// maxKeyFile bounds a file of keys.
const maxKeyFile = 1 << 20

// Keys verifies signatures of raw public keys: the schemes ed25519 and spki.
//
// A file of the scheme ed25519 has a key in each line, its 32 bytes in base64; one of spki has PEM blocks PUBLIC KEY, which are
// SubjectPublicKeyInfo, RFC 5280. In the configuration, a key is one word: the same bytes in base64.
type Keys struct {
	scheme           string
	trusted, revoked [][]byte
}

// NewKeys returns a verifier of "ed25519" or "spki" that knows no keys.
func NewKeys(scheme string) (*Keys, error) {
	if scheme != "ed25519" && scheme != "spki" {
		return nil, fmt.Errorf("signatures of type %q: there are ed25519 and spki", scheme)
	}
	return &Keys{scheme: scheme}, nil
}

func (k *Keys) Scheme() string { return k.scheme }

// Empty reports whether it trusts nobody.
func (k *Keys) Empty() bool {
	for _, key := range k.trusted {
		if !contains(k.revoked, key) {
			return false
		}
	}
	return true
}

// Add trusts a key, in base64.
func (k *Keys) Add(text string) error {
	b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if err != nil {
		return fmt.Errorf("key: %w", err)
	}
	return k.add(&k.trusted, b)
}

func (k *Keys) add(to *[][]byte, key []byte) error {
	if _, err := k.public(key); err != nil {
		return err
	}
	if !contains(*to, key) {
		*to = append(*to, key)
	}
	return nil
}

// public understands a key.
func (k *Keys) public(key []byte) (any, error) {
	if k.scheme == "spki" {
		return x509.ParsePKIXPublicKey(key)
	}
	if len(key) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("a key of %d bytes, those of ed25519 have %d", len(key), ed25519.PublicKeySize)
	}
	return ed25519.PublicKey(key), nil
}

// LoadFile trusts the keys of a file.
func (k *Keys) LoadFile(path string) error { return k.load(&k.trusted, path) }

// LoadSystem trusts the keys in DIR/trusted.SCHEME and DIR/trusted.SCHEME.d, and never those in DIR/revoked.SCHEME and
// DIR/revoked.SCHEME.d. What is not there is passed over.
func (k *Keys) LoadSystem(dir string) error {
	if err := k.LoadRevoked(dir); err != nil {
		return err
	}
	return k.loadAll(&k.trusted, filepath.Join(dir, "trusted."+k.scheme))
}

// LoadRevoked reads those that are never trusted alone.
func (k *Keys) LoadRevoked(dir string) error {
	return k.loadAll(&k.revoked, filepath.Join(dir, "revoked."+k.scheme))
}

func (k *Keys) loadAll(to *[][]byte, base string) error {
	files := []string{base}
	entries, err := os.ReadDir(base + ".d")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		files = append(files, filepath.Join(base+".d", e.Name()))
	}
	for _, file := range files {
		if err := k.load(to, file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (k *Keys) load(to *[][]byte, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err == nil && len(b) > maxKeyFile {
		err = fmt.Errorf("more than %d bytes", maxKeyFile)
	}
	if err == nil {
		err = k.parse(to, b)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (k *Keys) parse(to *[][]byte, b []byte) error {
	if k.scheme == "spki" {
		for {
			var block *pem.Block
			if block, b = pem.Decode(b); block == nil {
				return nil
			}
			if block.Type != "PUBLIC KEY" {
				continue
			}
			if err := k.add(to, block.Bytes); err != nil {
				return err
			}
		}
	}
	for n, line := range strings.Split(string(b), "\n") {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		key, err := base64.StdEncoding.DecodeString(line)
		if err == nil {
			err = k.add(to, key)
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n+1, err)
		}
	}
	return nil
}

// Verify implements Verifier.
func (k *Keys) Verify(data []byte, signatures [][]byte) (string, error) {
	if k.Empty() {
		return "", errors.New("no key is trusted")
	}
	tried := 0
	for _, key := range k.trusted {
		if contains(k.revoked, key) {
			continue
		}
		public, err := k.public(key)
		if err != nil {
			return "", err
		}
		tried++
		for _, s := range signatures {
			if valid(public, data, s) {
				return fingerprint(k.scheme, key), nil
			}
		}
	}
	for _, key := range k.revoked {
		public, err := k.public(key)
		if err != nil {
			continue
		}
		for _, s := range signatures {
			if valid(public, data, s) {
				return "", fmt.Errorf("key %s is revoked", fingerprint(k.scheme, key))
			}
		}
	}
	return "", fmt.Errorf("not signed by any of the trusted keys, of which there are %d", tried)
}

// fingerprint names a key: one of ed25519 is its own name, others are named by their SHA-256.
func fingerprint(scheme string, key []byte) string {
	if scheme == "ed25519" {
		return fmt.Sprintf("%x", key)
	}
	return fmt.Sprintf("sha256:%x", sha256.Sum256(key))
}

// valid reports whether the signature is one of the key. The digests are those that OpenSSL takes by default.
func valid(public any, data, signature []byte) bool {
	sum := sha256.Sum256(data)
	switch key := public.(type) {
	case ed25519.PublicKey:
		return len(signature) == ed25519.SignatureSize && ed25519.Verify(key, data, signature)
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(key, sum[:], signature)
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], signature) == nil
	}
	return false
}

// keySigner signs with a raw key.
type keySigner struct {
	scheme string
	key    crypto.Signer
}

// KeySigner reads a secret key: of ed25519 64 bytes in base64, which are the seed and the public key; of spki a PEM block PRIVATE KEY,
// which is PKCS #8.
func KeySigner(scheme string, secret []byte) (Signer, error) {
	switch scheme {
	case "ed25519":
		b, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(secret)))
		if err != nil || len(b) != ed25519.PrivateKeySize {
			return nil, fmt.Errorf("not a secret key of ed25519: %d bytes in base64 are expected", ed25519.PrivateKeySize)
		}
		key := ed25519.NewKeyFromSeed(b[:ed25519.SeedSize])
		if !bytes.Equal(key, b) {
			return nil, errors.New("not a secret key of ed25519: its second half is not its public key")
		}
		return keySigner{scheme, key}, nil
	case "spki":
		for rest := secret; ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				return nil, errors.New("no PEM block PRIVATE KEY in it: openssl genpkey makes one")
			}
			if block.Type != "PRIVATE KEY" {
				continue
			}
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			if s, ok := key.(crypto.Signer); ok {
				return keySigner{scheme, s}, nil
			}
			return nil, fmt.Errorf("a key of type %T cannot sign", key)
		}
	}
	return nil, fmt.Errorf("signatures of type %q: there are ed25519 and spki", scheme)
}

func (s keySigner) Scheme() string { return s.scheme }

func (s keySigner) Sign(data []byte) ([]byte, error) {
	switch s.key.(type) {
	case ed25519.PrivateKey:
		return s.key.Sign(nil, data, crypto.Hash(0))
	case *ecdsa.PrivateKey, *rsa.PrivateKey:
		sum := sha256.Sum256(data)
		return s.key.Sign(rand.Reader, sum[:], crypto.SHA256)
	}
	return nil, fmt.Errorf("keys of type %T do not sign here", s.key)
}
