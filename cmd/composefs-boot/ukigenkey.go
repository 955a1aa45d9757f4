package main

import (
	"crypto/rsa"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/composefs-boot/composefs-boot/uki/secureboot"
)

// ukifyGenkey makes keys where the options say they are, as ukify genkey does: a key and a certificate for Secure Boot, and pairs
// for PCR policies. Unlike ukify, it overwrites none.
func (a *app) ukifyGenkey(v ukiValues) error {
	notes, err := v.readConfig(ukifyConfigs)
	if err != nil {
		return err
	}
	for _, note := range notes {
		fmt.Fprintln(a.err, note)
	}
	o := secureboot.Options{Bits: 2048, Days: 3650}
	if o.Time, err = keyTime(); err != nil {
		return err
	}
	if days, ok := v.one("secureboot-certificate-validity"); ok {
		if o.Days, err = strconv.Atoi(days); err != nil {
			return usageError{fmt.Errorf("--secureboot-certificate-validity %q: want a number of days", days)}
		}
	}
	files, err := genkeyFiles(v, o)
	if err != nil {
		return err
	}
	if err := secureboot.CreateFiles(files); err != nil {
		return err
	}
	for _, f := range files {
		fmt.Fprintf(a.err, "wrote %s\n", f.Name)
	}
	return nil
}

// genkeyFiles makes the keys.
func genkeyFiles(v ukiValues, o secureboot.Options) ([]secureboot.File, error) {
	private, hasKey := v.one("secureboot-private-key")
	certificate, hasCertificate := v.one("secureboot-certificate")
	if hasKey != hasCertificate {
		return nil, usageError{errors.New("genkey: --secureboot-private-key and --secureboot-certificate go together: name both")}
	}
	var files []secureboot.File
	add := func(f secureboot.File, err error) error {
		files = append(files, f)
		return err
	}
	if hasKey {
		key, err := genkey(o, private)
		if err != nil {
			return nil, err
		}
		name, ok := v.one("secureboot-certificate-common-name")
		if !ok {
			if name, err = defaultCommonName(); err != nil {
				return nil, err
			}
		}
		c, err := o.Certificate(name, key)
		if err != nil {
			return nil, err
		}
		if err := add(secureboot.PrivateKeyFile(private, key)); err != nil {
			return nil, err
		}
		files = append(files, secureboot.CertificateFile(certificate, c))
	}
	public := v["pcr-public-key"]
	for k, private := range v["pcr-private-key"] {
		key, err := genkey(o, private)
		if err == nil {
			err = add(secureboot.PrivateKeyFile(private, key))
		}
		if err == nil && k < len(public) && public[k] != "" {
			err = add(secureboot.PublicKeyFile(public[k], key.Public()))
		}
		if err != nil {
			return nil, err
		}
	}
	if len(files) == 0 {
		return nil, usageError{errors.New("genkey: nothing to make: name --secureboot-private-key and --secureboot-certificate, or --pcr-private-key and --pcr-public-key")}
	}
	return files, nil
}

// genkey makes a key for a file. The option's other values name keys that are there already.
func genkey(o secureboot.Options, name string) (*rsa.PrivateKey, error) {
	if strings.HasPrefix(name, "exec:") || strings.HasPrefix(name, "tpm2:") {
		return nil, usageError{fmt.Errorf("genkey: %s: keys are made in files alone: name one", name)}
	}
	return o.GenerateKey()
}

// defaultCommonName is ukify's. A common name has 64 bytes at most.
func defaultCommonName() (string, error) {
	host, err := os.Hostname()
	name := "SecureBoot signing key on host " + host
	return name[:min(len(name), 64)], err
}
