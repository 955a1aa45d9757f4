package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// ukiOption is an option of ukify 262, as the command line and the configuration file have it.
type ukiOption struct {
	name, short string
	metavar     string // "" for a flag
	key         string // in section [UKI] of the configuration file, "" if it has none
	kind        ukiKind
	help        string
}

type ukiKind int

const (
	ukiOne     ukiKind = iota // the last one counts
	ukiMany                   // all count
	ukiWords                  // all count; in the configuration file they are words of one line
	ukiFlag                   // no value
	ukiIgnored                // nothing comes of it here
	ukiSigning                // refused
)

// ukiBuildOptions are the options of build.
var ukiBuildOptions = []ukiOption{
	{"config", "c", "PATH", "", ukiOne, "configuration `FILE`"},
	{"linux", "", "PATH", "Linux", ukiOne, "the kernel `FILE`; without one, it is an addon"},
	{"initrd", "", "PATH", "Initrd", ukiWords, "an initramfs `FILE`; several are joined in this order"},
	{"microcode", "", "PATH", "Microcode", ukiOne, "microcode `FILE`, for .ucode"},
	{"cmdline", "", "TEXT", "Cmdline", ukiOne, "the kernel command line, `TEXT|@FILE`"},
	{"os-release", "", "TEXT", "OSRelease", ukiOne, "`TEXT|@FILE` of os-release [default: that of this machine; \"\" for none]"},
	{"uname", "", "TEXT", "Uname", ukiOne, "release of the kernel, `TEXT` [default: what the kernel says]"},
	{"splash", "", "PATH", "Splash", ukiOne, "picture `FILE` (BMP)"},
	{"devicetree", "", "PATH", "DeviceTree", ukiOne, "device tree `FILE`, for .dtb"},
	{"devicetree-auto", "", "PATH", "DeviceTreeAuto", ukiWords, "device tree `FILE` for hardware that fits, for .dtbauto"},
	{"hwids", "", "DIR", "HWIDs", ukiOne, "`DIR` of hardware IDs [default: that of systemd; \"\" for none]"},
	{"efifw", "", "DIR", "Firmware", ukiMany, "`DIR` with a firmware image for hardware that fits"},
	{"sbat", "", "TEXT", "SBAT", ukiMany, "`TEXT|@FILE` for .sbat, besides that of stub and kernel"},
	{"pcrpkey", "", "PATH", "PCRPKey", ukiOne, "public key `FILE` for PCR signatures"},
	{"section", "", "NAME:TEXT", "", ukiMany, "another section, `NAME:TEXT|NAME:@FILE`"},
	{"profile", "", "TEXT", "Profile", ukiOne, "`TEXT|@FILE` of .profile; without --join-profile, make a profile to be joined"},
	{"join-profile", "", "PATH", "", ukiMany, "profile `FILE` to append"},
	{"efi-arch", "", "ARCH", "EFIArch", ukiOne, "architecture of the stub, `ARCH`: x64, aa64, riscv64, ia32 or arm [default: that of the kernel]"},
	{"stub", "", "PATH", "Stub", ukiOne, "the stub `FILE` [default: systemd's]"},
	{"output", "o", "PATH", "", ukiOne, "the `FILE` to write [default: the kernel's name with .unsigned.efi]"},
	{"measure", "", "", "", ukiFlag, "print PCR 11, as measure does"},
	{"pcr-banks", "", "BANKS", "PCRBanks", ukiOne, "banks to measure, `BANK,...` [default: sha1, sha256, sha384 and sha512]"},
	{"phases", "", "PHASES", "", ukiMany, "phases to measure, `PATH,...` [default: those of a boot]"},
}

// ukifyOnly are ukify's other options.
var ukifyOnly = []ukiOption{
	{"no-measure", "", "", "", ukiIgnored, ""},
	{"tools", "", "PATH", "", ukiIgnored, ""},
	{"no-sign-kernel", "", "", "", ukiIgnored, ""},
	{"no-policy-digest", "", "", "", ukiIgnored, ""},
	{"no-sign-initrd-pcrs", "", "", "", ukiIgnored, ""},
	{"signtool", "", "TOOL", "SecureBootSigningTool", ukiIgnored, ""},
	{"secureboot-certificate-dir", "", "PATH", "SecureBootCertificateDir", ukiIgnored, ""},
	{"secureboot-certificate-validity", "", "DAYS", "SecureBootCertificateValidity", ukiIgnored, ""},
	{"secureboot-certificate-common-name", "", "CN", "SecureBootCertificateCommonName", ukiIgnored, ""},
	{"sign-profile", "", "ID", "", ukiSigning, ""},
	{"pcrsig", "", "TEXT", "PCRSig", ukiSigning, ""},
	{"join-pcrsig", "", "PATH", "", ukiSigning, ""},
	{"signing-engine", "", "ENGINE", "SigningEngine", ukiSigning, ""},
	{"signing-provider", "", "PROVIDER", "SigningProvider", ukiSigning, ""},
	{"certificate-provider", "", "PROVIDER", "CertificateProvider", ukiSigning, ""},
	{"secureboot-private-key", "", "KEY", "SecureBootPrivateKey", ukiSigning, ""},
	{"secureboot-certificate", "", "CERT", "SecureBootCertificate", ukiSigning, ""},
	{"secureboot-certificate-name", "", "NAME", "SecureBootCertificateName", ukiSigning, ""},
	{"sign-kernel", "", "", "SignKernel", ukiSigning, ""},
	{"pcr-private-key", "", "KEY", "", ukiSigning, ""},
	{"pcr-public-key", "", "KEY", "", ukiSigning, ""},
	{"pcr-certificate", "", "CERT", "", ukiSigning, ""},
	{"policyref", "", "TEXT", "", ukiSigning, ""},
	{"policy-digest", "", "", "", ukiSigning, ""},
	{"sign-initrd-pcrs", "", "", "SignInitrdPCRs", ukiSigning, ""},
}

