package main

import (
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"
)

// secretsDir is on the physical root: each image has a /var of its own.
const secretsDir = "/sysroot/secrets"

// Files that systemd-stub and the initramfs hand over.
const (
	publicKeyFile  = "/run/systemd/tpm2-pcr-public-key.pem"
	signaturesFile = "/run/systemd/tpm2-pcr-signature.json"
)

// secrets prints the PCRs, and seals or unseals.
func secrets() error {
	// Not by os.OpenFile, as linuxtpm does, which makes it non-blocking: then an answer that is not there yet reads as nothing.
	fd, err := unix.Open("/dev/tpmrm0", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	tpm := transport.FromReadWriteCloser(os.NewFile(uintptr(fd), "/dev/tpmrm0"))
	defer tpm.Close()
	for bank, id := range map[string]tpm2.TPMIAlgHash{"sha1": tpm2.TPMAlgSHA1, "sha256": tpm2.TPMAlgSHA256,
		"sha384": tpm2.TPMAlgSHA384, "sha512": tpm2.TPMAlgSHA512} {
		for _, pcr := range []uint{7, 11, 12} {
			r, err := tpm2.PCRRead{PCRSelectionIn: selection(id, pcr)}.Execute(tpm)
			if err != nil {
				return fmt.Errorf("PCR %d: %w", pcr, err)
			}
			for _, d := range r.PCRValues.Digests {
				say("pcr %d:%s=%x", pcr, bank, d.Buffer)
			}
		}
	}
	// The key that counts is that of the secrets, not what is handed over.
	keyText, err := os.ReadFile(filepath.Join(secretsDir, "key"))
	if errors.Is(err, os.ErrNotExist) {
		if _, err := os.Stat(signaturesFile); err != nil {
			return nil // nothing to seal to, and nothing to unseal
		}
		keyText, err = os.ReadFile(publicKeyFile)
	}
	if err != nil {
		return err
	}
	s := sealer{tpm: tpm}
	if err := s.open(keyText); err != nil {
		return err
	}
	defer s.close()
	if _, err := os.Stat(secretsDir); err != nil {
		if err := os.Mkdir(secretsDir, 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(secretsDir, "key"), keyText, 0o600); err != nil {
			return err
		}
		signatures, err := os.ReadFile(signaturesFile)
		if err == nil {
			err = os.WriteFile(filepath.Join(secretsDir, "signatures"), signatures, 0o600)
		}
		if err != nil {
			return err
		}
		for name, pcr12 := range names {
			if err := s.seal(name, pcr12); err != nil {
				return fmt.Errorf("seal %s: %w", name, err)
			}
			say("sealed %s", name)
		}
		return nil
	}
	for name, pcr12 := range names {
		if text, err := s.unseal(name, pcr12); err != nil {
			say("refused %s: %v", name, err)
		} else {
			say("unsealed %s: %s", name, text)
		}
	}
	return nil
}

// names are the secrets, and whether PCR 12 must be the same.
var names = map[string]bool{"kernel": false, "config": true}

func selection(bank tpm2.TPMIAlgHash, pcr uint) tpm2.TPMLPCRSelection {
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: bank, PCRSelect: tpm2.PCClientCompatible.PCRs(pcr)}}}
}

// sealer has the storage key of the TPM, and the key that approves of policies.
type sealer struct {
	tpm     transport.TPM
	primary *tpm2.CreatePrimaryResponse
	signer  *tpm2.LoadExternalResponse
	fp      string // of the key, as in the signatures
}

func (s *sealer) open(keyText []byte) (err error) {
	block, _ := pem.Decode(keyText)
	if block == nil {
		return errors.New("the key for policies is no PEM")
	}
	parsed, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return err
	}
	key, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("the key for policies is %T", parsed)
	}
	sum := sha256.Sum256(x509.MarshalPKCS1PublicKey(key))
	s.fp = hex.EncodeToString(sum[:])
	public := tpm2.TPMTPublic{Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{SignEncrypt: true, Decrypt: true, UserWithAuth: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: tpm2.TPMKeyBits(key.N.BitLen()),
			Exponent: uint32(key.E)}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()})}
	if s.signer, err = (tpm2.LoadExternal{InPublic: tpm2.New2B(public), Hierarchy: tpm2.TPMRHOwner}).Execute(s.tpm); err != nil {
		return fmt.Errorf("load the key for policies: %w", err)
	}
	s.primary, err = tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(s.tpm)
	if err != nil {
		return fmt.Errorf("storage key: %w", err)
	}
	return nil
}

func (s *sealer) close() {
	for _, h := range []tpm2.TPMHandle{s.signer.ObjectHandle, s.primary.ObjectHandle} {
		tpm2.FlushContext{FlushHandle: h}.Execute(s.tpm)
	}
}

func (s *sealer) parent() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: s.primary.ObjectHandle, Name: s.primary.Name, Auth: tpm2.PasswordAuth(nil)}
}

