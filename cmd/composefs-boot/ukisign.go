package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/signer"
)

// signedFile is what sign and unsign print as JSON.
type signedFile struct {
	Output       string   `json:"output"`
	Authenticode string   `json:"authenticode"` // SHA-256, hexadecimal: what db and dbx may list
	Signers      []string `json:"signers"`
}

func (a *app) ukiSignCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "sign FILE",
		Short: "Sign a UKI, or any other program for UEFI",
		Long: `Sign a program for UEFI: a UKI, an addon, a boot loader. A file that is signed gets another signature; unsign takes all
of them away. RSA and SHA-256 are used, without a time: the same key gives the same bytes.

The key is a PEM file, a key in a TPM 2.0, or a program. tpm2:0x81010001 is a persistent handle, and tpm2:FILE a key file of the
TPM ("TSS2 PRIVATE KEY"); COMPOSEFS_TPM names another device than /dev/tpmrm0. exec:COMMAND is run by the shell, has the SHA-256
digest (32 bytes) as standard input and prints the RSA signature with PKCS #1 padding, so that keys on tokens and in key services
can be used.`,
		Example: `  composefs-boot uki sign os.efi --key db.key --certificate db.pem
  composefs-boot uki sign os.efi --key db.key --certificate db.pem -o os.signed.efi
  composefs-boot uki sign os.efi --key "exec:pkcs11-tool --sign --mechanism RSA-PKCS ..." --certificate db.pem`,
		Args: exactly(1),
	}
	key := c.Flags().String("key", "", "private key, `FILE|tpm2:KEY|exec:COMMAND`")
	certificate := c.Flags().String("certificate", "", "its certificate `FILE`, PEM or DER")
	output := c.Flags().StringP("output", "o", "", "the `FILE` to write [default: the same]")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if *key == "" || *certificate == "" {
			return usageError{errors.New("--key and --certificate are needed: make some with \"keys new\"")}
		}
		return a.changeSignatures(args[0], *output, func(f *os.File, p *uki.PE) error {
			return signWith(f, p, *key, *certificate)
		})
	}
	return c
}

// signWith writes a file with another signature, made with the key and the certificate that are named.
func signWith(f *os.File, p *uki.PE, key, certificate string) error {
	cert, err := signer.ReadCertificate(certificate)
	if err != nil {
		return err
	}
	s, err := signer.Open(key, cert.PublicKey)
	if err != nil {
		return err
	}
	return errors.Join(uki.Sign(f, p, s, cert), s.Close())
}

func (a *app) ukiUnsignCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "unsign FILE",
		Short: "Take the signatures off a UKI",
		Long:  `Take all signatures off a UKI or another program for UEFI, to sign it with another key or to edit it.`,
		Example: `  composefs-boot uki unsign os.efi
  composefs-boot uki unsign os.efi -o os.unsigned.efi`,
		Args: exactly(1),
	}
	output := c.Flags().StringP("output", "o", "", "the `FILE` to write [default: the same]")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.changeSignatures(args[0], *output, func(f *os.File, p *uki.PE) error { return uki.Unsign(f, p) })
	}
	return c
}

// changeSignatures writes a changed file to output, or in place of it.
func (a *app) changeSignatures(path, output string, change func(*os.File, *uki.PE) error) error {
	if output == "" {
		output = path
	}
	in := &ukiInput{}
	defer in.close()
	_, p, err := in.image(path)
	if err != nil {
		return err
	}
	result := signedFile{Output: output}
	err = replaceFile(output, func(f *os.File) error {
		if err := change(f, p); err != nil {
			return err
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		changed, err := uki.ParsePE(f, info.Size())
		if err != nil {
			return err
		}
		digest, err := changed.Authenticode()
		result.Authenticode = fmt.Sprintf("%x", digest)
		if err == nil {
			result.Signers, err = signers(changed)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if a.json {
		return printJSON(a.out, result)
	}
	if !a.quiet {
		fmt.Fprintf(a.err, "wrote %s, Authenticode %s\n", output, result.Authenticode)
		for _, s := range result.Signers {
			fmt.Fprintf(a.err, "signed by %s\n", s)
		}
	}
	return nil
}

// signers are the names of those who signed a file.
func signers(p *uki.PE) ([]string, error) {
	list, err := p.Signatures()
	names := []string{}
	for _, s := range list {
		names = append(names, s.Signer.Subject.String())
	}
	return names, err
}

// verifiedFile is what verify prints as JSON.
type verifiedFile struct {
	Path         string `json:"path"`
	Authenticode string `json:"authenticode"`
	Signer       string `json:"signer,omitempty"` // "" if db has the hash
}

func (a *app) ukiVerifyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify FILE...",
		Short: "Verify the signatures of UKIs",
		Long: `Verify programs for UEFI as firmware with Secure Boot does: one signature must be by a key that is trusted, or by one
whose certificate is signed by such a key, and nothing may be revoked. Like firmware, it does not look at the dates of certificates.`,
		Example: `  composefs-boot uki verify os.efi --db db.pem
  composefs-boot uki verify os.efi --db keys/db.auth --dbx keys/dbx.auth
  composefs-boot uki verify os.efi --firmware`,
		Args: cobra.MinimumNArgs(1),
	}
	var t trustFlags
	t.addTo(c.Flags())
	c.RunE = func(_ *cobra.Command, args []string) error {
		trust, _, err := t.read()
		if err != nil {
			return err
		}
		results := []verifiedFile{}
		for _, path := range args {
			r, err := verifyFile(path, trust)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			results = append(results, r)
			if !a.json && !a.quiet {
				by := "by its hash"
				if r.Signer != "" {
					by = "signed by " + r.Signer
				}
				fmt.Fprintf(a.out, "%s: trusted, %s\n", path, by)
			}
		}
		if a.json {
			return printJSON(a.out, results)
		}
		return nil
	}
	return c
}

func verifyFile(path string, t uki.Trust) (v verifiedFile, err error) {
	in := &ukiInput{}
	defer in.close()
	c, err := in.open(path)
	if err != nil {
		return v, err
	}
	p, err := uki.ParsePE(c, c.Size)
	if err != nil {
		return v, err
	}
	digest, err := p.Authenticode()
	if err != nil {
		return v, err
	}
	s, err := p.Verify(t)
	v = verifiedFile{Path: path, Authenticode: fmt.Sprintf("%x", digest)}
	if s.Signer != nil {
		v.Signer = s.Signer.Subject.String()
	}
	return v, err
}
