package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki/secureboot"
	"github.com/composefs-boot/composefs-boot/uki/signer"
)

// entryFlags are those of commands that write a file with entries.
type entryFlags struct {
	output, owner string
	dry           bool
}

func (f *entryFlags) addTo(c *cobra.Command) {
	c.Flags().StringVarP(&f.output, "output", "o", "", "the `FILE` to write")
	c.Flags().StringVar(&f.owner, "owner", "", "whose the entries are that have no owner, `GUID` [default: zeros]")
	c.Flags().BoolVarP(&f.dry, "dry-run", "n", false, "print what would be written, and write nothing")
}

func (f *entryFlags) read(names []string) (secureboot.Database, error) {
	if f.output == "" {
		return nil, errMissing("-o", "say which file to write")
	}
	var owner secureboot.GUID
	if f.owner != "" {
		var err error
		if owner, err = secureboot.ParseGUID(f.owner); err != nil {
			return nil, usageError{err}
		}
	}
	return readEntries(names, owner)
}

// writeEntries writes a file, and takes the place of an old one: what is in it can be made again.
func (a *app) writeEntries(f entryFlags, b []byte) error {
	if !f.dry {
		err := replaceFile(f.output, func(out *os.File) error {
			_, err := out.Write(b)
			return err
		})
		if err != nil {
			return err
		}
	}
	return a.printKeysChange(f.dry, "", []secureboot.File{{Name: f.output, Data: b}})
}

func (a *app) keysESLCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "esl FILE|sha256:HASH... -o FILE",
		Short: "Make EFI signature lists of certificates and hashes",
		Long: `Make EFI signature lists (ESL), which the setup of firmware and other programs read, of certificates (PEM or DER), of programs
for UEFI, which stand for their hashes, of hashes, and of other signature lists and .auth files, for all that they have.`,
		Example: `  composefs-boot keys esl keys/db.pem -o db.esl --owner $(cat keys/owner)
  composefs-boot keys esl keys/db.auth MicCorUEFCA2011.crt memtest.efi -o db.esl`,
		Args: cobra.MinimumNArgs(1),
	}
	var f entryFlags
	f.addTo(c)
	c.RunE = func(_ *cobra.Command, args []string) error {
		d, err := f.read(args)
		if err != nil {
			return err
		}
		return a.writeEntries(f, d.Bytes())
	}
	return c
}

func (a *app) keysAuthCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "auth PK|KEK|db|dbx [FILE|sha256:HASH]... --key KEY --certificate FILE -o FILE",
		Short: "Make a signed update of a variable",
		Long: `Make a signed update, an .auth file, of PK, KEK, db or dbx: the entries that are named, as for "keys esl", are what the variable
has then, or what is appended to it. PK and KEK are signed with the key of PK, db and dbx with one of KEK. The update has the time
SOURCE_DATE_EPOCH, or now; firmware takes one that replaces the variable only if it is newer than the last.

An update with nothing in it, made with --clear, deletes the variable; without PK, the machine is in setup mode again.`,
		Example: `  composefs-boot keys auth db keys/db.pem vendor.crt --key keys/KEK.key --certificate keys/KEK.pem -o db.auth
  composefs-boot keys auth dbx bad.efi --append --key exec:sign-kek --certificate KEK.pem -o dbx.append.auth
  composefs-boot keys auth PK --clear --key tpm2:0x81010001 --certificate PK.pem -o noPK.auth`,
		Args: cobra.MinimumNArgs(1),
	}
	var f entryFlags
	f.addTo(c)
	key := c.Flags().String("key", "", "private key, `FILE|tpm2:KEY|exec:COMMAND`")
	certificate := c.Flags().String("certificate", "", "its certificate `FILE`, PEM or DER")
	add := c.Flags().Bool("append", false, "append to the variable")
	empty := c.Flags().Bool("clear", false, "delete the variable")
	c.RunE = func(_ *cobra.Command, args []string) error {
		v, err := secureboot.ParseVariable(args[0])
		switch {
		case err != nil:
			return usageError{err}
		case *empty != (len(args) == 1):
			return usageError{errors.New("want files or hashes to put into the variable, or --clear to delete it")}
		case *empty && *add:
			return usageError{errors.New("--append and --clear: want one of them")}
		case *key == "" || *certificate == "":
			return errMissing("--key or --certificate", "say who signs the update")
		}
		d, err := f.read(args[1:])
		if err != nil {
			return err
		}
		if v == secureboot.PK && len(d) > 1 {
			return fmt.Errorf("PK: %d entries: firmware has one platform key", len(d))
		}
		b, err := signUpdate(v, *add, d, *key, *certificate)
		if err != nil {
			return err
		}
		return a.writeEntries(f, b)
	}
	return c
}

func signUpdate(v secureboot.Variable, add bool, d secureboot.Database, key, certificate string) ([]byte, error) {
	now, err := keyTime()
	if err != nil {
		return nil, err
	}
	cert, err := signer.ReadCertificate(certificate)
	if err != nil {
		return nil, err
	}
	s, err := signer.Open(key, cert.PublicKey)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return secureboot.Sign(v, add, now, d, s, cert)
}
