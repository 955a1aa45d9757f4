package remote_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func vectorKey(t testing.TB) []byte {
	t.Helper()
	return golden.Read(t, "ostree/vec.gpg")
}

func TestConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	write(t, path, `[core]
mode=bare
[remote "origin"]
url=https://example.org/repo
contenturl=mirrorlist=https://example.org/mirrors
branches=a/b;c;
gpg-verify=true
http2=false
tls-permissive=true
proxy=http://proxy:1
collection-id=org.example.A
gpgkeypath=/a.asc,/b
[remote "other"]
url=http://example.org/x
unconfigured-state=subscribe first
`)
	list, err := remote.ParseConfigs(path)
	if err != nil || len(list) != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	c := list[0]
	if c.Name != "origin" || c.URL != "https://example.org/repo" || c.ContentURL != "mirrorlist=https://example.org/mirrors" ||
		strings.Join(c.Branches, " ") != "a/b c" || !c.NoHTTP2 || !c.TLSPermissive || c.Proxy != "http://proxy:1" || c.CollectionID != "org.example.A" {
		t.Errorf("%+v", c)
	}
	if err := c.Usable(); err != nil {
		t.Error(err)
	}
	if err := list[1].Usable(); err == nil || !strings.Contains(err.Error(), "subscribe first") {
		t.Error(err)
	}
	for name, text := range map[string]string{
		"not a boolean":      "[remote \"a\"]\nurl=x\ngpg-verify=maybe\n",
		"a key, no cert":     "[remote \"a\"]\nurl=x\ntls-client-key-path=/k\n",
		"a path as the name": "[remote \"../a\"]\nurl=x\n",
		"no group":           "url=x\n",
	} {
		write(t, path, text)
		if list, err := remote.ParseConfigs(path); err == nil {
			t.Errorf("%s: %+v", name, list[0])
		}
	}
}

func TestTrust(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	key := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, 32))
	const vector = "gpg"
	for _, c := range []struct {
		name, settings string
		keyring        bool   // of the remote
		system         bool   // keys of the system
		commits        string // schemes, groups separated by blanks
		summary        string // the same
		waived         bool
		err            string
	}{
		{name: "nothing at all", err: "no keys say whom to trust"},
		{name: "a keyring", keyring: true, commits: vector},
		{name: "keys of the system", system: true, commits: "gpg"},
		{name: "waived", settings: "gpg-verify=false\n", waived: true},
		{name: "waived, though there is a keyring", settings: "gpg-verify=false\n", keyring: true, waived: true},
		{name: "asked for, without keys", settings: "gpg-verify=true\n", err: "no keys"},
		{name: "summary without keys", settings: "gpg-verify=false\ngpg-verify-summary=true\n", err: "no keys"},
		{name: "both", settings: "gpg-verify-summary=true\n", keyring: true, commits: "gpg", summary: "gpg"},
		{name: "summary alone", settings: "gpg-verify=false\ngpg-verify-summary=true\n", keyring: true, summary: "gpg", waived: true},
		{name: "an ed25519 key", settings: "verification-ed25519-key=" + key + "\n", commits: "ed25519"},
		{name: "gpg and ed25519", settings: "verification-ed25519-key=" + key + "\n", keyring: true, commits: "gpg ed25519"},
		{name: "sign-verify", settings: "sign-verify=ed25519\nverification-ed25519-key=" + key + "\n", commits: "ed25519"},
		{name: "sign-verify for the summary", settings: "sign-verify-summary=ed25519\nverification-ed25519-key=" + key + "\n", commits: "ed25519", summary: "ed25519"},
		{name: "sign-verify without a key", settings: "sign-verify=ed25519\n", err: "no keys"},
		{name: "any, without a key", settings: "sign-verify=true\n", err: "no keys"},
		{name: "any, with the system's", settings: "sign-verify=true\ngpg-verify=false\n", system: true, commits: "ed25519"},
		{name: "sign-verify=false", settings: "sign-verify=false\n", waived: true},
		{name: "a scheme that nobody knows", settings: "sign-verify=dummy\n", err: "dummy"},
		{name: "a key that is none", settings: "verification-ed25519-key=AAAA\n", err: "verification-ed25519-key"},
		{name: "a file that is not there", settings: "verification-ed25519-file=/nowhere\n", err: "/nowhere"},
		{name: "a keyring that is not there", settings: "gpgkeypath=/nowhere\n", err: "/nowhere"},
	} {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		write(t, in("remotes.d/r.conf"), "[remote \"r\"]\nurl=http://x\n"+c.settings)
		if c.keyring {
			write(t, in("remotes.d/r.trustedkeys.gpg"), string(vectorKey(t)))
		}
		system := remote.System{GPG: in("gpg"), Keys: []string{in("keys")}}
		if c.system {
			write(t, in("gpg/a.gpg"), string(vectorKey(t)))
			write(t, in("keys/trusted.ed25519"), key+"\n")
		}
		list, err := remote.ParseConfigs(in("remotes.d/r.conf"))
		if err != nil {
			t.Fatal(err)
		}
		trust, err := list[0].Trust(system)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) || errors.Is(err, remote.ErrNoKeys) != (c.settings == "") {
				t.Errorf("%s: %v, want %q", c.name, err, c.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var commits, summary []string
		for _, group := range trust.Commits {
			for _, v := range group {
				commits = append(commits, v.Scheme())
			}
		}
		for _, group := range trust.Summary {
			for _, v := range group {
				summary = append(summary, v.Scheme())
			}
		}
		if got := strings.Join(commits, " "); got != c.commits || strings.Join(summary, " ") != c.summary || trust.Waived != c.waived {
			t.Errorf("%s: commits %q, summary %q, waived %v", c.name, commits, summary, trust.Waived)
		}
	}
}

