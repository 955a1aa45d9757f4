package uki

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
)

// Policy is a signed PCR policy: whoever has the private key says by it that secrets may be had when the PCRs have certain
// values. A secret is sealed in the TPM to the public key alone, by TPM2_PolicyAuthorize, and so can be had under each later
// system whose values the same key has signed. The TPM is defined by TCG's "TPM 2.0 Library", parts 1 and 3; how a policy
// looks as JSON by systemd-measure(1) and systemd-stub(7), which has a list of them for each bank in .pcrsig.
type Policy struct {
	PCRs      []int  `json:"pcrs"`
	Key       string `json:"pkfp,omitempty"` // fingerprint of the public key, see Fingerprint
	Ref       string `json:"ref,omitempty"`  // a word that the secret is sealed to as well
	Digest    string `json:"pol"`            // of the session after TPM2_PolicyPCR, by SHA-256, in hexadecimal
	ToSign    string `json:"tbs,omitempty"`  // what is to be signed, in hexadecimal, if it is signed elsewhere
	Signature string `json:"sig,omitempty"`  // of it, RSASSA-PKCS1-v1_5 with SHA-256, in base64
}

// PolicyKey is a key that signs policies, and what for.
type PolicyKey struct {
	Public crypto.PublicKey // nil: that of Signer
	Signer crypto.Signer    // nil: the policies are to be signed elsewhere
	Phases []string         // of the boot in which they are good; nil: Phases
	Ref    string           // "" for none
}

// Fingerprint returns how policies name a key: the SHA-256 of its PKCS #1 form, in hexadecimal. Only RSA keys have one, as
// systemd lets the TPM load no others.
func Fingerprint(key crypto.PublicKey) (string, error) {
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		return "", fmt.Errorf("key of type %T: PCR policies are signed with RSA", key)
	}
	return fmt.Sprintf("%x", sha256.Sum256(x509.MarshalPKCS1PublicKey(public))), nil
}

// pcrBytes is how many bytes a TPM of a PC has for a selection of its 24 PCRs.
const pcrBytes = 3

// policyPCR returns the digest of a policy session, with SHA-256, after TPM2_PolicyPCR for a PCR that has a value.
func policyPCR(bank Bank, pcr int, value []byte) [sha256.Size]byte {
	const command = 0x17f // TPM_CC_PolicyPCR
	algorithm := map[Bank]uint16{"sha1": 0x4, "sha256": 0xb, "sha384": 0xc, "sha512": 0xd}[bank]
	var selection [pcrBytes]byte
	selection[pcr/8] = 1 << (pcr % 8)
	values := sha256.Sum256(value)

	b := make([]byte, sha256.Size) // the digest of a new session
	b = binary.BigEndian.AppendUint32(b, command)
	b = binary.BigEndian.AppendUint32(b, 1) // selections
	b = binary.BigEndian.AppendUint16(b, algorithm)
	b = append(append(b, pcrBytes), selection[:]...)
	return sha256.Sum256(append(b, values[:]...))
}

// NewPolicy makes the policy for a prediction, signed if there is a signer.
func NewPolicy(p Prediction, key PolicyKey) (Policy, error) {
	value, err := hex.DecodeString(p.Value)
	if err != nil || p.Bank.hash() == nil || len(value) != p.Bank.hash().Size() || p.PCR < 0 || p.PCR >= 8*pcrBytes {
		return Policy{}, fmt.Errorf("PCR %d of bank %q: %q is no value of it", p.PCR, p.Bank, p.Value)
	}
	digest := policyPCR(p.Bank, p.PCR, value)
	policy := Policy{PCRs: []int{p.PCR}, Ref: key.Ref, Digest: hex.EncodeToString(digest[:])}
	if public := key.public(); public != nil {
		if policy.Key, err = Fingerprint(public); err != nil {
			return policy, err
		}
	}
	if key.Signer == nil {
		policy.ToSign = hex.EncodeToString(policy.toSign())
		return policy, nil
	}
	signed := sha256.Sum256(policy.toSign())
	signature, err := key.Signer.Sign(rand.Reader, signed[:], crypto.SHA256)
	if err != nil {
		return policy, fmt.Errorf("sign a PCR policy: %w", err)
	}
	policy.Signature = base64.StdEncoding.EncodeToString(signature)
	// A wrong key given for that of a signer would be noticed at the next boot only, which does not get its secrets.
	if err := policy.verify(key.public()); err != nil {
		return policy, fmt.Errorf("sign a PCR policy: %w: is the public key that of the private key?", err)
	}
	return policy, nil
}

func (k PolicyKey) public() crypto.PublicKey {
	if k.Public == nil && k.Signer != nil {
		return k.Signer.Public()
	}
	return k.Public
}

func (k PolicyKey) phases() []string {
	if k.Phases == nil {
		return Phases
	}
	return k.Phases
}

// toSign is what the TPM hashes to check the signature: the policy's digest and what refers to it, which is a hash by
// systemd's choice.
func (p Policy) toSign() []byte {
	b, _ := hex.DecodeString(p.Digest)
	if p.Ref != "" {
		ref := sha256.Sum256([]byte(p.Ref))
		b = append(b, ref[:]...)
	}
	return b
}

