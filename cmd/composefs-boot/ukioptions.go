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
	ukiBool                   // no value, and with "no-" before its name the opposite
	ukiGroup                  // all count; the configuration file has one in each section [PCRSignature:NAME]
	ukiIgnored                // nothing comes of it here
	ukiEngine                 // of OpenSSL's engines and providers: refused
	ukiNSS                    // of pesign's database: refused
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
	{"output", "o", "PATH", "", ukiOne, "the `FILE` to write [default: the kernel's name with .unsigned.efi, or .efi if it is signed]"},
	{"measure", "", "", "", ukiBool, "print PCR 11, as measure does"},
	{"pcr-banks", "", "BANKS", "PCRBanks", ukiOne, "banks to measure, `BANK,...` [default: sha1, sha256, sha384 and sha512]"},
	{"phases", "", "PHASES", "Phases", ukiGroup, "phases to measure, `PATH,...`, or those that a --pcr-private-key signs [default: those of a boot]"},
	{"pcr-private-key", "", "KEY", "PCRPrivateKey", ukiGroup, "private `KEY` that signs PCR policies: a PEM file, exec:COMMAND or tpm2:FILE|HANDLE; with several, the options of each in the same order"},
	{"pcr-public-key", "", "PATH", "PCRPublicKey", ukiGroup, "its public key `FILE`"},
	{"pcr-certificate", "", "PATH", "PCRCertificate", ukiGroup, "or its certificate `FILE`"},
	{"policyref", "", "TEXT", "PolicyRef", ukiGroup, "`TEXT` that its policies refer to"},
	{"sign-profile", "", "ID", "", ukiMany, "sign policies only for the profile with this `ID`"},
	{"sign-initrd-pcrs", "", "", "SignInitrdPCRs", ukiBool, "also sign, with the first key, a policy for the initramfs alone, which refers to \"initrd\""},
	{"policy-digest", "", "", "", ukiBool, "leave room for signatures of policies, and print what is to be signed"},
	{"join-pcrsig", "", "PATH", "", ukiOne, "a UKI `FILE` made with --policy-digest, to put the signatures of --pcrsig into"},
	{"pcrsig", "", "TEXT", "PCRSig", ukiOne, "signed policies, `TEXT|@FILE`"},
	{"secureboot-private-key", "", "KEY", "SecureBootPrivateKey", ukiOne, "private `KEY` that signs the file: a PEM file, exec:COMMAND or tpm2:FILE|HANDLE"},
	{"secureboot-certificate", "", "PATH", "SecureBootCertificate", ukiOne, "its certificate `FILE`"},
	{"sign-kernel", "", "", "SignKernel", ukiBool, "sign the kernel as well [default: if it is not signed]"},
}

// ukifyOnly are ukify's other options.
var ukifyOnly = []ukiOption{
	{"tools", "", "PATH", "", ukiIgnored, ""},
	{"signtool", "", "TOOL", "SecureBootSigningTool", ukiOne, ""},
	{"secureboot-certificate-dir", "", "PATH", "SecureBootCertificateDir", ukiIgnored, ""},
	{"secureboot-certificate-validity", "", "DAYS", "SecureBootCertificateValidity", ukiOne, ""},
	{"secureboot-certificate-common-name", "", "CN", "SecureBootCertificateCommonName", ukiOne, ""},
	{"secureboot-certificate-name", "", "NAME", "SecureBootCertificateName", ukiNSS, ""},
	{"signing-engine", "", "ENGINE", "SigningEngine", ukiEngine, ""},
	{"signing-provider", "", "PROVIDER", "SigningProvider", ukiEngine, ""},
	{"certificate-provider", "", "PROVIDER", "CertificateProvider", ukiEngine, ""},
}

// ukiValues are the values that options were given, by name.
type ukiValues map[string][]string

