package remote

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

// Config says where a remote is, how it is reached, and whom it trusts. Its keys are those of ostree.repo-config(5), in a group
// [remote "NAME"].
type Config struct {
	Name         string
	URL          string   // of http, https or file; or one of a list of servers, behind mirrorlist= or metalink=
	ContentURL   string   // of files and parts of deltas; "": URL
	Branches     []string // that are pulled if none are named
	CollectionID string   // that commits must be bound to; "": any
	Proxy        string   // URL; "": that of the environment

	TLSPermissive      bool // any certificate will do
	ClientCert         string
	ClientKey          string
	CA                 string // file with the certificates of the authorities, instead of the system's
	NoHTTP2            bool
	VerifySummary      bool // by its GPG keys
	verify             *bool
	signVerify         string
	signVerifySummary  string
	gpgKeyPaths        []string
	keys               map[string]keySource // by scheme
	dir                string               // where its configuration is, and its keyring; ""
	file               string
	settings           [][2]string // keys and values, as they are in the file
	given              bool        // there are keys that are not configured
	unconfigured, tool string
}

type keySource struct{ key, file string }

// System are the directories of the machine. The zero value is none of them.
type System struct {
	Remotes string   // configurations, NAME.conf
	GPG     string   // keyrings, for remotes that have none of their own
	Keys    []string // with trusted.SCHEME and so on, see sign.Keys
}

// DefaultSystem are those that ostree has. OSTREE_GPG_HOME is another directory of keyrings, as it is for ostree.
func DefaultSystem() System {
	s := System{"/etc/ostree/remotes.d", "/usr/share/ostree/trusted.gpg.d", []string{"/etc/ostree", "/usr/share/ostree"}}
	if home := os.Getenv("OSTREE_GPG_HOME"); home != "" {
		s.GPG = home
	}
	return s
}

var remoteGroup = regexp.MustCompile(`^remote "(.+)"$`)

var validName = regexp.MustCompile(`^[\w][\w.-]*$`)

// CheckName tells why a name cannot be one of a remote. It is a part of the names of files.
func CheckName(name string) error {
	if len(name) > 200 || !validName.MatchString(name) {
		return fmt.Errorf("remote %.210q: not a name of a remote", name)
	}
	return nil
}

// maxKeyfile bounds what is read of a configuration, in bytes.
const maxKeyfile = 1 << 20

// readKeyfile reads a file of a configuration.
func readKeyfile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKeyfile+1))
	if err == nil && len(b) > maxKeyfile {
		err = fmt.Errorf("%s: more than %d bytes", path, maxKeyfile)
	}
	return b, err
}

