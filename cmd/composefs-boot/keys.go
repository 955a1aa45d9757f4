package main

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/composefs-boot/composefs-boot/uki/secureboot"
)

func (a *app) keysCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "keys",
		Short: "Make, show, rotate and revoke keys for Secure Boot",
		Long: `Make, show, rotate and revoke keys for Secure Boot. Firmware has four databases of certificates and hashes: db says what it
starts, dbx what it does not whatever db says, the keys in KEK may change these two, and the key in PK changes KEK and PK. Programs
are signed with the key of db.`,
		Example: `  composefs-boot keys new keys
  composefs-boot uki sign os.efi --key keys/db.key --certificate keys/db.pem
  composefs-boot keys show --firmware`,
	}
	c.AddCommand(a.keysNewCommand(), a.keysShowCommand(), a.keysESLCommand(), a.keysAuthCommand(), a.keysRotateCommand(), a.keysRevokeCommand())
	return c
}

// keysChange is what the commands print as JSON that write files.
type keysChange struct {
	DryRun bool       `json:"dry_run"`
	Files  []keysFile `json:"files"`
}

type keysFile struct {
	Path    string `json:"path"`
	Size    int    `json:"size"`
	Private bool   `json:"private"` // only its owner may read it
}

// printKeysChange tells which files of a directory were written, or would be.
func (a *app) printKeysChange(dry bool, dir string, files []secureboot.File) error {
	r := keysChange{DryRun: dry, Files: []keysFile{}}
	for _, f := range files {
		r.Files = append(r.Files, keysFile{filepath.Join(dir, f.Name), len(f.Data), f.Private})
	}
	switch {
	case a.json:
		return printJSON(a.out, r)
	case dry:
		fmt.Fprintln(a.out, "Dry run (nothing is written):")
	case a.quiet:
		return nil
	}
	for _, f := range r.Files {
		what := ""
		if f.Private {
			what = ", private"
		}
		fmt.Fprintf(a.out, "%s: %d bytes%s\n", f.Path, f.Size, what)
	}
	return nil
}

// keyFlags are those of commands that make keys.
type keyFlags struct {
	options secureboot.Options
	dry     bool
}

func (f *keyFlags) addTo(flags *pflag.FlagSet, name string) {
	flags.StringVar(&f.options.Name, "name", "", "whose keys they are, `TEXT` in the names of certificates [default: "+name+"]")
	flags.IntVar(&f.options.Days, "days", 3650, "how many `DAYS` certificates are valid; firmware does not look")
	flags.IntVar(&f.options.Bits, "bits", 2048, "size of RSA keys, `BITS`: 2048, which every firmware knows, 3072 or 4096")
	flags.BoolVarP(&f.dry, "dry-run", "n", false, "print which files would be written, and write none")
}

func (a *app) keysNewCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "new DIR",
		Short: "Make a directory of keys",
		Long: `Make the keys that a machine with Secure Boot of one's own needs:

  PK.key PK.pem, KEK.key KEK.pem, db.key db.pem   private keys and their certificates, PEM
  pcr.key pcr.pub                                 a key for PCR policies, private and public, PEM
  PK.auth KEK.auth db.auth                        to enrol them: for loader/keys/auto of systemd-boot
  owner                                           the GUID that marks entries as one's own

Private keys can be read by you alone, and nothing is overwritten. Others may not be able to write to the directory, and it may
not be in a composefs repository. Programs are signed with db.key; PK.key and KEK.key are better kept elsewhere, where "keys rotate"
and "keys revoke" take them from with --pk-key and --kek-key.

No certificates of Microsoft are added. Firmware of plug-in cards and other systems may need them: get them from Microsoft, and
name them with --add-db and --add-kek. SOURCE_DATE_EPOCH is the time of the .auth files.`,
		Example: `  composefs-boot keys new keys
  composefs-boot keys new keys --name "Example Ltd" --bits 4096 --add-db MicCorUEFCA2011.crt --owner $(uuidgen)
  composefs-boot keys new keys --dry-run`,
		Args: exactly(1),
	}
	var f keyFlags
	f.addTo(c.Flags(), "the host's name")
	owner := c.Flags().String("owner", "", "whose the entries are, `GUID` [default: a random one]")
	db := c.Flags().StringArray("add-db", nil, "trust this as well, `FILE`: a certificate, a signature list, an .auth file or a PE file")
	kek := c.Flags().StringArray("add-kek", nil, "let this change db and dbx as well, `FILE`")
	c.RunE = func(_ *cobra.Command, args []string) error {
		id := secureboot.NewGUID()
		var err error
		if *owner != "" {
			if id, err = secureboot.ParseGUID(*owner); err != nil {
				return usageError{err}
			}
		}
		if f.options.Name == "" {
			if f.options.Name, err = os.Hostname(); err != nil {
				return err
			}
		}
		if f.options.Time, err = keyTime(); err != nil {
			return err
		}
		addDB, err := readEntries(*db, id)
		if err != nil {
			return err
		}
		addKEK, err := readEntries(*kek, id)
		if err != nil {
			return err
		}
		if err := secureboot.CheckPlace(args[0]); err != nil { // before the work of making keys
			return err
		}
		files, err := secureboot.New(f.options, id, addKEK, addDB)
		if err == nil && !f.dry {
			err = secureboot.Create(args[0], files)
		}
		if err != nil {
			return err
		}
		return a.printKeysChange(f.dry, args[0], files)
	}
	return c
}

