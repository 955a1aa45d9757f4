package signer_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/uki/signer"
)

// openssl runs openssl in a directory.
func openssl(t *testing.T, dir string, args ...string) {
	t.Helper()
	c := exec.Command("openssl", args...)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// Keys as openssl makes them can be read, and sign; so does openssl itself as a program.
func TestOpen(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	openssl(t, dir, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a", "-keyout", "key.pem", "-out", "cert.pem")
	openssl(t, dir, "pkey", "-in", "key.pem", "-traditional", "-out", "old.pem")
	openssl(t, dir, "pkey", "-in", "key.pem", "-aes128", "-passout", "pass:x", "-out", "encrypted.pem")
	openssl(t, dir, "pkey", "-in", "key.pem", "-pubout", "-out", "pub.pem")
	openssl(t, dir, "pkey", "-in", "key.pem", "-pubout", "-outform", "der", "-out", "pub.der")
	openssl(t, dir, "x509", "-in", "cert.pem", "-outform", "der", "-out", "cert.der")
	openssl(t, dir, "genpkey", "-algorithm", "rsa", "-out", "other.pem")
	var public crypto.PublicKey
	for _, name := range []string{"pub.pem", "pub.der", "cert.pem", "cert.der", "key.pem"} {
		key, err := signer.ReadPublicKey(at(name))
		if err != nil {
			t.Fatal(err)
		}
		if public != nil && !key.(*rsa.PublicKey).Equal(public) {
			t.Errorf("%s: another key", name)
		}
		public = key
	}
	program := "exec:openssl pkeyutl -sign -inkey " + at("key.pem") + " -pkeyopt digest:sha256"
	digest := sha256.Sum256([]byte("text"))
	for _, name := range []string{at("key.pem"), at("old.pem"), program} {
		s, err := signer.Open(name, public)
		if err != nil {
			t.Fatal(err)
		}
		signature, err := s.Sign(rand.Reader, digest[:], crypto.SHA256)
		if err == nil {
			err = rsa.VerifyPKCS1v15(public.(*rsa.PublicKey), crypto.SHA256, digest[:], signature)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	for name, want := range map[string]string{
		at("other.pem"): "does not belong", at("encrypted.pem"): "is encrypted", at("pub.pem"): "no private key", at("absent"): "no such file",
	} {
		if _, err := signer.Open(name, public); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	for command, want := range map[string]string{
		"exec:cat":   "no signature of the digest",
		"exec:false": "exit status 1",
		"exec:openssl pkeyutl -sign -pkeyopt digest:sha256 -inkey " + at("other.pem"): "no signature of the digest",
	} {
		s, err := signer.Open(command, public)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Sign(rand.Reader, digest[:], crypto.SHA256); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", command, err, want)
		}
	}
	if _, err := signer.Open(program, nil); err == nil {
		t.Error("a program without a public key")
	}
}
