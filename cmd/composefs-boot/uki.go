package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki"
)

func (a *app) ukiCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "uki",
		Short: "Build, sign, inspect, take apart and measure unified kernel images",
		Long: `Build, sign, inspect, take apart and measure unified kernel images (UKI): programs for UEFI that hold the kernel, its
initramfs and its command line. Options of build are those of ukify 262, and this program also answers to that name.`,
		Example: `  composefs-boot uki build --linux vmlinuz --initrd initrd.img --cmdline "$(composefs-boot --no-repo compute-karg tree)" -o os.efi
  composefs-boot uki inspect os.efi
  composefs-boot uki measure os.efi`,
	}
	c.AddCommand(a.ukiBuildCommand(), a.ukiInspectCommand(), a.ukiExtractCommand(), a.ukiEditCommand(), a.ukiMeasureCommand(),
		a.ukiSignCommand(), a.ukiVerifyCommand(), a.ukiUnsignCommand())
	return c
}

func (a *app) ukiBuildCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "build",
		Short: "Build a UKI, an addon or a profile",
		Long: `Build a unified kernel image from a stub, a kernel and what goes with it. Without a kernel it is an addon, which the stub
adds to a UKI when it lies beside it; with --profile and no --join-profile it is a profile for a UKI to be built with
--join-profile. The same input gives the same bytes, signatures included.

With --pcr-private-key, each profile gets signatures for the values that PCR 11 will have when it is booted, by which secrets
that are sealed to the key can be had (.pcrsig, and .pcrpkey with the public key). With --secureboot-private-key, the
file is signed for Secure Boot. A key is a PEM file, or exec:COMMAND, which gets the SHA-256 digest on its standard input and writes
the signature, or tpm2:FILE|HANDLE.`,
		Example: `  composefs-boot uki build --linux vmlinuz --initrd microcode.img --initrd initrd.img --cmdline "quiet" -o os.efi
  composefs-boot --repo r uki build --linux vmlinuz --initrd initrd.img --image my-os --cmdline "quiet" -o os.efi
  composefs-boot uki build --profile "ID=rescue" --cmdline "systemd.unit=rescue.target" -o rescue.profile.efi
  composefs-boot uki build --linux vmlinuz --initrd initrd.img --join-profile rescue.profile.efi -o os.efi
  composefs-boot uki build --cmdline "debug" -o debug.addon.efi
  composefs-boot uki build --linux vmlinuz --initrd initrd.img --pcr-private-key pcr.key --pcr-banks sha256 \
      --secureboot-private-key db.key --secureboot-certificate db.crt -o os.efi
  composefs-boot uki build --linux vmlinuz --policy-digest --pcr-public-key pcr.pub -o unsigned.efi > to-sign.json
  composefs-boot uki build --join-pcrsig unsigned.efi --pcrsig @signed.json -o os.efi`,
		Args: exactly(0),
	}
	v := ukiValues{}
	v.addTo(c.Flags())
	image := c.Flags().String("image", "", "put the composefs argument of this image in front of the command line, `REF|DIGEST|DIR`")
	c.RunE = func(c *cobra.Command, _ []string) error {
		notes, err := v.readConfig(nil)
		if err != nil {
			return err
		}
		for _, note := range notes {
			fmt.Fprintln(a.err, note)
		}
		if *image != "" {
			arg, err := a.ukiImageArgument(c.Context(), *image)
			if err != nil {
				return err
			}
			v["image"] = []string{arg}
		}
		result, err := a.ukiBuild(v)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(a.out, result)
		}
		a.printPCRs(result.PCRs, a.err)
		if result.ToSign != nil {
			fmt.Fprintln(a.out, result.ToSign.Text())
		}
		a.ukiWrote(result)
		return nil
	}
	return c
}

