package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// option is an option of the C tools' command lines.
type option struct {
	name  string             // of one letter: -n; of more: --name
	value bool               // a value follows
	set   func(string) error // nil: the option is taken, and nothing comes of it
}

// getopt reads a command line as getopt_long(3) does, which scripts rely on: options and operands stand in any order, "--"
// ends the options, a long name may be cut off where it is still the only one, a value follows "=" or is the next argument,
// and short options may share a dash. It returns the operands.
func getopt(args []string, options []option) (operands []string, err error) {
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		switch {
		case arg == "--":
			return append(operands, args...), nil
		case strings.HasPrefix(arg, "--"):
			args, err = longOption(arg, args, options)
		case strings.HasPrefix(arg, "-") && arg != "-":
			args, err = shortOptions(arg, args, options)
		default:
			operands = append(operands, arg)
		}
		if err != nil {
			return nil, err
		}
	}
	return operands, nil
}

// longOption sets an option, and returns the arguments after it.
func longOption(arg string, args []string, options []option) ([]string, error) {
	name, value, has := strings.Cut(arg[2:], "=")
	var found []option
	for _, o := range options {
		if o.name == name && len(name) > 1 {
			found = []option{o}
			break
		}
		if len(o.name) > 1 && strings.HasPrefix(o.name, name) {
			found = append(found, o)
		}
	}
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("unknown option --%s: see --help", name)
	case len(found) > 1:
		return nil, fmt.Errorf("option --%s is ambiguous: --%s or --%s", name, found[0].name, found[1].name)
	}
	o := found[0]
	switch {
	case has && !o.value:
		return nil, fmt.Errorf("option --%s takes no value", o.name)
	case !has && o.value:
		if len(args) == 0 {
			return nil, fmt.Errorf("option --%s needs a value", o.name)
		}
		value, args = args[0], args[1:]
	}
	return args, o.take(value)
}

// shortOptions sets the options of one argument, and returns the arguments after it.
func shortOptions(arg string, args []string, options []option) ([]string, error) {
	for letters := arg[1:]; letters != ""; {
		var o option
		for _, o = range options {
			if o.name == letters[:1] {
				break
			}
		}
		if o.name != letters[:1] {
			return nil, fmt.Errorf("unknown option -%s: see --help", letters[:1])
		}
		letters = letters[1:]
		value := ""
		if o.value {
			if value, letters = letters, ""; value == "" {
				if len(args) == 0 {
					return nil, fmt.Errorf("option -%s needs a value", o.name)
				}
				value, args = args[0], args[1:]
			}
		}
		if err := o.take(value); err != nil {
			return nil, err
		}
	}
	return args, nil
}

func (o option) take(value string) error {
	if o.set == nil {
		return nil
	}
	return o.set(value)
}

// flag returns an option without a value that sets a variable.
func flag(name string, v *bool) option {
	return option{name, false, func(string) error { *v = true; return nil }}
}

// dropIns are the programs that this one stands in for, when it is called by their names. Each is a command, too.
var dropIns = []string{"mkcomposefs", "composefs-info", "mount.composefs", "ukify"}

// dropIn makes the command that stands in for another program, which reads its command line by itself. Usage is what
// --help begins with.
func (a *app) dropIn(c *cobra.Command, usage string, run func(c *cobra.Command, args []string, common []option) error) *cobra.Command {
	c.DisableFlagParsing = true
	c.SetHelpFunc(func(*cobra.Command, []string) {
		fmt.Fprintf(a.out, "Usage: %s\n\n%s\n\nExamples:\n%s\n", usage, c.Long, c.Example)
	})
	c.RunE = func(_ *cobra.Command, args []string) error {
		common := []option{
			{"help", false, func(string) error { return errHelp }},
			{"version", false, func(string) error { return errVersion }},
		}
		err := run(c, args, common)
		switch err {
		case errHelp:
			return c.Help()
		case errVersion:
			_, err = fmt.Fprintf(a.out, "%s (composefs-boot %s)\n", c.Name(), version)
		}
		return err
	}
	return c
}

// What the options --help and --version say; they end the reading of the command line.
var errHelp, errVersion = errors.New("help"), errors.New("version")
