package main

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/boot/initrd"
	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/signer"
)

// installUKI are the flags of install for unified kernel images.
type installUKI struct {
	make      bool
	kernel    string
	initrd    string
	setupRoot string
	modules   []string
	stub      string
	version   string
	tries     triesFlag
	addons    []string

	key, certificate  string
	pcrKey, pcrPublic string
	enroll            string

	// The open keys.
	sign   *boot.Signing
	policy *uki.PolicyKey
	public []crypto.PublicKey // halves of the keys
}

// nativeInitrd is the word for an initramfs that is made here.
const nativeInitrd = "native"

func (f *installUKI) addTo(flags *pflag.FlagSet) {
	flags.BoolVar(&f.make, "uki", false, "make a unified kernel image, unless the tree brings one")
	flags.StringVar(&f.kernel, "kernel", "", "the kernel is in `DIR`, with its initramfs and modules [default: the newest in the tree's usr/lib/modules]")
	flags.StringVar(&f.initrd, "initrd", "", "the initramfs `FILE`, or \""+nativeInitrd+"\" to make one with the kernel's modules [default: initramfs.img beside the kernel]")
	flags.StringArrayVar(&f.modules, "initrd-module", nil, "with --initrd native: a module to load as well, `NAME`")
	flags.StringVar(&f.setupRoot, "setup-root", "", "with --initrd native: the program composefs-setup-root, `FILE` [default: usr/bin/composefs-setup-root in the tree]")
	flags.StringVar(&f.stub, "stub", "", "the stub `FILE` [default: the tree's, in usr/lib/systemd/boot/efi]")
	flags.StringVar(&f.version, "image-version", "", "version by which the boot menu sorts, `TEXT` [default: IMAGE_VERSION of os-release, or VERSION_ID and the time]")
	flags.Var(&f.tries, "tries", "how often a unified kernel image is tried, `N`, if it never gets to boot-complete.target; 0 for no counting [default: 3, or 0 if the tree has no systemd-bless-boot]")
	flags.StringArrayVar(&f.addons, "addon", nil, "an addon for unified kernel images, `FILE` with a name NAME.addon.efi")
	flags.StringVar(&f.key, "secureboot-private-key", "", "sign for Secure Boot with the private `KEY`: a PEM file, or as in \"uki sign\"")
	flags.StringVar(&f.certificate, "secureboot-certificate", "", "the certificate `FILE` of that key")
	flags.StringVar(&f.pcrKey, "pcr-private-key", "", "sign PCR policies with the private `KEY`, for secrets in the TPM that are sealed to its public key")
	flags.StringVar(&f.pcrPublic, "pcr-public-key", "", "the public key `FILE` of that key [default: what the key says]")
	flags.StringVar(&f.enroll, "enroll-keys", "", "put PK.auth, KEK.auth and db.auth in `DIR` where systemd-boot enrols them from")
}

// triesFlag is a number that may be left to the system.
type triesFlag struct {
	given bool
	n     uint
}

func (t *triesFlag) String() string { return "" }
func (t *triesFlag) Type() string   { return "uint" }
func (t *triesFlag) Set(s string) error {
	t.given = true
	if _, err := fmt.Sscanf(s+"\n", "%d\n", &t.n); err != nil || t.n > 100 {
		return errors.New("want a number, 0 to 100")
	}
	return nil
}

// check refuses flags that do not go together.
func (f installUKI) check() error {
	for name, set := range map[string]bool{"--kernel": f.kernel != "", "--initrd": f.initrd != "", "--stub": f.stub != "",
		"--image-version": f.version != "", "--pcr-private-key": f.pcrKey != ""} {
		if set && !f.make {
			return usageError{fmt.Errorf("%s is for the unified kernel image that --uki makes", name)}
		}
	}
	if f.initrd != nativeInitrd && (len(f.modules) > 0 || f.setupRoot != "") {
		return usageError{errors.New("--initrd-module and --setup-root are for the initramfs that --initrd native makes")}
	}
	if (f.key == "") != (f.certificate == "") {
		return usageError{errors.New("--secureboot-private-key and --secureboot-certificate go together")}
	}
	if f.pcrKey == "" && f.pcrPublic != "" {
		return usageError{errors.New("--pcr-public-key goes with --pcr-private-key")}
	}
	return nil
}

