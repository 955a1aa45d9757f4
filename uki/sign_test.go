package uki_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
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

// identity is a key with its certificate.
type identity struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

// newIdentity makes a key and a certificate, signed by the issuer, or by itself.
func newIdentity(t testing.TB, name string, issuer *identity) identity {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<30, 0), // long ago: firmware does not look
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	by, byKey := template, key
	if issuer != nil {
		by, byKey = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by, key.Public(), byKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return identity{key, cert}
}

// write writes key and certificate as PEM files.
func (i identity) write(t testing.TB) (key, cert string) {
	t.Helper()
	dir := t.TempDir()
	key, cert = filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	der, err := x509.MarshalPKCS8PrivateKey(i.key)
	if err == nil {
		err = os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
	}
	if err == nil {
		err = os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.cert.Raw}), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return key, cert
}

func sign(t testing.TB, b []byte, by identity) []byte {
	t.Helper()
	m := &memory{}
	if err := uki.Sign(m, parse(t, b), by.key, by.cert); err != nil {
		t.Fatal(err)
	}
	return m.b
}

func unsign(t testing.TB, b []byte) []byte {
	t.Helper()
	m := &memory{}
	if err := uki.Unsign(m, parse(t, b)); err != nil {
		t.Fatal(err)
	}
	return m.b
}

func trust(certs ...*x509.Certificate) uki.Trust { return uki.Trust{Certificates: certs} }

// run runs a program and returns what it printed.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// nssDatabase makes what pesign finds keys in; the key's name is "ours".
func nssDatabase(t testing.TB, key, cert string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "nss")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "certutil", "-N", "-d", dir, "--empty-password")
	run(t, "openssl", "pkcs12", "-export", "-in", cert, "-inkey", key, "-name", "ours", "-passout", "pass:", "-out", dir+".p12")
	run(t, "pk12util", "-i", dir+".p12", "-d", dir, "-W", "")
	return dir
}

// What is signed here is accepted by sbverify and has the digest that it sees; what sbsign, pesign and systemd-sbsign sign is
// accepted here. Their signatures have attributes, ours have none.
func TestSignsAsSbsign(t *testing.T) {
	a := newIdentity(t, "a", nil)
	key, cert := a.write(t)
	nss := nssDatabase(t, key, cert)
	u := vm.NewUkify(t)
	for name, path := range map[string]string{"key.pem": key, "cert.pem": cert} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		u.Write(name, b)
	}
	for name, path := range map[string]string{
		"stub":   u.Stub("linuxx64.efi.stub"),
		"loader": u.Stub("systemd-bootx64.efi"),
		"arm":    u.Stub("linuxaa64.efi.stub"),
		"kernel": kernel(t),
	} {
		t.Run(name, func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			if list, err := parse(t, b).Signatures(); err != nil {
				t.Fatal(err)
			} else if len(list) > 0 { // by Debian
				if _, err := parse(t, b).Verify(trust(list[0].Signer)); err != nil {
					t.Errorf("as it comes: %v", err)
				}
				b = unsign(t, b)
			} else if name == "kernel" {
				t.Error("the kernel is not signed")
			}
			plain, ours, theirs := filepath.Join(dir, "plain"), filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
			signed := sign(t, b, a)
			if again := sign(t, b, a); !bytes.Equal(again, signed) {
				t.Error("another signature has other bytes")
			}
			if got, want := binary.LittleEndian.Uint32(signed[checksumAt(signed):]), peChecksum(zeroChecksum(signed)); got != want {
				t.Errorf("checksum %x, want %x", got, want)
			}
			write(t, plain, b)
			write(t, ours, signed)
			run(t, "sbverify", "--cert", cert, ours)
			one, err := parse(t, signed).Authenticode()
			if err != nil {
				t.Fatal(err)
			}
			u := u.With(t)
			u.Write("plain", b)
			for by, sign := range map[string]func(){
				"sbsign": func() { run(t, "sbsign", "--key", key, "--cert", cert, "--output", theirs, plain) },
				"pesign": func() { run(t, "pesign", "--force", "-s", "-n", nss, "-c", "ours", "-i", plain, "-o", theirs) },
				"systemd-sbsign": func() {
					u.Sbsign("sign", "plain", "--private-key=key.pem", "--certificate=cert.pem", "--output=theirs")
					if err := os.Rename(filepath.Join(u.Dir, "theirs"), theirs); err != nil {
						t.Fatal(err)
					}
				},
			} {
				sign()
				other, err := os.ReadFile(theirs)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := parse(t, other).Verify(trust(a.cert)); err != nil {
					t.Errorf("signed by %s: %v", by, err)
				}
				if two, err := parse(t, other).Authenticode(); err != nil || two != one {
					t.Errorf("digest %x, of the file of %s %x, %v", one, by, two, err)
				}
			}
			if got := unsign(t, signed); len(b)%8 == 0 && !bytes.Equal(zeroChecksum(got), zeroChecksum(b)) {
				t.Error("without the signature it is another file")
			}
			// A second signature beside the first: both count.
			c := newIdentity(t, "c", nil)
			both := sign(t, signed, c)
			for _, by := range []identity{a, c} {
				if s, err := parse(t, both).Verify(trust(by.cert)); err != nil || !s.Signer.Equal(by.cert) {
					t.Errorf("signed twice: %v", err)
				}
			}
			if list, err := parse(t, both).Signatures(); err != nil || len(list) != 2 {
				t.Errorf("%d signatures, %v", len(list), err)
			}
			write(t, ours, both)
			run(t, "sbverify", "--cert", cert, ours)
		})
	}
}

