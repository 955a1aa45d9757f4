package secureboot

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/uki/signer"
)

var (
	owner = mustGUID("11112222-3333-4444-5555-666677778888")
	day   = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	usual = Options{Name: "Test", Days: 10, Bits: 2048, Time: day}
)

// made are the files of a directory, made once, as keys take their time.
var made = sync.OnceValues(func() ([]File, error) { return New(usual, owner, nil, nil) })

// newDir makes a directory of keys.
func newDir(t *testing.T) *Dir {
	t.Helper()
	files, err := made()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "keys")
	if err := Create(path, files); err != nil {
		t.Fatal(err)
	}
	return reopen(t, path)
}

func reopen(t *testing.T, path string) *Dir {
	t.Helper()
	d, err := OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func apply(t *testing.T, d *Dir, files []File, err error) *Dir {
	t.Helper()
	if err == nil {
		err = d.Apply(files)
	}
	if err != nil {
		t.Fatal(err)
	}
	return reopen(t, d.Path)
}

// run runs a program of Debian's and returns what it prints.
func run(t *testing.T, program string, args ...string) []byte {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("%v: run \"make setup\"", err)
	}
	if err != nil {
		t.Fatalf("%s %q: %v: %s", program, args, err, out)
	}
	return out
}

func contents(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, path string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestGUID(t *testing.T) {
	text := "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	g, err := ParseGUID(text)
	if err != nil || g.String() != text || g[0] != 0x61 || g[15] != 0x8c {
		t.Errorf("%v %x, %v", g, g[:], err)
	}
	for _, bad := range []string{"", "8be4df61", text + "0", text[1:], "8be4df6193ca-11d2-aa0d-00e098032b8c-", "xbe4df61-93ca-11d2-aa0d-00e098032b8c"} {
		if g, err := ParseGUID(bad); err == nil {
			t.Errorf("%q is %v", bad, g)
		}
	}
	if a, b := NewGUID(), NewGUID(); a == b || a.String()[14] != '4' {
		t.Errorf("%v and %v are random", a, b)
	}
}

// OpenSSL reads what is made, and finds the key, the certificate and its extensions as they are meant.
func TestOpenSSLReadsKeys(t *testing.T) {
	d := newDir(t)
	in := func(name string) string { return filepath.Join(d.Path, name) }
	for _, name := range []string{"PK", "KEK", "db"} {
		run(t, "openssl", "pkey", "-check", "-noout", "-in", in(name+".key"))
		public := run(t, "openssl", "pkey", "-pubout", "-in", in(name+".key"))
		if !bytes.Equal(public, run(t, "openssl", "x509", "-pubkey", "-noout", "-in", in(name+".pem"))) {
			t.Errorf("%s.pem is for another key", name)
		}
		run(t, "openssl", "verify", "-CAfile", in(name+".pem"), "-partial_chain", "-attime", "1767400000", in(name+".pem"))
		about := run(t, "openssl", "x509", "-noout", "-subject", "-dates", "-ext", "basicConstraints,keyUsage", "-in", in(name+".pem"))
		want := "subject=CN = Test " + name + "\nnotBefore=Jan  2 03:04:05 2026 GMT\nnotAfter=Jan 12 03:04:05 2026 GMT\n" +
			"X509v3 Key Usage: critical\n    Digital Signature\nX509v3 Basic Constraints: critical\n    CA:FALSE\n"
		if string(about) != want {
			t.Errorf("%s: %s, want %s", name, about, want)
		}
	}
	if !bytes.Equal(run(t, "openssl", "pkey", "-pubout", "-in", in("pcr.key")), contents(t, in("pcr.pub"))) {
		t.Error("pcr.pub is another key")
	}
}

func TestOptions(t *testing.T) {
	key, err := usual.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []Options{{Bits: 1024}, {Bits: 2047}, {Bits: 0}, {Bits: 16384}} {
		if _, err := o.GenerateKey(); err == nil {
			t.Errorf("%d bits: no error", o.Bits)
		}
	}
	long := string(bytes.Repeat([]byte("x"), 65))
	for name, days := range map[string]int{"": 1, "zero": 0, "negative": -1, "never": 1 << 40, "a\nb": 1, long: 1} {
		if _, err := (Options{Days: days, Time: day}).Certificate(name, key); err == nil {
			t.Errorf("%q, %d days: no error", name, days)
		}
	}
	if _, err := (Options{Days: 1, Time: day}).Certificate(long[1:], key); err != nil {
		t.Error(err)
	}
}

// Lists and updates are those of efitools, byte for byte; both read ours.
func TestLikeEFITools(t *testing.T) {
	d := newDir(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(d.Path, name) }
	esl := filepath.Join(dir, "db.esl")
	run(t, "cert-to-efi-sig-list", "-g", owner.String(), in("db.pem"), esl)
	entry := CertificateEntry(owner, d.Certificates[DB])
	if !bytes.Equal(Database{entry}.Bytes(), contents(t, esl)) {
		t.Error("a list with a certificate is another than cert-to-efi-sig-list's")
	}
	for _, v := range Variables {
		for _, add := range []bool{false, true} {
			by := v.signer()
			key, err := signer.Open(in(by.Name+".key"), nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := Sign(v, add, day, Database{entry}, key, d.Certificates[by])
			if err != nil {
				t.Fatal(err)
			}
			theirs := filepath.Join(dir, "theirs.auth")
			args := []string{"-t", "2026-01-02 03:04:05", "-k", in(by.Name + ".key"), "-c", in(by.Name + ".pem"), v.Name, esl, theirs}
			if add {
				args = append([]string{"-a"}, args...)
			}
			run(t, "sign-efi-sig-list", args...)
			if !bytes.Equal(got, contents(t, theirs)) {
				t.Errorf("%s, append %v: another update than sign-efi-sig-list's", v.Name, add)
			}
			u, err := ParseUpdate(got)
			if err != nil {
				t.Fatal(err)
			}
			covers, added, signed, err := u.Covers()
			if err != nil || covers != v || added != add || !signed.Equal(d.Certificates[by]) {
				t.Errorf("%s, append %v: it is an update of %v, append %v: %v", v.Name, add, covers, added, err)
			}
			if !u.Time.Equal(day) || len(u.Database) != 1 || !u.Database[0].same(entry) || u.Database[0].Owner != owner {
				t.Errorf("update has %+v", u)
			}
		}
	}
	// What sbvarsign makes is read as well, and its signature is right.
	run(t, "sbvarsign", "--key", in("KEK.key"), "--cert", in("KEK.pem"), "--attr", "NON_VOLATILE,BOOTSERVICE_ACCESS,RUNTIME_ACCESS",
		"--output", filepath.Join(dir, "sb.auth"), "db", esl)
	c, err := Read(filepath.Join(dir, "sb.auth"), owner)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Update.Verify(DB, false, d.Certificates[KEK]); err != nil {
		t.Error(err)
	}
	// Its attributes are signed; they must be those of this content.
	if c.Update.Verify(DBX, false, d.Certificates[KEK]) == nil || c.Update.Verify(DB, true, d.Certificates[KEK]) == nil {
		t.Error("an update of db is taken for another")
	}
	// A database with all that we write, as efitools takes it apart.
	many := write(t, filepath.Join(dir, "many.esl"), Database{entry, HashEntry(owner, [32]byte{1}), HashEntry(owner, [32]byte{2}),
		CertificateEntry(owner, d.Certificates[KEK])}.Bytes())
	t.Chdir(dir)
	run(t, "sig-list-to-certs", many, "out")
	for name, want := range map[string]*x509.Certificate{"out-0.der": d.Certificates[DB], "out-3.der": d.Certificates[KEK]} {
		if !bytes.Equal(contents(t, name), want.Raw) {
			t.Errorf("sig-list-to-certs reads another certificate as %s", name)
		}
	}
	run(t, "cert-to-efi-hash-list", "-g", owner.String(), "-t", "2026-01-02 03:04:05", in("db.pem"), "revoked.esl")
	if got := (Database{RevokedEntry(owner, d.Certificates[DB], day)}).Bytes(); !bytes.Equal(got, contents(t, "revoked.esl")) {
		t.Errorf("revocation %x, cert-to-efi-hash-list makes %x", got, contents(t, "revoked.esl"))
	}
}

// Every kind of file is known by its content.
func TestRead(t *testing.T) {
	d := newDir(t)
	dir := t.TempDir()
	cert := d.Certificates[DB]
	entry := CertificateEntry(owner, cert)
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	for name, test := range map[string]struct {
		b       []byte
		kind    Kind
		entries int
	}{
		"pem":                    {append([]byte("# two\n"), append(block, block...)...), KindCertificate, 2},
		"der":                    {cert.Raw, KindCertificate, 1},
		"esl":                    {Database{entry, entry}.Bytes(), KindLists, 2},
		"auth":                   {contents(t, filepath.Join(d.Path, "db.auth")), KindUpdate, 1},
		"db-" + DB.GUID.String(): {append([]byte{7, 0, 0, 0}, Database{entry}.Bytes()...), KindVariable, 1},
	} {
		c, err := Read(write(t, filepath.Join(dir, name), test.b), owner)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.Kind != test.kind || len(c.Database) != test.entries || !c.Database[0].same(entry) || (c.Update != nil) != (test.kind == KindUpdate) {
			t.Errorf("%s: %+v", name, c)
		}
	}
	for name, b := range map[string][]byte{
		"empty": nil, "text": []byte("hello"), "key": contents(t, filepath.Join(d.Path, "db.key")), "pe": []byte("MZ"),
		"der-cut": cert.Raw[:100], "pem-cut": block[:100], "large": make([]byte, MaxDatabase+1),
	} {
		if c, err := Read(write(t, filepath.Join(dir, name), b), owner); err == nil {
			t.Errorf("%s: %+v", name, c)
		} else if !bytes.Contains([]byte(err.Error()), []byte(name)) {
			t.Errorf("%s: the error does not name the file: %v", name, err)
		}
	}
}

func TestFirmware(t *testing.T) {
	d := newDir(t)
	dir := t.TempDir()
	if _, err := ReadFirmware(dir); err == nil {
		t.Error("an empty directory has variables")
	}
	put := func(v Variable, b []byte) {
		write(t, filepath.Join(dir, v.Name+"-"+v.GUID.String()), append([]byte{0x27, 0, 0, 0}, b...))
	}
	put(Variable{"SecureBoot", globalGUID}, []byte{1})
	put(Variable{"SetupMode", globalGUID}, []byte{0})
	f, err := ReadFirmware(dir)
	if err != nil || !f.SecureBoot || f.SetupMode || f.DB != nil {
		t.Fatalf("%+v, %v", f, err)
	}
	put(DB, Database{CertificateEntry(owner, d.Certificates[DB]), HashEntry(owner, [32]byte{5})}.Bytes())
	put(DBX, Database{CertificateEntry(owner, d.Certificates[PK]), HashEntry(owner, [32]byte{6}), RevokedEntry(owner, d.Certificates[KEK], day)}.Bytes())
	put(Variable{"SbatLevelRT", shimGUID}, []byte("sbat,1,2024\nshim,2\n\x00"))
	if f, err = ReadFirmware(dir); err != nil || f.SBATLevel != "sbat,1,2024\nshim,2\n" {
		t.Fatalf("%q, %v", f.SBATLevel, err)
	}
	trust, err := f.Trust()
	if err != nil {
		t.Fatal(err)
	}
	r := trust.Revoked
	if len(trust.Certificates) != 1 || !trust.Certificates[0].Equal(d.Certificates[DB]) || len(trust.Hashes) != 1 || trust.Hashes[0][0] != 5 ||
		len(r.Certificates) != 1 || !r.Certificates[0].Equal(d.Certificates[PK]) || len(r.Hashes) != 1 || r.Hashes[0][0] != 6 || len(r.TBS) != 1 {
		t.Errorf("%+v", trust)
	}
	if _, since, err := f.DBX[2].Revoked(); err != nil || !since.Equal(day) {
		t.Errorf("revoked since %v, %v", since, err)
	}
	// What cannot be judged is no reason to trust.
	put(DBX, Database{{X509SHA384, owner, make([]byte, 64)}}.Bytes())
	if f, err = ReadFirmware(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Trust(); err == nil {
		t.Error("a revocation of a type that is not understood is left out")
	}
	write(t, filepath.Join(dir, "db-"+DB.GUID.String()), []byte{1})
	if _, err := ReadFirmware(dir); err == nil {
		t.Error("a variable of one byte is read")
	}
}
