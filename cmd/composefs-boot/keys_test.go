package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// composefsBoot runs the program in the working directory and returns what it prints, on both streams.
func composefsBoot(args ...string) (out string, code int) {
	var b bytes.Buffer
	code = run(context.Background(), append([]string{"composefs-boot"}, args...), nil, &b, &b)
	return b.String(), code
}

// What keys make is what verify trusts: a program that is signed with db.key, until its hash or the certificate is revoked.
func TestKeysAndTrust(t *testing.T) {
	stub := vm.NewUkify(t).Stub("systemd-bootx64.efi")
	t.Chdir(t.TempDir())
	must := func(args ...string) {
		t.Helper()
		if out, code := composefsBoot(args...); code != 0 {
			t.Fatalf("%q: %s", args, out)
		}
	}
	must("keys", "new", "keys", "--name", "Test")
	must("uki", "sign", stub, "--key", "keys/db.key", "--certificate", "keys/db.pem", "-o", "boot.efi")
	verify := func(want string, flags ...string) {
		t.Helper()
		out, code := composefsBoot(append([]string{"uki", "verify", "boot.efi"}, flags...)...)
		if (code == 0) != (want == "signed by CN=Test db" || want == "by its hash") || !strings.Contains(out, want) {
			t.Errorf("%q: %s, want %s", flags, out, want)
		}
	}
	verify("signed by CN=Test db", "--db", "keys/db.pem")
	verify("signed by CN=Test db", "--db", "keys/db.auth")
	verify("not signed by a key that is trusted", "--db", "keys/KEK.auth")
	verify("by its hash", "--db", "boot.efi")

	// The hash of a program, as efitools has it, with the owner that it always takes.
	must("keys", "esl", "boot.efi", "-o", "ours.esl", "--owner", "605dab50-e046-4300-abb6-3dd810dd8b23")
	if out, err := exec.Command("hash-to-efi-sig-list", "boot.efi", "theirs.esl").CombinedOutput(); err != nil {
		t.Fatalf("hash-to-efi-sig-list: %v: %s: run \"make setup\"", err, out)
	}
	ours, err := os.ReadFile("ours.esl")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.ReadFile("theirs.esl")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(ours, theirs) {
		t.Errorf("signature list %x, hash-to-efi-sig-list makes %x", ours, theirs)
	}
	must("keys", "revoke", "keys", "boot.efi")
	verify("dbx has the hash of the file", "--db", "keys/db.auth", "--dbx", "keys/dbx.auth")
	os.Remove("keys/dbx.auth")
	must("keys", "rotate", "keys", "db")
	verify("signed by CN=Test db", "--db", "keys/db.auth")
	old, err := filepath.Glob("keys/old/*-db.pem")
	if err != nil || len(old) != 1 {
		t.Fatalf("%q, %v", old, err)
	}
	must("keys", "revoke", "keys", old[0])
	verify("not signed by a key that is trusted", "--db", "keys/db.auth")
	verify("dbx has the certificate", "--db", "keys/db.auth", "--db", old[0], "--dbx", "keys/dbx.auth")

	// The same as variables of the firmware.
	must("keys", "esl", old[0], "-o", "db.esl")
	must("keys", "esl", "keys/dbx.auth", "-o", "dbx.esl")
	variable := func(name, guid string, b []byte) {
		t.Helper()
		if err := os.MkdirAll("vars", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("vars/"+name+"-"+guid, append([]byte{7, 0, 0, 0}, b...), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const global, security = "8be4df61-93ca-11d2-aa0d-00e098032b8c", "d719b2cb-3d3a-4596-a3bc-dad00e67656f"
	list := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	variable("SecureBoot", global, []byte{1})
	variable("SetupMode", global, []byte{0})
	variable("db", security, list("db.esl"))
	verify("signed by CN=Test db", "--firmware=vars")
	variable("dbx", security, list("dbx.esl"))
	verify("dbx has the certificate", "--firmware=vars")
}

// ukify itself builds and signs with the keys that genkey makes, as its own do.
func TestUkifyUsesOurKeys(t *testing.T) {
	u := vm.NewUkify(t)
	if _, errOut, code := ukifyHere(t, u.Dir, "genkey", "--secureboot-private-key=db.key", "--secureboot-certificate=db.pem",
		"--secureboot-certificate-common-name=Test db", "--pcr-private-key=pcr.key", "--pcr-public-key=pcr.pub"); code != 0 {
		t.Fatal(errOut)
	}
	u.Write("linux", []byte("no kernel"))
	u.Ukify("build", "--linux=linux", "--uname=1", "--os-release=", "--hwids=", "--no-sign-kernel", "--secureboot-private-key=db.key", "--secureboot-certificate=db.pem",
		"--pcr-private-key=pcr.key", "--pcr-public-key=pcr.pub", "--output=theirs.efi")
	out, code := composefsBoot("uki", "verify", "theirs.efi", "--db", "db.pem")
	if code != 0 || !strings.Contains(out, "signed by CN=Test db") {
		t.Error(out)
	}
}
