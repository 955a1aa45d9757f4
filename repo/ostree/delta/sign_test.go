package delta

import (
	"crypto/ed25519"
	"encoding/base64"
	"io"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// TestSigned makes a delta that ostree takes for signed, and reads one that ostree has signed.
func TestSigned(t *testing.T) {
	l := vectors(t)
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	name := Name{checksum(t, first), checksum(t, second)}
	opts := Options{Name: name, MaxDiff: DefaultMaxDiff, Inline: true, Sign: func(b []byte) (gvariant.Value, error) {
		v, err := gvariant.Encode("aay", gvariant.List{ed25519.Sign(private, b)})
		if err != nil {
			return v, err
		}
		return gvariant.Encode("a{sv}", gvariant.Dict{"ostree.sign.ed25519": v})
	}}
	path := filepath.Join(generate(t, l, opts), "superblock")
	signed := func(path string) {
		t.Helper()
		d := applied(t, l, path)
		if d.Signed == nil {
			t.Fatal("it is not signed")
		}
		message, err := io.ReadAll(d.Signed)
		if err != nil {
			t.Fatal(err)
		}
		v, ok, err := d.Signatures.Lookup("ostree.sign.ed25519")
		if err == nil && ok {
			v, err = v.At(0)
		}
		if err != nil || !ok || !ed25519.Verify(public, message, v.Bytes()) {
			t.Errorf("the signature is not right: %v", err)
		}
	}
	signed(path)
	key, secret := base64.StdEncoding.EncodeToString(public), base64.StdEncoding.EncodeToString(private)
	run := func(args ...string) {
		t.Helper()
		if out, err := vm.Ostree(t, args...).CombinedOutput(); err != nil {
			t.Fatalf("ostree %v: %v\n%s", args, err, out)
		}
	}
	run("--repo="+l.Path, "static-delta", "verify", "--sign-type=ed25519", path, key)
	theirs := filepath.Join(t.TempDir(), "delta")
	run("--repo="+l.Path, "static-delta", "generate", "--inline", "--filename="+theirs, "--sign-type=ed25519", "--sign="+secret, "--from="+first, "--to="+second)
	signed(theirs)
}
