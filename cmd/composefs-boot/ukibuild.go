package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/composefs-boot/composefs-boot/uki"
)

// ukiBuilt is what build prints as JSON.
type ukiBuilt struct {
	Output   string           `json:"output"`
	Size     int64            `json:"size"`
	Machine  string           `json:"machine"`
	Signer   string           `json:"signer,omitempty"` // subject of the certificate for Secure Boot
	PCRs     []uki.Prediction `json:"pcrs,omitempty"`
	ToSign   uki.Policies     `json:"policies,omitempty"`          // with --policy-digest
	Unsigned int              `json:"unsigned_policies,omitempty"` // with --join-pcrsig: how many have no signature yet
}

// ukiBuild builds what the options say, measures it with --measure, and signs it.
func (a *app) ukiBuild(v ukiValues) (result ukiBuilt, err error) {
	in := &ukiInput{}
	defer in.close()
	secureBoot, err := in.secureBoot(v)
	if err != nil {
		return result, err
	}
	if _, ok := v.one("join-pcrsig"); ok || len(v["pcrsig"]) > 0 {
		return in.joinPolicies(v, secureBoot)
	}
	if err := v.checkPhases(); err != nil {
		return result, err
	}
	keys, err := in.policyKeys(v)
	if err != nil {
		return result, err
	}
	parts, err := in.parts(v)
	if err != nil {
		return result, err
	}
	if !parts.PCRPKey.IsSet() {
		if parts.PCRPKey, err = publicKey(v, keys); err != nil {
			return result, err
		}
	}
	output, given := v.one("output")
	if linux, ok := v.one("linux"); !given && ok {
		output = filepath.Base(linux) + ".unsigned.efi"
		if secureBoot != nil {
			output = filepath.Base(linux) + ".efi"
		}
	} else if !given {
		return result, usageError{errors.New("--output is needed for an addon or a profile")}
	}
	path, arch := in.stubPath(v, parts)
	c, err := in.open(path)
	if err != nil {
		return result, fmt.Errorf("stub for %s: %w: install systemd-boot-efi, or name one with --stub", arch, err)
	}
	stub, err := uki.ParsePE(c, c.Size)
	if err != nil {
		return result, fmt.Errorf("stub: %s: %w", path, err)
	}
	if parts.HWIDs, err = hwids(v, stub.Machine); err != nil {
		return result, err
	}
	if parts.Linux.IsSet() && secureBoot != nil {
		if parts.Linux, err = in.signKernel(v, parts.Linux, secureBoot); err != nil {
			return result, err
		}
	}
	banks, phases, err := v.measured()
	if err != nil {
		return result, err
	}
	result = ukiBuilt{Output: output, Machine: stub.Machine.String()}
	image, err := parts.Image(stub)
	if err != nil {
		return result, fmt.Errorf("%s: %w", output, err)
	}
	onlyProfile := parts.Profile.IsSet() && len(parts.Join) == 0
	if measure := v.on("measure"); measure || len(keys) > 0 && !onlyProfile {
		behind, err := image.Behind(stub)
		if err != nil {
			return result, err
		}
		hashes, err := uki.HashSections(behind, banks)
		if err != nil {
			return result, err
		}
		if measure {
			result.PCRs = hashes.Predict(phases)
		}
		if len(keys) > 0 && !onlyProfile {
			policies, err := image.AddPolicies(hashes, keys, v["sign-profile"])
			if err != nil {
				return result, err
			}
			if v.on("policy-digest") {
				result.ToSign = policies
			}
		}
	}
	layout, err := uki.Append(stub, image)
	if err != nil {
		return result, fmt.Errorf("%s: %w", output, err)
	}
	return result, result.write(layout, secureBoot)
}

// write writes the file, signed if there is a key.
func (r *ukiBuilt) write(layout *uki.Layout, key *secureBootKey) error {
	r.Size = layout.Size
	err := replaceFile(r.Output, func(f *os.File) error {
		if err := layout.Write(f); err != nil || key == nil {
			return err
		}
		r.Signer = key.certificate.Subject.String()
		p, err := uki.ParsePE(f, layout.Size)
		if err != nil {
			return err
		}
		if err := uki.SignInPlace(f, p, key.key, key.certificate); err != nil {
			return err
		}
		info, err := f.Stat()
		if err == nil {
			r.Size = info.Size()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", r.Output, err)
	}
	return nil
}

// joinPolicies puts signatures of policies that were made elsewhere into a UKI.
func (in *ukiInput) joinPolicies(v ukiValues, key *secureBootKey) (result ukiBuilt, err error) {
	path, ok := v.one("join-pcrsig")
	signed, given := v.one("pcrsig")
	if !ok || !given {
		return result, usageError{errors.New("--join-pcrsig and --pcrsig: want both")}
	}
	if result.Output, ok = v.one("output"); !ok {
		return result, usageError{errors.New("--output is needed with --join-pcrsig")}
	}
	together := []string{"join-pcrsig", "pcrsig", "output", "secureboot-private-key", "secureboot-certificate", "signtool", "config", "efi-arch"}
	for _, o := range append(ukiOptions(), ukiOption{name: "image"}) {
		value, given := v.one(o.name)
		if given && value != "" && value != "false" && !slices.Contains(together, o.name) {
			return result, usageError{fmt.Errorf("--%s: it has no effect on a UKI with --join-pcrsig: leave it out", o.name)}
		}
	}
	c, err := in.text(signed)
	if err != nil {
		return result, named("pcrsig", err)
	}
	if !c.IsSet() {
		return result, usageError{errors.New("--pcrsig: want signed policies, TEXT or @FILE")}
	}
	policies, err := uki.ReadPolicies(c)
	if err != nil {
		return result, named("pcrsig", err)
	}
	_, p, err := in.image(path)
	if err != nil {
		return result, err
	}
	result.Machine = p.Machine.String()
	layout, unsigned, err := uki.JoinPolicies(p, policies)
	if err != nil {
		return result, fmt.Errorf("%s: %w", path, err)
	}
	result.Unsigned = unsigned
	return result, result.write(layout, key)
}