func (v ukiValues) set(o ukiOption, value string) error {
	switch o.kind {
	case ukiIgnored:
	case ukiEngine:
		return fmt.Errorf("--%s: OpenSSL's engines and providers are not used: name the key as exec:COMMAND or tpm2:FILE|HANDLE", o.name)
	case ukiNSS:
		return fmt.Errorf("--%s: pesign's databases are not read: give --secureboot-private-key and --secureboot-certificate", o.name)
	case ukiMany, ukiWords, ukiGroup:
		v[o.name] = append(v[o.name], value)
	case ukiBool:
		on, known := map[string]string{"1": "true", "true": "true", "yes": "true", "y": "true", "t": "true", "on": "true",
			"0": "false", "false": "false", "no": "false", "n": "false", "f": "false", "off": "false"}[strings.ToLower(value)]
		if !known {
			return fmt.Errorf("--%s: %q: want yes or no", o.name, value)
		}
		v[o.name] = []string{on}
	default:
		v[o.name] = []string{value}
	}
	return nil
}

// opposite returns the option with "no-" before its name.
func (v ukiValues) opposite(o ukiOption) option {
	return option{"no-" + o.name, false, func(string) error { return v.set(o, "no") }}
}

// on tells whether something is wanted that is not unless it is said.
func (v ukiValues) on(name string) bool {
	value, _ := v.one(name)
	return value == "true"
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
	if f.option.kind == ukiFlag || f.option.kind == ukiBool {
		return "bool"
	}
	return f.option.metavar
}

// ukiOppositeValue lets cobra read one of these options with "no-" before its name.
type ukiOppositeValue struct{ ukiFlagValue }

func (f ukiOppositeValue) Set(string) error { return f.values.set(f.option, "no") }

// addTo makes flags of the options.
func (v ukiValues) addTo(f *pflag.FlagSet) {
	for _, o := range ukiBuildOptions {
		flag := f.VarPF(ukiFlagValue{v, o}, o.name, o.short, o.help)
		if o.kind == ukiBool {
			flag.NoOptDefVal = "true"
			opposite := f.VarPF(ukiOppositeValue{ukiFlagValue{v, o}}, "no-"+o.name, "", "")
			opposite.NoOptDefVal, opposite.Hidden = "true", true
		}
	}
	for _, o := range ukifyOnly { // they say what to do instead
		f.VarPF(ukiFlagValue{v, o}, o.name, o.short, "").Hidden = true
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
	groups := newUkiGroups(v)
	for _, l := range lines {
		group, inGroup := strings.CutPrefix(l.section, "PCRSignature:")
		at := slices.IndexFunc(ukiOptions(), func(o ukiOption) bool {
			return o.key == l.key && (l.section == "UKI" && o.kind != ukiGroup || inGroup && o.kind == ukiGroup)
		})
		if at >= 0 && inGroup {
			groups.set(group, ukiOptions()[at].name, l.value)
			continue
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
	groups.fill()
	return notes, nil
}

// ukiGroups are the keys that sign policies, each with its options: those of the command line first, by their order, and then
// those of the configuration file, by the names of their sections.
type ukiGroups struct {
	values ukiValues
	given  int // on the command line
	names  []string
}

func newUkiGroups(v ukiValues) *ukiGroups {
	return &ukiGroups{values: v, given: len(v["pcr-private-key"])}
}

// set sets an option of a group of the configuration file.
func (g *ukiGroups) set(group, name, value string) {
	at := slices.Index(g.names, group)
	if at < 0 {
		at = len(g.names)
		g.names = append(g.names, group)
	}
	list := g.values[name]
	for len(list) <= g.given+at {
		list = append(list, "")
	}
	list[g.given+at] = value
	g.values[name] = list
}

// fill makes the lists that have something equally long.
func (g *ukiGroups) fill() {
	for _, o := range ukiOptions() {
		list := g.values[o.name]
		for o.kind == ukiGroup && len(g.names) > 0 && len(list) > 0 && len(list) < g.given+len(g.names) {
			list = append(list, "")
			g.values[o.name] = list
		}
	}
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
