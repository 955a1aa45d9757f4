package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki"
)

func (a *app) ukifyCommand() *cobra.Command {
	var options strings.Builder
	for _, o := range ukiBuildOptions {
		name := "--" + o.name
		if o.kind == ukiBool {
			name = "--[no-]" + o.name
		}
		if o.metavar != "" {
			name += "=" + o.metavar
		}
		fmt.Fprintf(&options, "  %-24s %s\n", name, strings.ReplaceAll(o.help, "`", ""))
	}
	c := &cobra.Command{
		Use:   "ukify",
		Short: "Build and inspect unified kernel images and make keys, as the program ukify does",
		Long: `Build a unified kernel image, inspect some, or make keys. Files are those that ukify 262 writes, with a checksum. This program signs by
itself, whatever --signtool says; pesign's databases and OpenSSL's engines and providers are not used. Genkey makes keys where the
options for private and public keys and the certificate say, and overwrites none; --secureboot-certificate-common-name=CN and
--secureboot-certificate-validity=DAYS go into the certificate.

` + options.String() + `  --section=NAME:text|binary[@FILE]
                           with inspect: only this section
  --all                    with inspect: the stub's sections, too
  --json=pretty|short|off  print JSON; -j is --json=pretty

Settings are also read from ukify.conf in /etc/systemd, /run/systemd, /usr/local/lib/systemd or /usr/lib/systemd.`,
		Example: `  ukify build --linux=vmlinuz --initrd=initrd.img --cmdline="quiet" --output=os.efi
  ukify inspect os.efi --json=pretty
  ukify genkey --secureboot-private-key=db.key --secureboot-certificate=db.pem --pcr-private-key=pcr.key --pcr-public-key=pcr.pub`,
	}
	return a.dropIn(c, "ukify build|inspect|genkey [OPTION]... [FILE]...", func(_ *cobra.Command, args []string, common []option) error {
		return a.ukify(args, common)
	})
}

func (a *app) ukify(args []string, common []option) error {
	v := ukiValues{}
	options := append(common, option{"h", false, func(string) error { return errHelp }})
	for _, o := range append(ukiOptions(), ukiOption{name: "all", kind: ukiFlag}) {
		for _, name := range []string{o.name, o.short} {
			if name != "" {
				options = append(options, option{name, o.metavar != "", func(s string) error {
					if o.kind == ukiBool {
						s = "yes"
					}
					return v.set(o, s)
				}})
			}
		}
		if o.kind == ukiBool {
			options = append(options, v.opposite(o))
		}
	}
	mode := "off"
	options = append(options,
		option{"json", true, func(s string) error { mode = s; return nil }},
		option{"j", false, func(string) error { mode = "pretty"; return nil }})
	operands, err := getopt(args, options)
	if err == errHelp || err == errVersion {
		return err
	}
	if err != nil {
		return usageError{err}
	}
	if mode != "off" && mode != "pretty" && mode != "short" {
		return usageError{fmt.Errorf("--json %q: want pretty, short or off", mode)}
	}
	a.json = mode != "off"
	if mode == "short" {
		a.out = compactJSON{a.out}
	}
	verb := ""
	if len(operands) > 0 {
		verb = operands[0]
	}
	switch {
	case verb == "inspect":
		if len(operands) == 1 {
			return usageError{fmt.Errorf("inspect: which files?")}
		}
		_, all := v.one("all")
		return a.ukiInspect(operands[1:], v["section"], all, false)
	case verb == "genkey":
		if len(operands) > 1 {
			return usageError{fmt.Errorf("genkey: %q: files are named by options", operands[1])}
		}
		return a.ukifyGenkey(v)
	case verb == "build" && len(operands) > 1:
		return usageError{fmt.Errorf("build: %q: files are named by options", operands[1])}
	}
	notes, err := v.readConfig(ukifyConfigs)
	if err != nil {
		return err
	}
	for _, note := range notes {
		fmt.Fprintln(a.err, note)
	}
	if verb != "build" && verb != "" { // as it was before there were verbs: KERNEL INITRD...
		v["linux"] = operands[:1]
		v["initrd"] = append(v["initrd"], operands[1:]...)
	}
	result, err := a.ukiBuild(v)
	if err != nil {
		return err
	}
	if !a.json {
		a.printPCRs(result.PCRs, a.err)
	} else if err := printMeasured(a.out, result.PCRs); err != nil {
		return err
	}
	if result.ToSign != nil {
		fmt.Fprintln(a.out, result.ToSign.Text())
	}
	a.ukiWrote(result)
	return nil
}

// measuredHash is a PCR as systemd-measure has it in JSON, in a list for each bank.
type measuredHash struct {
	Phase string `json:"phase"`
	PCR   int    `json:"pcr"`
	Hash  string `json:"hash"`
}

// printMeasured prints an object for each profile and .dtbauto.
func printMeasured(w io.Writer, all []uki.Prediction) error {
	for len(all) > 0 {
		first, banks := all[0], map[uki.Bank][]measuredHash{}
		for len(all) > 0 && all[0].Profile == first.Profile && all[0].DTB == first.DTB {
			p := all[0]
			banks[p.Bank] = append(banks[p.Bank], measuredHash{p.Phase, p.PCR, p.Value})
			all = all[1:]
		}
		if err := printJSON(w, banks); err != nil {
			return err
		}
	}
	return nil
}

// compactJSON writes JSON in one line.
type compactJSON struct{ io.Writer }

func (c compactJSON) Write(b []byte) (int, error) {
	var v json.RawMessage = b
	short, err := json.Marshal(v)
	if err != nil {
		return 0, err
	}
	_, err = c.Writer.Write(append(short, '\n'))
	return len(b), err
}
