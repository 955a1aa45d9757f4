// Package fsverity computes, parses and enforces fs-verity file digests.
//
// fs-verity protects a read-only file by a Merkle tree over its blocks. With the parameters that composefs uses
// (4096-byte blocks, no salt) the tree is built like this: every block, the last one padded with zeros, is hashed;
// the hashes are packed into blocks of the next level, again padded with zeros, until one hash is left: the root hash.
// A file of at most one block has no tree, its root hash is the hash of that block; an empty file has a root hash of
// zeros. The file digest is the hash of a 256-byte descriptor that holds the parameters, the file size and the root
// hash. The definition is in the kernel's Documentation/filesystems/fsverity.rst.
//
// The package has two halves: the digest in userspace ([Digester], [Of], [OfReader]), which needs no kernel support,
// and the kernel's enforcement ([Enable], [Measure]).
package fsverity

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"fmt"
)

// BlockSize is the size in bytes of a Merkle tree block, for data and for hashes.
const BlockSize = 4096

// Algorithm is a hash algorithm, with the numbers of the kernel's fs-verity interface (FS_VERITY_HASH_ALG_*).
type Algorithm uint8

// The algorithms that fs-verity defines.
const (
	SHA256 Algorithm = 1
	SHA512 Algorithm = 2
)

// Size returns the length of a digest in bytes: 32 or 64, and 0 for anything that is not an algorithm.
func (a Algorithm) Size() int {
	switch a {
	case SHA256:
		return 32
	case SHA512:
		return 64
	}
	return 0
}

// String returns "sha256" or "sha512".
func (a Algorithm) String() string {
	switch a {
	case SHA256:
		return "sha256"
	case SHA512:
		return "sha512"
	}
	return fmt.Sprintf("algorithm %d", uint8(a))
}

// Name returns the name that composefs repositories use, which carries the block size as a power of two:
// "fsverity-sha256-12" or "fsverity-sha512-12".
func (a Algorithm) Name() string {
	return "fsverity-" + a.String() + "-12"
}

// ParseAlgorithm reads "sha256" or "sha512", also in the long form that [Algorithm.Name] returns.
func ParseAlgorithm(s string) (Algorithm, error) {
	for _, a := range []Algorithm{SHA256, SHA512} {
		if s == a.String() || s == a.Name() {
			return a, nil
		}
	}
	return 0, fmt.Errorf("unknown fs-verity algorithm %q: want fsverity-sha256-12 or fsverity-sha512-12", s)
}

// Digest is the fs-verity digest of a file. The zero value means "no digest". Digests are comparable and may be used
// as map keys.
type Digest struct {
	alg Algorithm
	sum [64]byte
}

// MakeDigest makes a digest from the raw bytes of its hash, which must have the length of the algorithm.
func MakeDigest(a Algorithm, sum []byte) (Digest, error) {
	if a.Size() == 0 || len(sum) != a.Size() {
		return Digest{}, fmt.Errorf("a digest of %d bytes is not of %v", len(sum), a)
	}
	d := Digest{alg: a}
	copy(d.sum[:], sum)
	return d, nil
}

// ParseHex reads a digest of 64 (sha256) or 128 (sha512) lower-case hexadecimal digits. Upper case is refused: a digest
// is also a file name, and two spellings would be two names.
func ParseHex[T string | []byte](s T) (Digest, error) {
	var d Digest
	switch len(s) {
	case 64:
		d.alg = SHA256
	case 128:
		d.alg = SHA512
	default:
		return Digest{}, fmt.Errorf("digest %q: %d characters, want 64 (sha256) or 128 (sha512)", shorten(string(s)), len(s))
	}
	for k := range len(s) {
		c := s[k]
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			return Digest{}, fmt.Errorf("digest %q: upper case, want lower-case hexadecimal digits", shorten(string(s)))
		default:
			return Digest{}, fmt.Errorf("digest %q: not hexadecimal", shorten(string(s)))
		}
		d.sum[k/2] = d.sum[k/2]<<4 | c
	}
	return d, nil
}

// ParseObjectPath reads a digest from the path of its object below objects/: two hexadecimal digits, a slash and the
// rest.
func ParseObjectPath(p string) (Digest, error) {
	if len(p) < 3 || p[2] != '/' {
		return Digest{}, fmt.Errorf("object path %q: want two hexadecimal digits, a slash and the rest", shorten(p))
	}
	return ParseHex(p[:2] + p[3:])
}

func shorten(s string) string {
	if len(s) > 140 {
		return s[:140] + "..."
	}
	return s
}

// Algorithm returns the algorithm, 0 for the zero digest.
func (d Digest) Algorithm() Algorithm { return d.alg }

// Compare orders digests as their texts are ordered.
func (d Digest) Compare(o Digest) int {
	return cmp.Or(bytes.Compare(d.sum[:], o.sum[:]), cmp.Compare(d.alg, o.alg))
}

// IsZero reports whether d is the zero value, "no digest".
func (d Digest) IsZero() bool { return d.alg == 0 }

// Bytes returns the raw hash, 32 or 64 bytes.
func (d Digest) Bytes() []byte { return d.sum[:d.alg.Size()] }

// String returns the lower-case hexadecimal digits, "" for the zero digest.
func (d Digest) String() string { return hex.EncodeToString(d.Bytes()) }

// FileName returns the last part of ObjectPath, the name of the object in its directory.
func (d Digest) FileName() string {
	if d.IsZero() {
		return ""
	}
	return hex.EncodeToString(d.sum[1:d.alg.Size()])
}

// AppendBinary appends the raw hash. The error is always nil.
func (d Digest) AppendBinary(b []byte) ([]byte, error) {
	return append(b, d.sum[:d.alg.Size()]...), nil
}

// AppendText appends the lower-case hexadecimal digits. The error is always nil.
func (d Digest) AppendText(b []byte) ([]byte, error) {
	return hex.AppendEncode(b, d.sum[:d.alg.Size()]), nil
}

// ObjectPath returns where the object with this digest is found below objects/: the first two digits, a slash and the
// rest.
func (d Digest) ObjectPath() string {
	s := d.String()
	if s == "" {
		return ""
	}
	return s[:2] + "/" + s[2:]
}