func (a *app) ukiWrote(result ukiBuilt) {
	if a.quiet {
		return
	}
	signed := "unsigned"
	if result.Signer != "" {
		signed = "signed by " + result.Signer
	}
	fmt.Fprintf(a.err, "wrote %s, %s, %s\n", result.Output, size(result.Size), signed)
	if result.Unsigned > 0 {
		fmt.Fprintf(a.err, "%d PCR policies in it are not signed\n", result.Unsigned)
	}
}

// ukiInput opens the files that a UKI is made of. They are read while it is written, and closed after that.
type ukiInput struct {
	files []*os.File
	keys  []io.Closer
}

func (in *ukiInput) close() {
	for _, k := range in.keys {
		k.Close()
	}
	for _, f := range in.files {
		f.Close()
	}
}

func (in *ukiInput) open(path string) (uki.Content, error) {
	f, err := os.Open(path)
	if err != nil {
		return uki.Content{}, err
	}
	in.files = append(in.files, f)
	info, err := f.Stat()
	if err != nil {
		return uki.Content{}, err
	}
	if !info.Mode().IsRegular() {
		// A pipe or device cannot be read twice.
		b, err := io.ReadAll(io.LimitReader(f, 1<<32))
		return uki.Bytes(b), err
	}
	return uki.Content{ReaderAt: f, Size: info.Size()}, nil
}

// text returns TEXT, or the content of the file in @FILE. An empty text is no content.
func (in *ukiInput) text(value string) (uki.Content, error) {
	if path, ok := strings.CutPrefix(value, "@"); ok {
		return in.open(path)
	}
	if value == "" {
		return uki.Content{}, nil
	}
	return uki.Text(value), nil
}

// image opens a UKI, an addon or a profile.
func (in *ukiInput) image(path string) (*uki.Image, *uki.PE, error) {
	c, err := in.open(path)
	if err != nil {
		return nil, nil, err
	}
	m, p, err := uki.Read(c, c.Size)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, p, nil
}

// parts opens what the options name.
func (in *ukiInput) parts(v ukiValues) (p uki.Parts, err error) {
	one := func(name string, to *uki.Content, open func(string) (uki.Content, error)) {
		if value, ok := v.one(name); ok && err == nil {
			*to, err = open(value)
			err = named(name, err)
		}
	}
	many := func(name string, to *[]uki.Content, open func(string) (uki.Content, error)) {
		for _, value := range v[name] {
			var c uki.Content
			if err == nil {
				c, err = open(value)
				err = named(name, err)
			}
			*to = append(*to, c)
		}
	}
	one("linux", &p.Linux, in.open)
	many("initrd", &p.Initrd, in.open)
	one("microcode", &p.Microcode, in.open)
	one("splash", &p.Splash, in.open)
	one("devicetree", &p.DTB, in.open)
	many("devicetree-auto", &p.DTBAuto, in.open)
	one("pcrpkey", &p.PCRPKey, in.open)
	one("uname", &p.Uname, func(s string) (uki.Content, error) { return uki.Text(s), nil })
	one("profile", &p.Profile, in.text)
	many("efifw", &p.Firmware, func(dir string) (uki.Content, error) {
		return uki.Firmware(filepath.Base(filepath.Clean(dir)), os.DirFS(dir))
	})
	one("cmdline", &p.Cmdline, func(s string) (uki.Content, error) {
		if !strings.HasPrefix(s, "@") {
			s = strings.Join(strings.Fields(s), " ")
		}
		return in.text(s)
	})
	if _, ok := v.one("os-release"); !ok && p.Linux.IsSet() {
		v["os-release"] = []string{"@/usr/lib/os-release"}
		if _, err := os.Stat("/etc/os-release"); err == nil {
			v["os-release"] = []string{"@/etc/os-release"}
		}
	}
	one("os-release", &p.OSRelease, in.text)
	if err != nil {
		return p, err
	}
	for _, value := range v["sbat"] {
		if path, ok := strings.CutPrefix(value, "@"); ok {
			b, err := os.ReadFile(path)
			if err != nil {
				return p, named("sbat", err)
			}
			value = string(b)
		}
		p.SBAT = append(p.SBAT, value)
	}
	for _, value := range v["section"] {
		name, text, ok := strings.Cut(value, ":")
		if !ok {
			return p, usageError{fmt.Errorf("--section %q: want NAME:TEXT or NAME:@FILE", value)}
		}
		c, err := in.text(text)
		if err != nil {
			return p, named("section", err)
		}
		if !c.IsSet() {
			c = uki.Text("")
		}
		p.Extra = append(p.Extra, uki.NewSection(name, c))
	}
	for _, path := range v["join-profile"] {
		m, _, err := in.image(path)
		if err != nil {
			return p, named("join-profile", err)
		}
		p.Join = append(p.Join, m)
	}
	if arg, ok := v.one("image"); ok {
		return p, addImage(&p, arg)
	}
	return p, nil
}

