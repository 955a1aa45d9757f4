// Command composefs-setup-root makes a composefs image the root of the running system. It is started in the initramfs when
// the physical root file system has been mounted, and replaces it.
//
// It says what went wrong in the kernel log and on standard error, and ends with exit code 1; 2 for wrong options. It
// never starts a shell, and an error leaves everything as it was. Package boot/setuproot is the work itself.
//
// Started by the kernel as /init of an initramfs, it does all that is to be done there: package boot/pid1.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/boot/pid1"
	"github.com/composefs-boot/composefs-boot/boot/setuproot"
)

// version is set by the build.
var version = "development"

const configFile = "/usr/lib/composefs/setup-root-conf.toml"

const usage = `composefs-setup-root makes a composefs image the root of the running system.

Usage: composefs-setup-root [OPTIONS]

Options:
  --sysroot DIR   where the physical root is mounted [default: /sysroot]
  --target DIR    where the new root goes [default: where the physical root was]
  --config FILE   configuration [default: /usr/lib/composefs/setup-root-conf.toml]
  --cmdline TEXT  kernel command line [default: that of the running kernel]
  --root-fs DIR   use a directory instead of an image, unverified (for tests)
  --dry-run       print the plan and change nothing
  --verbose       print what each step took
  --version       print the version
  --help          print this

Examples:
  composefs-setup-root                      what the initramfs calls
  composefs-setup-root --dry-run            what would be done with this command line on this kernel
  composefs-setup-root --sysroot / --target /mnt --cmdline "composefs=?HEX"
`

type options struct {
	sysroot, target, config, cmdline, rootFS string
	hasCmdline, hasConfig                    bool
	dryRun, verbose                          bool
}

func main() {
	if os.Getpid() == 1 {
		asInit() // the kernel's arguments are not for us
	}
	o, done, err := parse(os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintf(os.Stderr, "composefs-setup-root: %v (see --help)\n", err)
		os.Exit(2)
	}
	if done {
		return
	}
	if err := setup(o); err != nil {
		report("<3>", err.Error())
		os.Exit(1)
	}
}

// asInit is the program as process 1. It does not return.
func asInit() {
	o := options{sysroot: pid1.Sysroot, target: pid1.Sysroot, config: configFile}
	pid1.Run(pid1.Host{
		Signed: func() (bool, error) {
			c, err := readConfig(o)
			return c.SignedCmdline, err
		},
		SetUp:  func() error { return setup(o) },
		Report: func(l pid1.Level, text string) { report(string(l), text) },
	})
}

// parse reads the options. Done means that what they ask for has been printed.
func parse(args []string, out io.Writer) (o options, done bool, err error) {
	o = options{sysroot: "/sysroot", config: configFile}
	for k := 0; k < len(args); k++ {
		name, value, inline := strings.Cut(args[k], "=")
		var text *string
		switch name {
		case "--sysroot":
			text = &o.sysroot
		case "--target":
			text = &o.target
		case "--config":
			text, o.hasConfig = &o.config, true
		case "--cmdline":
			text, o.hasCmdline = &o.cmdline, true
		case "--root-fs":
			text = &o.rootFS
		case "--dry-run":
			o.dryRun = true
		case "--verbose":
			o.verbose = true
		case "--version", "-V":
			fmt.Fprintln(out, "composefs-setup-root", version)
			return o, true, nil
		case "--help", "-h":
			fmt.Fprint(out, usage)
			return o, true, nil
		default:
			return o, false, fmt.Errorf("unknown option %q", args[k])
		}
		switch {
		case text == nil && inline:
			return o, false, fmt.Errorf("%s takes no value", name)
		case text == nil:
		case inline:
			*text = value
		case k+1 == len(args):
			return o, false, fmt.Errorf("%s needs a value", name)
		default:
			k++
			*text = args[k]
		}
	}
	if o.target == "" {
		o.target = o.sysroot
	}
	return o, false, nil
}

// readConfig reads the configuration. The usual file need not be there.
func readConfig(o options) (setuproot.Config, error) {
	text, err := os.ReadFile(o.config)
	if errors.Is(err, os.ErrNotExist) && !o.hasConfig {
		return setuproot.DefaultConfig, nil
	}
	if err != nil {
		return setuproot.Config{}, err
	}
	c, err := setuproot.ParseConfig(text)
	if err != nil {
		return c, fmt.Errorf("%s: %w", o.config, err)
	}
	return c, nil
}

