package uki

import (
	"crypto/rsa"
	"slices"
)

// What is known of a policy's signature.
const (
	SignatureGood     = "good"
	SignatureBad      = "bad"
	SignatureUnknown  = "of a key that is not in .pcrpkey"
	SignatureIsAbsent = "none"
)

// PolicyInfo is what there is to know about a policy in .pcrsig.
type PolicyInfo struct {
	Profile   int    `json:"profile"`
	ID        string `json:"id,omitempty"` // of the profile
	Bank      Bank   `json:"bank"`
	PCRs      []int  `json:"pcrs"`
	Key       string `json:"pkfp,omitempty"`
	Ref       string `json:"ref,omitempty"`
	Digest    string `json:"pol"`
	Matches   bool   `json:"matches"`           // it is for PCR 11 as it will be, in a phase that is known
	Phase     string `json:"phase"`             // then: which,
	DTB       int    `json:"dtbauto,omitempty"` // and with which .dtbauto
	Signature string `json:"signature"`         // SignatureGood and so on
}

// explainedPhases are those that policies are looked up in: of a boot, and of what comes before and after it.
var explainedPhases = append([]string{"", Phases[3] + ":shutdown", Phases[3] + ":shutdown:final"}, Phases...)

// ExplainPolicies finds out, for each policy in the profiles of a UKI that was read, what it is good for, by predicting the PCR
// of the profile, and checks the signatures that the key in .pcrpkey made.
func ExplainPolicies(m *Image) ([]PolicyInfo, error) {
	key, err := m.PolicyKey()
	if err != nil {
		return nil, err
	}
	profiles := make([]Policies, m.Bootable())
	var banks []Bank
	for n := range profiles {
		if profiles[n], err = m.ProfilePolicies(n); err != nil {
			return nil, err
		}
		for _, bank := range Banks {
			if len(profiles[n].of(bank)) > 0 {
				banks = append(banks, bank)
			}
		}
	}
	banks = slices.Compact(slices.Sorted(slices.Values(banks)))
	all, err := Measure(m, banks, explainedPhases)
	if err != nil {
		return nil, err
	}
	known := map[policyPlace]Prediction{}
	for _, p := range all {
		policy, err := NewPolicy(p, PolicyKey{})
		if err != nil {
			return nil, err
		}
		known[policyPlace{p.Profile, p.Bank, policy.Digest}] = p
	}
	var list []PolicyInfo
	for n, policies := range profiles {
		for _, b := range policies {
			for _, policy := range b.Policies {
				p, matches := known[policyPlace{n, b.Bank, policy.Digest}]
				list = append(list, PolicyInfo{n, m.ID(n), b.Bank, policy.PCRs, policy.Key, policy.Ref, policy.Digest, matches, p.Phase, p.DTB,
					policy.state(key)})
			}
		}
	}
	return list, nil
}

// policyPlace is where a policy is looked up.
type policyPlace struct {
	profile int
	bank    Bank
	digest  string
}

func (p Policy) state(key *rsa.PublicKey) string {
	switch {
	case p.Signature == "":
		return SignatureIsAbsent
	case !p.isOf(key):
		return SignatureUnknown
	case p.verify(key) != nil:
		return SignatureBad
	}
	return SignatureGood
}
