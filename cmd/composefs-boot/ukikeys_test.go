package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
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
	c := uki.Bytes(u.Read("signed.efi"))
	m, _, err := uki.Read(c, c.Size)
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
	if !bytes.Equal(u.Read("ours.efi"), u.Read("unsigned.efi")) {
		t.Error("joined to a signed file, it is another")
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

// Signed for Secure Boot, a UKI is ukify's but for the signature, and sbverify accepts it and the kernel in it.
func TestUkifySecureBoot(t *testing.T) {
	u := signingFiles(t)
	secureBoot := []string{"build", "--linux=linux", "--os-release=@osrel", "--hwids=", "--secureboot-private-key=b.key", "--secureboot-certificate=b.crt",
		"--pcr-private-key=a.key", "--pcr-banks=sha256", "--join-profile=one.efi"}
	unsigned := func(name string) []byte {
		t.Helper()
		c := uki.Bytes(u.Read(name))
		p, err := uki.ParsePE(c, c.Size)
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(filepath.Join(u.Dir, name+".unsigned"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := uki.Unsign(f, p); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return u.Read(name + ".unsigned")
	}
	ours := func(args ...string) {
		t.Helper()
		_, errOut, code := ukifyHere(t, u.Dir, append(append(secureBoot, "--stub="+u.Stub("linuxx64.efi.stub")), args...)...)
		if code != 0 || !strings.Contains(errOut, "signed by CN=b") {
			t.Fatal(errOut)
		}
	}
	u.Write("linux", unsigned("linux")) // Debian has signed it
	for _, tool := range []string{"sbsign", "systemd-sbsign"} {
		u.Ukify(append(secureBoot, "--no-sign-kernel", "--signtool="+tool, "--output="+tool+".efi")...)
		ours("--no-sign-kernel", "--signtool="+tool, "--output=ours.efi")
		if !bytes.Equal(unsigned("ours.efi"), unsigned(tool+".efi")) {
			t.Errorf("%s: the files differ", tool)
		}
	}
	verify := func(name string, want bool) {
		t.Helper()
		out, err := exec.Command("sbverify", "--cert", filepath.Join(u.Dir, "b.crt"), filepath.Join(u.Dir, name)).CombinedOutput()
		if (err == nil) != want {
			t.Errorf("sbverify %s: %v: %s", name, err, out)
		}
	}
	kernel := func(name string) {
		t.Helper()
		var out bytes.Buffer
		if code := run(context.Background(), []string{"composefs-boot", "uki", "extract", name, "linux", "-o", "kernel"}, nil, &out, &out); code != 0 {
			t.Fatal(out.String())
		}
	}
	verify("ours.efi", true)
	kernel("ours.efi")
	verify("kernel", false)
	// The default is to sign a kernel that is not signed; then it is left alone.
	ours() // the name is the kernel's
	verify("linux.efi", true)
	kernel("linux.efi")
	verify("kernel", true)
	signed := u.Read("kernel")
	u.Write("linux", signed)
	ours("--output=again.efi")
	kernel("again.efi")
	if !bytes.Equal(u.Read("kernel"), signed) || !bytes.Equal(u.Read("again.efi"), u.Read("linux.efi")) {
		t.Error("a signed kernel is signed again, or the same key gives other bytes")
	}
	ours("--output=twice.efi", "--sign-kernel")
	kernel("twice.efi")
	if bytes.Equal(u.Read("kernel"), signed) {
		t.Error("--sign-kernel does not sign a signed kernel")
	}
}

// measure signs for one profile what build has signed, and inspect tells what for.
func TestMeasureSigns(t *testing.T) {
	u := signingFiles(t)
	_, errOut, code := ukifyHere(t, u.Dir, "build", "--linux=linux", "--os-release=@osrel", "--hwids=", "--stub="+u.Stub("linuxx64.efi.stub"),
		"--join-profile=one.efi", "--pcr-private-key=a.key", "--output=os.efi")
	if code != 0 {
		t.Fatal(errOut)
	}
	ours := func(want int, args ...string) string {
		t.Helper()
		var out, errOut bytes.Buffer
		if code := run(context.Background(), append([]string{"composefs-boot", "uki"}, args...), nil, &out, &errOut); code != want {
			t.Fatalf("%q: %d: %s", args, code, errOut.String())
		}
		return out.String() + errOut.String()
	}
	for _, profile := range []string{"main", "one"} {
		built, err := uki.ParsePolicies([]byte(ours(0, "extract", "os.efi", "pcrsig", "--profile="+profile)))
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range [][]string{{}, {"--public-key=a.pub"}, {"--certificate=a.crt"}} {
			measured, err := uki.ParsePolicies([]byte(ours(0, append([]string{"measure", "os.efi", "--profile=" + profile, "--private-key=a.key"}, key...)...)))
			if err != nil {
				t.Fatal(err)
			}
			if built.Text() != measured.Text() {
				t.Errorf("%s: %s\nwant\n%s", profile, measured.Text(), built.Text())
			}
		}
		program := "exec:openssl pkeyutl -sign -inkey a.key -pkeyopt digest:sha256"
		one := ours(0, "measure", "os.efi", "--profile="+profile, "--private-key="+program, "--public-key=a.pub", "--bank=sha512", "--phase=enter-initrd")
		u.Write("one.json", []byte(one))
		two := ours(0, "measure", "os.efi", "--profile="+profile, "--private-key=b.key", "--bank=sha512", "--phase=enter-initrd", "--append=one.json")
		if p, err := uki.ParsePolicies([]byte(two)); err != nil || len(p) != 1 || len(p[0].Policies) != 2 || !strings.HasPrefix(two, one[:len(one)-3]) {
			t.Errorf("appended: %v: %s", err, two)
		}
	}
	digests, err := uki.ParsePolicies([]byte(ours(0, "measure", "os.efi", "--policy-digest", "--policyref=r")))
	if err != nil || len(digests) != 4 || len(digests[0].Policies) != 8 || digests[0].Policies[0].ToSign == "" || digests[0].Policies[0].Key != "" {
		t.Errorf("policy digests: %v: %v", err, digests)
	}
	text := ours(0, "inspect", "os.efi", "--signatures")
	for _, want := range []string{"policies: 32\n", "  @0 main: sha1 PCR 11: phase enter-initrd; key ", "  @1 one: sha512 PCR 11: phase enter-initrd:leave-initrd:sysinit:ready; key "} {
		if !strings.Contains(text, want) || strings.Count(text, ", signature good\n") != 32 {
			t.Errorf("inspect: no %q in %s", want, text)
		}
	}
	if plain := ours(0, "inspect", "os.efi"); !strings.HasPrefix(text, plain) || strings.Contains(plain, "policies:") {
		t.Error("inspect without --signatures has them")
	}
	var object struct {
		Policies []uki.PolicyInfo `json:"_policies"`
	}
	var out bytes.Buffer
	if code := run(context.Background(), []string{"composefs-boot", "--json", "uki", "inspect", "os.efi", "--signatures"}, nil, &out, &out); code != 0 {
		t.Fatal(out.String())
	}
	if err := json.Unmarshal(out.Bytes(), &object); err != nil || len(object.Policies) != 32 || object.Policies[31].Signature != uki.SignatureGood {
		t.Errorf("%v: %s", err, out.String())
	}
	for want, args := range map[string][]string{
		"say with --profile for which": {"--private-key=a.key"},
		"has no use with":              {"--private-key=a.key", "--policy-digest"},
		"give one of them":             {"--policy-digest", "--public-key=a.pub", "--certificate=a.crt"},
		"go with --private-key":        {"--append=one.json"},
		"for PCR 11 alone":             {"--policy-digest", "--cmdline=x"},
	} {
		if got := ours(2, append([]string{"measure", "os.efi"}, args...)...); !strings.Contains(got, want) {
			t.Errorf("%q: %s", args, got)
		}
	}
	if got := ours(1, "measure", "os.efi", "--profile=0", "--private-key=a.key", "--public-key=b.pub"); !strings.Contains(got, "does not belong to the public key") {
		t.Error(got)
	}
}