// keyTime is SOURCE_DATE_EPOCH, or else now, in whole seconds as signed updates have them.
func keyTime() (time.Time, error) {
	t, err := sourceDate(time.Now())
	return t.UTC().Truncate(time.Second), err
}

// readEntries reads what is named: a file of any kind, or sha256:HASH.
func readEntries(names []string, owner secureboot.GUID) (secureboot.Database, error) {
	var d secureboot.Database
	for _, name := range names {
		if text, ok := strings.CutPrefix(name, "sha256:"); ok {
			b, err := hex.DecodeString(text)
			if err != nil || len(b) != sha256.Size {
				return nil, usageError{fmt.Errorf("%s: want sha256: and 64 hexadecimal digits, as \"uki verify --json\" prints them", name)}
			}
			d = d.With(secureboot.HashEntry(owner, [sha256.Size]byte(b)))
			continue
		}
		c, err := secureboot.Read(name, owner)
		if err != nil {
			return nil, err
		}
		d = d.With(c.Database...)
	}
	return d, nil
}

// signingKeys are the flags that say where the keys are that sign updates.
func signingKeys(flags *pflag.FlagSet) (open func(dir string) (*secureboot.Dir, error)) {
	pk := flags.String("pk-key", "", "the private key of PK, `FILE|tpm2:KEY|exec:COMMAND` [default: PK.key in DIR]")
	kek := flags.String("kek-key", "", "the private key of KEK, `FILE|tpm2:KEY|exec:COMMAND` [default: KEK.key in DIR]")
	return func(path string) (*secureboot.Dir, error) {
		d, err := secureboot.OpenDir(path)
		if err == nil {
			d.Keys = map[secureboot.Variable]string{secureboot.PK: *pk, secureboot.KEK: *kek}
		}
		return d, err
	}
}

func (a *app) keysRotateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rotate DIR PK|KEK|db",
		Short: "Make a new key beside an old one",
		Long: `Make a new key for db, KEK or PK of a directory that "keys new" made. The order is:

  1. keys rotate DIR db, and let machines take DIR/updates: they trust the old and the new key
  2. sign everything with the new db.key, and let machines take that
  3. keys revoke DIR old/TIME-db.pem, and let machines take DIR/updates: they trust the new key alone

For KEK it is the same, without the second step. PK has one key only: the new one replaces it, signed by the old one.

What was replaced is kept as old/TIME-NAME. Files in updates are for machines that are enrolled, to be taken in the order of their
names: those named .append.auth are appended to the variable (as with efi-updatevar -a -f), the others replace it. The .auth files
in DIR have everything, for machines that are still to be enrolled. The times in updates always grow, as firmware wants it.`,
		Example: `  composefs-boot keys rotate keys db
  composefs-boot keys rotate keys KEK --pk-key tpm2:0x81010001
  composefs-boot keys rotate keys PK --dry-run`,
		Args: exactly(2),
	}
	var f keyFlags
	f.addTo(c.Flags(), "as before")
	open := signingKeys(c.Flags())
	c.RunE = func(_ *cobra.Command, args []string) error {
		v, err := secureboot.ParseVariable(args[1])
		if err != nil {
			return usageError{err}
		}
		d, err := open(args[0])
		if err != nil {
			return err
		}
		if f.options.Time, err = keyTime(); err != nil {
			return err
		}
		if old := d.Certificates[v]; old != nil {
			f.options.Name = cmp.Or(f.options.Name, strings.TrimSuffix(old.Subject.CommonName, " "+v.Name))
		}
		files, err := d.Rotate(v, f.options)
		return a.changeKeys(d, files, f.dry, err)
	}
	return c
}

// changeKeys makes a change that was planned.
func (a *app) changeKeys(d *secureboot.Dir, files []secureboot.File, dry bool, err error) error {
	if err == nil && !dry {
		err = d.Apply(files)
	}
	if err != nil {
		return err
	}
	return a.printKeysChange(dry, d.Path, files)
}

func (a *app) keysRevokeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "revoke DIR FILE|sha256:HASH...",
		Short: "Trust a certificate or a program no longer",
		Long: `Put certificates, programs and hashes into dbx, so that firmware starts nothing that they name, whoever signed it. A FILE is a
certificate (PEM or DER), a program for UEFI, which stands for its own hash, or a signature list or .auth file, for all that it
has. A certificate of KEK is taken out of KEK instead.

dbx.auth has everything, for machines that are still to be enrolled; files in updates are for those that are. What the directory
uses itself is not revoked: make a new key with "keys rotate" first, and sign with that.`,
		Example: `  composefs-boot keys revoke keys old-os.efi
  composefs-boot keys revoke keys keys/old/20260102T030405Z-db.pem
  composefs-boot keys revoke keys sha256:80b4d96931bf0d02fd91a61e19d14f1da452e66db2408ca8604d411f92659f0a`,
		Args: cobra.MinimumNArgs(2),
	}
	dry := c.Flags().BoolP("dry-run", "n", false, "print which files would be written, and write none")
	open := signingKeys(c.Flags())
	c.RunE = func(_ *cobra.Command, args []string) error {
		d, err := open(args[0])
		if err != nil {
			return err
		}
		now, err := keyTime()
		if err != nil {
			return err
		}
		entries, err := readEntries(args[1:], d.Owner)
		if err != nil {
			return err
		}
		files, err := d.Revoke(entries, now)
		return a.changeKeys(d, files, *dry, err)
	}
	return c
}

func errMissing(flag, why string) error {
	return usageError{errors.New(flag + " is missing: " + why)}
}