// kernel returns the path of Debian's, which is signed.
func kernel(t testing.TB) string {
	t.Helper()
	found, err := filepath.Glob(vm.Cache(t, "kernel-6.1") + "/boot/vmlinuz-*")
	if err != nil || len(found) == 0 {
		t.Fatalf("no kernel: %v", err)
	}
	return found[0]
}

func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

func checksumAt(b []byte) int { return int(binary.LittleEndian.Uint32(b[60:])) + 24 + 64 }

func zeroChecksum(b []byte) []byte {
	b = bytes.Clone(b)
	clear(b[checksumAt(b) : checksumAt(b)+4])
	return b
}

// Any byte that a signature covers matters, and the others do not: the checksum alone is free.
func TestEveryByteCounts(t *testing.T) {
	a := newIdentity(t, "a", nil)
	good := sign(t, tinyPE(".text", ".linux"), a)
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 1
		p, err := uki.ParsePE(bytes.NewReader(bad), int64(len(bad)))
		if err == nil {
			_, err = p.Verify(trust(a.cert))
		}
		end := len(good) - 8 // padding of the signature is up to 7 bytes
		if free := at >= checksumAt(good) && at < checksumAt(good)+4; free != (err == nil) && at < end {
			// Some of what says what the signature is made of is not signed, as PKCS #7 has it, but never what it is for.
			if at < int(parse(t, good).CertificateTable.Offset) || err == nil && !sameSigned(t, bad, good) {
				t.Errorf("byte %d of %d: %v", at, len(good), err)
			}
		}
	}
}

// sameSigned tells whether two files are the same but for their certificate tables.
func sameSigned(t *testing.T, a, b []byte) bool {
	one, err := parse(t, a).Authenticode()
	two, err2 := parse(t, b).Authenticode()
	return err == nil && err2 == nil && one == two
}

