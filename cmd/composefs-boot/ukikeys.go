package main

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/signer"
)

// secureBootKey is what a file is signed with for Secure Boot.
type secureBootKey struct {
	key         *signer.Signer
	certificate *x509.Certificate
}

// secureBoot opens the key that the options name, or returns nil if they name none.
func (in *ukiInput) secureBoot(v ukiValues) (*secureBootKey, error) {
	name, hasKey := v.one("secureboot-private-key")
	path, hasCertificate := v.one("secureboot-certificate")
	tool, _ := v.one("signtool")
	if !slices.Contains([]string{"", "sbsign", "systemd-sbsign", "pesign"}, tool) {
		return nil, usageError{fmt.Errorf("--signtool %q: want sbsign or systemd-sbsign", tool)}
	}
	if tool == "pesign" {
		return nil, errors.New("--signtool=pesign: pesign's databases are not read: give --secureboot-private-key and --secureboot-certificate")
	}
	switch {
	case hasKey != hasCertificate:
		return nil, usageError{errors.New("--secureboot-private-key and --secureboot-certificate: want both")}
	case !hasKey && v.on("sign-kernel"):
		return nil, usageError{errors.New("--sign-kernel needs --secureboot-private-key and --secureboot-certificate")}
	case !hasKey:
		return nil, nil
	}
	certificate, err := signer.ReadCertificate(path)
	if err != nil {
		return nil, named("secureboot-certificate", err)
	}
	key, err := in.key("secureboot-private-key", name, certificate.PublicKey)
	if err != nil {
		return nil, err
	}
	return &secureBootKey{key, certificate}, nil
}

// key opens a private key, which is closed with the files.
func (in *ukiInput) key(option, name string, public crypto.PublicKey) (*signer.Signer, error) {
	key, err := signer.Open(name, public)
	if err != nil {
		return nil, named(option, err)
	}
	in.keys = append(in.keys, key)
	return key, nil
}

// signKernel signs the kernel, if it is to be: it can be started by itself then, too.
func (in *ukiInput) signKernel(v ukiValues, linux uki.Content, key *secureBootKey) (uki.Content, error) {
	linux, err := uki.Kernel(linux)
	if err != nil {
		return linux, fmt.Errorf("kernel: %w", err)
	}
	p, err := uki.ParsePE(linux, linux.Size)
	if err != nil {
		return linux, fmt.Errorf("kernel: %w", err)
	}
	if _, given := v.one("sign-kernel"); given && !v.on("sign-kernel") || !given && p.CertificateTable.Size > 0 {
		return linux, nil
	}
	f, err := os.CreateTemp("", "linux-signed")
	if err != nil {
		return linux, err
	}
	in.files = append(in.files, f)
	if err := os.Remove(f.Name()); err != nil {
		return linux, err
	}
	if err := uki.Sign(f, p, key.key, key.certificate); err != nil {
		return linux, fmt.Errorf("kernel: %w: leave it unsigned with --no-sign-kernel", err)
	}
	info, err := f.Stat()
	if err != nil {
		return linux, err
	}
	return uki.Content{ReaderAt: f, Size: info.Size()}, nil
}

// The policy that --sign-initrd-pcrs adds is for the first phase alone, and has a reference so that it is not taken for another.
const (
	initrdPhase = "enter-initrd"
	initrdRef   = "initrd"
)

