package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki/secureboot"
)

// shownFile is what show prints of a file as JSON.
type shownFile struct {
	Path    string          `json:"path"`
	Kind    secureboot.Kind `json:"kind"`
	Update  *shownUpdate    `json:"update,omitempty"`
	Entries []shownEntry    `json:"entries"`
}

type shownUpdate struct {
	Variable string    `json:"variable,omitempty"` // "" if the signature is not right
	Append   bool      `json:"append"`
	Time     time.Time `json:"time"`
	Signer   string    `json:"signer,omitempty"`
	Problem  string    `json:"problem,omitempty"`
}

// shownEntry is a certificate or a hash.
type shownEntry struct {
	Type    secureboot.Type `json:"type"`
	Owner   secureboot.GUID `json:"owner"`
	Subject string          `json:"subject,omitempty"`
	Serial  string          `json:"serial,omitempty"` // hexadecimal
	Until   *time.Time      `json:"not_after,omitempty"`
	Hash    string          `json:"hash"` // SHA-256 of a certificate, or the hash that the entry is, hexadecimal
	Since   *time.Time      `json:"revoked_since,omitempty"`
	Problem string          `json:"problem,omitempty"`
}

// shownFirmware is what show --firmware prints as JSON.
type shownFirmware struct {
	SecureBoot bool                    `json:"secure_boot"`
	SetupMode  bool                    `json:"setup_mode"`
	Variables  map[string][]shownEntry `json:"variables"`
}

func (a *app) keysShowCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "show FILE... | --firmware[=DIR]",
		Short: "Show what certificates, signature lists and signed updates contain",
		Long: `Show what certificates (PEM or DER), EFI signature lists, .auth files and variables of the firmware contain, or what the firmware
of this machine trusts. Of an .auth file it also says for which variable it is and who signed it.`,
		Example: `  composefs-boot keys show keys/db.auth
  composefs-boot --json keys show db.esl
  composefs-boot keys show --firmware`,
	}
	firmware := addFirmwareFlag(c.Flags(), "show the firmware's variables")
	c.RunE = func(_ *cobra.Command, args []string) error {
		switch {
		case *firmware != "" && len(args) > 0:
			return usageError{errors.New("want files or --firmware (its directory follows \"=\")")}
		case *firmware != "":
			return a.showFirmware(*firmware)
		case len(args) == 0:
			return usageError{errors.New("which files? Or is --firmware meant?")}
		}
		results := []shownFile{}
		for _, path := range args {
			c, err := secureboot.Read(path, secureboot.GUID{})
			if err != nil {
				return err
			}
			results = append(results, shownFile{path, c.Kind, showUpdate(c.Update), showEntries(c.Database)})
		}
		if a.json {
			return printJSON(a.out, results)
		}
		for _, r := range results {
			fmt.Fprintf(a.out, "%s: %s\n", r.Path, describe(r))
			a.printEntries(r.Entries)
		}
		return nil
	}
	return c
}

func showUpdate(u *secureboot.Update) *shownUpdate {
	if u == nil {
		return nil
	}
	v, add, by, err := u.Covers()
	if err != nil {
		return &shownUpdate{Time: u.Time, Problem: err.Error()}
	}
	return &shownUpdate{Variable: v.Name, Append: add, Time: u.Time, Signer: by.Subject.String()}
}

func showEntries(d secureboot.Database) []shownEntry {
	entries := []shownEntry{}
	for _, e := range d {
		s := shownEntry{Type: e.Type, Owner: e.Owner}
		switch e.Type {
		case secureboot.X509:
			s.Hash = fmt.Sprintf("%x", sha256.Sum256(e.Data))
			c, err := e.Certificate()
			if err != nil {
				s.Problem = err.Error()
				break
			}
			s.Subject, s.Serial, s.Until = c.Subject.String(), c.SerialNumber.Text(16), &c.NotAfter
		case secureboot.X509SHA256:
			hash, since, err := e.Revoked()
			if s.Hash = fmt.Sprintf("%x", hash); err != nil {
				s.Problem = err.Error()
			} else if !since.IsZero() {
				s.Since = &since
			}
		default:
			s.Hash = fmt.Sprintf("%x", e.Data)
		}
		entries = append(entries, s)
	}
	return entries
}

// describe says in a line what a file is.
func describe(f shownFile) string {
	names := map[secureboot.Kind]string{secureboot.KindCertificate: "certificate", secureboot.KindLists: "EFI signature lists",
		secureboot.KindVariable: "variable of the firmware", secureboot.KindProgram: "program, which has this hash"}
	u := f.Update
	switch {
	case u == nil:
		return names[f.Kind]
	case u.Problem != "":
		return fmt.Sprintf("signed update of %s: %s", u.Time.Format(time.RFC3339), u.Problem)
	case u.Append:
		return fmt.Sprintf("signed update of %s, appended to %s, signed by %s", u.Time.Format(time.RFC3339), u.Variable, u.Signer)
	}
	return fmt.Sprintf("signed update of %s, replaces %s, signed by %s", u.Time.Format(time.RFC3339), u.Variable, u.Signer)
}

func (a *app) printEntries(entries []shownEntry) {
	for _, e := range entries {
		about := []string{"owner " + e.Owner.String()}
		if e.Until != nil {
			about = append(about, "serial "+e.Serial, "until "+e.Until.Format(time.DateOnly))
		}
		if e.Since != nil {
			about = append(about, "revoked since "+e.Since.Format(time.RFC3339))
		}
		if e.Problem != "" {
			about = append(about, e.Problem)
		}
		if e.Subject != "" {
			fmt.Fprintf(a.out, "  %v %s\n    sha256 %s\n", e.Type, e.Subject, e.Hash)
		} else {
			fmt.Fprintf(a.out, "  %v %s\n", e.Type, e.Hash)
		}
		fmt.Fprintf(a.out, "    %s\n", strings.Join(about, ", "))
	}
	if len(entries) == 0 {
		fmt.Fprintln(a.out, "  nothing")
	}
}

func (a *app) showFirmware(dir string) error {
	f, err := secureboot.ReadFirmware(dir)
	if err != nil {
		return err
	}
	databases := map[secureboot.Variable]secureboot.Database{secureboot.PK: f.PK, secureboot.KEK: f.KEK, secureboot.DB: f.DB, secureboot.DBX: f.DBX}
	r := shownFirmware{f.SecureBoot, f.SetupMode, map[string][]shownEntry{}}
	for v, d := range databases {
		r.Variables[v.Name] = showEntries(d)
	}
	if a.json {
		return printJSON(a.out, r)
	}
	words := map[bool]string{true: "yes", false: "no"}
	fmt.Fprintf(a.out, "Secure Boot is enforced: %s\nsetup mode: %s\n", words[f.SecureBoot], words[f.SetupMode])
	for _, v := range secureboot.Variables {
		fmt.Fprintf(a.out, "%s:\n", v.Name)
		a.printEntries(r.Variables[v.Name])
	}
	return nil
}
