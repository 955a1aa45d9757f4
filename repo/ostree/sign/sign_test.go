package sign_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

const vectorKey = "4B4F9FE48268AA6A78A6C7094E70CCB3E427B9E6"

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func gpg(t testing.TB, keyring []byte) *sign.GPG {
	t.Helper()
	g := sign.NewGPG()
	if err := g.Read(bytes.NewReader(keyring)); err != nil {
		t.Fatal(err)
	}
	return g
}

func verify(v sign.Verifier, data, dictionary []byte) error {
	s, err := sign.Parse(dictionary)
	if err != nil {
		return err
	}
	_, err = sign.Policy{{v}}.Verify(data, s)
	return err
}

// What ostree 2026.4 has signed with gpg.
func TestVector(t *testing.T) {
	for _, name := range []string{"vec.commit", "summary"} {
		data, dictionary := read(t, name), read(t, map[string]string{"vec.commit": "vec.commitmeta", "summary": "summary.sig"}[name])
		g := gpg(t, golden.Read(t, "ostree/vec.gpg"))
		s, err := sign.Parse(dictionary)
		if err != nil {
			t.Fatal(err)
		}
		who, err := sign.Policy{{g}}.Verify(data, s)
		if err != nil || len(who) != 1 || who[0] != "gpg "+vectorKey {
			t.Errorf("%s: %q, %v", name, who, err)
		}
		if got := g.Fingerprints(); len(got) != 1 || got[0] != vectorKey {
			t.Errorf("%q", got)
		}
	}
}

// Not one bit of the commit and of the signature may change. Some of a key may: those that do not take part.
func TestBitFlips(t *testing.T) {
	commit, dictionary, ring := read(t, "vec.commit"), read(t, "vec.commitmeta"), golden.Read(t, "ostree/vec.gpg")
	g := gpg(t, ring)
	flip := func(b []byte, bit int) []byte {
		b = bytes.Clone(b)
		b[bit/8] ^= 1 << (bit % 8)
		return b
	}
	for bit := range len(commit) * 8 {
		if verify(g, flip(commit, bit), dictionary) == nil {
			t.Fatalf("bit %d of the commit", bit)
		}
	}
	s, err := sign.Parse(dictionary)
	if err != nil {
		t.Fatal(err)
	}
	signature := s["gpg"][0]
	// What stands in the unhashed part of an OpenPGP signature is not signed, and says nothing: here it is the issuer, again. The
	// number of bits before the signature itself is the same if it is the same in bytes.
	hashed, bits := 3+6+29, 3+6+29+2+10+2
	for bit := range len(signature) * 8 {
		if at := bit / 8; at >= hashed && at < hashed+2+10 || at == bits || at == bits+1 {
			continue
		}
		if verify(g, commit, encode(t, "ostree.gpgsigs", flip(signature, bit))) == nil {
			t.Fatalf("bit %d of the signature", bit)
		}
	}
	if verify(g, commit, encode(t, "ostree.gpgsigs", signature)) != nil {
		t.Fatal("the signature itself")
	}
	// The key's material: n and e.
	for bit := (3 + 6) * 8; bit < 272*8; bit++ {
		changed := sign.NewGPG()
		if changed.Read(bytes.NewReader(flip(ring, bit))) == nil && verify(changed, commit, dictionary) == nil {
			t.Fatalf("bit %d of the key", bit)
		}
	}
}

func encode(t testing.TB, key string, signatures ...[]byte) []byte {
	t.Helper()
	list := gvariant.List{}
	for _, s := range signatures {
		list = append(list, s)
	}
	value, err := gvariant.Encode("aay", list)
	if err != nil {
		t.Fatal(err)
	}
	v, err := gvariant.Encode("a{sv}", gvariant.Dict{key: value})
	if err != nil {
		t.Fatal(err)
	}
	return v.Bytes()
}

