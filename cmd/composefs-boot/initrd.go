package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot/initrd"
	"github.com/composefs-boot/composefs-boot/boot/setuproot"
)

// initrdFlags are those of initrd build.
type initrdFlags struct {
	config   initrd.Config
	output   string
	compress string
	setup    string // path of setup-root-conf.toml
	dry      bool
}

// initrdResult is what initrd build prints as JSON.
type initrdResult struct {
	DryRun   bool           `json:"dry_run"`
	Path     string         `json:"path,omitempty"`
	Size     int64          `json:"size,omitempty"` // of the initramfs; 0 if none was made
	Contents int64          `json:"contents"`       // bytes of all files, not compressed
	Modules  []initrdModule `json:"modules"`
	Early    []initrdFile   `json:"microcode,omitempty"`
	Files    []initrdFile   `json:"files"`
}

type initrdModule struct {
	When string `json:"when"` // "boot", or the type of the root for which it is loaded
	Path string `json:"path"`
}

type initrdFile struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
}

func (a *app) initrdCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "initrd",
		Short:   "Make an initramfs without a distribution's tools",
		Example: "  composefs-boot initrd build --modules-dir tree/usr/lib/modules/6.12.0 --setup-root composefs-setup-root -o initramfs.img",
	}
	c.AddCommand(a.initrdBuildCommand())
	return c
}

func (a *app) initrdBuildCommand() *cobra.Command {
	var f initrdFlags
	c := &cobra.Command{
		Use:   "build --setup-root FILE [--modules-dir DIR] -o FILE",
		Short: "Make an initramfs whose only program is composefs-setup-root",
		Long: `Make an initramfs whose only program is composefs-setup-root. Started by the kernel, it loads the modules, waits for the
device that root= names, sets up the verified root and starts the system. There is no shell in it: if it fails, the reason is on
the console, and the machine halts, or restarts with composefs.onfail=reboot on the kernel command line.

The kernel modules are those for usual disks, EROFS, overlayfs, and ext4, btrfs or xfs, with all that they need; --module adds more.
Encrypted disks, RAID and network roots need dracut's initramfs.

No root is needed, and the same input gives the same bytes. SOURCE_DATE_EPOCH is the time of the files, 1970-01-01 if it is not set.`,
		Example: `  composefs-boot initrd build --modules-dir tree/usr/lib/modules/6.12.0 --setup-root bin/composefs-setup-root -o initramfs.img
  composefs-boot initrd build --modules-dir /usr/lib/modules/$(uname -r) --setup-root /usr/bin/composefs-setup-root --dry-run
  composefs-boot initrd build ... --module dm_mod --firmware 'vendor/card*.bin' --microcode-dir /usr/lib/firmware`,
		Args: exactly(0),
		RunE: func(c *cobra.Command, _ []string) error { return a.initrdBuild(c.Context(), f) },
	}
	flags := c.Flags()
	flags.StringVar(&f.config.SetupRoot, "setup-root", "", "the program composefs-setup-root, `FILE`")
	flags.StringVar(&f.config.ModulesDir, "modules-dir", "", "the kernel's modules, with modules.dep, `DIR` [default: the kernel has all built in]")
	flags.StringVarP(&f.output, "output", "o", "", "the initramfs to make, `FILE`")
	flags.StringArrayVar(&f.config.Modules, "module", nil, "a module to load as well, `NAME`")
	flags.StringArrayVar(&f.config.Firmware, "firmware", nil, "firmware to add, `NAME` below the firmware directory, or a pattern")
	flags.StringVar(&f.config.FirmwareDir, "firmware-dir", "", "where firmware is, `DIR` [default: beside the modules, ../../firmware]")
	flags.StringVar(&f.config.MicrocodeDir, "microcode-dir", "", "where intel-ucode and amd-ucode are, `DIR` [default: no microcode]")
	flags.StringVar(&f.setup, "config", "", "the setup-root-conf.toml to add, `FILE` [default: none, the defaults count]")
	flags.StringVar(&f.compress, "compress", string(initrd.Zstd), "`COMPRESSION`: zstd, gzip or none")
	flags.BoolVarP(&f.dry, "dry-run", "n", false, "print what would be in it, with sizes, and write nothing")
	return c
}

func (a *app) initrdBuild(ctx context.Context, f initrdFlags) error {
	var err error
	switch {
	case f.config.SetupRoot == "":
		return usageError{errors.New("--setup-root is missing: say which program is to be /init")}
	case f.output == "" && !f.dry:
		return usageError{errors.New("-o is missing: say which file to make, or --dry-run")}
	}
	if f.config.Compression, err = initrd.ParseCompression(f.compress); err != nil {
		return usageError{err}
	}
	if f.config.Time, err = sourceDate(f.config.Time); err != nil {
		return err
	}
	if f.setup != "" {
		if f.config.SetupConfig, err = os.ReadFile(f.setup); err != nil {
			return err
		}
		// Better now than at boot.
		if _, err := setuproot.ParseConfig(f.config.SetupConfig); err != nil {
			return fmt.Errorf("%s: %w", f.setup, err)
		}
	}
	plan, err := f.config.Plan(ctx)
	if err != nil {
		return err
	}
	result := newInitrdResult(plan)
	result.DryRun = f.dry
	if !f.dry {
		result.Path = f.output
		if result.Size, err = writeInitrd(plan, f.output); err != nil {
			return err
		}
	}
	return a.printInitrd(result)
}

// writeInitrd writes the initramfs under another name first: what is at the path is whole, or what was there before.
func writeInitrd(plan *initrd.Plan, path string) (size int64, err error) {
	out, err := os.CreateTemp(filepath.Dir(path), ".composefs-initrd-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(out.Name())
	err = plan.Write(out)
	if err == nil {
		err = out.Chmod(0o644)
	}
	var info os.FileInfo
	if err == nil {
		info, err = out.Stat()
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return 0, err
	}
	return info.Size(), os.Rename(out.Name(), path)
}

func newInitrdResult(plan *initrd.Plan) initrdResult {
	r := initrdResult{Modules: []initrdModule{}}
	for _, m := range plan.Modules {
		r.Modules = append(r.Modules, initrdModule{m.When, m.Path})
	}
	for _, f := range plan.Early {
		if !f.IsDir() {
			r.Early = append(r.Early, initrdFile{f.Path, f.Size()})
			r.Contents += f.Size()
		}
	}
	for _, f := range plan.Files {
		if !f.IsDir() {
			r.Files = append(r.Files, initrdFile{f.Path, f.Size()})
			r.Contents += f.Size()
		}
	}
	return r
}

func (a *app) printInitrd(r initrdResult) error {
	if a.json {
		return printJSON(a.out, r)
	}
	if !r.DryRun {
		fmt.Fprintf(a.out, "%s: %s, %d modules, %s unpacked\n", r.Path, size(r.Size), len(r.Modules), size(r.Contents))
		return nil
	}
	fmt.Fprintln(a.out, "Dry run (nothing is written):")
	for _, f := range slices.Concat(r.Early, r.Files) {
		fmt.Fprintf(a.out, "%10s  %s\n", size(f.Size), f.Path)
	}
	fmt.Fprintf(a.out, "%10s  in all, not compressed\n", size(r.Contents))
	for _, m := range r.Modules {
		fmt.Fprintf(a.out, "load %-5s  %s\n", m.When, m.Path)
	}
	return nil
}
