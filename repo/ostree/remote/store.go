package remote

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

// ErrUnknown tells that there is no such remote.
var ErrUnknown = errors.New("no such remote")

// Store is where the remotes of a composefs repository are configured. It has no room for that itself, so they are in a directory
// ostree/remotes.d of it, in files as they may stand in /etc/ostree/remotes.d, which count as well: NAME.conf, the keyring
// NAME.trustedkeys.gpg, and cookies that are sent, NAME.cookies.txt.
type Store struct {
	repository string
	system     System
}

// NewStore returns the remotes of the repository at a path, and those of the machine; without a path, of the machine alone.
func NewStore(repository string, s System) *Store { return &Store{repository, s} }

func (s *Store) dir() string {
	if s.repository == "" {
		return ""
	}
	return filepath.Join(s.repository, "ostree/remotes.d")
}

// System returns the directories of the machine.
func (s *Store) System() System { return s.system }

// List returns the remotes, sorted by name. One of the repository hides one of the machine that has the same name.
func (s *Store) List() ([]*Config, error) {
	all := map[string]*Config{}
	for _, dir := range []string{s.system.Remotes, s.dir()} {
		if dir == "" {
			continue
		}
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name(), ".conf") {
				continue
			}
			configs, err := ParseConfigs(filepath.Join(dir, e.Name()))
			if err != nil {
				return nil, err
			}
			for _, c := range configs {
				all[c.Name] = c
			}
		}
	}
	var list []*Config
	for _, name := range slices.Sorted(maps.Keys(all)) {
		list = append(list, all[name])
	}
	return list, nil
}

// Get returns the remote of that name.
func (s *Store) Get(name string) (*Config, error) {
	list, err := s.List()
	if err != nil {
		return nil, err
	}
	for _, c := range list {
		if c.Name == name {
			return c, nil
		}
	}
	return nil, fmt.Errorf("remote %q: %w: ostree remote list names those that there are", name, ErrUnknown)
}

// AddOptions say more about a remote than its name and URL.
type AddOptions struct {
	Settings [][2]string // keys and values
	Keyring  []byte      // GPG keys
	Replace  bool        // one that is there
}

// Add writes a remote into the repository.
func (s *Store) Add(name, url string, o AddOptions) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if _, err := s.Get(name); err == nil && !o.Replace {
		return fmt.Errorf("remote %q: it is there already (--force replaces it)", name)
	} else if err != nil && !errors.Is(err, ErrUnknown) {
		return err
	}
	group := fmt.Sprintf("remote %q", name)
	var text strings.Builder
	fmt.Fprintf(&text, "[%s]\n", group)
	place := [2]string{"url", url}
	if list, ok := strings.CutPrefix(url, metalinkPrefix); ok {
		place = [2]string{"metalink", list}
	}
	for _, kv := range append([][2]string{place}, o.Settings...) {
		if strings.ContainsAny(kv[0], "=\n[]# \t") || kv[0] == "" || strings.ContainsAny(kv[1], "\r\n") {
			return fmt.Errorf("remote %q: %.200q=%.200q is no setting", name, kv[0], kv[1])
		}
		fmt.Fprintf(&text, "%s=%s\n", kv[0], kv[1])
	}
	f, err := ostree.ParseKeyfile([]byte(text.String()))
	if err == nil {
		_, err = newConfig(name, f, group)
	}
	if err != nil {
		return fmt.Errorf("remote %q: %w", name, err)
	}
	if len(o.Keyring) > 0 {
		if err := sign.NewGPG().Read(bytes.NewReader(o.Keyring)); err != nil {
			return fmt.Errorf("remote %q: %w", name, err)
		}
	}
	if err := os.MkdirAll(s.dir(), 0o755); err != nil {
		return err
	}
	// A remote that appears has its keyring.
	ring := filepath.Join(s.dir(), name+".trustedkeys.gpg")
	if len(o.Keyring) > 0 {
		if err := replace(ring, o.Keyring); err != nil {
			return err
		}
	} else if err := os.Remove(ring); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return replace(filepath.Join(s.dir(), name+".conf"), []byte(text.String()))
}

// ImportKeys adds GPG keys to the keyring of a remote of the repository.
func (s *Store) ImportKeys(name string, keys []byte) error {
	c, err := s.Get(name)
	if err != nil {
		return err
	}
	if c.dir != s.dir() {
		return fmt.Errorf("remote %q: it is configured in %s, and its keyring is %s", name, c.file, c.Keyring())
	}
	dearmored, err := sign.Dearmor(keys)
	if err == nil {
		err = sign.NewGPG().Read(bytes.NewReader(dearmored))
	}
	if err != nil {
		return fmt.Errorf("remote %q: %w", name, err)
	}
	ring, err := os.ReadFile(c.Keyring())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if ring, err = sign.Dearmor(ring); err != nil {
		return fmt.Errorf("%s: %w", c.Keyring(), err)
	}
	return replace(c.Keyring(), append(ring, dearmored...))
}

// Fingerprints returns those of the GPG keys that the remote trusts.
func (s *Store) Fingerprints(c *Config) ([]string, error) {
	g, err := c.gpg(s.system)
	if err != nil {
		return nil, err
	}
	return g.Fingerprints(), nil
}

// Remove removes a remote of the repository, its keyring and cookies, and what is kept of its summary.
func (s *Store) Remove(name string) error {
	c, err := s.Get(name)
	if err != nil {
		return err
	}
	if c.dir != s.dir() {
		return fmt.Errorf("remote %q: it is configured in %s", name, c.file)
	}
	if err := os.Remove(c.file); err != nil {
		return err
	}
	for _, path := range []string{c.Keyring(), c.cookies()} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return os.RemoveAll(s.Cache(c))
}

// replace writes a file whole, or not at all.
func replace(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
