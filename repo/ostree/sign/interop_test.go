package sign_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

func run(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// What ostree signs with gpg is good here, and what is signed here is good for ostree.
func TestOstree(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	home, err := os.MkdirTemp("", "gpg") // sockets have short names
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		os.RemoveAll(home)
	})
	gpgs := func(args ...string) *exec.Cmd {
		return exec.Command("gpg", append([]string{"--homedir", home, "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"}, args...)...)
	}
	run(t, gpgs("--quick-generate-key", "one@example.org", "ed25519", "sign"))
	ring, secretKey := in("one.gpg"), in("one.secret")
	run(t, gpgs("--output", ring, "--export", "one@example.org"))
	run(t, gpgs("--armor", "--output", secretKey, "--export-secret-keys", "one@example.org"))
	g := sign.NewGPG()
	if err := g.Load(ring); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(in("tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, vm.Ostree(t, "init", "--repo="+in("theirs"), "--mode=archive"))
	theirs := run(t, vm.Ostree(t, "commit", "--repo="+in("theirs"), "--branch=b", "--tree=dir="+in("tree"), "--gpg-sign=one@example.org", "--gpg-homedir="+home))
	ours := run(t, vm.Ostree(t, "commit", "--repo="+in("theirs"), "--branch=c", "--tree=dir="+in("tree"), "--subject=another"))
	object := func(sum, ext string) string { return in("theirs/objects/" + sum[:2] + "/" + sum[2:] + ext) }
	commit := func(sum string) []byte {
		b, err := os.ReadFile(object(sum, ".commit"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	dictionary, err := os.ReadFile(object(theirs, ".commitmeta"))
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(g, commit(theirs), dictionary); err != nil {
		t.Error(err)
	}
	f, err := os.Open(secretKey)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	signer, err := sign.GPGSigner(f, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if dictionary, err = sign.Add(nil, commit(ours), signer); err == nil {
		err = os.WriteFile(object(ours, ".commitmeta"), dictionary, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	run(t, vm.Ostree(t, "summary", "--repo="+in("theirs"), "--update", "--gpg-sign=one@example.org", "--gpg-homedir="+home))
	summary, _ := os.ReadFile(in("theirs/summary"))
	signatures, err := os.ReadFile(in("theirs/summary.sig"))
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(g, summary, signatures); err != nil {
		t.Error(err)
	}
	if signatures, err = sign.Add(nil, summary, signer); err == nil {
		err = os.WriteFile(in("theirs/summary.sig"), signatures, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	run(t, vm.Ostree(t, "init", "--repo="+in("client"), "--mode=archive"))
	run(t, vm.Ostree(t, "remote", "add", "--repo="+in("client"), "--gpg-import="+ring, "--set=gpg-verify-summary=true", "origin", "file://"+in("theirs")))
	run(t, vm.Ostree(t, "pull", "--repo="+in("client"), "origin", "c"))
	out := run(t, vm.Ostree(t, "show", "--repo="+in("client"), "--gpg-verify-remote=origin", "origin:c"))
	if !strings.Contains(out, "Good signature") {
		t.Error(out)
	}
	// ostree refuses what has been changed: it has looked.
	if dictionary, err = sign.Add(nil, []byte("something else"), signer); err == nil {
		err = os.WriteFile(object(ours, ".commitmeta"), dictionary, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	run(t, vm.Ostree(t, "init", "--repo="+in("other"), "--mode=archive"))
	run(t, vm.Ostree(t, "remote", "add", "--repo="+in("other"), "--gpg-import="+ring, "origin", "file://"+in("theirs")))
	if out, err := vm.Ostree(t, "pull", "--repo="+in("other"), "origin", "c").CombinedOutput(); err == nil || !bytes.Contains(out, []byte("BAD signature")) {
		t.Errorf("%v: %s", err, out)
	}
}

// Debian's ostree knows neither ed25519 nor spki. Their signatures are those of OpenSSL, which is asked instead.
func TestOpenSSL(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	openssl := func(args ...string) { t.Helper(); run(t, exec.Command("openssl", args...)) }
	file := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(in(name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if err := os.WriteFile(in("data"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, kind := range map[string][]string{
		"ed25519": {"-algorithm", "ed25519"},
		"p256":    {"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"},
		"p384":    {"-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"},
		"rsa":     {"-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"},
	} {
		openssl(append([]string{"genpkey", "-out", in(name + ".key")}, kind...)...)
		openssl("pkey", "-in", in(name+".key"), "-pubout", "-out", in(name+".pub"))
		k, err := sign.NewKeys("spki")
		if err != nil {
			t.Fatal(err)
		}
		if err := k.LoadFile(in(name + ".pub")); err != nil {
			t.Fatal(err)
		}
		pkeyutl := []string{"pkeyutl", "-rawin", "-in", in("data"), "-inkey"}
		if name != "ed25519" {
			pkeyutl = append([]string{"pkeyutl", "-digest", "sha256"}, pkeyutl[1:]...)
		}
		openssl(append(pkeyutl, in(name+".key"), "-sign", "-out", in("theirs"))...)
		theirs := file("theirs")
		if err := verify(k, data, encode(t, "ostree.sign.spki", theirs)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for bit := range len(theirs) * 8 {
			theirs[bit/8] ^= 1 << (bit % 8)
			if verify(k, data, encode(t, "ostree.sign.spki", theirs)) == nil {
				t.Errorf("%s: bit %d", name, bit)
			}
			theirs[bit/8] ^= 1 << (bit % 8)
		}
		signer, err := sign.KeySigner("spki", file(name+".key"))
		if err != nil {
			t.Fatal(err)
		}
		ours, err := signer.Sign(data)
		if err == nil {
			err = os.WriteFile(in("ours"), ours, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		openssl(append(pkeyutl, in(name+".pub"), "-pubin", "-verify", "-sigfile", in("ours"))...)
	}
}
