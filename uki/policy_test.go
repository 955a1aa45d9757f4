package uki_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/uki"
)

// What a policy is for a value of a PCR, in every bank: the digests are those that systemd-measure 262 prints for a kernel
// "hi\n" in the phase "a".
func TestPolicyDigest(t *testing.T) {
	m := &uki.Image{Profiles: [][]uki.Section{{uki.NewSection(".linux", uki.Text("hi\n"))}}}
	all, err := uki.Measure(m, uki.Banks, []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	for k, want := range []string{
		"f0fcdb04478e124588d918901cf6b1b5fe7f60a43ddba0035f610c93095545c5",
		"228e973882e2f43e215951fdbdf8ae4549efd504e84e2ffa430c50215f27fe7d",
		"9c6aef102d219889a071598bc4bed324f1bc4de8dec6a3fa9d7919ec2342b35d",
		"7b7ecaa6b1a7960fb382132b366ca708bf1198e7e8faa3d41042be8503de767e",
	} {
		p, err := uki.NewPolicy(all[k], uki.PolicyKey{Ref: "foo"})
		if err != nil {
			t.Fatal(err)
		}
		// SHA-256 of "foo" is what the reference is to the TPM.
		const ref = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
		if p.Digest != want || p.ToSign != want+ref {
			t.Errorf("%s: %+v, want %s", all[k].Bank, p, want)
		}
	}
	for _, p := range []uki.Prediction{{Bank: "sha1", Value: "00"}, {Bank: "md5", Value: ""}, {Bank: "sha1", PCR: 24, Value: all[0].Value}, {Bank: "sha1", Value: "x"}} {
		if _, err := uki.NewPolicy(p, uki.PolicyKey{}); err == nil {
			t.Errorf("%+v: no error", p)
		}
	}
}

// A key that systemd does not load into a TPM, and a public key that is not the signer's, are noticed when they sign.
func TestPolicyKeys(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := uki.Prediction{PCR: 11, Bank: "sha1", Value: strings.Repeat("00", 20)}
	if _, err := uki.NewPolicy(p, uki.PolicyKey{Signer: ec}); err == nil || !strings.Contains(err.Error(), "signed with RSA") {
		t.Errorf("an EC key: %v", err)
	}
	if _, err := uki.NewPolicy(p, uki.PolicyKey{Signer: newKey(t), Public: newKey(t).Public()}); err == nil || !strings.Contains(err.Error(), "public key that of the private key?") {
		t.Errorf("another public key: %v", err)
	}
}

// systemd-measure signs and prints the same, byte for byte.
func TestPoliciesAsSystemd(t *testing.T) {
	u := vm.NewUkify(t)
	key := newKey(t)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	u.Write("key", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	u.Write("pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	u.Write("linux", []byte("kernel"))
	u.Write("cmdline", []byte("cmdline"))
	u.Write("old", u.Measure("sign", "--linux=cmdline", "--private-key=key", "--json=pretty"))
	m := &uki.Image{Profiles: [][]uki.Section{{uki.NewSection(".linux", uki.Text("kernel")), uki.NewSection(".cmdline", uki.Text("cmdline"))}}}
	private, public := uki.PolicyKey{Signer: key}, uki.PolicyKey{Public: key.Public()}
	for _, c := range []struct {
		args  string
		banks []uki.Bank
		key   uki.PolicyKey
		old   bool
	}{
		{"sign --private-key=key", uki.Banks, private, false},
		{"sign --private-key=key --bank=sha512 --policyref=ü\"<&> --phase=b --phase=a:b", uki.Banks[3:], uki.PolicyKey{Signer: key, Phases: []string{"a:b", "b"}, Ref: "ü\"<&>"}, false},
		{"sign --private-key=key --phase=", uki.Banks, uki.PolicyKey{Signer: key, Phases: []string{""}}, false},
		{"sign --private-key=key --bank=sha256 --append=old", uki.Banks[1:2], private, true},
		{"sign --private-key=key --bank=sha1 --bank=sha256 --append=old --linux=cmdline --cmdline=old", nil, private, true},
		{"policy-digest --public-key=pub", uki.Banks, public, false},
		{"policy-digest --append=old --bank=sha384", uki.Banks[2:3], uki.PolicyKey{}, true},
		{"policy-digest --public-key=pub --policyref=x", uki.Banks, uki.PolicyKey{Public: key.Public(), Ref: "x"}, false},
	} {
		m, banks := m, c.banks
		if banks == nil {
			old := uki.Bytes(u.Read("old"))
			m, banks = &uki.Image{Profiles: [][]uki.Section{{uki.NewSection(".linux", uki.Text("cmdline")), uki.NewSection(".cmdline", old)}}}, uki.Banks[:2]
		}
		want := strings.TrimSpace(string(u.Measure(append(strings.Fields(c.args), "--linux=linux", "--cmdline=cmdline")...)))
		if c.banks == nil {
			want = strings.TrimSpace(string(u.Measure(strings.Fields(c.args)...)))
		}
		phases := c.key.Phases
		if phases == nil {
			phases = uki.Phases
		}
		all, err := uki.Measure(m, banks, phases)
		if err != nil {
			t.Fatal(err)
		}
		list, err := uki.SignPredictions(all, c.key)
		if err != nil {
			t.Fatal(err)
		}
		if c.old {
			old, err := uki.ParsePolicies(u.Read("old"))
			if err != nil {
				t.Fatal(err)
			}
			old.Append(list)
			list = old
		}
		var got bytes.Buffer
		e := json.NewEncoder(&got)
		e.SetEscapeHTML(false)
		if err := e.Encode(list); err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(got.String()) != want {
			t.Errorf("%s:\n%s\nwant\n%s", c.args, got.String(), want)
		}
		again, err := uki.ParsePolicies([]byte(list.Text()))
		if err != nil || again.Text() != list.Text() {
			t.Errorf("%s: read again: %v\n%s\nwant\n%s", c.args, err, again.Text(), list.Text())
		}
	}
}

// Policies are read from files of strangers.
func TestParsePolicies(t *testing.T) {
	digest := strings.Repeat("ab", 32)
	good := fmt.Sprintf(`{"pcrs": [11], "pkfp": "%s", "pol": "%[1]s", "tbs": "%[1]s", "sig": "AAAA"}`, digest)
	if p, err := uki.ParsePolicies([]byte(`{"sha1": [` + good + `], "sha256": []}` + "  \x00\x00")); err != nil || len(p) != 2 || len(p[0].Policies) != 1 {
		t.Errorf("%+v, %v", p, err)
	}
	for text, want := range map[string]string{
		"":                         "byte 0: EOF",
		"[]":                       "want an object with a list for each bank",
		"{":                        "byte 1:",
		`{"sha1": []} x`:           "byte",
		`{"sha1": []}{}`:           "something follows the object",
		`{"sha1": [], "sha1": []}`: "bank sha1: twice",
		`{"md5": []}`:              `bank "md5"`,
		`{"sha1": {}}`:             "cannot unmarshal",
		`{"sha1": [{"more": 1}]}`:  `unknown field "more"`,
		`{"sha1": [{}]}`:           "policy 1: no PCRs",
		`{"sha1": ` + strings.Repeat("[", 20_000) + `}`:                            "exceeded max depth",
		`{"sha1": [` + strings.Repeat(good+",", 5000) + good + `]}`:                "5001 policies, at most 4096",
		`{"sha1": [` + strings.Replace(good, "[11]", "[-1]", 1) + `]}`:             "PCRs [-1]",
		`{"sha1": [` + strings.Replace(good, "[11]", "[24]", 1) + `]}`:             "PCRs [24]",
		`{"sha1": [` + strings.Replace(good, "[11]", "[11, 11]", 1) + `]}`:         "PCRs [11 11]",
		`{"sha1": [` + strings.Replace(good, "[11]", "[1e3]", 1) + `]}`:            "cannot unmarshal",
		`{"sha1": [` + strings.Replace(good, `"pol": "ab`, `"pol": "`, 1) + `]}`:   "want a digest",
		`{"sha1": [` + strings.Replace(good, `"pol": "ab`, `"pol": "xx`, 1) + `]}`: "want a digest",
		`{"sha1": [` + strings.Replace(good, `"pol": "ab`, `"pol": "cd`, 1) + `]}`: "it is not that of the policy",
		`{"sha1": [` + strings.Replace(good, `AAAA`, `A`, 1) + `]}`:                "sig: illegal base64",
		strings.Repeat(" ", 1<<24+1):                                               "bytes, at most 16777216 are read",
	} {
		p, err := uki.ParsePolicies([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v, %v, want %q", text, p, err, want)
		}
	}
}

// What is in .pcrsig is found out by predicting: in which phase a policy is good, and whether .pcrpkey made the signature.
func TestExplainPolicies(t *testing.T) {
	key, other := newKey(t), newKey(t)
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	m := &uki.Image{Profiles: [][]uki.Section{{uki.NewSection(".linux", uki.Text("kernel")),
		uki.NewSection(".pcrpkey", uki.Bytes(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})))},
		{uki.NewSection(".profile", uki.Text("ID=a"))}, {uki.NewSection(".profile", uki.Text("ID=b"))}}}
	h, err := uki.HashSections(m, uki.Banks[1:2])
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.AddPolicies(h, []uki.PolicyKey{{Signer: key, Phases: []string{"enter-initrd"}}, {Signer: other, Phases: []string{"mine"}, Ref: "r"},
		{Public: other.Public(), Phases: []string{""}}}, []string{"b"})
	if err != nil {
		t.Fatal(err)
	}
	check := func(want ...string) {
		t.Helper()
		all, err := uki.ExplainPolicies(m)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, p := range all {
			got = append(got, fmt.Sprint(p.Profile, p.ID, p.Bank, p.PCRs, p.Ref, p.Matches, " ", p.Phase, " ", p.Signature))
		}
		if strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	check("1bsha256[11]true enter-initrd good", "1bsha256[11]rfalse  of a key that is not in .pcrpkey", "1bsha256[11]true  none")
	// The kernel is another one, and the signature that of another policy.
	last := m.Profiles[2][len(m.Profiles[2])-1]
	text := make([]byte, last.Size)
	last.ReadAt(text, 0)
	p, err := uki.ParsePolicies(text)
	if err != nil {
		t.Fatal(err)
	}
	p[0].Policies[0].Signature = p[0].Policies[1].Signature
	m.Profiles[2][len(m.Profiles[2])-1] = uki.NewSection(".pcrsig", uki.Text(p.Text()))
	m.Profiles[0][0] = uki.NewSection(".linux", uki.Text("kerneL"))
	check("1bsha256[11]false  bad", "1bsha256[11]rfalse  of a key that is not in .pcrpkey", "1bsha256[11]false  none")
	if _, err := m.AddPolicies(h, []uki.PolicyKey{{Signer: key}}, []string{"b"}); err == nil || !strings.Contains(err.Error(), "has one already") {
		t.Errorf("another .pcrsig: %v", err)
	}
}

// Whatever is read as policies is written in a way that is read as the same.
func FuzzParsePolicies(f *testing.F) {
	digest := strings.Repeat("ab", 32)
	f.Add([]byte(fmt.Sprintf(`{"sha1": [{"pcrs": [0, 23], "pkfp": "%s", "ref": "\u00fc\ud83d\ude00", "pol": "%[1]s", "sig": "AAAA"}], "sha512": []}`, digest)))
	f.Add([]byte(fmt.Sprintf(`{"sha256": [{"pcrs": [11], "pol": "%s", "tbs": "%[1]s"}]}  `, digest)))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := uki.ParsePolicies(b)
		if err != nil {
			return
		}
		compact, err := p.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{p.Text(), string(compact)} {
			again, err := uki.ParsePolicies([]byte(text))
			if err != nil || again.Text() != p.Text() {
				t.Errorf("%v: %s, want %s", err, again.Text(), p.Text())
			}
		}
	})
}

// A file whose .pcrsig is not where data of a section is has no signatures put into it.
func TestJoinPoliciesRefuses(t *testing.T) {
	key := newKey(t)
	s := stub(t, vm.NewUkify(t).Stub("linuxx64.efi.stub"))
	m := &uki.Image{Profiles: [][]uki.Section{{uki.NewSection(".linux", uki.Text("kernel"))}}}
	h, err := uki.HashSections(m, uki.Banks[:3])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.AddPolicies(h, []uki.PolicyKey{{Public: key.Public()}}, nil); err != nil {
		t.Fatal(err)
	}
	signed, err := uki.SignPredictions(h.Predict(uki.Phases), uki.PolicyKey{Signer: key})
	if err != nil {
		t.Fatal(err)
	}
	l, err := uki.Append(s, m)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "uki"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := l.Write(f); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(file, []byte(".pcrsig\x00")) // in the section table
	for name, c := range map[string]struct {
		change func(b []byte)
		want   string
	}{
		"as it is":       {func(b []byte) {}, ""},
		"in the headers": {func(b []byte) { set32(b, at+20, 64) }, "is in the headers"},
		"empty":          {func(b []byte) { set32(b, at+8, 0) }, "PCR policies: byte 0"},
		"in the signatures": {func(b []byte) {
			set32(b, at-headers(b, at)+144, uint32(len(b)-512))
			set32(b, at-headers(b, at)+148, 512)
		}, "or the signatures"},
		"no room in memory":         {func(b []byte) { set32(b, at-40+12, binary.LittleEndian.Uint32(b[at+12:])+4096); set32(b, at+8, 4096) }, "there is room for 4096"},
		"not JSON":                  {func(b []byte) { b[binary.LittleEndian.Uint32(b[at+20:])] = 'x' }, "section .pcrsig: PCR policies: byte"},
		"signatures not at the end": {func(b []byte) { set32(b, at-headers(b, at)+144, 4096); set32(b, at-headers(b, at)+148, 8) }, "certificate table ends at 4104"},
	} {
		b := bytes.Clone(file)
		c.change(b)
		p, err := uki.ParsePE(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		l, unsigned, err := uki.JoinPolicies(p, signed)
		if c.want == "" {
			if err != nil || unsigned != 0 || l.Size != int64(len(b)) {
				t.Errorf("%s: %d not signed, %v", name, unsigned, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func set32(b []byte, at int, v uint32) { binary.LittleEndian.PutUint32(b[at:], v) }

// headers is how far the optional header is before something in the section table.
func headers(b []byte, at int) int { return at - int(binary.LittleEndian.Uint32(b[60:])) - 24 }
