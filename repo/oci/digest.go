package oci

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"
)

// Digest names a blob by its content: "sha256:" or "sha512:" and as many hexadecimal digits as belong to it.
type Digest string

// ParseDigest checks that s is a digest of an algorithm that this package knows.
func ParseDigest(s string) (Digest, error) {
	algorithm, digits, _ := strings.Cut(s, ":")
	size := map[string]int{"sha256": sha256.Size, "sha512": sha512.Size}[algorithm]
	b, err := hex.DecodeString(digits)
	if size == 0 || err != nil || len(b) != size || strings.ToLower(digits) != digits {
		return "", fmt.Errorf("%.200q is not a digest: want sha256: or sha512: and its hexadecimal digits", s)
	}
	return Digest(s), nil
}

// DigestOf returns the SHA-256 digest of a content.
func DigestOf(b []byte) Digest {
	sum := sha256.Sum256(b)
	return Digest("sha256:" + hex.EncodeToString(sum[:]))
}

// UnmarshalText refuses what is no digest.
func (d *Digest) UnmarshalText(b []byte) (err error) {
	*d, err = ParseDigest(string(b))
	return err
}

// newHash returns the hash of the digest's algorithm.
func (d Digest) newHash() hash.Hash {
	if strings.HasPrefix(string(d), "sha512:") {
		return sha512.New()
	}
	return sha256.New()
}

// check tells whether the sum of a hash is the digest.
func (d Digest) check(h hash.Hash) error {
	algorithm, _, _ := strings.Cut(string(d), ":")
	if got := algorithm + ":" + hex.EncodeToString(h.Sum(nil)); got != string(d) {
		return fmt.Errorf("the content has digest %s, not %s", got, d)
	}
	return nil
}

// verify tells whether a content has the digest.
func (d Digest) verify(b []byte) error {
	h := d.newHash()
	h.Write(b)
	return d.check(h)
}