// openKeys opens the keys that are named. They are to be closed, also if there is an error.
func (f *installUKI) openKeys() (keys keyRing, err error) {
	if f.key != "" {
		certificate, err := signer.ReadCertificate(f.certificate)
		if err != nil {
			return keys, named("secureboot-certificate", err)
		}
		key, err := keys.open(f.key, certificate.PublicKey)
		if err != nil {
			return keys, named("secureboot-private-key", err)
		}
		f.sign = &boot.Signing{Key: key, Certificate: certificate}
	}
	if f.pcrKey != "" {
		var public crypto.PublicKey
		if f.pcrPublic != "" {
			if public, err = signer.ReadPublicKey(f.pcrPublic); err != nil {
				return keys, named("pcr-public-key", err)
			}
		}
		key, err := keys.open(f.pcrKey, public)
		if err != nil {
			return keys, named("pcr-private-key", err)
		}
		f.policy = &uki.PolicyKey{Signer: key}
	}
	f.public = keys.public()
	return keys, nil
}

// keyRing is open keys.
type keyRing []*signer.Signer

func (r *keyRing) open(name string, public crypto.PublicKey) (*signer.Signer, error) {
	key, err := signer.Open(name, public)
	if err == nil {
		*r = append(*r, key)
	}
	return key, err
}

// public returns the public halves.
func (r keyRing) public() []crypto.PublicKey {
	var list []crypto.PublicKey
	for _, key := range r {
		list = append(list, key.Public())
	}
	return list
}

func (r keyRing) close() {
	for _, key := range r {
		key.Close()
	}
}

// deploy adds to a deployment what the flags say about unified kernel images.
func (f installUKI) deploy(ctx context.Context, source string, s boot.System, when time.Time, d *boot.Deployment) error {
	switch {
	case f.tries.given:
		d.Tries = f.tries.n
	case s.CanBless():
		d.Tries = 3
	}
	d.Sign = f.sign
	if f.enroll != "" {
		var err error
		if d.Enroll, err = boot.ReadEnrollment(f.enroll, d.Scratch); err != nil {
			return named("enroll-keys", err)
		}
	}
	for _, name := range f.addons {
		c, err := d.Scratch.Open(name)
		if err != nil {
			return named("addon", err)
		}
		d.Addons = append(d.Addons, boot.Addon{Name: filepath.Base(name), Content: c})
	}
	if !f.make {
		return nil
	}
	d.Unified = &boot.Unified{Version: f.version, Time: when, Policy: f.policy}
	open := func(to *uki.Content, name string) (err error) {
		if name != "" {
			*to, err = d.Scratch.Open(name)
		}
		return err
	}
	if err := open(&d.Unified.Stub, f.stub); err != nil {
		return named("stub", err)
	}
	kernel := f.kernel
	if kernel != "" {
		if err := open(&d.Unified.Linux, filepath.Join(kernel, "vmlinuz")); err != nil {
			return named("kernel", err)
		}
	}
	switch {
	case f.initrd == nativeInitrd && kernel == "" && s.Kernel() == nil:
		return fmt.Errorf("%s: no kernel in usr/lib/modules, whose modules --initrd native would take: say --kernel DIR", source)
	case f.initrd == nativeInitrd:
		return f.native(ctx, source, s, when, d)
	case f.initrd != "":
		return named("initrd", open(&d.Unified.Initrd, f.initrd))
	case f.kernel != "":
		return named("kernel", open(&d.Unified.Initrd, filepath.Join(f.kernel, "initramfs.img")))
	}
	return nil
}

// native makes the initramfs. Its files are the system's own, but for those that flags name.
func (f installUKI) native(ctx context.Context, source string, s boot.System, when time.Time, d *boot.Deployment) error {
	const program = "usr/bin/composefs-setup-root"
	config := initrd.Config{SetupRoot: program, System: s.Files(), Modules: f.modules, Compression: initrd.Zstd, Time: when}
	var err error
	if f.setupRoot != "" {
		if config.SetupRoot, err = filepath.Abs(f.setupRoot); err != nil {
			return err
		}
	} else if s.Tree.Lookup(program) == nil {
		return fmt.Errorf("%s: no %s in it: say --setup-root FILE", source, program)
	}
	if config.SetupConfig, err = s.SetupConfig(); err != nil {
		return fmt.Errorf("%s: %w", source, err)
	}
	builtIn := false // the kernel has everything that it needs
	if f.kernel != "" {
		if config.ModulesDir, err = filepath.Abs(f.kernel); err != nil {
			return err
		}
		_, err = os.Stat(filepath.Join(f.kernel, "kernel"))
		builtIn = errors.Is(err, os.ErrNotExist)
	} else {
		config.ModulesDir = strings.TrimPrefix(path.Dir(s.Kernel().Kernel.Path), "/")
		builtIn = s.Tree.Lookup(config.ModulesDir+"/kernel") == nil
	}
	if builtIn && len(f.modules) == 0 {
		config.ModulesDir = ""
	}
	plan, err := config.Plan(ctx)
	if err != nil {
		return named("initrd native", err)
	}
	var b bytes.Buffer
	if err := plan.Write(&b); err != nil {
		return err
	}
	d.Unified.Initrd, d.Unified.Native = uki.Bytes(b.Bytes()), true
	return nil
}