// newKey makes an OpenPGP key.
func newKey(t testing.TB, c *packet.Config) *openpgp.Entity {
	t.Helper()
	if c == nil {
		c = &packet.Config{}
	}
	c.Algorithm, c.Curve = packet.PubKeyAlgoEdDSA, packet.Curve25519
	e, err := openpgp.NewEntity("test", "", "test@example.org", c)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func public(t testing.TB, keys ...*openpgp.Entity) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, k := range keys {
		if err := k.Serialize(&b); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func secret(t testing.TB, key *openpgp.Entity) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := key.SerializePrivateWithoutSigning(&b, nil); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gpgSigner(t testing.TB, key *openpgp.Entity) sign.Signer {
	t.Helper()
	s, err := sign.GPGSigner(bytes.NewReader(secret(t, key)), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var data = []byte("a commit")

func TestGPGKeys(t *testing.T) {
	ours, other := newKey(t, nil), newKey(t, nil)
	past := func() time.Time { return time.Now().Add(-48 * time.Hour) }
	expired := newKey(t, &packet.Config{Time: past, KeyLifetimeSecs: 3600})
	expiring, err := sign.Add(nil, data, gpgSigner(t, ours))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := openpgp.DetachSign(&b, expired, bytes.NewReader(data), &packet.Config{Time: past}); err != nil {
		t.Fatal(err)
	}
	byExpired := encode(t, "ostree.gpgsigs", b.Bytes())
	b.Reset()
	old := newKey(t, &packet.Config{Time: past})
	if err := openpgp.DetachSign(&b, old, bytes.NewReader(data), &packet.Config{Time: past, SigLifetimeSecs: 3600}); err != nil {
		t.Fatal(err)
	}
	expiredSignature := encode(t, "ostree.gpgsigs", b.Bytes())
	notRevoked := public(t, ours)
	both, err := sign.Add(expiring, data, gpgSigner(t, other))
	if err != nil {
		t.Fatal(err)
	}
	s, _ := sign.Parse(both)
	inOne := encode(t, "ostree.gpgsigs", append(append([]byte{}, s["gpg"][0]...), s["gpg"][1]...))
	if err := ours.RevokeKey(packet.KeyCompromised, "lost", nil); err != nil {
		t.Fatal(err)
	}
	revoked := public(t, ours)
	for _, c := range []struct {
		name       string
		ring       []byte
		dictionary []byte
		err        string
	}{
		{"good", notRevoked, expiring, ""},
		{"second of two", public(t, other), both, ""},
		{"second of two, in one blob", public(t, other), inOne, ""},
		{"another key", public(t, other), expiring, "is not known"},
		{"no keys", nil, expiring, "is not known"},
		{"revoked key", revoked, expiring, "is revoked"},
		{"revoked in one of two keyrings", append(bytes.Clone(notRevoked), revoked...), expiring, "is revoked"},
		{"revoked, and another that signed too", append(public(t, other), revoked...), both, ""},
		{"expired key", public(t, expired), byExpired, "has expired"},
		{"expired signature", public(t, old), expiredSignature, "has expired"},
		{"nothing in the dictionary", notRevoked, nil, "not signed"},
		{"no element", notRevoked, encode(t, "ostree.gpgsigs"), "not signed"},
		{"an empty element", notRevoked, encode(t, "ostree.gpgsigs", nil), "no signature in it"},
		{"garbage", notRevoked, encode(t, "ostree.gpgsigs", []byte("garbage")), "not a signature"},
		{"a key for a signature", notRevoked, encode(t, "ostree.gpgsigs", notRevoked), "not a signature"},
		{"of another scheme", notRevoked, encode(t, "ostree.sign.ed25519", []byte("x")), "not signed"},
	} {
		err := verify(gpg(t, c.ring), data, c.dictionary)
		if got := errorText(err); c.err == "" != (err == nil) || !strings.Contains(got, c.err) {
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
		}
		if err != nil && !errors.Is(err, sign.ErrUnsigned) && !errors.Is(err, sign.ErrUntrusted) {
			t.Errorf("%s: the error does not say what kind it is: %v", c.name, err)
		}
	}
	// Too many, or too large ones, are not even tried.
	many := make([][]byte, 129)
	for _, dictionary := range [][]byte{encode(t, "ostree.gpgsigs", many...), encode(t, "ostree.gpgsigs", make([]byte, 65<<10))} {
		if _, err := sign.Parse(dictionary); err == nil {
			t.Error("no limit")
		}
	}
	if _, err := sign.Parse([]byte("\x01\x02\x03")); err == nil {
		t.Error("garbage is a dictionary")
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// A keyring may be armoured, and several blocks long; a directory has many.
func TestKeyrings(t *testing.T) {
	a, b := newKey(t, nil), newKey(t, nil)
	dir := t.TempDir()
	var text bytes.Buffer
	for _, k := range []*openpgp.Entity{a, b} {
		w, err := armor.Encode(&text, openpgp.PublicKeyType, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Serialize(w); err != nil {
			t.Fatal(err)
		}
		w.Close()
		text.WriteString("\n")
	}
	for name, content := range map[string][]byte{
		"a.gpg": public(t, a, b), "b.asc": text.Bytes(), "empty.gpg": nil, "README": []byte("not a key"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]int{dir: 2, filepath.Join(dir, "a.gpg"): 2, filepath.Join(dir, "b.asc"): 2} {
		g := sign.NewGPG()
		if err := g.Load(path); err != nil || len(g.Fingerprints()) != want {
			t.Errorf("%s: %q, %v", path, g.Fingerprints(), err)
		}
	}
	for name, content := range map[string][]byte{
		"garbage": []byte("garbage"), "keybox": []byte("\x00\x00\x00\x20\x01\x01\x00\x02KBXf\x00\x00\x00\x00"),
	} {
		if err := sign.NewGPG().Read(bytes.NewReader(content)); err == nil {
			t.Errorf("%s is a keyring", name)
		}
	}
}

func TestRawKeys(t *testing.T) {
	dir := t.TempDir()
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	pub := base64.StdEncoding.EncodeToString(key.Public().(ed25519.PublicKey))
	other := base64.StdEncoding.EncodeToString(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{8}, 32)).Public().(ed25519.PublicKey))
	s, err := sign.KeySigner("ed25519", []byte(base64.StdEncoding.EncodeToString(key)+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	dictionary, err := sign.Add(nil, data, s)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	check := func(name, want string, keys ...string) {
		t.Helper()
		k, err := sign.NewKeys("ed25519")
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range keys {
			if err := k.Add(text); err != nil {
				t.Fatal(err)
			}
		}
		if err := k.LoadSystem(dir); err != nil {
			t.Fatal(err)
		}
		err = verify(k, data, dictionary)
		if want == "" != (err == nil) || !strings.Contains(errorText(err), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
		if err == nil {
			for bit := range len(data) * 8 {
				changed := bytes.Clone(data)
				changed[bit/8] ^= 1 << (bit % 8)
				if verify(k, changed, dictionary) == nil {
					t.Fatalf("bit %d", bit)
				}
			}
		}
	}
	check("no keys", "no key is trusted")
	check("the key", "", pub)
	check("another key", "not signed by any", other)
	write("trusted.ed25519", other+"\n"+pub+"\n\n")
	check("a file", "")
	write("revoked.ed25519.d/lost", pub+"\n")
	check("a revoked key", "is revoked")
	check("a revoked key that the remote names", "is revoked", pub)
	k, _ := sign.NewKeys("ed25519")
	for _, text := range []string{"", "AAAA", "!", pub + pub} {
		if k.Add(text) == nil {
			t.Errorf("%q is a key", text)
		}
	}
	if _, err := sign.NewKeys("dummy"); err == nil {
		t.Error("dummy signatures are signatures")
	}
	for _, text := range []string{"", pub, base64.StdEncoding.EncodeToString(make([]byte, 64))} {
		if _, err := sign.KeySigner("ed25519", []byte(text)); err == nil {
			t.Errorf("%q is a secret key", text)
		}
	}
}

// Groups must all agree; of a group, one member.
func TestPolicy(t *testing.T) {
	a, b, c := newKey(t, nil), newKey(t, nil), newKey(t, nil)
	dictionary, err := sign.Add(nil, data, gpgSigner(t, a), gpgSigner(t, b))
	if err != nil {
		t.Fatal(err)
	}
	s, err := sign.Parse(dictionary)
	if err != nil {
		t.Fatal(err)
	}
	va, vb, vc := gpg(t, public(t, a)), gpg(t, public(t, b)), gpg(t, public(t, c))
	for _, p := range []struct {
		policy sign.Policy
		good   bool
	}{
		{nil, true}, {sign.Policy{{va}}, true}, {sign.Policy{{va}, {vb}}, true}, {sign.Policy{{vc, vb}}, true},
		{sign.Policy{{va}, {vc}}, false}, {sign.Policy{{}}, false}, {sign.Policy{{va}, {}}, false},
	} {
		who, err := p.policy.Verify(data, s)
		if (err == nil) != p.good || p.good && len(who) != len(p.policy) {
			t.Errorf("%v: %q, %v", p.policy, who, err)
		}
	}
}

// What stands in the dictionary besides stays there.
func TestAdd(t *testing.T) {
	before, err := gvariant.Encode("a{sv}", gvariant.List{
		gvariant.Tuple{"z", mustEncode(t, "s", "first")},
		gvariant.Tuple{"a", mustEncode(t, "u", uint32(7))},
	})
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t, nil)
	after := before.Bytes()
	for range 2 {
		if after, err = sign.Add(after, data, gpgSigner(t, key)); err != nil {
			t.Fatal(err)
		}
	}
	v, err := gvariant.New("a{sv}", after)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Check(); err != nil {
		t.Error(err)
	}
	var order []string
	n, _ := v.Len()
	for i := range n {
		k, _, err := v.Entry(i)
		if err != nil {
			t.Fatal(err)
		}
		order = append(order, k)
	}
	s, err := sign.Parse(after)
	if got := strings.Join(order, " "); got != "z a ostree.gpgsigs" || err != nil || len(s["gpg"]) != 2 {
		t.Errorf("%s, %d signatures, %v", got, len(s["gpg"]), err)
	}
}

func mustEncode(t testing.TB, typ string, x any) gvariant.Value {
	t.Helper()
	v, err := gvariant.Encode(typ, x)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func FuzzVerify(f *testing.F) {
	f.Add(read(f, "vec.commitmeta"), golden.Read(f, "ostree/vec.gpg"))
	f.Fuzz(func(t *testing.T, dictionary, ring []byte) {
		s, err := sign.Parse(dictionary)
		if err != nil {
			return
		}
		g := sign.NewGPG()
		if g.Read(bytes.NewReader(ring)) != nil {
			return
		}
		if _, err := (sign.Policy{{g}}).Verify([]byte("what nobody has signed"), s); err == nil {
			t.Error("signed")
		}
	})
}