func named(option string, err error) error {
	if err != nil {
		return fmt.Errorf("--%s: %w", option, err)
	}
	return nil
}

// stubPath returns where the stub is, and for which architecture: the one that is asked for, that of the kernel, or else that
// of this machine.
func (in *ukiInput) stubPath(v ukiValues, p uki.Parts) (path, arch string) {
	arch, given := v.one("efi-arch")
	if !given {
		arch = map[string]string{"amd64": "x64", "arm64": "aa64", "386": "ia32"}[runtime.GOARCH]
		arch = cmp.Or(arch, runtime.GOARCH)
		if kernel, err := uki.ParsePE(p.Linux, p.Linux.Size); p.Linux.IsSet() && err == nil {
			arch = kernel.Machine.String()
		}
	}
	if path, ok := v.one("stub"); ok {
		return path, arch
	}
	kind := "addon"
	if p.Linux.IsSet() {
		kind = "linux"
	}
	return "/usr/lib/systemd/boot/efi/" + kind + arch + ".efi.stub", arch
}

// hwids makes .hwids of the directory that is named, or of systemd's if it is there.
func hwids(v ukiValues, machine uki.Machine) (uki.Content, error) {
	dir, given := v.one("hwids")
	if !given {
		dir = "/usr/lib/systemd/boot/hwids/" + machine.String()
		if _, err := os.Stat(dir); err != nil {
			return uki.Content{}, nil
		}
	}
	if dir == "" {
		return uki.Content{}, nil
	}
	c, err := uki.HWIDs(os.DirFS(dir))
	return c, named("hwids", err)
}

// replaceFile writes a file under another name beside it and then gives it its name.
func replaceFile(path string, write func(*os.File) error) error {
	f, err := os.OpenFile(filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d", filepath.Base(path), os.Getpid())),
		os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	if err = write(f); err == nil {
		err = f.Close()
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		f.Close()
		os.Remove(f.Name())
	}
	return err
}

func (a *app) ukiExtractCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "extract FILE SECTION",
		Short: "Write a section of a UKI",
		Long: `Write a section of a UKI to standard output or a file, as it is in effect when a profile is booted. The section is named
with or without its dot.`,
		Example: `  composefs-boot uki extract os.efi cmdline
  composefs-boot uki extract os.efi .initrd --output initrd.img
  composefs-boot uki extract os.efi cmdline --profile rescue`,
		Args: exactly(2),
	}
	profile := c.Flags().String("profile", "0", "the profile, by `NUMBER|ID`")
	output := c.Flags().StringP("output", "o", "-", "the `FILE` to write, \"-\" for standard output")
	c.RunE = func(c *cobra.Command, args []string) error {
		in := &ukiInput{}
		defer in.close()
		m, _, err := in.image(args[0])
		if err != nil {
			return err
		}
		n, err := m.Find(*profile)
		if err == nil {
			write := func(w io.Writer) error { return uki.Extract(w, m, n, "."+strings.TrimPrefix(args[1], ".")) }
			if *output == "-" {
				err = write(a.out)
			} else {
				err = replaceFile(*output, func(f *os.File) error { return write(f) })
			}
		}
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		return nil
	}
	return c
}