// ParseConfigs reads the remotes of a file, which may be the file config of an ostree repository. Keyrings are looked for beside it.
func ParseConfigs(path string) ([]*Config, error) {
	b, err := readKeyfile(path)
	if err != nil {
		return nil, err
	}
	f, err := ostree.ParseKeyfile(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var all []*Config
	for _, group := range f.Groups() {
		m := remoteGroup.FindStringSubmatch(group)
		if m == nil {
			continue
		}
		c, err := newConfig(m[1], f, group)
		if err != nil {
			return nil, fmt.Errorf("%s: remote %q: %w", path, m[1], err)
		}
		c.dir, c.file = filepath.Dir(path), path
		all = append(all, c)
	}
	return all, nil
}

func newConfig(name string, f ostree.Keyfile, group string) (*Config, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	c := &Config{Name: name, keys: map[string]keySource{}}
	for _, key := range f.Keys(group) {
		value, _ := f.Get(group, key)
		c.settings = append(c.settings, [2]string{key, value})
	}
	var failed error
	text := func(key string) string {
		s, _ := f.Get(group, key)
		return s
	}
	boolean := func(key string, otherwise bool) bool {
		b, err := f.Bool(group, key, otherwise)
		failed = errors.Join(failed, err)
		return b
	}
	list := func(key string) []string {
		return strings.FieldsFunc(text(key), func(r rune) bool { return r == ';' || r == ',' })
	}
	c.URL, c.ContentURL, c.Proxy, c.CollectionID = text("url"), text("contenturl"), text("proxy"), text("collection-id")
	if list := text("metalink"); list != "" {
		c.URL = metalinkPrefix + list
	}
	c.TLSPermissive, c.NoHTTP2 = boolean("tls-permissive", false), !boolean("http2", true)
	c.ClientCert, c.ClientKey, c.CA = text("tls-client-cert-path"), text("tls-client-key-path"), text("tls-ca-path")
	c.VerifySummary = boolean("gpg-verify-summary", false)
	if text("gpg-verify") != "" {
		b := boolean("gpg-verify", true)
		c.verify = &b
	}
	c.Branches, c.gpgKeyPaths = list("branches"), list("gpgkeypath")
	c.signVerify, c.signVerifySummary = text("sign-verify"), text("sign-verify-summary")
	for _, scheme := range []string{"ed25519", "spki"} {
		c.keys[scheme] = keySource{text("verification-" + scheme + "-key"), text("verification-" + scheme + "-file")}
	}
	c.unconfigured, c.tool = text("unconfigured-state"), text("custom-backend")
	if (c.ClientCert == "") != (c.ClientKey == "") {
		failed = errors.Join(failed, errors.New("tls-client-cert-path and tls-client-key-path go together"))
	}
	if failed != nil {
		return nil, failed
	}
	return c, nil
}

// Usable tells why nothing can be pulled from the remote, if that is so.
func (c *Config) Usable() error {
	switch {
	case c.unconfigured != "":
		return fmt.Errorf("remote %q: %s", c.Name, c.unconfigured)
	case c.tool != "":
		return fmt.Errorf("remote %q: it is for %q, which pulls from it", c.Name, c.tool)
	case c.URL == "":
		return fmt.Errorf("remote %q: no url in its configuration", c.Name)
	}
	return nil
}

// Trust is whom a remote trusts.
type Trust struct {
	Commits sign.Policy // must be signed so
	Summary sign.Policy // empty: need not be signed
	Waived  bool        // it is said that commits need not be signed
}

// ErrNoKeys tells that nothing is known about who may sign what a remote has.
var ErrNoKeys = errors.New("no keys say whom to trust")

// Trust reads the keys of the remote. What is not configured is taken for granted where there are keys: a remote with a keyring has
// signed commits. Keyrings of the system count for a remote that has none of its own. The error is ErrNoKeys if there are no keys at
// all, and nothing is said about that; where signatures are asked for, it is another one.
func (c *Config) Trust(s System) (Trust, error) {
	var t Trust
	fail := func(err error) (Trust, error) { return Trust{}, fmt.Errorf("remote %q: %w", c.Name, err) }
	gpg, err := c.gpg(s)
	if err != nil {
		return fail(err)
	}
	if c.verify != nil && *c.verify || c.verify == nil && !gpg.Empty() {
		if gpg.Empty() {
			return fail(errors.New("gpg-verify is set, and there are no keys: ostree remote gpg-import adds some"))
		}
		t.Commits = append(t.Commits, []sign.Verifier{gpg})
	}
	if c.VerifySummary {
		if gpg.Empty() {
			return fail(errors.New("gpg-verify-summary is set, and there are no keys: ostree remote gpg-import adds some"))
		}
		t.Summary = append(t.Summary, []sign.Verifier{gpg})
	}
	for _, p := range []struct {
		key, value string
		to         *sign.Policy
	}{{"sign-verify", c.signVerify, &t.Commits}, {"sign-verify-summary", c.signVerifySummary, &t.Summary}} {
		group, err := c.verifiers(s, p.value, p.key == "sign-verify")
		if err != nil {
			return fail(fmt.Errorf("%s: %w", p.key, err))
		}
		if len(group) > 0 {
			*p.to = append(*p.to, group)
		}
	}
	t.Waived = len(t.Commits) == 0 && (c.verify != nil || isFalse(c.signVerify))
	if len(t.Commits) == 0 && !t.Waived {
		return fail(ErrNoKeys)
	}
	return t, nil
}

func isFalse(s string) bool { return s == "false" || s == "0" }

// verifiers returns those of a setting sign-verify: a list of schemes, each of which must have keys; or true for those that have.
// Without a setting, commits are verified with the keys that the remote itself has.
func (c *Config) verifiers(s System, setting string, commits bool) ([]sign.Verifier, error) {
	var group []sign.Verifier
	schemes := []string{"ed25519", "spki"}
	all := setting == "true" || setting == "1" || setting == "" && commits
	switch {
	case all:
	case setting == "" || isFalse(setting):
		return nil, nil
	default:
		schemes = strings.FieldsFunc(setting, func(r rune) bool { return r == ';' || r == ',' })
	}
	for _, scheme := range schemes {
		k, err := c.rawKeys(s, scheme, setting != "")
		if err != nil {
			return nil, err
		}
		if !k.Empty() {
			group = append(group, k)
		} else if !all {
			return nil, fmt.Errorf("there are no keys of %s: verification-%[1]s-key or verification-%[1]s-file name one", scheme)
		}
	}
	if len(group) == 0 && setting != "" {
		return nil, errors.New("there are no keys: verification-ed25519-key and the like name one")
	}
	return group, nil
}

// rawKeys returns the keys of the remote; with it those of the system that are revoked; and if it has none, and the system is to be
// asked, those that are trusted there.
func (c *Config) rawKeys(s System, scheme string, system bool) (*sign.Keys, error) {
	k, err := sign.NewKeys(scheme)
	if err != nil {
		return nil, err
	}
	own := c.keys[scheme]
	if own.file != "" {
		if err := k.LoadFile(own.file); err != nil {
			return nil, err
		}
	}
	if own.key != "" {
		if err := k.Add(own.key); err != nil {
			return nil, fmt.Errorf("verification-%s-key: %w", scheme, err)
		}
	}
	for _, dir := range s.Keys {
		load := k.LoadRevoked
		if system && own == (keySource{}) {
			load = k.LoadSystem
		}
		if err := load(dir); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// Keyring returns where the keyring of the remote is, or would be.
func (c *Config) Keyring() string {
	if c.dir == "" {
		return ""
	}
	return filepath.Join(c.dir, c.Name+".trustedkeys.gpg")
}

func (c *Config) gpg(s System) (*sign.GPG, error) {
	g := sign.NewGPG()
	if path := c.Keyring(); path != "" {
		if err := g.Load(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	own := !g.Empty()
	for _, path := range c.gpgKeyPaths {
		if err := g.Load(path); err != nil {
			return nil, err
		}
	}
	if !own && s.GPG != "" {
		if err := g.Load(s.GPG); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return g, nil
}

// Anonymous returns the configuration of a remote that has none: a URL and the files of keys that are given.
func Anonymous(url string, gpgKeys []string) *Config {
	return &Config{Name: "anonymous", URL: url, gpgKeyPaths: slices.Clone(gpgKeys), keys: map[string]keySource{},
		given: len(gpgKeys) > 0}
}

// TrustAlso adds files of GPG keys to those of the configuration. With any, commits must be signed, whatever that says.
func (c *Config) TrustAlso(gpgKeys []string) {
	if len(gpgKeys) > 0 {
		c.gpgKeyPaths, c.verify, c.given = append(c.gpgKeyPaths, gpgKeys...), nil, true
	}
}
