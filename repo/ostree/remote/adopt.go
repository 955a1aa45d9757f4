package remote

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

// NameFor returns the name under which Adopt configures a remote: its own, or that of its host, or directory, if it is known by nothing but its URL. If
// another remote has that name, a number is added.
func (s *Store) NameFor(c *Config) (string, error) {
	name := c.Name
	if c.file == "" {
		u, err := parseURL(strings.TrimPrefix(strings.TrimPrefix(c.URL, mirrorListPrefix), metalinkPrefix), "file")
		if err != nil {
			return "", err
		}
		if name = strings.Trim(unfit.ReplaceAllString(cmp.Or(u.Host, path.Base(u.Path)), "-"), "-."); name == "" {
			return "", fmt.Errorf("%s: no host in it", c.URL)
		}
	}
	for n := 1; ; n++ {
		candidate := name
		if n > 1 {
			candidate = fmt.Sprintf("%s-%d", name, n)
		}
		is, err := s.Get(candidate)
		if errors.Is(err, ErrUnknown) {
			return candidate, CheckName(candidate)
		}
		if err != nil || is.URL == c.URL {
			return candidate, err
		}
	}
}

var unfit = regexp.MustCompile(`[^A-Za-z0-9.-]+`)

// Adopt configures a remote in the repository as it was used, so that it can be used there again, and returns its name. The keyring gets
// all GPG keys that it trusts, wherever they are kept, with those of the machine if there are no others; what else settings name by
// paths must be there under these paths. A remote that is configured there, or on the machine, and trusts no more than it did, stays as
// it is. That signatures were waived for once is not kept.
func (s *Store) Adopt(c *Config, machine System) (string, error) {
	if !c.given && c.dir != "" && (c.dir == s.dir() || c.dir == s.system.Remotes) {
		return c.Name, nil
	}
	name, err := s.NameFor(c)
	if err != nil {
		return "", err
	}
	if !c.given && s.system.GPG != "" {
		machine.GPG = "" // its keyrings count for the remote anyway, and they may change
	}
	keys, err := c.gpg(machine)
	if err != nil {
		return "", fmt.Errorf("remote %q: %w", c.Name, err)
	}
	settings := c.settings
	if is, err := s.Get(name); err == nil {
		if !c.given && c.file == "" {
			return name, nil // that of the same URL
		}
		if c.file == "" {
			settings = is.settings
		}
		if err := is.addKeys(keys); err != nil {
			return "", err
		}
	}
	settings = slices.DeleteFunc(slices.Clone(settings), func(kv [2]string) bool {
		return kv[0] == "url" || kv[0] == "metalink" || kv[0] == "gpgkeypath" || kv[0] == "gpg-verify" && c.given // the keys are in the keyring, and count
	})
	ring, err := keys.Export()
	if err != nil {
		return "", fmt.Errorf("remote %q: %w", c.Name, err)
	}
	return name, s.Add(name, c.URL, AddOptions{Settings: settings, Keyring: ring, Replace: true})
}

// addKeys adds the GPG keys that are configured for the remote.
func (c *Config) addKeys(to *sign.GPG) error {
	own, err := c.gpg(System{})
	if err == nil {
		to.Add(own)
	}
	return err
}
