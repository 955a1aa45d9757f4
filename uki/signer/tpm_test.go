package signer

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// startTPM starts a TPM that is empty, names it in the environment and returns its socket.
func startTPM(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // a path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "tpm")
	c := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--server", "type=unixio,path="+socket,
		"--ctrl", "type=unixio,path="+socket+".ctrl", "--flags", "startup-clear,not-need-init")
	if err := c.Start(); err != nil {
		t.Fatalf("%v: run \"make setup\"", err)
	}
	t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		os.RemoveAll(dir)
	})
	t.Setenv(TPMVariable, socket)
	for range 200 {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		time.Sleep(25 * time.Millisecond)
	}
	t.Fatal("swtpm does not make its socket")
	return ""
}

// tpm connects to the TPM for the time of f: it has one user at a time.
func tpm(t *testing.T, f func(transport.TPM) error) {
	t.Helper()
	c, err := connectTPM()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := f(c); err != nil {
		t.Fatal(err)
	}
}

// signing is the template of a key for signatures, with the scheme RSASSA or, if that is 0, any.
func signing(scheme tpm2.TPMAlgID) tpm2.TPMTPublic {
	s := tpm2.TPMTRSAScheme{Scheme: tpm2.TPMAlgNull}
	switch scheme {
	case tpm2.TPMAlgRSASSA:
		s = tpm2.TPMTRSAScheme{Scheme: scheme, Details: tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256})}
	case tpm2.TPMAlgRSAPSS:
		s = tpm2.TPMTRSAScheme{Scheme: scheme, Details: tpm2.NewTPMUAsymScheme(scheme, &tpm2.TPMSSigSchemeRSAPSS{HashAlg: tpm2.TPMAlgSHA256})}
	}
	return tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, SignEncrypt: true},
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{Scheme: s, KeyBits: 2048}),
	}
}

// persist makes a key with a persistent handle, and a password unless that is empty.
func persist(t *testing.T, handle tpm2.TPMHandle, template tpm2.TPMTPublic, password string) {
	t.Helper()
	tpm(t, func(c transport.TPM) error {
		made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(template),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: []byte(password)}}},
		}.Execute(c)
		if err != nil {
			return err
		}
		_, err = tpm2.EvictControl{Auth: tpm2.TPMRHOwner, PersistentHandle: handle,
			ObjectHandle: &tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name}}.Execute(c)
		if err != nil {
			return err
		}
		_, err = tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(c)
		return err
	})
}

// child makes a key below a parent, as a key file.
func child(t *testing.T, parent tpm2.TPMTPublic, rsaParent bool) []byte {
	t.Helper()
	var file tpmKeyASN1
	tpm(t, func(c transport.TPM) error {
		made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(parent)}.Execute(c)
		if err != nil {
			return err
		}
		key, err := tpm2.Create{ParentHandle: tpm2.NamedHandle{Handle: made.ObjectHandle, Name: made.Name},
			InPublic: tpm2.New2B(signing(0))}.Execute(c)
		if err != nil {
			return err
		}
		file = tpmKeyASN1{Type: loadable, EmptyAuth: truth(0), Parent: int64(tpm2.TPMRHOwner),
			Public: tpm2.Marshal(key.OutPublic), Private: tpm2.Marshal(key.OutPrivate)}
		if rsaParent {
			file.RSAParent = truth(5)
		}
		_, err = tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(c)
		return err
	})
	return keyFile(t, file)
}

// truth is a boolean that is true, in a tag.
func truth(tag int) asn1.RawValue {
	return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: []byte{asn1.TagBoolean, 1, 0xff}}
}

func keyFile(t *testing.T, f tpmKeyASN1) []byte {
	t.Helper()
	der, err := asn1.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: tpmKeyFile, Bytes: der})
}