// ukiValues are the values that options were given, by name.
type ukiValues map[string][]string

func (v ukiValues) set(o ukiOption, value string) error {
	switch o.kind {
	case ukiIgnored:
	case ukiSigning:
		return fmt.Errorf("--%s: signing is not part of build: leave it out and sign the file that is made", o.name)
	case ukiMany, ukiWords:
		v[o.name] = append(v[o.name], value)
	default:
		v[o.name] = []string{value}
	}
	return nil
}

// one returns the value of an option, and whether it was given.
func (v ukiValues) one(name string) (string, bool) {
	if list := v[name]; len(list) > 0 {
		return list[len(list)-1], true
	}
	return "", false
}

// ukiFlagValue lets cobra read one of these options.
type ukiFlagValue struct {
	values ukiValues
	option ukiOption
}

func (f ukiFlagValue) Set(s string) error { return f.values.set(f.option, s) }
func (f ukiFlagValue) String() string     { return "" }
func (f ukiFlagValue) Type() string {
	if f.option.kind == ukiFlag {
		return "bool"
	}
	return f.option.metavar
}

// addTo makes flags of the options.
func (v ukiValues) addTo(f *pflag.FlagSet) {
	for _, o := range ukiBuildOptions {
		flag := f.VarPF(ukiFlagValue{v, o}, o.name, o.short, o.help)
		if o.kind == ukiFlag {
			flag.NoOptDefVal = "true"
		}
	}
}

// ukifyConfigs are the places of ukify's configuration file.
var ukifyConfigs = []string{"/etc/systemd/ukify.conf", "/run/systemd/ukify.conf", "/usr/local/lib/systemd/ukify.conf", "/usr/lib/systemd/ukify.conf"}

// readConfig reads the configuration file that is given, or the first of those that are there. The command line counts more;
// lists begin with what the file says. It returns what it does not know, in lines for people.
func (v ukiValues) readConfig(search []string) (notes []string, err error) {
	path, given := v.one("config")
	if !given {
		at := slices.IndexFunc(search, func(p string) bool { _, err := os.Stat(p); return err == nil })
		if at < 0 {
			return nil, nil
		}
		path = search[at]
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	lines, err := parseUkifyConfig(string(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	first := ukiValues{}
	for _, l := range lines {
		at := slices.IndexFunc(ukiOptions(), func(o ukiOption) bool { return l.section == "UKI" && o.key == l.key })
		if strings.HasPrefix(l.section, "PCRSignature:") {
			return nil, fmt.Errorf("%s: line %d: [%s]: signing is not part of build: leave it out and sign the file that is made", path, l.number, l.section)
		}
		if at < 0 {
			notes = append(notes, fmt.Sprintf("%s: line %d: [%s] %s: not known, left out", path, l.number, l.section, l.key))
			continue
		}
		o, values := ukiOptions()[at], []string{l.value}
		if o.kind == ukiWords {
			values = strings.Fields(l.value)
		}
		for _, value := range values {
			if err := first.set(o, value); err != nil {
				return nil, fmt.Errorf("%s: line %d: %w", path, l.number, err)
			}
		}
	}
	for name, values := range first {
		at := slices.IndexFunc(ukiOptions(), func(o ukiOption) bool { return o.name == name })
		if kind := ukiOptions()[at].kind; kind == ukiMany || kind == ukiWords {
			v[name] = append(values, v[name]...)
		} else if len(v[name]) == 0 {
			v[name] = values
		}
	}
	return notes, nil
}

func ukiOptions() []ukiOption { return slices.Concat(ukiBuildOptions, ukifyOnly) }

// configLine is a setting of the configuration file.
type configLine struct {
	number              int
	section, key, value string
}

// parseUkifyConfig reads lines "[Section]" and "Key = value"; an indented line continues the value before it, and "#" begins
// a comment, also after a space.
func parseUkifyConfig(text string) ([]configLine, error) {
	var lines []configLine
	section := ""
	number := 0
	for line := range strings.Lines(text) {
		number++
		indented := strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t")
		for at := range line {
			if line[at] == '#' && (at == 0 || line[at-1] == ' ' || line[at-1] == '\t') {
				line = line[:at]
				break
			}
		}
		line = strings.TrimSpace(line)
		key, value, ok := strings.Cut(line, "=")
		switch {
		case line == "":
		case indented && len(lines) > 0:
			lines[len(lines)-1].value += "\n" + line
		case line[0] == '[' && line[len(line)-1] == ']':
			section = line[1 : len(line)-1]
		case !ok || section == "":
			return nil, fmt.Errorf("line %d: want \"[Section]\" or \"Key = value\" in one", number)
		default:
			lines = append(lines, configLine{number, section, strings.TrimSpace(key), strings.TrimSpace(value)})
		}
	}
	return lines, nil
}