// policyKeys opens the keys that sign PCR policies. With --policy-digest they have no private part.
func (in *ukiInput) policyKeys(v ukiValues) ([]uki.PolicyKey, error) {
	private, public, certificates := v["pcr-private-key"], v["pcr-public-key"], v["pcr-certificate"]
	elsewhere := v.on("policy-digest")
	wrong := func(format string, args ...any) ([]uki.PolicyKey, error) {
		return nil, usageError{fmt.Errorf(format, args...)}
	}
	switch {
	case len(public) > 0 && len(certificates) > 0:
		return wrong("--pcr-public-key and --pcr-certificate: give one of them")
	case elsewhere && len(private) > 0:
		return wrong("--pcr-private-key has no use with --policy-digest, as the policies are signed elsewhere")
	case elsewhere && len(public)+len(certificates) != 1:
		return wrong("--policy-digest: give the public key that will sign, with --pcr-public-key or --pcr-certificate")
	case elsewhere && v.on("measure"):
		return wrong("--measure and --policy-digest: give one of them")
	case !elsewhere && len(private) == 0 && v.on("sign-initrd-pcrs"):
		return wrong("--sign-initrd-pcrs needs --pcr-private-key or --policy-digest")
	case !elsewhere && len(private) == 0:
		return nil, nil
	}
	count := max(1, len(private))
	for _, name := range []string{"pcr-public-key", "pcr-certificate", "phases", "policyref"} {
		if n := len(v[name]); n > 0 && n != count {
			return wrong("--%s is there %d times, --pcr-private-key %d times: give each key its own", name, n, len(private))
		}
	}
	at := func(name string, k int) string {
		if k < len(v[name]) {
			return v[name][k]
		}
		return ""
	}
	var keys []uki.PolicyKey
	for k := range count {
		key := uki.PolicyKey{Ref: at("policyref", k)}
		if list := at("phases", k); list != "" {
			key.Phases = phaseList([]string{list})
		}
		for _, name := range []string{"pcr-public-key", "pcr-certificate"} {
			if path := at(name, k); path != "" {
				var err error
				if key.Public, err = signer.ReadPublicKey(path); err != nil {
					return nil, named(name, err)
				}
			}
		}
		if !elsewhere {
			if at("pcr-private-key", k) == "" {
				return wrong("a key of PCR policies has no --pcr-private-key, or PCRPrivateKey= in the configuration file")
			}
			s, err := in.key("pcr-private-key", at("pcr-private-key", k), key.Public)
			if err != nil {
				return nil, err
			}
			key.Signer = s
		}
		keys = append(keys, key)
	}
	if v.on("sign-initrd-pcrs") {
		key := keys[0]
		key.Phases, key.Ref = []string{initrdPhase}, initrdRef
		keys = append(keys, key)
	}
	return keys, nil
}

// publicKey is the .pcrpkey that goes with the only key that is given: what the file says, if it does in the form that systemd
// reads.
func publicKey(v ukiValues, keys []uki.PolicyKey) (uki.Content, error) {
	var public crypto.PublicKey
	var err error
	switch {
	case len(v["pcr-public-key"]) == 1:
		path := v["pcr-public-key"][0]
		b, err := os.ReadFile(path)
		if err != nil {
			return uki.Content{}, named("pcr-public-key", err)
		}
		if block, _ := pem.Decode(b); block != nil && block.Type == "PUBLIC KEY" {
			return uki.Bytes(b), nil
		}
		if public, err = signer.ReadPublicKey(path); err != nil {
			return uki.Content{}, named("pcr-public-key", err)
		}
	case len(v["pcr-certificate"]) == 1:
		if public, err = signer.ReadPublicKey(v["pcr-certificate"][0]); err != nil {
			return uki.Content{}, named("pcr-certificate", err)
		}
	case len(v["pcr-private-key"]) == 1:
		public = keys[0].Signer.Public()
	default:
		return uki.Content{}, nil
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return uki.Content{}, err
	}
	return uki.Bytes(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}

// bootPhases are the words that systemd extends PCR 11 with.
var bootPhases = []string{"enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"}

// checkPhases looks for words in --phases that no boot gets to: what is bound to them could never be had.
func (v ukiValues) checkPhases() error {
	for _, path := range phaseList(v["phases"]) {
		for word := range strings.SplitSeq(path, ":") {
			if !slices.Contains(bootPhases, word) {
				return usageError{fmt.Errorf("--phases %q: %q is no phase of a boot: want %s", path, word, strings.Join(bootPhases, ", "))}
			}
		}
	}
	return nil
}

// phaseList splits lists of phase paths.
func phaseList(lists []string) []string {
	var phases []string
	for _, list := range lists {
		phases = append(phases, strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\n' })...)
	}
	return phases
}
