package delta

import (
	"crypto/ed25519"
	"io"
	"os"
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
	// Debian's ostree has no other signatures than those of tests, which are a word.
	opts.Sign = func([]byte) (gvariant.Value, error) {
		v, err := gvariant.Encode("aay", gvariant.List{[]byte("word\x00")})
		if err != nil {
			return v, err
		}
		return gvariant.Encode("a{sv}", gvariant.Dict{"ostree.sign.dummy": v})
	}
	path = filepath.Join(generate(t, l, opts), "superblock")
	theirs := filepath.Join(t.TempDir(), "delta")
	for _, args := range [][]string{
		{"verify", "--sign-type=dummy", path, "word"},
		{"generate", "--inline", "--filename=" + theirs, "--sign-type=dummy", "--sign=word", "--from=" + first, "--to=" + second},
	} {
		c := vm.Ostree(t, append([]string{"--repo=" + l.Path, "static-delta"}, args...)...)
		c.Env = append(os.Environ(), "OSTREE_DUMMY_SIGN_ENABLED=1")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("ostree static-delta %v: %v\n%s", args, err, out)
		}
	}
	if d := applied(t, l, theirs); d.Signed == nil {
		t.Error("the delta of ostree is not signed")
	}
}
