package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/signer"
)

// measured returns the banks and phases that the options name.
func (v ukiValues) measured() (banks []uki.Bank, phases []string, err error) {
	split := func(r rune) bool { return r == ',' || r == ' ' || r == '\n' }
	for _, name := range slices.Concat(v["pcr-banks"], v["bank"]) {
		for _, b := range strings.FieldsFunc(strings.ToLower(name), split) {
			if !slices.Contains(uki.Banks, uki.Bank(b)) {
				return nil, nil, usageError{fmt.Errorf("bank %q: want sha1, sha256, sha384 or sha512", b)}
			}
			banks = append(banks, uki.Bank(b))
		}
	}
	phases = phaseList(v["phases"])
	for _, p := range v["phase"] {
		words := slices.DeleteFunc(strings.Split(p, ":"), func(word string) bool { return word == "" })
		phases = append(phases, strings.Join(words, ":"))
	}
	slices.Sort(banks)
	if banks = slices.Compact(banks); len(banks) == 0 {
		banks = uki.Banks
	}
	slices.Sort(phases)
	if phases = slices.Compact(phases); len(phases) == 0 {
		phases = uki.Phases
	}
	return banks, phases, nil
}

// printPCRs prints predictions as systemd-measure does: lines "11:sha256=...", and what they are for on another stream.
func (a *app) printPCRs(all []uki.Prediction, about io.Writer) {
	for _, group := range pcrGroups(all) {
		p := group[0]
		what := fmt.Sprintf("# PCR[%d]", p.PCR)
		if p.PCR == uki.PCRKernel {
			what += fmt.Sprintf(" Phase <%s>", cmp.Or(p.Phase, ":"))
		}
		if p.Profile > 0 || p.ID != "" {
			what += fmt.Sprintf(" Profile @%d %s", p.Profile, p.ID)
		}
		if p.DTB > 0 {
			what += fmt.Sprintf(" .dtbauto %d", p.DTB)
		}
		fmt.Fprintln(about, strings.TrimRight(what, " "))
		for _, p := range group {
			fmt.Fprintf(a.out, "%d:%s=%s\n", p.PCR, p.Bank, p.Value)
		}
	}
}

// pcrGroups puts the banks of a phase together.
func pcrGroups(all []uki.Prediction) [][]uki.Prediction {
	var groups [][]uki.Prediction
	at := map[uki.Prediction]int{}
	for _, p := range all {
		key := p
		key.Bank, key.Value = "", ""
		n, ok := at[key]
		if !ok {
			n = len(groups)
			at[key] = n
			groups = append(groups, nil)
		}
		groups[n] = append(groups[n], p)
	}
	return groups
}

