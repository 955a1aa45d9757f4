package main

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/uki"
)

// writeKey makes NAME.key, NAME.pub and NAME.crt in the directory.
func writeKey(t *testing.T, u *vm.Ukify, name string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for end, block := range map[string]pem.Block{
		".key": {Type: "PRIVATE KEY", Bytes: private}, ".pub": {Type: "PUBLIC KEY", Bytes: public}, ".crt": {Type: "CERTIFICATE", Bytes: certificate},
	} {
		u.Write(name+end, pem.EncodeToMemory(&block))
	}
}

// signingFiles makes what the tests of signing build from.
func signingFiles(t *testing.T) *vm.Ukify {
	t.Helper()
	u := vm.NewUkify(t)
	kernel, err := os.ReadFile(vm.Kernels(t)["6.12"].Image)
	if err != nil {
		t.Fatal(err)
	}
	u.Write("linux", kernel)
	u.Write("osrel", []byte("ID=x\n"))
	u.Write("dtb1", []byte("device tree 1"))
	u.Write("dtb2", []byte("device tree 2"))
	for _, name := range []string{"a", "b", "c"} {
		writeKey(t, u, name)
	}
	u.Write("ukify.conf", []byte(`[UKI]
SignInitrdPCRs=yes
[PCRSignature:first]
PCRPrivateKey=b.key
PCRPublicKey=b.pub
Phases=enter-initrd
PolicyRef=of the file
[PCRSignature:second]
PCRPrivateKey=c.key
PCRPublicKey=c.pub
Phases=enter-initrd:leave-initrd:sysinit enter-initrd:leave-initrd
PolicyRef=other
`))
	for _, name := range []string{"one", "two"} {
		u.Ukify("build", "--profile=ID="+name, "--cmdline="+name, "--hwids=", "--output="+name+".efi")
	}
	return u
}

// What is signed with keys in PEM files is the same as ukify's, byte for byte: policies, where they are, and the key with them.
func TestUkifySigns(t *testing.T) {
	u := signingFiles(t)
	build := []string{"build", "--linux=linux", "--os-release=@osrel", "--hwids=", "--cmdline=x"}
	a := []string{"--pcr-private-key=a.key"}
	profiles := []string{"--join-profile=one.efi", "--profile=ID=main\nTITLE=Main", "--join-profile=two.efi"}
	for name, args := range map[string][]string{
		"a key":            a,
		"public key":       {"--pcr-private-key=a.key", "--pcr-public-key=a.pub", "--measure", "--json=short"},
		"certificate":      {"--pcr-private-key=a.key", "--pcr-certificate=a.crt", "--pcr-banks=sha256"},
		"another .pcrpkey": {"--pcr-private-key=a.key", "--pcrpkey=b.pub", "--pcr-banks=sha512,sha1"},
		"only public":      {"--pcr-public-key=a.pub"},
		"two keys": {"--pcr-private-key=a.key", "--pcr-private-key=b.key", "--pcr-public-key=a.pub", "--pcr-public-key=b.pub",
			"--phases=enter-initrd", "--phases=enter-initrd:leave-initrd,enter-initrd:leave-initrd:sysinit:ready:shutdown"},
		"the same key twice": {"--pcr-private-key=a.key", "--pcr-private-key=a.key", "--policyref=x", "--policyref=\u00fc \"y\\"},
		"config":             {"--config=ukify.conf"},
		"key and config": {"--config=ukify.conf", "--pcr-private-key=a.key", "--pcr-public-key=a.pub", "--phases=enter-initrd:leave-initrd",
			"--policyref=of the line", "--no-sign-initrd-pcrs"},
		"initramfs alone":    append([]string{"--sign-initrd-pcrs"}, a...),
		"one .dtbauto":       append([]string{"--devicetree-auto=dtb1", "--pcr-banks=sha256"}, a...),
		"two .dtbauto":       append([]string{"--devicetree-auto=dtb1", "--devicetree-auto=dtb2", "--pcr-banks=sha256"}, a...),
		"the same .dtbauto":  append([]string{"--devicetree-auto=dtb1", "--devicetree-auto=dtb1", "--pcr-banks=sha256"}, a...),
		"profiles":           append(profiles, a...),
		"some profiles":      append(append(profiles, "--sign-profile=main", "--sign-profile=two"), a...),
		"no base profile":    append(append(profiles, "--sign-profile=one"), a...),
		"profiles, two keys": append(profiles, "--config=ukify.conf", "--devicetree-auto=dtb1"),
		"profile, no ID":     append([]string{"--sign-profile=main"}, a...),
		"policy digests":     {"--policy-digest", "--pcr-public-key=a.pub"},
		"of a certificate":   append(profiles, "--policy-digest", "--pcr-certificate=a.crt", "--sign-initrd-pcrs", "--pcr-banks=sha256"),
		"not measured":       append([]string{"--measure", "--no-measure"}, a...),
	} {
		t.Run(name, func(t *testing.T) {
			u := u.With(t)
			want := u.Ukify(append(append(build, args...), "--stub=/usr/lib/systemd/boot/efi/linuxx64.efi.stub", "--output=theirs.efi")...)
			out, errOut, code := ukifyHere(t, u.Dir, append(append(build, args...), "--stub="+u.Stub("linuxx64.efi.stub"), "--output=ours.efi")...)
			if code != 0 {
				t.Fatal(errOut)
			}
			if normal(out) != normal(string(want)) {
				t.Errorf("prints\n%s\nwant\n%s", out, want)
			}
			sameUKI(t, u.Dir)
		})
	}
}

