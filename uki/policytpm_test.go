package uki_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/uki"
)

const secret = "the secret"

// tpm is a TPM with a secret in it that is sealed to a key.
type tpm struct {
	t      *testing.T
	conn   transport.TPM
	key    *tpm2.LoadExternalResponse
	sealed *tpm2.CreatePrimaryResponse
}

// seal starts a TPM that gives the secret away under policies that the key has signed.
func seal(t *testing.T, key *rsa.PublicKey, ref string) *tpm {
	d := &tpm{t: t, conn: transport.FromReadWriter(vm.TPM(t))}
	var err error
	d.key, err = tpm2.LoadExternal{Hierarchy: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{SignEncrypt: true, Decrypt: true, UserWithAuth: true},
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: tpm2.TPMKeyBits(key.N.BitLen())}),
		Unique:           tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()}),
	})}.Execute(d.conn)
	if err != nil {
		t.Fatal(err)
	}
	// The policy of the secret is that of a session after PolicyAuthorize alone, which forgets what was before.
	calculator, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		t.Fatal(err)
	}
	authorize := tpm2.PolicyAuthorize{PolicyRef: tpm2.TPM2BDigest{Buffer: policyRef(ref)}, KeySign: d.key.Name}
	if err := authorize.Update(calculator); err != nil {
		t.Fatal(err)
	}
	d.sealed, err = tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: []byte(secret)})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true},
			AuthPolicy:       tpm2.TPM2BDigest{Buffer: calculator.Hash().Digest},
		}),
	}.Execute(d.conn)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func policyRef(ref string) []byte {
	if ref == "" {
		return nil
	}
	sum := sha256.Sum256([]byte(ref))
	return sum[:]
}

// boot extends PCR 11 as the stub and systemd do: with names and contents of sections, and words.
func (d *tpm) boot(sections, phase string) {
	extend := func(data string) {
		_, err := tpm2.PCREvent{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(11), Auth: tpm2.PasswordAuth(nil)},
			EventData: tpm2.TPM2BEvent{Buffer: []byte(data)}}.Execute(d.conn)
		if err != nil {
			d.t.Fatal(err)
		}
	}
	for section := range strings.SplitSeq(sections, "|") {
		name, content, _ := strings.Cut(section, "=")
		extend(name + "\x00")
		extend(content)
	}
	for word := range strings.SplitSeq(phase, ":") {
		extend(word)
	}
}

// unseal asks for the secret under one of the policies.
func (d *tpm) unseal(bank uki.Bank, p uki.Policy) (string, error) {
	algorithm := map[uki.Bank]tpm2.TPMAlgID{"sha1": tpm2.TPMAlgSHA1, "sha256": tpm2.TPMAlgSHA256, "sha384": tpm2.TPMAlgSHA384,
		"sha512": tpm2.TPMAlgSHA512}[bank]
	digest, err := hex.DecodeString(p.Digest)
	if err != nil {
		d.t.Fatal(err)
	}
	signature, err := base64.StdEncoding.DecodeString(p.Signature)
	if err != nil {
		d.t.Fatal(err)
	}
	session, flush, err := tpm2.PolicySession(d.conn, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		d.t.Fatal(err)
	}
	defer flush()
	_, err = tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: algorithm, PCRSelect: tpm2.PCClientCompatible.PCRs(uint(p.PCRs[0]))}}}}.Execute(d.conn)
	if err != nil {
		d.t.Fatal(err)
	}
	signed := sha256.Sum256(append(digest, policyRef(p.Ref)...))
	verified, err := tpm2.VerifySignature{KeyHandle: d.key.ObjectHandle, Digest: tpm2.TPM2BDigest{Buffer: signed[:]},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA,
			&tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: signature}})}}.Execute(d.conn)
	if err != nil {
		return "", err
	}
	_, err = tpm2.PolicyAuthorize{PolicySession: session.Handle(), ApprovedPolicy: tpm2.TPM2BDigest{Buffer: digest},
		PolicyRef: tpm2.TPM2BDigest{Buffer: policyRef(p.Ref)}, KeySign: d.key.Name, CheckTicket: verified.Validation}.Execute(d.conn)
	if err != nil {
		return "", err
	}
	out, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: d.sealed.ObjectHandle, Name: d.sealed.Name, Auth: session}}.Execute(d.conn)
	if err != nil {
		return "", err
	}
	return string(out.OutData.Buffer), nil
}

// tryAll asks for the secret under each policy of a profile.
func (d *tpm) tryAll(all uki.Policies) bool {
	for _, b := range all {
		for _, p := range b.Policies {
			if s, err := d.unseal(b.Bank, p); err == nil && s == secret {
				return true
			}
		}
	}
	return false
}

// A TPM gives a secret away that is sealed to a key when what is booted is what the key has signed, and for nothing else: not
// after a byte of the command line has changed, not in another profile, not in another phase, not under another key's policy.
func TestPoliciesInTPM(t *testing.T) {
	key, other := newKey(t), newKey(t)
	section := func(name, text string) uki.Section { return uki.NewSection(name, uki.Text(text)) }
	m := &uki.Image{Profiles: [][]uki.Section{
		{section(".cmdline", "quiet"), section(".linux", "kernel")},
		{section(".profile", "ID=main")},
		{section(".profile", "ID=rescue"), section(".cmdline", "rescue")},
	}}
	const (
		main   = ".linux=kernel|.cmdline=quiet|.profile=ID=main"
		rescue = ".linux=kernel|.cmdline=rescue|.profile=ID=rescue"
		phase  = "enter-initrd"
	)
	hashes, err := uki.HashSections(m, uki.Banks)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.AddPolicies(hashes, []uki.PolicyKey{{Signer: key, Phases: []string{phase}}, {Signer: key, Phases: []string{phase}, Ref: "initrd"}}, nil); err != nil {
		t.Fatal(err)
	}
	var policies [2]uki.Policies
	for n := range policies {
		if policies[n], err = m.ProfilePolicies(n); err != nil || len(policies[n]) != len(uki.Banks) {
			t.Fatal(policies[n], err)
		}
	}
	foreign, err := uki.SignPredictions(hashes.Predict([]string{phase}), uki.PolicyKey{Signer: other, Phases: []string{phase}})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		ref, sections, phase string
		policies             uki.Policies
		want                 bool
	}{
		"the same":               {"", main, phase, policies[0], true},
		"rescue":                 {"", rescue, phase, policies[1], true},
		"with a reference":       {"initrd", main, phase, policies[0], true},
		"another reference":      {"other", main, phase, policies[0], false},
		"a byte of .cmdline":     {"", strings.Replace(main, "quiet", "quieT", 1), phase, policies[0], false},
		"main for rescue":        {"", rescue, phase, policies[0], false},
		"rescue for main":        {"", main, phase, policies[1], false},
		"a later phase":          {"", main, "enter-initrd:leave-initrd", policies[0], false},
		"another key's policies": {"", main, phase, foreign, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := seal(t, &key.PublicKey, c.ref)
			d.boot(c.sections, c.phase)
			if got := d.tryAll(c.policies); got != c.want {
				t.Errorf("unsealed: %v, want %v", got, c.want)
			}
		})
	}
	// Each bank by itself, with the policies without a reference.
	d := seal(t, &key.PublicKey, "")
	d.boot(main, phase)
	for _, b := range policies[0] {
		if s, err := d.unseal(b.Bank, b.Policies[0]); err != nil || s != secret {
			t.Errorf("bank %s: %q, %v", b.Bank, s, err)
		}
	}
}

func newKey(t testing.TB) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return key
}
