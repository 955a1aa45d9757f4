package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/uki"
)

func (a *app) ukiEditCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "edit FILE",
		Short: "Change sections of an unsigned UKI",
		Long: `Change sections of a UKI, an addon or a profile that is not signed. All other sections stay as they are, byte for byte, and
the result is the file that build would make of the parts. A signature would not be right any more: unsign the file first, and
sign it again.`,
		Example: `  composefs-boot uki edit os.efi --cmdline "quiet" -o new.efi
  composefs-boot uki edit os.efi --section .splash:@logo.bmp --remove .ucode -o new.efi
  composefs-boot uki edit os.efi --profile rescue --cmdline @line -o new.efi --measure`,
		Args: exactly(1),
	}
	cmdline := c.Flags().String("cmdline", "", "the kernel command line, `TEXT|@FILE`")
	sections := c.Flags().StringArray("section", nil, "another section, `NAME:TEXT|NAME:@FILE`")
	remove := c.Flags().StringArray("remove", nil, "remove the section of this `NAME`")
	profile := c.Flags().String("profile", "", "change this profile, by `NUMBER|ID` [default: what all profiles have in common]")
	output := c.Flags().StringP("output", "o", "", "the `FILE` to write")
	measure := c.Flags().Bool("measure", false, "print PCR 11, as measure does")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *output == "" {
			return usageError{errors.New("--output is needed")}
		}
		in := &ukiInput{}
		defer in.close()
		e := uki.Edit{}
		if c.Flags().Changed("cmdline") {
			*sections = append([]string{".cmdline:" + oneLineCmdline(*cmdline)}, *sections...)
		}
		for _, value := range *sections {
			name, text, ok := strings.Cut(value, ":")
			if !ok {
				return usageError{fmt.Errorf("--section %q: want NAME:TEXT or NAME:@FILE", value)}
			}
			content, err := in.text(text)
			if err != nil {
				return named("section", err)
			}
			if !content.IsSet() {
				content = uki.Text("")
			}
			e.Set = append(e.Set, uki.NewSection("."+strings.TrimPrefix(name, "."), content))
		}
		for _, name := range *remove {
			e.Remove = append(e.Remove, "."+strings.TrimPrefix(name, "."))
		}
		result, err := a.ukiEdit(in, args[0], *output, *profile, e, *measure)
		if err != nil {
			return err
		}
		if a.json {
			return printJSON(a.out, result)
		}
		a.printPCRs(result.PCRs, a.err)
		a.ukiWrote(result)
		return nil
	}
	return c
}

// oneLineCmdline is a text for .cmdline as build takes it.
func oneLineCmdline(s string) string {
	if strings.HasPrefix(s, "@") {
		return s
	}
	return strings.Join(strings.Fields(s), " ")
}

func (a *app) ukiEdit(in *ukiInput, path, output, profile string, e uki.Edit, measure bool) (result ukiBuilt, err error) {
	m, p, err := in.image(path)
	if err != nil {
		return result, err
	}
	if profile != "" {
		n, err := m.Find(profile)
		if err != nil {
			return result, fmt.Errorf("%s: %w", path, err)
		}
		e.Profile = min(n+1, len(m.Profiles)-1)
	}
	layout, err := e.Apply(p)
	if err != nil {
		return result, fmt.Errorf("%s: %w", path, err)
	}
	if err := replaceFile(output, func(f *os.File) error { return layout.Write(f) }); err != nil {
		return result, fmt.Errorf("%s: %w", output, err)
	}
	result = ukiBuilt{Output: output, Size: layout.Size, Machine: p.Machine.String()}
	if measure {
		result.PCRs, err = predictFile(output)
	}
	return result, err
}

// predictFile predicts PCR 11 of a file.
func predictFile(path string) ([]uki.Prediction, error) {
	in := &ukiInput{}
	defer in.close()
	m, _, err := in.image(path)
	if err != nil {
		return nil, err
	}
	return uki.Measure(m, uki.Banks, uki.Phases)
}
