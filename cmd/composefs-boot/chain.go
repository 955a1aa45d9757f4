package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot/chain"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

func (a *app) chainCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "chain",
		Short: "Verify a boot from firmware to the last file",
		Example: `  composefs-boot chain verify /efi --db db.pem
  composefs-boot --repo r chain verify os.efi --db db.pem --json`,
	}
	c.AddCommand(a.chainVerifyCommand())
	return c
}

// chainResult is what chain verify prints as JSON.
type chainResult struct {
	OK    bool        `json:"ok"`
	Path  string      `json:"path"`
	First *chainBreak `json:"first,omitempty"` // where the chain breaks
	chain.Report
}

// chainBreak is a broken link and the entry that has it, "" for the boot loader.
type chainBreak struct {
	Entry string `json:"entry,omitempty"`
	chain.Link
}

// chainFlags say what the chain is verified with.
type chainFlags struct {
	trust     trustFlags
	sbatLevel string
	allow     []string
	read      bool
}

func (a *app) chainVerifyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify ESP|UKI",
		Short: "Verify the chain of trust of an ESP or a UKI",
		Long: `Verify the whole chain of trust before it is booted: signatures and SBAT levels of the boot loader, the UKIs and their
addons, the command line of every profile (exactly one composefs argument, and nothing that starts something else, as init= or
rd.break), the initramfs, the image and all its objects in the repository, and that the kernel is the image's. ESP is the
directory where it is mounted, or a copy of it.

Each link is a line: "ok", "broken", "warning", or "not checked" when there was nothing to check it with. The error names the
first link that breaks, the reason and the way out, and the exit code is 1; also with --json.

Type 1 entries break the chain by their nature: nothing signs their command line.`,
		Example: `  composefs-boot chain verify /efi --db db.pem
  composefs-boot --repo r chain verify os.efi --db db.pem --sbat-level SbatLevel.csv
  composefs-boot --no-repo --json chain verify os.efi --db db.pem --allow systemd.debug_shell`,
		Args: exactly(1),
	}
	f := chainFlags{}
	f.trust.addTo(c.Flags())
	c.Flags().StringVar(&f.sbatLevel, "sbat-level", "", "the revocation list in `FILE`, as shim has it in SbatLevel [default: with --firmware, what shim shows]")
	c.Flags().StringArrayVar(&f.allow, "allow", nil, "permit this kernel `ARGUMENT`: NAME or NAME=VALUE")
	c.Flags().BoolVar(&f.read, "read", false, "read objects that have fs-verity, too, so that the kernel checks every block of them")
	c.RunE = func(c *cobra.Command, args []string) error { return a.chainVerify(c.Context(), args[0], f) }
	return c
}

func (a *app) chainVerify(ctx context.Context, path string, f chainFlags) error {
	var checked atomic.Int64
	o := chain.Options{Allow: f.allow}
	o.Verify.Read, o.Verify.Lock, o.Verify.Checked = f.read, a.lock(), &checked
	if f.trust.given() {
		trust, level, err := f.trust.read()
		if err != nil {
			return err
		}
		o.Trust, o.SBATLevel = &trust, level
	}
	if f.sbatLevel != "" {
		b, err := os.ReadFile(f.sbatLevel)
		if err != nil {
			return fmt.Errorf("--sbat-level: %w", err)
		}
		o.SBATLevel = string(b)
	}
	if !a.noRepo {
		r, err := a.open()
		if err != nil {
			return fmt.Errorf("%w (name the repository with --repo, or leave it out with --no-repo)", err)
		}
		defer r.Close()
		o.Repo = r
	}
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	p := a.startProgress(func() progressEvent { return progressEvent{What: "verifying", Files: checked.Load()} })
	var report chain.Report
	if info.IsDir() {
		report, err = chain.ESP(ctx, os.DirFS(path), o)
	} else {
		report, err = chain.UKI(ctx, os.DirFS(filepath.Dir(path)), filepath.Base(path), o)
	}
	p.end()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return a.chainPrint(path, report)
}

// chainPrint prints a report, and returns the first broken link as an error.
func (a *app) chainPrint(path string, report chain.Report) error {
	entry, link := report.First()
	if a.json {
		result := chainResult{OK: link == nil, Path: path, Report: report}
		if link != nil {
			result.First = &chainBreak{entry, *link}
		}
		if err := printJSON(a.out, result); err != nil {
			return err
		}
	} else {
		a.chainLinks("", report.Loader)
		for _, e := range report.Entries {
			a.chainLinks(fmt.Sprintf("%s (%s)", e.Path, e.Type), e.Links)
		}
	}
	if link == nil {
		return nil
	}
	text := "chain broken: " + link.String()
	if entry != "" {
		text = "chain broken: " + entry + ": " + link.String()
	}
	if link.WayOut != "" {
		text += ": " + link.WayOut
	}
	return errors.New(fstree.Printable(text))
}

func (a *app) chainLinks(title string, links []chain.Link) {
	indent := ""
	if title != "" {
		fmt.Fprintln(a.out, fstree.Printable(title))
		indent = "  "
	}
	for _, l := range links {
		fmt.Fprintf(a.out, "%s%-12s %s\n", indent, l.Status, fstree.Printable(l.String()))
		if l.Status != chain.OK && l.WayOut != "" {
			fmt.Fprintf(a.out, "%s%s %s\n", indent, strings.Repeat(" ", 12), l.WayOut)
		}
	}
}