func TestStore(t *testing.T) {
	dir := t.TempDir()
	s := remote.NewStore(filepath.Join(dir, "repo"), remote.System{Remotes: filepath.Join(dir, "etc")})
	write(t, filepath.Join(dir, "etc/a.conf"), "[remote \"a\"]\nurl=http://system\n")
	write(t, filepath.Join(dir, "etc/README"), "not a remote")
	if err := s.Add("b", "http://b", remote.AddOptions{Keyring: vectorKey(t), Settings: [][2]string{{"gpg-verify-summary", "true"}}}); err != nil {
		t.Fatal(err)
	}
	names := func() string {
		list, err := s.List()
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, c := range list {
			all = append(all, c.Name+"="+c.URL)
		}
		return strings.Join(all, " ")
	}
	if got := names(); got != "a=http://system b=http://b" {
		t.Error(got)
	}
	b, err := s.Get("b")
	if err != nil || !b.VerifySummary {
		t.Fatalf("%+v, %v", b, err)
	}
	if keys, err := s.Fingerprints(b); err != nil || len(keys) != 1 {
		t.Errorf("%q, %v", keys, err)
	}
	if err := s.Add("b", "http://c", remote.AddOptions{}); err == nil {
		t.Error("added twice")
	}
	// The keys of the one that is replaced are not those of the new one.
	if err := s.Add("b", "http://c", remote.AddOptions{Replace: true}); err != nil {
		t.Error(err)
	}
	b, _ = s.Get("b")
	if keys, err := s.Fingerprints(b); err != nil || len(keys) != 0 {
		t.Errorf("%q, %v", keys, err)
	}
	if err := s.ImportKeys("b", vectorKey(t)); err != nil {
		t.Error(err)
	}
	if err := s.ImportKeys("b", []byte("garbage")); err == nil {
		t.Error("garbage is a key")
	}
	if keys, err := s.Fingerprints(b); err != nil || len(keys) != 1 {
		t.Errorf("%q, %v", keys, err)
	}
	if err := s.Add("a", "http://mine", remote.AddOptions{Replace: true}); err != nil {
		t.Error(err)
	}
	if got := names(); got != "a=http://mine b=http://c" {
		t.Error(got)
	}
	for _, name := range []string{"a", "b"} {
		if err := s.Remove(name); err != nil {
			t.Error(err)
		}
	}
	if got := names(); got != "a=http://system" {
		t.Error(got)
	}
	if err := s.Remove("a"); err == nil {
		t.Error("one of the machine is removed")
	}
	if _, err := s.Get("x"); !errors.Is(err, remote.ErrUnknown) {
		t.Error(err)
	}
	for _, name := range []string{"", "../x", "a/b", "-x", ".x", "a b"} {
		if s.Add(name, "http://x", remote.AddOptions{}) == nil {
			t.Errorf("%q is a name", name)
		}
	}
	for _, kv := range [][2]string{{"a\nb", "c"}, {"", "c"}, {"a", "b\n[remote \"x\"]"}, {"gpg-verify", "maybe"}} {
		if s.Add("x", "http://x", remote.AddOptions{Settings: [][2]string{kv}}) == nil {
			t.Errorf("%q is a setting", kv)
		}
	}
	if s.Add("x", "http://x\n[remote \"y\"]", remote.AddOptions{}) == nil {
		t.Error("a URL of two lines")
	}
}
