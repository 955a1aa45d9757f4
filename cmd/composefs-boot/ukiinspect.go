package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki"
)

func (a *app) ukiInspectCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "inspect FILE...",
		Short: "Show the sections of UKIs",
		Long: `Show the sections of UKIs, addons and profiles: name, size, SHA-256, and the content of those that are text. With --json it
is an object of sections by name, those of the base profile, and a list "_profiles" of such objects for the others.

With --signatures, it tells who signed the file and whether the signature is right, and of each signed PCR policy in .pcrsig in
which phase of the boot it is good, by predicting PCR 11, and whether the key in .pcrpkey made the signature; in JSON, in lists
"_signatures" and "_policies".`,
		Example: `  composefs-boot uki inspect os.efi
  composefs-boot uki inspect os.efi --signatures
  composefs-boot uki inspect os.efi --section .cmdline:text
  composefs-boot --json uki inspect os.efi`,
		Args: cobra.MinimumNArgs(1),
	}
	v := ukiValues{}
	section := ukiOption{name: "section", metavar: "NAME", kind: ukiMany}
	c.Flags().Var(ukiFlagValue{v, section}, "section", "only this section, `NAME:text|binary[@FILE]`; FILE gets the content")
	all := c.Flags().Bool("all", false, "show the stub's sections, too")
	signatures := c.Flags().Bool("signatures", false, "explain the signatures of the file and of the PCR policies")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.ukiInspect(args, v["section"], *all, *signatures)
	}
	return c
}

// shownSection is what --section says.
type shownSection struct {
	name, path string
	text       bool
}

func parseShown(values []string) ([]shownSection, error) {
	var list []shownSection
	for _, value := range values {
		name, mode, ok := strings.Cut(value, ":")
		mode, path, _ := strings.Cut(mode, "@")
		if !ok || mode != "text" && mode != "binary" {
			return nil, usageError{fmt.Errorf("--section %q: want NAME:text or NAME:binary, and @FILE if the content is wanted", value)}
		}
		list = append(list, shownSection{name, path, mode == "text"})
	}
	return list, nil
}

func (a *app) ukiInspect(paths, sections []string, all, signatures bool) error {
	shown, err := parseShown(sections)
	if err != nil {
		return err
	}
	if a.json && len(paths) > 1 {
		return usageError{errors.New("JSON is printed for one file at a time")}
	}
	for _, path := range paths {
		in := &ukiInput{}
		m, p, err := in.image(path)
		if err == nil {
			if !signatures {
				p = nil
			}
			err = a.ukiInspectImage(m, p, shown, all)
			if err != nil {
				err = fmt.Errorf("%s: %w", path, err)
			}
		}
		in.close()
		if err != nil {
			return err
		}
	}
	return nil
}

// ukiInspectImage explains the signatures, too, if it is given the file.
func (a *app) ukiInspectImage(m *uki.Image, p *uki.PE, shown []shownSection, all bool) error {
	profiles, err := uki.Inspect(m, func(name string) (show, text bool) {
		for _, s := range shown {
			if s.name == name {
				return true, s.text
			}
		}
		known, text := uki.ShowKnown(name)
		// In JSON, a profile says which it is.
		return all || known && len(shown) == 0 || a.json && name == ".profile", text
	})
	if err != nil {
		return err
	}
	for _, s := range shown {
		if err := saveSection(m, s); err != nil {
			return err
		}
	}
	object := sectionObject{profiles: profiles}
	if p != nil {
		if object.signatures, err = uki.ExplainSignatures(p); err != nil {
			return err
		}
		if object.policies, err = uki.ExplainPolicies(m); err != nil {
			return err
		}
		if object.policies == nil {
			object.policies = []uki.PolicyInfo{} // that there are none is an answer
		}
	}
	if a.json {
		return printJSON(a.out, object)
	}
	for _, infos := range profiles {
		for _, i := range infos {
			fmt.Fprintf(a.out, "%s:\n  size: %d bytes\n  sha256: %s\n", i.Name, i.Size, i.SHA256)
			if i.IsText {
				fmt.Fprintln(a.out, "  text:")
				for line := range strings.SplitSeq(strings.TrimRight(i.Text, " \t\r\n"), "\n") {
					if strings.TrimSpace(line) != "" {
						line = "    " + line
					}
					fmt.Fprintln(a.out, line)
				}
			}
		}
	}
	if p != nil {
		a.printSignatures(object.signatures)
		a.printExplained(object.policies)
	}
	return nil
}