func (a *app) ukiMeasureCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "measure FILE",
		Short: "Predict the PCRs of a UKI",
		Long: `Predict PCR 11 of the TPM, which the stub extends with the sections and systemd with the phases of the boot: for every
profile, phase and bank. No TPM is needed. With --cmdline, --addon or --systemd-boot, PCR 12 is predicted as well, as the stub
extends it with the number of the profile, the command line that it is started with, in place of the UKI's, and with addons, and
systemd-boot before that with the profile that it starts.

With --private-key, the values of PCR 11 are signed, and the policies printed as JSON, as systemd-measure does: with them, secrets can
be had that are sealed to the key. With --policy-digest, what is to be signed elsewhere is printed. Of a UKI with several profiles,
one is signed, as the policies of a profile belong to it alone.`,
		Example: `  composefs-boot uki measure os.efi
  composefs-boot --json uki measure os.efi --bank sha256 --phase enter-initrd
  composefs-boot uki measure os.efi --profile rescue --addon debug.addon.efi
  composefs-boot uki measure os.efi --bank sha256 --private-key pcr.key > tpm2-pcr-signature.json
  composefs-boot uki measure os.efi --policy-digest --public-key pcr.pub`,
		Args: exactly(1),
	}
	v := ukiValues{}
	f := c.Flags()
	f.Var(ukiFlagValue{v, ukiOption{name: "bank", metavar: "BANK", kind: ukiMany}}, "bank", "`BANK` of PCRs [default: sha1, sha256, sha384 and sha512]")
	f.Var(ukiFlagValue{v, ukiOption{name: "phase", metavar: "PATH", kind: ukiMany}}, "phase", "`PATH` of phases, as enter-initrd:leave-initrd, or \":\" for what is there before [default: those of a boot]")
	profile := f.String("profile", "", "only this profile, by `NUMBER|ID`")
	cmdline := f.String("cmdline", "", "command line that the stub is started with, `TEXT`")
	addons := f.StringArray("addon", nil, "addon `FILE`, in the order in which the stub loads them")
	menu := f.Bool("systemd-boot", false, "systemd-boot starts the UKI, not the firmware")
	sign := ukiSigning{}
	f.StringVar(&sign.private, "private-key", "", "sign policies with this `KEY`: a PEM file, exec:COMMAND or tpm2:FILE|HANDLE")
	f.StringVar(&sign.public, "public-key", "", "its public key `FILE`")
	f.StringVar(&sign.certificate, "certificate", "", "or its certificate `FILE`")
	f.StringVar(&sign.ref, "policyref", "", "`TEXT` that the policies refer to")
	f.BoolVar(&sign.digests, "policy-digest", false, "print the policies that are to be signed elsewhere")
	f.StringVar(&sign.old, "append", "", "`FILE` of policies to print as well, before the new ones")
	c.RunE = func(c *cobra.Command, args []string) error {
		in := &ukiInput{}
		defer in.close()
		key, err := in.policyKey(sign)
		if err != nil {
			return err
		}
		m, _, err := in.image(args[0])
		if err != nil {
			return err
		}
		banks, phases, err := v.measured()
		if err != nil {
			return err
		}
		all, err := uki.Measure(m, banks, phases)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		if *profile != "" {
			n, err := m.Find(*profile)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			all = slices.DeleteFunc(all, func(p uki.Prediction) bool { return p.Profile != n })
		}
		if key != nil {
			if *cmdline != "" || len(*addons) > 0 || *menu {
				return usageError{errors.New("--cmdline, --addon and --systemd-boot: policies are for PCR 11 alone")}
			}
			if sign.private != "" && *profile == "" && m.Bootable() > 1 {
				return usageError{fmt.Errorf("%s: %d profiles: say with --profile for which the policies are", args[0], m.Bootable())}
			}
			key.Phases = phases
			return a.printPolicies(all, *key, sign.old)
		}
		if *cmdline != "" || len(*addons) > 0 || *menu {
			config := uki.Config{Cmdline: *cmdline}
			for _, path := range *addons {
				addon, _, err := in.image(path)
				if err != nil {
					return err
				}
				config.Addons = append(config.Addons, addon)
			}
			for n := range m.Bootable() {
				if *profile != "" && !slices.ContainsFunc(all, func(p uki.Prediction) bool { return p.Profile == n }) {
					continue
				}
				config.Profile, config.Loader = n, ""
				if *menu && n > 0 {
					config.Loader = fmt.Sprintf("@%d", n)
				}
				more, err := uki.MeasureConfig(config, banks)
				if err != nil {
					return err
				}
				all = append(all, more...)
			}
		}
		if a.json {
			return printJSON(a.out, all)
		}
		a.printPCRs(all, a.out)
		return nil
	}
	return c
}

// ukiSigning is what measure signs with.
type ukiSigning struct {
	private, public, certificate, ref string
	digests                           bool
	old                               string // file of policies
}

// policyKey opens the key, or returns nil if nothing is to be signed.
func (in *ukiInput) policyKey(s ukiSigning) (*uki.PolicyKey, error) {
	switch {
	case s.private == "" && !s.digests:
		if s != (ukiSigning{}) {
			return nil, usageError{errors.New("--public-key, --certificate, --policyref and --append go with --private-key or --policy-digest")}
		}
		return nil, nil
	case s.private != "" && s.digests:
		return nil, usageError{errors.New("--private-key has no use with --policy-digest, as the policies are signed elsewhere")}
	case s.public != "" && s.certificate != "":
		return nil, usageError{errors.New("--public-key and --certificate: give one of them")}
	}
	key := &uki.PolicyKey{Ref: s.ref}
	if path := cmp.Or(s.public, s.certificate); path != "" {
		var err error
		if key.Public, err = signer.ReadPublicKey(path); err != nil {
			return nil, err
		}
	}
	if s.private != "" {
		private, err := in.key("private-key", s.private, key.Public)
		if err != nil {
			return nil, err
		}
		key.Signer = private
	}
	return key, nil
}

// printPolicies prints the policies of a key, after those of a file.
func (a *app) printPolicies(all []uki.Prediction, key uki.PolicyKey, old string) error {
	var policies uki.Policies
	if old != "" {
		b, err := os.ReadFile(old)
		if err == nil {
			policies, err = uki.ParsePolicies(b)
		}
		if err != nil {
			return named("append", err)
		}
	}
	list, err := uki.SignPredictions(all, key)
	if err != nil {
		return err
	}
	policies.Append(list)
	text, err := policies.MarshalJSON()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(a.out, "%s\n", text)
	return err
}