func TestVerify(t *testing.T) {
	root, other := newIdentity(t, "root", nil), newIdentity(t, "other", nil)
	middle := newIdentity(t, "middle", &root)
	plain := tinyPE(".text", ".linux")
	signed := sign(t, plain, root)
	byMiddle := sign(t, plain, middle)
	digest, err := parse(t, plain).Authenticode()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		file  []byte
		trust uki.Trust
		want  error
	}{
		"signed":                {signed, trust(other.cert, root.cert), nil},
		"signed by one below":   {byMiddle, trust(root.cert), nil},
		"unsigned":              {plain, trust(root.cert), uki.ErrUnsigned},
		"hash is known":         {plain, uki.Trust{Hashes: [][32]byte{digest}}, nil},
		"another key":           {signed, trust(other.cert), uki.ErrUntrusted},
		"nothing is trusted":    {signed, uki.Trust{}, uki.ErrUntrusted},
		"signed twice":          {sign(t, signed, other), trust(root.cert), nil},
		"hash is revoked":       {signed, uki.Trust{trust(root.cert).Certificates, nil, uki.Revocations{Hashes: [][32]byte{digest}}}, uki.ErrRevoked},
		"key is revoked":        {signed, uki.Trust{trust(root.cert).Certificates, nil, uki.Revocations{Certificates: trust(root.cert).Certificates}}, uki.ErrRevoked},
		"issuer is revoked":     {byMiddle, uki.Trust{trust(middle.cert).Certificates, nil, uki.Revocations{Certificates: trust(root.cert).Certificates}}, uki.ErrRevoked},
		"TBS is revoked":        {signed, uki.Trust{trust(root.cert).Certificates, nil, uki.Revocations{TBS: [][32]byte{sha256.Sum256(root.cert.RawTBSCertificate)}}}, uki.ErrRevoked},
		"one of two is revoked": {sign(t, signed, other), uki.Trust{trust(root.cert).Certificates, nil, uki.Revocations{Certificates: trust(other.cert).Certificates}}, uki.ErrRevoked},
		"changed":               {put32(len(plain)-4, 7)(bytes.Clone(signed)), trust(root.cert), uki.ErrTampered},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := parse(t, c.file).Verify(c.trust); !errors.Is(err, c.want) || c.want == nil && err != nil {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
	// The certificate of another with the same name and serial number is not enough.
	forged := bytes.Clone(signed)
	copy(forged[len(plain):], bytes.ReplaceAll(forged[len(plain):], root.key.N.Bytes(), other.key.N.Bytes()))
	if _, err := parse(t, forged).Verify(trust(root.cert)); err == nil {
		t.Error("a forged certificate is accepted")
	}
}

// A table of signatures that is not right gives an error with its offset.
func TestHostileCertificateTable(t *testing.T) {
	a := newIdentity(t, "a", nil)
	plain := tinyPE(".text")
	good := sign(t, plain, a)
	table := len(plain)
	directory := tinyOptional + 112 + 8*4
	size := uint32(len(good) - table)
	for name, c := range map[string]struct {
		change func([]byte) []byte
		want   string
	}{
		"length of zero":        {put32(table, 0), "offset 1536: signature of 0 bytes"},
		"length past the end":   {put32(table, size+1), "offset 1536: signature of"},
		"length of 4 GiB":       {put32(table, 0xffffffff), "offset 1536: signature of"},
		"X.509 type":            {put16(table+6, 1), "offset 1536: certificate of type 1"},
		"no ASN.1":              {put32(table+8, 0), "offset 1536: signature"},
		"not at the end":        {func(b []byte) []byte { return append(b, make([]byte, 8)...) }, "want the end of the file"},
		"within the sections":   {func(b []byte) []byte { return put32(directory, uint32(table-8))(put32(directory+4, size+8)(b)) }, "the file only"},
		"length odd":            {put32(directory+4, size-1), "certificate table of"},
		"no place for it":       {put32(tinyOptional+108, 4), "there is no place"},
		"signature of 2 GiB":    {put32(table+10, 0xffffff7f), "offset 1536: signature"},
		"rest of the table":     {put32(table, size-4), "offset"},
		"trailing second entry": {func(b []byte) []byte { return put32(directory+4, size+8)(append(b, 1, 0, 0, 0, 0, 2, 2, 0)) }, "signature of 1 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			b := c.change(bytes.Clone(good))
			p, err := uki.ParsePE(bytes.NewReader(b), int64(len(b)))
			if err == nil {
				_, err = p.Verify(trust(a.cert))
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// What firmware could understand otherwise is not signed.
func TestRefusesToSign(t *testing.T) {
	a, b := newIdentity(t, "a", nil), newIdentity(t, "b", nil)
	gap := tinyPE(".text", ".data")
	gap = put32(tinyTable+40+20, tinyHeaders+1024)(append(gap, make([]byte, 512)...))
	if err := uki.Sign(&memory{}, parse(t, gap), a.key, a.cert); err == nil || !strings.Contains(err.Error(), "offset 1536: gap") {
		t.Errorf("with a gap: %v", err)
	}
	if err := uki.Sign(&memory{}, parse(t, tinyPE(".text")), a.key, b.cert); err == nil || !strings.Contains(err.Error(), "another key") {
		t.Errorf("with another's certificate: %v", err)
	}
	if err := uki.Unsign(&memory{}, parse(t, tinyPE(".text"))); !errors.Is(err, uki.ErrUnsigned) {
		t.Errorf("unsign: %v", err)
	}
}

func FuzzVerify(f *testing.F) {
	a := newIdentity(f, "a", nil)
	plain := tinyPE(".text", ".linux")
	digest, err := parse(f, plain).Authenticode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sign(f, plain, a))
	f.Add(sign(f, sign(f, plain, a), newIdentity(f, "b", nil)))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := uki.ParsePE(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		if _, err := p.Verify(trust(a.cert)); err != nil {
			return
		}
		if got, err := p.Authenticode(); err != nil || got != digest {
			t.Errorf("a file that was not signed is accepted: %x, %v", got, err)
		}
	})
}