// printSignatures prints a line for each signature of the file.
func (a *app) printSignatures(all []uki.SignatureInfo) {
	fmt.Fprintf(a.out, "signatures: %d\n", len(all))
	for _, s := range all {
		right := "right"
		if s.Problem != "" {
			right = s.Problem
		}
		fmt.Fprintf(a.out, "  %s, serial number %s, %s: %s\n", s.Signer, s.Serial, s.Hash, right)
	}
}

// printExplained prints a line for each policy.
func (a *app) printExplained(all []uki.PolicyInfo) {
	fmt.Fprintf(a.out, "policies: %d\n", len(all))
	for _, p := range all {
		where := fmt.Sprintf("@%d", p.Profile)
		if p.ID != "" {
			where += " " + p.ID
		}
		phase := "not for what is in this file, or for a phase that is not known"
		if p.Matches {
			phase = "phase " + cmp.Or(p.Phase, ":")
		}
		if p.DTB > 0 {
			phase += fmt.Sprintf(", .dtbauto %d", p.DTB)
		}
		if p.Ref != "" {
			phase += fmt.Sprintf(", reference %q", p.Ref)
		}
		fmt.Fprintf(a.out, "  %s: %s PCR %s: %s; key %.16s, signature %s\n", where, p.Bank, strings.Trim(fmt.Sprint(p.PCRs), "[]"), phase,
			cmp.Or(p.Key, "not named"), p.Signature)
	}
}

// saveSection writes the content of a section to the file that --section names: the last one, if there are several.
func saveSection(m *uki.Image, s shownSection) error {
	if s.path == "" {
		return nil
	}
	for _, have := range slices.Backward(m.Sections()) {
		if have.Name == s.name {
			return replaceFile(s.path, func(f *os.File) error {
				_, err := f.ReadFrom(have.Reader())
				return err
			})
		}
	}
	return nil
}

// sectionObject is what inspect prints as JSON, like ukify: an object with the sections of the base by name, in the order of
// the file, and "_profiles", a list of such objects. Sections that may be there several times are lists. What ukify does not have
// are "_signatures" and "_policies", if they are wanted.
type sectionObject struct {
	profiles   [][]uki.Info
	signatures []uki.SignatureInfo
	policies   []uki.PolicyInfo
}

// sectionInfo is a section as JSON.
type sectionInfo struct {
	Size   int64   `json:"size"`
	SHA256 string  `json:"sha256"`
	Text   *string `json:"text,omitempty"`
}

func (o sectionObject) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	member := func(name string, value any) error {
		if b.Len() > 1 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%q:", name)
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		return e.Encode(value)
	}
	b.WriteByte('{')
	if len(o.profiles) > 0 {
		base := o.profiles[0]
		for k, i := range base {
			same := func(other uki.Info) bool { return other.Name == i.Name }
			if slices.IndexFunc(base, same) < k {
				continue
			}
			var list []sectionInfo
			for _, other := range base {
				if same(other) {
					info := sectionInfo{Size: other.Size, SHA256: other.SHA256}
					if other.IsText {
						info.Text = &other.Text
					}
					list = append(list, info)
				}
			}
			value := any(list)
			if len(list) == 1 && i.Name != ".dtbauto" && i.Name != ".efifw" {
				value = list[0]
			}
			if err := member(i.Name, value); err != nil {
				return nil, err
			}
		}
		var rest []sectionObject
		for _, p := range o.profiles[1:] {
			rest = append(rest, sectionObject{profiles: [][]uki.Info{p}})
		}
		if len(rest) > 0 {
			if err := member("_profiles", rest); err != nil {
				return nil, err
			}
		}
	}
	if o.signatures != nil {
		if err := member("_signatures", o.signatures); err != nil {
			return nil, err
		}
	}
	if o.policies != nil {
		if err := member("_policies", o.policies); err != nil {
			return nil, err
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}
