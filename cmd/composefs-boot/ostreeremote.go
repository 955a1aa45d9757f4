package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

func (a *app) ostreeRemoteCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "remote",
		Short: "Say where OSTree repositories are, and whom they trust",
		Long: `Say where OSTree repositories are, and whom they trust. Remotes are kept in the directory ostree/remotes.d of the repository, in files as
ostree.repo-config(5) describes; those of the machine in /etc/ostree/remotes.d count as well. A remote's keyring NAME.trustedkeys.gpg is
beside its file. A remote without one trusts the keys in /usr/share/ostree/trusted.gpg.d. Cookies that are to be sent are in
NAME.cookies.txt, in the Netscape format, as ostree remote add-cookie and browsers write it.`,
		Example: "  composefs-boot --repo r ostree remote add --gpg-import key.asc my-os https://ostree.example.org/repo",
	}
	c.AddCommand(a.remoteAddCommand(), a.remoteListCommand(), a.remoteShowCommand(), a.remoteDeleteCommand(), a.remoteImportCommand())
	return c
}

func (a *app) remoteAddCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "add NAME URL [BRANCH...]",
		Short: "Add a remote",
		Long: `Add a remote to the repository. URL is one of http or https; of a repository on this machine, file:///PATH; or of a list of mirrors, a URL
in each line, mirrorlist=URL, or a metalink, which says what the summary must be, too, metalink=URL. Branches are pulled if no refs are named.

Keys say who signs its commits: --gpg-import, or --sign-verify with ed25519 or spki. With --gpg-verify-summary the summary must be signed,
too. --set has the other settings of ostree.repo-config(5).`,
		Example: `  composefs-boot --repo r ostree remote add --gpg-import key.asc my-os https://ostree.example.org/repo my-os/stable
  composefs-boot --repo r ostree remote add --sign-verify ed25519=inline:KEY my-os https://ostree.example.org/repo
  composefs-boot --repo r ostree remote add --set tls-ca-path=/etc/ca.pem --set http2=false my-os https://ostree.example.org/repo`,
		Args: between(2, 1<<20),
	}
	keys := c.Flags().StringArray("gpg-import", nil, "trust the GPG keys in this `FILE`; - is standard input")
	noVerify := c.Flags().Bool("no-gpg-verify", false, "its commits need no GPG signatures")
	summary := c.Flags().Bool("gpg-verify-summary", false, "its summary must have one, too")
	signed := c.Flags().StringArray("sign-verify", nil, "trust a `KEY`: ed25519=inline:BASE64, ed25519=file:PATH, spki=file:PATH")
	settings := c.Flags().StringArray("set", nil, "another setting, `KEY=VALUE`")
	contents := c.Flags().String("contenturl", "", "where files are fetched from, if not at `URL`")
	collection := c.Flags().String("collection-id", "", "`ID` of the collection that its commits must be meant for")
	ifNot := c.Flags().Bool("if-not-exists", false, "do nothing if there is one of that name")
	force := c.Flags().Bool("force", false, "replace one of that name, and its keys")
	c.MarkFlagsMutuallyExclusive("if-not-exists", "force")
	c.RunE = func(_ *cobra.Command, args []string) error {
		store, err := a.remotes()
		if err != nil {
			return err
		}
		if _, err := store.Get(args[0]); err == nil && *ifNot {
			return nil
		}
		o := remote.AddOptions{Replace: *force}
		set := func(key, value string) {
			if value != "" {
				o.Settings = append(o.Settings, [2]string{key, value})
			}
		}
		set("contenturl", *contents)
		set("collection-id", *collection)
		if len(args) > 2 {
			set("branches", strings.Join(args[2:], ";")+";")
		}
		if *noVerify {
			set("gpg-verify", "false")
		}
		if *summary {
			set("gpg-verify-summary", "true")
		}
		if err := setKeys(set, *signed); err != nil {
			return usageError{err}
		}
		for _, s := range *settings {
			key, value, ok := strings.Cut(s, "=")
			if !ok {
				return usageError{fmt.Errorf("--set %q: want KEY=VALUE", s)}
			}
			o.Settings = append(o.Settings, [2]string{key, value})
		}
		if o.Keyring, err = a.readKeyrings(*keys); err != nil {
			return err
		}
		return store.Add(args[0], args[1], o)
	}
	return c
}

// setKeys makes settings of --sign-verify.
func setKeys(set func(key, value string), keys []string) error {
	var schemes []string
	for _, k := range keys {
		scheme, where, _ := strings.Cut(k, "=")
		kind, value, ok := strings.Cut(where, ":")
		switch {
		case !ok || scheme != "ed25519" && scheme != "spki":
			return fmt.Errorf("--sign-verify %q: want ed25519 or spki, =, and inline:KEY or file:PATH", k)
		case kind == "inline":
			set("verification-"+scheme+"-key", value)
		case kind == "file":
			set("verification-"+scheme+"-file", value)
		default:
			return fmt.Errorf("--sign-verify %q: want inline:KEY or file:PATH", k)
		}
		schemes = append(schemes, scheme)
	}
	set("sign-verify", strings.Join(schemes, ";"))
	return nil
}