func writeFile(t *testing.T, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Keys in a TPM sign: with a handle, and in files as this test makes them or OpenSSL's provider for TPMs does, more often than
// the TPM has room for keys that nobody releases.
func TestTPMSigns(t *testing.T) {
	socket := startTPM(t)
	persist(t, 0x81010001, signing(0), "")
	persist(t, 0x81010002, signing(tpm2.TPMAlgRSASSA), "")
	persist(t, 0x81000001, tpm2.ECCSRKTemplate, "")
	dir := t.TempDir()
	names := []string{
		"0x81010001", "0x81010002",
		writeFile(t, child(t, tpm2.ECCSRKTemplate, false)), writeFile(t, child(t, emptyECC(), false)),
		writeFile(t, child(t, tpm2.RSASRKTemplate, true)), writeFile(t, child(t, emptyRSA(), true)),
	}
	for _, parent := range []string{"", "0x81000001"} {
		path := filepath.Join(dir, "openssl"+parent+".pem")
		args := []string{"genpkey", "-provider", "tpm2", "-algorithm", "RSA", "-out", path}
		if parent != "" {
			args = append(args, "-pkeyopt", "parent:"+parent)
		}
		c := exec.Command("openssl", args...)
		c.Env = append(os.Environ(), "TPM2OPENSSL_TCTI=swtpm:path="+socket)
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("openssl %q: %v: %s: run \"make setup\"", args, err, out)
		}
		names = append(names, path)
	}
	var last crypto.PublicKey
	for _, name := range append(names, names...) {
		s, err := Open("tpm2:"+name, nil)
		if err != nil {
			t.Fatal(err)
		}
		for n := range 3 {
			digest := sha256.Sum256([]byte{byte(n)})
			signature, err := s.Sign(rand.Reader, digest[:], crypto.SHA256)
			if err == nil {
				err = rsa.VerifyPKCS1v15(s.Public().(*rsa.PublicKey), crypto.SHA256, digest[:], signature)
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		digest := sha256.Sum256(nil)
		if _, err := s.Sign(rand.Reader, digest[:], &rsa.PSSOptions{Hash: crypto.SHA256}); err == nil {
			t.Errorf("%s: a signature with another padding is made", name)
		}
		if _, err := s.Sign(rand.Reader, digest[:20], crypto.SHA1); err == nil {
			t.Errorf("%s: a signature with SHA-1 is made", name)
		}
		public := s.Public()
		if err := s.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if s, err = Open("tpm2:"+name, public); err != nil {
			t.Fatal(err)
		}
		s.Close()
		if last != nil {
			if _, err := Open("tpm2:"+name, last); err == nil || !strings.Contains(err.Error(), "does not belong") {
				t.Errorf("%s: the key of another: %v", name, err)
			}
		}
		last = public
	}
}

func TestTPMRefuses(t *testing.T) {
	startTPM(t)
	with := func(change func(*tpm2.TPMTPublic)) tpm2.TPMTPublic {
		p := signing(0)
		change(&p)
		return p
	}
	persist(t, 0x81010001, with(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt, p.ObjectAttributes.SignEncrypt = true, false }), "")
	restricted := signing(tpm2.TPMAlgRSASSA)
	restricted.ObjectAttributes.Restricted = true
	persist(t, 0x81010002, restricted, "")
	persist(t, 0x81010003, signing(tpm2.TPMAlgRSAPSS), "")
	persist(t, 0x81010004, tpm2.ECCSRKTemplate, "")
	persist(t, 0x81010005, signing(0), "secret")
	foreign := child(t, tpm2.ECCSRKTemplate, false)
	for name, want := range map[string]string{
		"0x81010001": "not for signing", "0x81010002": "is restricted", "0x81010003": "want RSASSA", "0x81010004": "want RSA",
		"0x8101ffff": "no such key", "0x40000001": "persistent ones are", "1": "persistent ones are", "0x181010001": "no such file",
		"/nowhere": "no such file", "": "no such file",
	} {
		if _, err := Open("tpm2:"+name, nil); err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "tpm2:"+name+": ") {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	s, err := Open("tpm2:0x81010005", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Sign(rand.Reader, make([]byte, 32), crypto.SHA256); err == nil || !strings.Contains(err.Error(), "has a password") {
		t.Errorf("%v", err)
	}
	s.Close()

	startTPM(t)
	if _, err := Open("tpm2:"+writeFile(t, foreign), nil); err == nil || !strings.Contains(err.Error(), "not made by this TPM") {
		t.Errorf("%v", err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(writeFile(t, foreign), ec.Public()); err == nil || !strings.Contains(err.Error(), "name it tpm2:") {
		t.Errorf("%v", err)
	}
	t.Setenv(TPMVariable, filepath.Join(t.TempDir(), "none"))
	if _, err := Open("tpm2:0x81010001", nil); err == nil || !strings.Contains(err.Error(), TPMVariable) {
		t.Errorf("%v", err)
	}
	t.Setenv(TPMVariable, writeFile(t, nil))
	if _, err := Open("tpm2:0x81010001", nil); err == nil || !strings.Contains(err.Error(), "no device or socket") {
		t.Errorf("%v", err)
	}
}

// hostileKeyFiles are key files that are refused, by their defect.
func hostileKeyFiles(t testing.TB) map[string][]byte {
	good := tpmKeyASN1{Type: loadable, EmptyAuth: truth(0), Parent: 0x40000001, Public: []byte{0, 0}, Private: []byte{0, 0}}
	encode := func(change func(*tpmKeyASN1)) []byte {
		f := good
		change(&f)
		der, err := asn1.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: tpmKeyFile, Bytes: der})
	}
	explicit := func(tag int) asn1.RawValue {
		return asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: tag, IsCompound: true, Bytes: []byte{0x30, 0}}
	}
	whole, err := asn1.Marshal(good)
	if err != nil {
		t.Fatal(err)
	}
	block := func(b []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: tpmKeyFile, Bytes: b}) }
	return map[string][]byte{
		"empty":           nil,
		"other-pem":       bytes.ReplaceAll(block(whole), []byte("TSS2"), []byte("TSS1")),
		"no-der":          block([]byte("text")),
		"cut":             block(whole[:len(whole)-1]),
		"more":            block(append(bytes.Clone(whole), 0)),
		"importable":      encode(func(f *tpmKeyASN1) { f.Type = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 4} }),
		"sealed":          encode(func(f *tpmKeyASN1) { f.Type = asn1.ObjectIdentifier{2, 23, 133, 10, 1, 5} }),
		"password":        encode(func(f *tpmKeyASN1) { f.EmptyAuth = asn1.RawValue{} }),
		"policy":          encode(func(f *tpmKeyASN1) { f.Policy = explicit(1) }),
		"auth-policy":     encode(func(f *tpmKeyASN1) { f.AuthPolicy = explicit(3) }),
		"parent-negative": encode(func(f *tpmKeyASN1) { f.Parent = -1 }),
		"parent-large":    encode(func(f *tpmKeyASN1) { f.Parent = 1 << 32 }),
	}
}