// seal makes a secret that a session with the policy opens: approved by the key, and with the present PCR 12.
func (s *sealer) seal(name string, pcr12 bool) error {
	session, end, err := tpm2.PolicySession(s.tpm, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
	if err != nil {
		return err
	}
	defer end()
	_, err = tpm2.PolicyAuthorize{PolicySession: session.Handle(), KeySign: s.signer.Name,
		CheckTicket: tpm2.TPMTTKVerified{Tag: tpm2.TPMSTVerified, Hierarchy: tpm2.TPMRHOwner}}.Execute(s.tpm)
	if err == nil && pcr12 {
		_, err = tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: selection(tpm2.TPMAlgSHA256, 12)}.Execute(s.tpm)
	}
	if err != nil {
		return err
	}
	policy, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(s.tpm)
	if err != nil {
		return err
	}
	sealed, err := tpm2.Create{ParentHandle: s.parent(),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: []byte("the secret of " + name)})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: policy.PolicyDigest,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true}})}.Execute(s.tpm)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(secretsDir, name+".private"), tpm2.Marshal(sealed.OutPrivate), 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(secretsDir, name+".public"), tpm2.Marshal(sealed.OutPublic), 0o600)
}

// signature is a policy that a key has approved of.
type signature struct {
	PCRs []int  `json:"pcrs"`
	Key  string `json:"pkfp"`
	Pol  string `json:"pol"`
	Sig  string `json:"sig"`
}

// unseal opens a secret. It tries every signature there is, those of the boot that made the secret and those for other values of
// PCR 11 as well, so that it is the TPM that refuses.
func (s *sealer) unseal(name string, pcr12 bool) (string, error) {
	var signatures []signature
	for _, file := range []string{signaturesFile, filepath.Join(secretsDir, "signatures")} {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var banks map[string][]signature
		if err == nil {
			err = json.Unmarshal(text, &banks)
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		signatures = append(signatures, banks["sha256"]...)
	}
	private, err := read[tpm2.TPM2BPrivate](name + ".private")
	if err != nil {
		return "", err
	}
	public, err := read[tpm2.TPM2BPublic](name + ".public")
	if err != nil {
		return "", err
	}
	loaded, err := tpm2.Load{ParentHandle: s.parent(), InPrivate: *private, InPublic: *public}.Execute(s.tpm)
	if err != nil {
		return "", err
	}
	defer tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(s.tpm)
	var reasons []error
	for _, sig := range signatures {
		if sig.Key != s.fp || len(sig.PCRs) != 1 || sig.PCRs[0] != 11 {
			continue
		}
		secret, err := s.try(loaded, sig, pcr12)
		if err == nil {
			return secret, nil
		}
		if !strings.Contains(fmt.Sprint(reasons), err.Error()) {
			reasons = append(reasons, err)
		}
	}
	if reasons == nil {
		return "", errors.New("no policy is signed with the key")
	}
	return "", fmt.Errorf("%v", reasons)
}

func (s *sealer) try(loaded *tpm2.LoadResponse, sig signature, pcr12 bool) (string, error) {
	approved, err := hex.DecodeString(sig.Pol)
	if err != nil {
		return "", err
	}
	raw, err := base64.StdEncoding.DecodeString(sig.Sig)
	if err != nil {
		return "", err
	}
	digest := sha256.Sum256(approved)
	ticket, err := tpm2.VerifySignature{KeyHandle: s.signer.ObjectHandle, Digest: tpm2.TPM2BDigest{Buffer: digest[:]},
		Signature: tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgRSASSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA,
			&tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: raw}})}}.Execute(s.tpm)
	if err != nil {
		return "", fmt.Errorf("the signature of the policy: %w", err)
	}
	session, end, err := tpm2.PolicySession(s.tpm, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		return "", err
	}
	defer end()
	if _, err := (tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: selection(tpm2.TPMAlgSHA256, 11)}).Execute(s.tpm); err != nil {
		return "", err
	}
	_, err = tpm2.PolicyAuthorize{PolicySession: session.Handle(), ApprovedPolicy: tpm2.TPM2BDigest{Buffer: approved},
		KeySign: s.signer.Name, CheckTicket: ticket.Validation}.Execute(s.tpm)
	if err != nil {
		return "", fmt.Errorf("PolicyAuthorize: %w", err)
	}
	if pcr12 {
		if _, err := (tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: selection(tpm2.TPMAlgSHA256, 12)}).Execute(s.tpm); err != nil {
			return "", err
		}
	}
	secret, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: session}}.Execute(s.tpm)
	if err != nil {
		return "", fmt.Errorf("Unseal: %w", err)
	}
	return string(secret.OutData.Buffer), nil
}

func read[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](name string) (*T, error) {
	b, err := os.ReadFile(filepath.Join(secretsDir, name))
	if err != nil {
		return nil, err
	}
	return tpm2.Unmarshal[T, P](b)
}