// readKeyrings reads files of keys; - is standard input.
func (a *app) readKeyrings(files []string) ([]byte, error) {
	var all []byte
	for _, file := range files {
		var b []byte
		var err error
		if file == "-" {
			b, err = io.ReadAll(a.in)
		} else {
			b, err = os.ReadFile(file)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, b...)
	}
	return all, nil
}

// remoteListResult is what ostree remote list prints as JSON.
type remoteListResult struct {
	Remotes []remoteEntry `json:"remotes"`
}

type remoteEntry struct {
	Name string `json:"name"`
	URL  string `json:"url"`
}

func (a *app) remoteListCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "list",
		Short:   "List the remotes",
		Long:    "List the remotes of the repository and of the machine.",
		Example: "  composefs-boot --repo r ostree remote list -u",
		Args:    exactly(0),
	}
	urls := c.Flags().BoolP("show-urls", "u", false, "with their URLs")
	c.RunE = func(*cobra.Command, []string) error {
		store, err := a.remotes()
		if err != nil {
			return err
		}
		list, err := store.List()
		if err != nil {
			return err
		}
		result := remoteListResult{Remotes: []remoteEntry{}}
		for _, r := range list {
			result.Remotes = append(result.Remotes, remoteEntry{r.Name, r.URL})
			switch {
			case a.json:
			case *urls:
				fmt.Fprintf(a.out, "%s  %s\n", r.Name, r.URL)
			default:
				fmt.Fprintln(a.out, r.Name)
			}
		}
		if a.json {
			return printJSON(a.out, result)
		}
		return nil
	}
	return c
}

// remoteShowResult is what ostree remote show prints as JSON.
type remoteShowResult struct {
	remoteEntry
	Branches   []string `json:"branches"`
	Collection string   `json:"collection_id,omitempty"`
	GPGKeys    []string `json:"gpg_keys"` // fingerprints
	Commits    []string `json:"commits_signed_with"`
	Summary    []string `json:"summary_signed_with"`
}

func (a *app) remoteShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show NAME",
		Short:   "Show where a remote is, and whom it trusts",
		Long:    "Show where a remote is, and whom it trusts: the fingerprints of its GPG keys, and what commits and the summary must be signed with.",
		Example: "  composefs-boot --repo r ostree remote show my-os",
		Args:    exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			store, err := a.remotes()
			if err != nil {
				return err
			}
			c, err := store.Get(args[0])
			if err != nil {
				return err
			}
			keys, err := store.Fingerprints(c)
			if err != nil {
				return err
			}
			trust, failed := c.Trust(store.System())
			result := remoteShowResult{remoteEntry{c.Name, c.URL}, append([]string{}, c.Branches...), c.CollectionID, append([]string{}, keys...),
				trust.Commits.Schemes(), trust.Summary.Schemes()}
			if a.json {
				return printJSON(a.out, result)
			}
			fmt.Fprintf(a.out, "url      %s\n", c.URL)
			for _, b := range c.Branches {
				fmt.Fprintf(a.out, "branch   %s\n", b)
			}
			if c.CollectionID != "" {
				fmt.Fprintf(a.out, "for      %s\n", c.CollectionID)
			}
			for _, k := range keys {
				fmt.Fprintf(a.out, "gpg key  %s\n", k)
			}
			switch {
			case failed != nil:
				fmt.Fprintf(a.out, "commits  refused: %v\n", failed)
			case trust.Waived:
				fmt.Fprintln(a.out, "commits  not verified")
			default:
				fmt.Fprintf(a.out, "commits  signed with %s\n", strings.Join(trust.Commits.Schemes(), " and "))
			}
			if len(trust.Summary) > 0 {
				fmt.Fprintf(a.out, "summary  signed with %s\n", strings.Join(trust.Summary.Schemes(), " and "))
			}
			return nil
		},
	}
}

func (a *app) remoteDeleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "delete NAME",
		Short:   "Delete a remote of the repository",
		Long:    "Delete a remote of the repository, its keyring, and what is kept of its summary. Commits that were pulled from it stay.",
		Example: "  composefs-boot --repo r ostree remote delete my-os",
		Args:    exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			store, err := a.remotes()
			if err != nil {
				return err
			}
			return store.Remove(args[0])
		},
	}
}

func (a *app) remoteImportCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "gpg-import NAME FILE...",
		Short:   "Trust more GPG keys",
		Long:    "Add the GPG keys in files to the keyring of a remote; - is standard input. A key that is revoked there signs nothing any more.",
		Example: "  composefs-boot --repo r ostree remote gpg-import my-os new-key.asc",
		Args:    between(2, 1<<20),
		RunE: func(_ *cobra.Command, args []string) error {
			store, err := a.remotes()
			if err != nil {
				return err
			}
			keys, err := a.readKeyrings(args[1:])
			if err != nil {
				return err
			}
			return store.ImportKeys(args[0], keys)
		},
	}
}