func TestHostileKeyFiles(t *testing.T) {
	for name, b := range hostileKeyFiles(t) {
		if f, err := parseKeyFile(b); err == nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
	// What the TPM itself has to look at.
	startTPM(t)
	for name, change := range map[string]func(*tpmKeyASN1){
		"no-public":      func(f *tpmKeyASN1) { f.Public = nil },
		"no-private":     func(f *tpmKeyASN1) { f.Private = nil },
		"public-size":    func(f *tpmKeyASN1) { f.Public = []byte{0xff, 0xff, 1} },
		"private-size":   func(f *tpmKeyASN1) { f.Private = []byte{0xff, 0xff, 1} },
		"public-empty":   func(f *tpmKeyASN1) { f.Public = []byte{0, 0} },
		"parent-none":    func(f *tpmKeyASN1) { f.Parent = 0 },
		"parent-missing": func(f *tpmKeyASN1) { f.Parent = 0x81001234 },
	} {
		f := tpmKeyASN1{Type: loadable, EmptyAuth: truth(0), Parent: int64(tpm2.TPMRHOwner), Private: []byte{0, 0},
			Public: tpm2.Marshal(tpm2.New2B(signing(0)))}
		change(&f)
		path := writeFile(t, keyFile(t, f))
		if _, err := Open("tpm2:"+path, nil); err == nil || !strings.HasPrefix(err.Error(), fmt.Sprintf("tpm2:%s: ", path)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
