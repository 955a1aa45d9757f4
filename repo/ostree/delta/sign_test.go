package delta

import (
	"crypto/ed25519"
	"encoding/base64"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

// TestSigned makes a delta that ostree takes for signed, and reads one that ostree has signed.
func TestSigned(t *testing.T) {
	l := vectors(t)
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := sign.KeySigner("ed25519", []byte(base64.StdEncoding.EncodeToString(private)))
	if err != nil {
		t.Fatal(err)
	}
	name := Name{checksum(t, first), checksum(t, second)}
	opts := Options{Name: name, MaxDiff: DefaultMaxDiff, Inline: true, Sign: func(b []byte) ([]byte, error) {
		return sign.Add(nil, b, signer)
	}}
	path := filepath.Join(generate(t, l, opts), "superblock")
	d := applied(t, l, path)
	if d.Signed == nil {
		t.Fatal("it is not signed")
	}
	message, err := io.ReadAll(d.Signed)
	if err != nil {
		t.Fatal(err)
	}
	signatures, err := sign.Parse(d.Signatures)
	if err != nil {
		t.Fatal(err)
	}
	if list := signatures["ed25519"]; len(list) != 1 || !ed25519.Verify(public, message, list[0]) {
		t.Errorf("signatures %x", list)
	}
	// Debian's ostree has no other signatures than those of tests, which are a word.
	opts.Sign = func([]byte) ([]byte, error) {
		word, err := gvariant.Encode("aay", gvariant.List{[]byte("word\x00")})
		if err != nil {
			return nil, err
		}
		v, err := gvariant.Encode("a{sv}", gvariant.Dict{"ostree.sign.dummy": word})
		return v.Bytes(), err
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