func setup(o options) error {
	start := time.Now()
	w := setuproot.World{RootFS: o.rootFS, Sysroot: o.sysroot, Target: o.target}
	var err error
	if w.Config, err = readConfig(o); err != nil {
		return err
	}
	if !o.hasCmdline {
		line, err := os.ReadFile("/proc/cmdline")
		if err != nil {
			return err
		}
		o.cmdline = string(line)
	}
	if w.Choice, err = karg.Parse(o.cmdline); err != nil {
		return err
	}
	for _, ignored := range w.Choice.Ignored {
		warn(o, fmt.Sprintf("%.300s does not count: another argument of its kind stands before it", ignored))
	}
	if err := w.Look(); err != nil {
		return err
	}
	looked := time.Since(start)
	steps, err := w.Plan()
	if err != nil {
		return err
	}
	if o.dryRun {
		fmt.Print(setuproot.Format(steps))
		return nil
	}
	var physical unix.Stat_t
	if err := unix.Stat(o.sysroot, &physical); err != nil {
		return &os.PathError{Op: "stat", Path: o.sysroot, Err: err}
	}
	result, err := setuproot.Execute(steps)
	all := time.Since(start)
	for _, w := range result.Warnings {
		warn(o, w)
	}
	if o.verbose {
		fmt.Printf("%8d us  look at the command line, the disk and the kernel\n", looked.Microseconds())
		for _, t := range result.Times {
			fmt.Printf("%8d us  %v\n", t.Took.Microseconds(), t.Step)
		}
		fmt.Printf("%8d us  in all\n", all.Microseconds())
	}
	if err != nil {
		return err
	}
	if image, err := w.Choose(); err == nil && o.rootFS == "" {
		if first := w.Choice.Images[0]; image != first {
			warn(o, fmt.Sprintf("image %v is missing on the disk: %v is booted instead", first.Digest, image))
		}
		if !image.Insecure {
			report("<6>", fmt.Sprintf("the root is image %v, verified whenever it is read", image.Digest))
		}
	}
	if o.target == "/sysroot" {
		tellRoot(physical, "/dev/gpt-auto-root", "/run/systemd/volatile-root")
	}
	return nil
}

func warn(o options, text string) {
	if o.dryRun {
		fmt.Fprintln(os.Stderr, "composefs-setup-root:", text)
		return
	}
	report("<4>", text)
}

// report writes a line to the kernel log, which the console shows, and to standard error. For process 1 that is the console
// as well: then only what the log does not show there.
func report(level, text string) {
	text = "composefs-setup-root: " + oneLine(text)
	kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil || os.Getpid() != 1 || level < string(pid1.Info) && !shown(level) {
		fmt.Fprintln(os.Stderr, text)
	}
	if err != nil {
		return
	}
	defer kmsg.Close()
	const longest = 900 // the kernel refuses records of more than about a thousand bytes
	if len(text) > longest {
		text = text[:longest]
	}
	fmt.Fprint(kmsg, level+text+"\n")
}

// shown reports whether the console shows messages of this level: those below the first number of printk.
func shown(level string) bool {
	text, err := os.ReadFile("/proc/sys/kernel/printk")
	var below, n int
	_, err2 := fmt.Sscan(string(text), &below)
	_, err3 := fmt.Sscanf(level, "<%d>", &n)
	return err == nil && err2 == nil && err3 == nil && n < below
}

// oneLine keeps what the command line or the disk brought into a message from steering the console.
func oneLine(text string) string {
	text = strings.ReplaceAll(text, "\n", "; ")
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, text)
}

// tellRoot tells systemd on which device the physical root is: the new root is on none from which systemd could find that out
// (systemd issue 35017), and so it would neither find the EFI system partition nor mark a boot entry there as good. systemd
// reads the text of the link, and wants the device's number in it. Btrfs has no number of its own: then there has to be the
// link that is made for a root that was found by its partition type.
func tellRoot(sysroot unix.Stat_t, device, link string) {
	dev := sysroot.Dev
	if unix.Major(dev) == 0 {
		var st unix.Stat_t
		if unix.Stat(device, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
			return
		}
		dev = st.Rdev
	}
	// It may be there already, and a system without systemd does not need it.
	os.MkdirAll(filepath.Dir(link), 0o755)
	os.Symlink(fmt.Sprintf("/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)), link)
}
