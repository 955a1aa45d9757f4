package sign

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// maxKeyring bounds a keyring. Those of distributions have some ten keys of a few kilobytes.
const maxKeyring = 16 << 20

// GPG verifies OpenPGP signatures. Keys that are revoked or have expired sign nothing, whenever that was done.
type GPG struct{ keys openpgp.EntityList }

// NewGPG returns a verifier that knows no keys.
func NewGPG() *GPG { return &GPG{} }

func (g *GPG) Scheme() string { return "gpg" }

// Empty reports whether it trusts nobody.
func (g *GPG) Empty() bool { return len(g.keys) == 0 }

// Fingerprints returns those of the primary keys, in hexadecimal, sorted.
func (g *GPG) Fingerprints() []string {
	var all []string
	for _, e := range g.keys {
		all = append(all, fmt.Sprintf("%X", e.PrimaryKey.Fingerprint))
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// Load adds the keys of a file, or of all the files in a directory whose names end in .gpg or .asc, as gpg --export writes them,
// with --armor or without.
func (g *GPG) Load(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := g.Read(f); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		return nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); ext == ".gpg" || ext == ".asc" {
			if err := g.Load(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Read adds the keys of a keyring. Keys that this program cannot use are passed over, if there are others.
func (g *GPG) Read(r io.Reader) error {
	keys, err := readKeys(r)
	if err != nil {
		return err
	}
	g.keys = append(g.keys, keys...)
	return nil
}

// Add adds the keys of another keyring.
func (g *GPG) Add(other *GPG) { g.keys = append(g.keys, other.keys...) }

// Export returns the keys as a keyring, each once.
func (g *GPG) Export() ([]byte, error) {
	var all [][]byte
	for _, e := range g.keys {
		var b bytes.Buffer
		if err := e.Serialize(&b); err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(all, func(o []byte) bool { return bytes.Equal(o, b.Bytes()) }) {
			all = append(all, b.Bytes())
		}
	}
	return bytes.Join(all, nil), nil
}

func readKeys(r io.Reader) (openpgp.EntityList, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxKeyring+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxKeyring {
		return nil, fmt.Errorf("a keyring of more than %d bytes", maxKeyring)
	}
	if len(b) == 0 {
		return nil, nil // gpg makes such ones
	}
	if len(b) > 12 && string(b[8:12]) == "KBXf" {
		return nil, errors.New("a keybox, not a keyring: gpg --export writes one")
	}
	if b, err = Dearmor(b); err != nil {
		return nil, err
	}
	keys, err := openpgp.ReadKeyRing(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	// Without a self-signature there is nothing that says what the key is for.
	keys = slices.DeleteFunc(keys, func(e *openpgp.Entity) bool {
		self, _ := e.PrimarySelfSignature()
		return self == nil
	})
	if len(keys) == 0 {
		return nil, errors.New("no keys in it")
	}
	return keys, nil
}

// Dearmor returns a keyring as packets, whose armour, if there is one, is taken off. Keyrings that follow each other are one.
func Dearmor(b []byte) ([]byte, error) {
	if !bytes.HasPrefix(bytes.TrimSpace(b), []byte("-----BEGIN")) {
		return b, nil
	}
	var packets []byte
	for in := bufio.NewReader(bytes.NewReader(b)); ; {
		block, err := armor.Decode(in)
		if err == io.EOF {
			return packets, nil
		}
		if err != nil {
			return nil, err
		}
		if block.Type != openpgp.PublicKeyType && block.Type != openpgp.PrivateKeyType {
			return nil, fmt.Errorf("%s is no key", block.Type)
		}
		more, err := io.ReadAll(block.Body)
		if err != nil {
			return nil, err
		}
		packets = append(packets, more...)
	}
}

// Verify implements Verifier.
func (g *GPG) Verify(data []byte, signatures [][]byte) (string, error) {
	var failed []string
	for _, blob := range signatures {
		packets, err := split(blob)
		if err != nil {
			failed = append(failed, err.Error())
			continue
		}
		for _, p := range packets {
			key, err := g.verify(data, p)
			if err == nil {
				return key, nil
			}
			if text := err.Error(); !slices.Contains(failed, text) {
				failed = append(failed, text)
			}
		}
	}
	if len(failed) == 0 {
		return "", errors.New("no signature in it")
	}
	if len(failed) > 3 {
		failed = append(failed[:3], "…")
	}
	return "", errors.New(strings.Join(failed, "; "))
}

// split cuts a sequence of packets, each of which is verified alone.
func split(blob []byte) ([][]byte, error) {
	var packets [][]byte
	for in := packet.NewOpaqueReader(bytes.NewReader(blob)); ; {
		p, err := in.Next()
		if err == io.EOF {
			return packets, nil
		}
		if err != nil {
			return nil, fmt.Errorf("not a signature: %w", err)
		}
		if len(packets) == maxSignatures {
			return nil, fmt.Errorf("more than %d signatures in one", maxSignatures)
		}
		var b bytes.Buffer
		if err := p.Serialize(&b); err != nil {
			return nil, err
		}
		packets = append(packets, b.Bytes())
	}
}

// verify verifies one signature. The same key may be in several keyrings, one of which does not know yet that it is revoked: the
// revocation counts. Of other differences, the one that is better for the key counts: its life was prolonged.
func (g *GPG) verify(data, signature []byte) (string, error) {
	p, err := packet.Read(bytes.NewReader(signature))
	if err != nil {
		return "", fmt.Errorf("not a signature: %w", err)
	}
	s, ok := p.(*packet.Signature)
	if !ok || s.IssuerKeyId == nil {
		return "", errors.New("not a signature that names its key")
	}
	id := fmt.Sprintf("%016X", *s.IssuerKeyId)
	if s.SigType != packet.SigTypeBinary {
		return "", fmt.Errorf("the signature of key %s is not one of a file", id)
	}
	// The library does not look at these two bytes, which the key has not signed.
	h, err := s.PrepareVerify()
	if err != nil {
		return "", fmt.Errorf("key %s: %w", id, err)
	}
	h.Write(data)
	h.Write(s.HashSuffix)
	if sum := h.Sum(nil); !bytes.Equal(sum[:2], s.HashTag[:]) {
		return "", fmt.Errorf("the signature of key %s is of something else", id)
	}
	result := fmt.Errorf("key %s is not known", id)
	good := ""
	for _, e := range g.keys {
		ring := keyring{openpgp.EntityList{e}}
		if len(ring.KeysById(*s.IssuerKeyId)) == 0 {
			continue
		}
		_, _, err := openpgp.VerifyDetachedSignature(ring, bytes.NewReader(data), bytes.NewReader(signature), nil)
		switch {
		case err == nil:
			good = fmt.Sprintf("%X", e.PrimaryKey.Fingerprint)
		case errors.Is(err, pgperrors.ErrKeyRevoked):
			return "", fmt.Errorf("key %s is revoked", id)
		case errors.Is(err, pgperrors.ErrKeyExpired):
			result = fmt.Errorf("key %s has expired, or is not valid yet by the clock of this machine", id)
		case errors.Is(err, pgperrors.ErrSignatureExpired):
			result = fmt.Errorf("the signature of key %s has expired, or is not valid yet by the clock of this machine", id)
		case errors.Is(err, pgperrors.ErrUnknownIssuer):
			result = fmt.Errorf("key %s is not one to sign with", id)
		default:
			result = fmt.Errorf("key %s: %w", id, err)
		}
	}
	if good == "" {
		return "", result
	}
	return good, nil
}

// keyring lets primary keys sign that say nothing about what they are for, as gpg does: old ones do not.
type keyring struct{ openpgp.EntityList }

func (k keyring) KeysByIdUsage(id uint64, usage byte) []openpgp.Key {
	keys := k.EntityList.KeysByIdUsage(id, usage)
	for _, key := range k.KeysById(id) {
		if key.PublicKey == key.Entity.PrimaryKey && key.SelfSignature != nil && !key.SelfSignature.FlagsValid {
			keys = append(keys, key)
		}
	}
	return keys
}

// gpgSigner signs with an OpenPGP key.
type gpgSigner struct{ key *openpgp.Entity }

// GPGSigner reads a secret key as gpg --export-secret-keys writes it, with --armor or without. If it is encrypted, the passphrase
// opens it. The key to use is named by the end of its fingerprint, if there are several.
func GPGSigner(r io.Reader, id string, passphrase []byte) (Signer, error) {
	keys, err := readKeys(r)
	if err != nil {
		return nil, err
	}
	var found *openpgp.Entity
	for _, e := range keys {
		if !strings.HasSuffix(fmt.Sprintf("%X", e.PrimaryKey.Fingerprint), strings.ToUpper(id)) || e.PrivateKey == nil {
			continue
		}
		if found != nil {
			return nil, errors.New("several secret keys: say which, by its fingerprint")
		}
		found = e
	}
	if found == nil {
		return nil, errors.New("no such secret key in it: gpg --export-secret-keys writes one")
	}
	if len(passphrase) > 0 {
		if err := found.DecryptPrivateKeys(passphrase); err != nil {
			return nil, fmt.Errorf("the passphrase does not open the key: %w", err)
		}
	}
	return gpgSigner{found}, nil
}

func (s gpgSigner) Scheme() string { return "gpg" }

func (s gpgSigner) Sign(data []byte) ([]byte, error) {
	var b bytes.Buffer
	if err := openpgp.DetachSign(&b, s.key, bytes.NewReader(data), nil); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
