package uki

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf16"
)

// Policies are lists of policies by bank, in the order of the file.
type Policies []BankPolicies

// BankPolicies are the policies for the PCRs of one bank.
type BankPolicies struct {
	Bank     Bank
	Policies []Policy
}

// Add appends a policy, unless it is there already.
func (p *Policies) Add(bank Bank, policy Policy) {
	at := slices.IndexFunc(*p, func(b BankPolicies) bool { return b.Bank == bank })
	if at < 0 {
		at = len(*p)
		*p = append(*p, BankPolicies{Bank: bank})
	}
	list := &(*p)[at].Policies
	if !slices.ContainsFunc(*list, policy.equal) {
		*list = append(*list, policy)
	}
}

// Merge appends the policies that are not there.
func (p *Policies) Merge(more Policies) {
	for _, b := range more {
		for _, policy := range b.Policies {
			p.Add(b.Bank, policy)
		}
	}
}

// Append appends the policies that are not there, and puts the banks that they are of at the end, as systemd-measure does with
// --append.
func (p *Policies) Append(more Policies) {
	moved := func(b BankPolicies) bool {
		return slices.ContainsFunc(more, func(other BankPolicies) bool { return other.Bank == b.Bank })
	}
	old := *p
	*p = slices.DeleteFunc(slices.Clone(old), moved)
	for _, b := range more {
		for _, had := range old {
			if had.Bank == b.Bank {
				*p = append(*p, BankPolicies{b.Bank, slices.Clone(had.Policies)})
			}
		}
		p.Merge(Policies{b})
	}
}

func (p Policy) equal(other Policy) bool {
	if !slices.Equal(p.PCRs, other.PCRs) {
		return false
	}
	p.PCRs, other.PCRs = nil, nil
	return p.line() == other.line()
}

// line has all that is compared.
func (p Policy) line() [5]string { return [5]string{p.Key, p.Ref, p.Digest, p.ToSign, p.Signature} }

// MarshalJSON returns the policies as systemd-measure prints them.
func (p Policies) MarshalJSON() ([]byte, error) { return []byte(p.json(",", ":", quote)), nil }

// Text returns the policies as ukify writes them into .pcrsig.
func (p Policies) Text() string {
	return p.json(", ", ": ", func(s string) string { return ascii(quote(s)) })
}

func (p Policies) json(comma, colon string, quote func(string) string) string {
	var banks []string
	for _, b := range p {
		var list []string
		for _, policy := range b.Policies {
			var pcrs, members []string
			for _, n := range policy.PCRs {
				pcrs = append(pcrs, fmt.Sprint(n))
			}
			members = append(members, `"pcrs"`+colon+"["+strings.Join(pcrs, comma)+"]")
			for _, m := range []struct{ name, value string }{
				{"pkfp", policy.Key}, {"ref", policy.Ref}, {"pol", policy.Digest}, {"tbs", policy.ToSign}, {"sig", policy.Signature},
			} {
				if m.value != "" {
					members = append(members, quote(m.name)+colon+quote(m.value))
				}
			}
			list = append(list, "{"+strings.Join(members, comma)+"}")
		}
		banks = append(banks, quote(string(b.Bank))+colon+"["+strings.Join(list, comma)+"]")
	}
	return "{" + strings.Join(banks, comma) + "}"
}

func quote(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s) // a string always can be
	return strings.TrimSuffix(b.String(), "\n")
}

// ascii escapes the rest of Unicode.
func ascii(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r <= '~'+1 {
			b.WriteRune(r)
			continue
		}
		for _, u := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, u)
		}
	}
	return b.String()
}

// maxPolicies is how many policies of a bank are read.
const maxPolicies = 4096

// ReadPolicies reads policies from a file, as ParsePolicies does.
func ReadPolicies(c Content) (Policies, error) {
	text, err := c.load(maxText)
	if err != nil {
		return nil, fmt.Errorf("PCR policies: %w", err)
	}
	return ParsePolicies(text)
}

// ParsePolicies reads policies as systemd-measure and ukify write them. Members that it does not know are an error, as they
// would be lost when the policies are written again.
func ParsePolicies(text []byte) (Policies, error) {
	if len(text) > maxText {
		return nil, fmt.Errorf("PCR policies: %d bytes, at most %d are read", len(text), maxText)
	}
	d := json.NewDecoder(bytes.NewReader(bytes.TrimRight(text, "\x00")))
	d.DisallowUnknownFields()
	fail := func(err error) (Policies, error) {
		return nil, fmt.Errorf("PCR policies: byte %d: %w", d.InputOffset(), err)
	}
	if t, err := d.Token(); err != nil {
		return fail(err)
	} else if t != json.Delim('{') {
		return fail(errors.New("want an object with a list for each bank"))
	}
	var p Policies
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return fail(err)
		}
		b := BankPolicies{Bank: Bank(name.(string))}
		if !slices.Contains(Banks, b.Bank) {
			return fail(fmt.Errorf("bank %q: want sha1, sha256, sha384 or sha512", b.Bank))
		}
		if slices.ContainsFunc(p, func(other BankPolicies) bool { return other.Bank == b.Bank }) {
			return fail(fmt.Errorf("bank %s: twice", b.Bank))
		}
		if err := d.Decode(&b.Policies); err != nil {
			return fail(err)
		}
		if len(b.Policies) > maxPolicies {
			return fail(fmt.Errorf("bank %s: %d policies, at most %d are read", b.Bank, len(b.Policies), maxPolicies))
		}
		for k, policy := range b.Policies {
			if err := policy.check(); err != nil {
				return fail(fmt.Errorf("bank %s: policy %d: %w", b.Bank, k+1, err))
			}
		}
		p = append(p, b)
	}
	if _, err := d.Token(); err != nil {
		return fail(err)
	}
	if _, err := d.Token(); err != io.EOF {
		return fail(errors.New("something follows the object"))
	}
	return p, nil
}

// check tells whether the members have the forms that they are to have.
func (p Policy) check() error {
	if len(p.PCRs) == 0 {
		return errors.New("no PCRs")
	}
	for k, n := range p.PCRs {
		if n < 0 || n >= 8*pcrBytes || k > 0 && n <= p.PCRs[k-1] {
			return fmt.Errorf("PCRs %v: want numbers from 0 to %d, each once and in order", p.PCRs, 8*pcrBytes-1)
		}
	}
	for _, m := range []struct {
		name, value string
		sizes       []int
	}{{"pkfp", p.Key, []int{0, 32}}, {"pol", p.Digest, []int{32}}, {"tbs", p.ToSign, []int{0, 32, 64}}} {
		b, err := hex.DecodeString(m.value)
		if err != nil || !slices.Contains(m.sizes, len(b)) {
			return fmt.Errorf("%s %q: want a digest in hexadecimal", m.name, m.value)
		}
	}
	if p.ToSign != "" && p.ToSign != hex.EncodeToString(p.toSign()) {
		return fmt.Errorf("tbs %s: it is not that of the policy", p.ToSign)
	}
	if _, err := base64.StdEncoding.DecodeString(p.Signature); err != nil {
		return fmt.Errorf("sig: %w", err)
	}
	return nil
}
