// Package sign makes and verifies the signatures of OSTree: those of commits, summaries and static deltas.
//
// What is signed are bytes: a commit object, the file summary, the superblock of a static delta. Signatures stand beside them, in a
// dictionary a{sv}: the detached metadata of a commit (objects/xx/….commitmeta), the file summary.sig, the third member of a signed
// superblock (see package delta). Each scheme has a key in it, whose value is a list of signatures, aay:
//
//	ostree.gpgsigs       binary OpenPGP signature packets, RFC 9580; several may follow each other in one element
//	ostree.sign.ed25519  64 bytes, RFC 8032
//	ostree.sign.spki     whatever the key makes: Ed25519; ECDSA with SHA-256 in ASN.1; RSA PKCS #1 v1.5 with SHA-256
//
// One valid signature by one trusted key is enough for a scheme. A scheme that knows no key accepts nothing. Which schemes are asked
// is a Policy. Nothing in the dictionary says who is to be trusted: keys come from the configuration of the remote and from the
// directories of the system alone, see LoadGPG and LoadKeys.
package sign

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// ErrUnsigned tells that there is no signature of a scheme that is asked for.
var ErrUnsigned = errors.New("not signed")

// ErrUntrusted tells that there are signatures, but no good one by a key that is trusted.
var ErrUntrusted = errors.New("no valid signature of a trusted key")

// A Verifier checks signatures of one scheme with the keys that it trusts.
type Verifier interface {
	// Scheme is the name of the scheme: "gpg", "ed25519", "spki".
	Scheme() string
	// Verify returns the key that has signed the data, by its fingerprint, if one of the signatures is good. The error says what is
	// wrong with each.
	Verify(data []byte, signatures [][]byte) (key string, err error)
}

// A Signer signs with one secret key.
type Signer interface {
	Scheme() string
	Sign(data []byte) ([]byte, error)
}

// schemes are their names, in the order in which their signatures are written.
var schemes = []string{"gpg", "ed25519", "spki"}

// keys are the keys of the schemes in dictionaries.
var keys = map[string]string{"gpg": "ostree.gpgsigs", "ed25519": "ostree.sign.ed25519", "spki": "ostree.sign.spki"}

// Limits of what stands in a dictionary. A hundred keys that each sign is more than anybody has.
const (
	maxSignatures = 128
	maxSignature  = 64 << 10
)

// Signatures are the signatures of one thing, by scheme.
type Signatures map[string][][]byte

// Parse reads the signatures in a dictionary, a{sv} in serialised form. There may be none in it.
func Parse(dictionary []byte) (Signatures, error) {
	v, err := gvariant.New("a{sv}", dictionary)
	if err != nil {
		return nil, fmt.Errorf("signatures: %w", err)
	}
	return ParseValue(v)
}

// ParseValue reads the signatures in a dictionary.
func ParseValue(v gvariant.Value) (Signatures, error) {
	s := Signatures{}
	for _, scheme := range schemes {
		key := keys[scheme]
		list, ok, err := v.Lookup(key)
		if err == nil && !ok {
			continue
		}
		if err == nil {
			s[scheme], err = byteStrings(list)
		}
		if err != nil {
			return nil, fmt.Errorf("signatures: %s: %w", key, err)
		}
	}
	return s, nil
}

func byteStrings(v gvariant.Value) ([][]byte, error) {
	if v.Type() != "aay" {
		return nil, fmt.Errorf("type %s, and aay is expected", v.Type())
	}
	n, err := v.Len()
	if err != nil {
		return nil, err
	}
	if n > maxSignatures {
		return nil, fmt.Errorf("%d signatures, more than %d", n, maxSignatures)
	}
	list := make([][]byte, n)
	for i := range list {
		e, err := v.At(i)
		if err != nil {
			return nil, err
		}
		if list[i] = e.Bytes(); len(list[i]) > maxSignature {
			return nil, fmt.Errorf("a signature of %d bytes", len(list[i]))
		}
	}
	return list, nil
}

// Policy says who must have signed: of each group, at least one member must find a good signature. An empty policy asks for nothing.
type Policy [][]Verifier

// Schemes returns the schemes of each group: "ed25519 or spki".
func (p Policy) Schemes() []string {
	groups := []string{}
	for _, group := range p {
		var schemes []string
		for _, v := range group {
			schemes = append(schemes, v.Scheme())
		}
		groups = append(groups, strings.Join(schemes, " or "))
	}
	return groups
}

// Verify checks the signatures of the data and returns who has signed, one for each group: "gpg 4B4F…". The error is ErrUnsigned or
// ErrUntrusted.
func (p Policy) Verify(data []byte, s Signatures) ([]string, error) {
	var who []string
	for _, group := range p {
		key, err := verify(group, data, s)
		if err != nil {
			return nil, err
		}
		who = append(who, key)
	}
	return who, nil
}

func verify(group []Verifier, data []byte, s Signatures) (string, error) {
	var asked []string
	var failed error
	for _, v := range group {
		asked = append(asked, v.Scheme())
		if len(s[v.Scheme()]) == 0 {
			continue
		}
		key, err := v.Verify(data, s[v.Scheme()])
		if err == nil {
			return v.Scheme() + " " + key, nil
		}
		failed = errors.Join(failed, fmt.Errorf("%s: %w", v.Scheme(), err))
	}
	if failed == nil {
		return "", fmt.Errorf("%w with %s", ErrUnsigned, strings.Join(asked, ", "))
	}
	return "", fmt.Errorf("%w: %s", ErrUntrusted, strings.ReplaceAll(failed.Error(), "\n", "; "))
}

// Add signs the data and returns the dictionary with the signatures added to what stands in it already, which may be nothing: nil.
func Add(dictionary, data []byte, signers ...Signer) ([]byte, error) {
	v, err := gvariant.New("a{sv}", dictionary)
	if err != nil {
		return nil, fmt.Errorf("signatures: %w", err)
	}
	s, err := ParseValue(v)
	if err != nil {
		return nil, err
	}
	changed := map[string]bool{}
	for _, signer := range signers {
		signature, err := signer.Sign(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", signer.Scheme(), err)
		}
		scheme := signer.Scheme()
		s[scheme] = append(s[scheme], signature)
		changed[scheme] = true
	}
	n, err := v.Len()
	if err != nil {
		return nil, err
	}
	var entries gvariant.List // in the order in which they stand
	for i := range n {
		key, value, err := v.Entry(i)
		if err != nil {
			return nil, err
		}
		if !changed[schemeOf(key)] {
			entries = append(entries, gvariant.Tuple{key, value})
		}
	}
	for _, scheme := range schemes {
		if !changed[scheme] {
			continue
		}
		list := gvariant.List{}
		for _, signature := range s[scheme] {
			list = append(list, signature)
		}
		value, err := gvariant.Encode("aay", list)
		if err != nil {
			return nil, err
		}
		entries = append(entries, gvariant.Tuple{keys[scheme], value})
	}
	out, err := gvariant.Encode("a{sv}", entries)
	return out.Bytes(), err
}

func schemeOf(key string) string {
	for scheme, k := range keys {
		if k == key {
			return scheme
		}
	}
	return ""
}

func contains(list [][]byte, b []byte) bool {
	for _, e := range list {
		if bytes.Equal(e, b) {
			return true
		}
	}
	return false
}