func (p Policy) verify(key crypto.PublicKey) error {
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("key of type %T: PCR policies are signed with RSA", key)
	}
	signature, err := base64.StdEncoding.DecodeString(p.Signature)
	if err != nil {
		return fmt.Errorf("signature: %w", err)
	}
	signed := sha256.Sum256(p.toSign())
	if rsa.VerifyPKCS1v15(public, crypto.SHA256, signed[:], signature) != nil {
		return errors.New("the signature does not verify")
	}
	return nil
}

// isOf tells whether the policy names the key.
func (p Policy) isOf(key *rsa.PublicKey) bool {
	if key == nil {
		return false
	}
	fingerprint, err := Fingerprint(key)
	return err == nil && fingerprint == p.Key
}

// SignPredictions makes the policies of a key for those predictions that are for one of its phases.
func SignPredictions(all []Prediction, key PolicyKey) (Policies, error) {
	var list Policies
	for _, p := range all {
		if !slices.Contains(key.phases(), p.Phase) {
			continue
		}
		policy, err := NewPolicy(p, key)
		if err != nil {
			return nil, err
		}
		list.Add(p.Bank, policy)
	}
	return list, nil
}

// AddPolicies appends a section .pcrsig to each profile, with the policies for it alone, which are good in no other. The hashes
// are those of the image behind its stub. With profiles named by their IDs, only they get one; in the others no secrets can be
// had. Where a key has no signer, there is room for signatures that JoinPolicies puts there. It returns all policies. ukify signs
// for the first .dtbauto alone in all profiles but the first one.
func (m *Image) AddPolicies(h *Hashes, keys []PolicyKey, only []string) (Policies, error) {
	if find(sections(h.image), ".linux") == nil {
		return nil, errors.New("PCR policies are for a UKI: this has no kernel")
	}
	var phases []string
	for _, key := range keys {
		phases = append(phases, key.phases()...)
	}
	slices.Sort(phases)
	predictions := h.Predict(slices.Compact(phases))
	var all Policies
	for n := range m.Bootable() {
		if len(only) > 0 && !slices.Contains(only, m.ID(n)) {
			continue
		}
		var own Policies
		for _, variant := range variantsOf(predictions, n) {
			for _, key := range keys {
				list, err := SignPredictions(variant, key)
				if err != nil {
					return nil, err
				}
				own.Merge(list)
			}
		}
		all.Merge(own)
		profile := &m.Profiles[min(n+1, len(m.Profiles)-1)]
		if slices.ContainsFunc(*profile, func(s Section) bool { return s.Name == sectionPolicies }) {
			return nil, fmt.Errorf("section %s: profile %d has one already", sectionPolicies, n)
		}
		*profile = append(*profile, NewSection(sectionPolicies, Bytes(own.section())))
	}
	return all, nil
}

const sectionPolicies = ".pcrsig"

func sections(m *Image) []*Section {
	list, _ := m.Profile(0)
	return list
}

// variantsOf returns the predictions for a profile, those for each .dtbauto by themselves.
func variantsOf(all []Prediction, profile int) [][]Prediction {
	var list [][]Prediction
	for _, p := range all {
		if p.Profile != profile {
			continue
		}
		if n := len(list); n == 0 || list[n-1][0].DTB != p.DTB {
			list = append(list, nil)
		}
		list[len(list)-1] = append(list[len(list)-1], p)
	}
	return list
}

// section is the text of .pcrsig: with room for signatures, if some are missing. A signature of 4096 bits has 684 bytes.
func (p Policies) section() []byte {
	const room = 1024
	text := []byte(p.Text())
	for _, b := range p {
		for _, policy := range b.Policies {
			if policy.Signature == "" {
				text = append(text, bytes.Repeat([]byte{' '}, room)...)
			}
		}
	}
	return text
}

// ProfilePolicies returns the policies in .pcrsig of a profile, or none.
func (m *Image) ProfilePolicies(profile int) (Policies, error) {
	sections, err := m.Profile(profile)
	if err != nil {
		return nil, err
	}
	s := find(sections, sectionPolicies)
	if s == nil {
		return nil, nil
	}
	return s.policies()
}

// policies reads the section as .pcrsig.
func (s *Section) policies() (Policies, error) {
	text, err := s.text()
	if err != nil {
		return nil, err
	}
	list, err := ParsePolicies([]byte(text))
	if err != nil {
		return nil, fmt.Errorf("section %s: %w", s.Name, err)
	}
	return list, nil
}

// PolicyKey returns the public key in .pcrpkey, which secrets are sealed to as a rule, or nil if there is none.
func (m *Image) PolicyKey() (*rsa.PublicKey, error) {
	s := find(sections(m), ".pcrpkey")
	if s == nil {
		return nil, nil
	}
	text, err := s.text()
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("section .pcrpkey: not a PEM file")
	}
	key, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("section .pcrpkey: %w", err)
	}
	public, ok := key.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("section .pcrpkey: key of type %T, want RSA", key)
	}
	return public, nil
}