// A UKI with room for signatures gets those that are made elsewhere, as ukify puts them there.
func TestUkifyJoinsSignatures(t *testing.T) {
	u := signingFiles(t)
	linux := u.Stub("linuxx64.efi.stub")
	common := []string{"build", "--linux=linux", "--os-release=@osrel", "--hwids=", "--stub=" + linux, "--join-profile=one.efi", "--pcr-banks=sha256,sha512"}
	do := func(args ...string) string {
		t.Helper()
		out, errOut, code := ukifyHere(t, u.Dir, args...)
		if code != 0 {
			t.Fatal(errOut)
		}
		return out
	}
	u.Write("digests.json", []byte(do(append(common, "--policy-digest", "--pcr-public-key=a.pub", "--output=room.efi", "--sign-initrd-pcrs")...)))
	do(append(common, "--pcr-private-key=a.key", "--output=signed.efi", "--sign-initrd-pcrs")...)
	// The signatures, as another machine makes them of the digests alone.
	f, err := os.Open(filepath.Join(u.Dir, "signed.efi"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := uki.Read(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	var signed uki.Policies
	for n := range m.Bootable() {
		policies, err := m.ProfilePolicies(n)
		if err != nil {
			t.Fatal(err)
		}
		signed.Merge(policies)
	}
	u.Write("signed.json", []byte(signed.Text()))

	u.Ukify("build", "--join-pcrsig=room.efi", "--pcrsig=@signed.json", "--hwids=", "--output=theirs.efi")
	do("build", "--join-pcrsig=room.efi", "--pcrsig=@signed.json", "--hwids=", "--output=ours.efi")
	sameUKI(t, u.Dir)
	do("build", "--join-pcrsig=room.efi", "--pcrsig="+signed.Text(), "--output=again.efi", "--secureboot-private-key=b.key", "--secureboot-certificate=b.crt")
	_, errOut, code := ukifyHere(t, u.Dir, "build", "--join-pcrsig=again.efi", "--pcrsig=@signed.json", "--output=unsigned.efi")
	if code != 0 || !strings.Contains(errOut, "unsigned") {
		t.Errorf("a signed file: %s", errOut)
	}
	ours, _ := os.ReadFile(filepath.Join(u.Dir, "ours.efi"))
	again, _ := os.ReadFile(filepath.Join(u.Dir, "unsigned.efi"))
	if !bytes.Equal(ours, again) {
		for k := range min(len(ours), len(again)) {
			if ours[k] != again[k] {
				t.Errorf("joined to a signed file, it is another: %d and %d bytes, at %d", len(ours), len(again), k)
			}
		}
		t.Errorf("joined to a signed file, it has %d bytes, want %d", len(again), len(ours))
	}

	some := uki.Policies{{Bank: "sha512", Policies: signed[1].Policies[:3]}}
	_, errOut, code = ukifyHere(t, u.Dir, "build", "--join-pcrsig=room.efi", "--pcrsig="+some.Text(), "--output=some.efi")
	if code != 0 || !strings.Contains(errOut, "17 PCR policies in it are not signed") {
		t.Errorf("some signatures: %s", errOut)
	}
	wrong := uki.Policies{{Bank: "sha512", Policies: []uki.Policy{signed[1].Policies[0]}}}
	wrong[0].Policies[0].Signature = signed[1].Policies[1].Signature
	for name, c := range map[string]struct{ file, pcrsig, want string }{
		"another's":    {"room.efi", wrong.Text(), "does not verify with the key in .pcrpkey"},
		"none of it":   {"room.efi", `{"sha1": []}`, "none of the signatures is for a policy in it"},
		"no signature": {"room.efi", "@digests.json", "is not signed"},
		"no room":      {"one.efi", "@signed.json", "there is no .pcrsig: build the UKI with --policy-digest"},
		"no JSON":      {"room.efi", "x", "PCR policies: byte 0"},
		"nothing":      {"room.efi", "", "want signed policies"},
	} {
		_, errOut, code := ukifyHere(t, u.Dir, "build", "--join-pcrsig="+c.file, "--pcrsig="+c.pcrsig, "--output=x.efi")
		if code == 0 || !strings.Contains(errOut, c.want) {
			t.Errorf("%s: %d %s, want %q", name, code, errOut, c.want)
		}
	}
}
