package remote_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

// A remote that is adopted trusts the same keys as before, wherever those were, and has the same settings.
func TestAdopt(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write(t, in("key.gpg"), string(vectorKey(t)))
	system := remote.System{GPG: in("trusted")}
	write(t, in("trusted/key.gpg"), string(vectorKey(t)))
	read := func(text string) *remote.Config {
		t.Helper()
		write(t, in("a.conf"), "[remote \"a\"]\n"+text)
		list, err := remote.ParseConfigs(in("a.conf"))
		if err != nil {
			t.Fatal(err)
		}
		return list[0]
	}
	given := func(c *remote.Config) *remote.Config {
		c.TrustAlso([]string{in("key.gpg")})
		return c
	}
	const url = "http://example.org:8080/repo"
	for name, c := range map[string]struct {
		config *remote.Config
		there  string // settings of a remote that is there already
		name   string
		keys   int
		branch bool // a setting that is kept
		waived bool
	}{
		"url":                     {config: remote.Anonymous(url, []string{in("key.gpg")}), name: "example.org-8080", keys: 1},
		"url without keys":        {config: remote.Anonymous("http://[::1]:80/", nil), name: "1-80", keys: 1},
		"the keys of the machine": {config: read("url=" + url + "\nbranches=x\n"), name: "a", keys: 1, branch: true},
		"a path of keys":          {config: read("url=" + url + "\nbranches=x\ngpgkeypath=" + in("key.gpg")), name: "a", keys: 1, branch: true},
		"waived":                  {config: read("url=" + url + "\ngpg-verify=false\n"), name: "a", keys: 1, waived: true},
		"waived, and given keys":  {config: given(read("url=" + url + "\ngpg-verify=false\n")), name: "a", keys: 1},
		"another of that name":    {config: read("url=" + url + "\n"), there: "url=http://else\n", name: "a-2", keys: 1},
		"the same":                {config: read("url=" + url + "\n"), there: "url=" + url + "\nbranches=y\n", name: "a", keys: 1},
	} {
		repository := t.TempDir()
		store := remote.NewStore(repository, remote.System{})
		if c.there != "" {
			write(t, filepath.Join(repository, "ostree/remotes.d/a.conf"), "[remote \"a\"]\n"+c.there)
		}
		planned, err := store.NameFor(c.config)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got, err := store.Adopt(c.config, system)
		if err != nil || got != c.name || planned != got {
			t.Errorf("%s: %q, planned as %q, %v", name, got, planned, err)
			continue
		}
		is, err := store.Get(got)
		if err != nil || is.URL != c.config.URL || slices.Equal(is.Branches, []string{"x"}) != c.branch {
			t.Errorf("%s: %+v, %v", name, is, err)
			continue
		}
		if keys, err := store.Fingerprints(is); err != nil || len(keys) != c.keys {
			t.Errorf("%s: keys %q, %v", name, keys, err)
		}
		if trust, err := is.Trust(remote.System{}); err != nil || trust.Waived != c.waived {
			t.Errorf("%s: %+v, %v", name, trust, err)
		}
		// What is there stays as it is.
		before, _ := os.ReadFile(filepath.Join(repository, "ostree/remotes.d", got+".trustedkeys.gpg"))
		if again, err := store.Adopt(is, system); again != got || err != nil {
			t.Errorf("%s: again: %q, %v", name, again, err)
		}
		is.TrustAlso([]string{in("key.gpg")})
		if again, err := store.Adopt(is, system); again != got || err != nil {
			t.Errorf("%s: once more: %q, %v", name, again, err)
		}
		if after, _ := os.ReadFile(filepath.Join(repository, "ostree/remotes.d", got+".trustedkeys.gpg")); string(after) != string(before) {
			t.Errorf("%s: a key that was there is there twice", name)
		}
	}
	// On the machine itself, its keyrings go on to count, and are not copied.
	here := remote.NewStore(t.TempDir(), system)
	for k, c := range []*remote.Config{remote.Anonymous(url, nil), given(remote.Anonymous(url, nil))} {
		name, err := here.Adopt(c, system)
		if err != nil {
			t.Fatal(err)
		}
		is, err := here.Get(name)
		if err != nil {
			t.Fatal(err)
		}
		trust, err := is.Trust(system)
		if _, missing := os.Stat(is.Keyring()); err != nil || trust.Waived || (missing == nil) != (k == 1) {
			t.Errorf("%+v, %v, keyring: %v", trust, err, missing)
		}
	}
	// What was adopted verifies what the key has signed.
	_, web := vectors(t)
	store := remote.NewStore(t.TempDir(), remote.System{})
	name, err := store.Adopt(remote.Anonymous(web, []string{in("key.gpg")}), remote.System{})
	if err != nil {
		t.Fatal(err)
	}
	config, err := store.Get(name)
	if err != nil {
		t.Fatal(err)
	}
	r := newRepo(t)
	if p := mustPull(t, open(t, config, remote.Options{}), r, never, vectorRef).Commits[0]; len(p.Signers) != 1 {
		t.Errorf("%+v", p)
	}
	if _, err := store.NameFor(remote.Anonymous("http:///x", nil)); err == nil {
		t.Error("a name for a URL without a host")
	}
}

// What is said before a pull is what then comes.
func TestLook(t *testing.T) {
	s, url := vectors(t)
	config := configured(t, url, "")
	for name, o := range map[string]remote.PullOptions{"objects": never, "delta": {Deltas: remote.DeltasAlways}, "either": {}} {
		r := newRepo(t)
		mustPull(t, open(t, config, remote.Options{}), r, never, first)
		s.asked = map[string]int{}
		offer, err := open(t, config, remote.Options{}).Look(t.Context(), r, vectorRef, o)
		if err != nil || offer.Commit.String() != second || offer.Here || len(offer.Signers) != 1 {
			t.Errorf("%s: %+v, %v", name, offer, err)
		}
		if requests, _ := s.count(`\.(filez|dirtree|dirmeta)$|/[0-9]+$`); requests > 0 {
			t.Errorf("%s: %d requests for objects and parts: %v", name, requests, s.asked)
		}
		before := s.sent.Load()
		p := mustPull(t, open(t, config, remote.Options{}), r, o, vectorRef).Commits[0]
		came := s.sent.Load() - before
		if offer.Delta != p.Delta || offer.Known && (offer.Bytes > came || offer.Bytes == 0) {
			t.Errorf("%s: %+v, and %d bytes came by %q", name, offer, came, p.Delta)
		}
		if offer.Known && offer.Delta == "" && offer.Objects != p.Stats.Metadata+p.Stats.Files {
			t.Errorf("%s: %+v, and %+v came", name, offer, p.Stats)
		}
		offer, err = open(t, config, remote.Options{}).Look(t.Context(), r, vectorRef, o)
		if err != nil || !offer.Here || offer.Bytes != 0 {
			t.Errorf("%s: %+v, %v", name, offer, err)
		}
	}
	// The word of the server needs no signature.
	write(t, filepath.Join(s.dir, "refs/heads/forged"), first+"\n")
	rem := open(t, configured(t, url, ""), remote.Options{})
	if c, err := rem.Peek(t.Context(), "forged"); err != nil || c.String() != first {
		t.Errorf("%v, %v", c, err)
	}
	if _, err := rem.Peek(t.Context(), "../x"); err == nil {
		t.Error("a ref that leads elsewhere")
	}
}
