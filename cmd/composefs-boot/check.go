package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
)

// fsckResult is what fsck prints as JSON.
type fsckResult struct {
	OK             bool           `json:"ok"`
	HasMetadata    bool           `json:"has_metadata"`
	ObjectsChecked int            `json:"objects_checked"`
	ObjectsCorrupt int            `json:"objects_corrupted"`
	StreamsChecked int            `json:"streams_checked"`
	StreamsCorrupt int            `json:"streams_corrupted"`
	ImagesChecked  int            `json:"images_checked"`
	ImagesCorrupt  int            `json:"images_corrupted"`
	BrokenLinks    int            `json:"broken_links"`
	MissingObjects int            `json:"missing_objects"`
	Errors         []string       `json:"errors"`
	VerityRequired bool           `json:"verity_required"`
	MetadataOnly   bool           `json:"metadata_only"`
	Findings       []repo.Finding `json:"findings"`

	Repair []repo.RepairStep `json:"repair,omitempty"` // what was done, or would be
}

// errCorrupt ends fsck with exit code 1 after the findings have been printed.
var errCorrupt = errors.New("the repository is damaged, see above")

func (a *app) fsckCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "fsck",
		Short: "Check the repository",
		Long: `Check that every object has the content that its name says, and that images, streams and refs lead to what is there. Of each
object that is damaged or missing, the images and the files in them are named that cannot be used without it.

With --repair what can be healed is healed: fs-verity is enabled, names are made right, and objects that are lost are looked for
in the repository itself and in what --from names: other repositories, or directories with files of any name. Nothing is
deleted: what nobody can heal goes to quarantine/ in the repository.

The exit code is 1 if something is wrong, or still wrong after a repair; with --json it is 0 if the check itself could be done.`,
		Example: `  composefs-boot --repo r fsck
  composefs-boot --repo r fsck --metadata-only --json
  composefs-boot --repo r fsck --repair --from /other/repository --from /usr --dry-run`,
		Args: exactly(0),
	}
	o := repo.FsckOptions{}
	c.Flags().BoolVar(&o.MetadataOnly, "metadata-only", false, "do not look at the content of objects")
	c.Flags().BoolVar(&o.Read, "read", false, "read objects that have fs-verity, too, so that the kernel checks every block of them")
	fix := c.Flags().Bool("repair", false, "heal what can be healed")
	from := c.Flags().StringArray("from", nil, "look for lost objects in this repository or directory, by `PATH`")
	dry := c.Flags().BoolP("dry-run", "n", false, "with --repair: print what would be done, and do nothing")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if !*fix && (len(*from) > 0 || *dry) {
			return usageError{errors.New("--from and --dry-run go with --repair")}
		}
		if *fix && o.MetadataOnly {
			return usageError{errors.New("--repair looks at the content of objects: leave --metadata-only out")}
		}
		return a.withRepo(func(r *repo.Repo) error {
			if *fix {
				return a.repair(c.Context(), r, repo.RepairOptions{From: *from, Read: o.Read, DryRun: *dry, Lock: a.lock()})
			}
			var checked atomic.Int64
			o.Lock, o.Checked = a.lock(), &checked
			p := a.startProgress(func() progressEvent { return progressEvent{What: "checking", Files: checked.Load()} })
			report, err := r.Fsck(c.Context(), o)
			p.end()
			if err != nil {
				return err
			}
			return a.printFsck(r, report, o.MetadataOnly, nil)
		})
	}
	return c
}

// newFsckResult makes what fsck prints as JSON of a report.
func newFsckResult(r *repo.Repo, report repo.FsckReport, metadataOnly bool) fsckResult {
	result := fsckResult{OK: report.OK(), HasMetadata: true, ObjectsChecked: report.Objects, ObjectsCorrupt: report.ObjectsBad,
		StreamsChecked: report.Streams, StreamsCorrupt: report.StreamsBad, ImagesChecked: report.Images,
		ImagesCorrupt: report.ImagesBad, BrokenLinks: report.BrokenLinks, MissingObjects: report.MissingObjects,
		Errors: []string{}, VerityRequired: r.RequiresVerity(), MetadataOnly: metadataOnly, Findings: []repo.Finding{}}
	for _, f := range report.Findings {
		result.Errors = append(result.Errors, f.String())
		result.Findings = append(result.Findings, f)
	}
	return result
}

// printFsck prints a report. Damage is an error, but not with JSON, where the report says so.
func (a *app) printFsck(r *repo.Repo, report repo.FsckReport, metadataOnly bool, steps []repo.RepairStep) error {
	if a.json {
		result := newFsckResult(r, report, metadataOnly)
		result.Repair = steps
		return printJSON(a.out, result)
	}
	fmt.Fprintln(a.out, "meta.json: ok")
	for _, kind := range []struct {
		name       string
		total, bad int
	}{{"objects", report.Objects, report.ObjectsBad}, {"streams", report.Streams, report.StreamsBad},
		{"images", report.Images, report.ImagesBad}} {
		fmt.Fprintf(a.out, "%s: %d/%d ok\n", kind.name, kind.total-kind.bad, kind.total)
	}
	if report.BrokenLinks > 0 {
		fmt.Fprintln(a.out, "broken symlinks:", report.BrokenLinks)
	}
	if report.MissingObjects > 0 {
		fmt.Fprintln(a.out, "missing objects:", report.MissingObjects)
	}
	if report.OK() {
		fmt.Fprintln(a.out, "status: ok")
		return nil
	}
	fmt.Fprintf(a.out, "status: %d error(s)\n", len(report.Findings))
	for _, f := range report.Findings {
		fmt.Fprintln(a.out, "  -", f)
		if a.name != "cfsctl" {
			a.printBreaks(f.Breaks)
		}
	}
	return fmt.Errorf("%s: %w", r.Path(), errCorrupt)
}

// printBreaks tells what cannot be used because of a damaged object.
func (a *app) printBreaks(list []repo.Broken) {
	for _, b := range list {
		line := b.Name
		if len(b.Refs) > 0 {
			line += " (" + strings.Join(b.Refs, ", ") + ")"
		}
		const most = 5
		shown := b.Paths[:min(most, len(b.Paths))]
		if len(shown) > 0 {
			line += ": " + strings.Join(shown, ", ")
		}
		if more := len(b.Paths) - len(shown) + b.More; more > 0 {
			line += fmt.Sprintf(" and %d more", more)
		}
		fmt.Fprintln(a.out, "      breaks", line)
	}
}

func (a *app) repair(ctx context.Context, r *repo.Repo, o repo.RepairOptions) error {
	if !a.json && !o.DryRun {
		o.Step = func(s repo.RepairStep) { fmt.Fprintln(a.out, s) }
	}
	report, err := r.Repair(ctx, o)
	if err != nil {
		return err
	}
	if !a.json && o.DryRun {
		for _, s := range report.Steps {
			fmt.Fprintln(a.out, s)
		}
	}
	return a.printFsck(r, report.After, false, report.Steps)
}

// verifyResult is what verify prints as JSON.
type verifyResult struct {
	OK       bool           `json:"ok"`
	Image    string         `json:"image"`
	Format   string         `json:"format,omitempty"`
	Objects  int            `json:"objects"`
	Findings []repo.Finding `json:"findings"`
}

func (a *app) verifyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "verify IMAGE",
		Short: "Verify an image and every object that it needs",
		Long: `Verify the digest of an image, its structure, and that every object that it needs is there and has its digest. IMAGE is a
digest, the name of a ref, or an image file, whose digest is printed. The objects are those of the repository.

Every finding is a line, with the files that it concerns. The exit code is 1 if something is wrong; with --json it is 0 if the
image could be verified, and "ok" tells the outcome.`,
		Example: `  composefs-boot --repo r verify refs/my-os
  composefs-boot --repo r verify --read --json DIGEST`,
		Args: exactly(1),
	}
	o := repo.VerifyOptions{}
	c.Flags().BoolVar(&o.Read, "read", false, "read objects that have fs-verity, too, so that the kernel checks every block of them")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			var checked atomic.Int64
			o.Lock, o.Checked = a.lock(), &checked
			p := a.startProgress(func() progressEvent { return progressEvent{What: "verifying", Files: checked.Load()} })
			verify := r.VerifyImage
			if _, err := r.ImageDigest(args[0]); err != nil {
				if info, err := os.Stat(args[0]); err == nil && info.Mode().IsRegular() {
					verify = r.VerifyImageFile
				}
			}
			report, err := verify(c.Context(), args[0], o)
			p.end()
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, verifyResult{len(report.Findings) == 0, report.Image.String(), report.Format.String(), report.Objects,
					append([]repo.Finding{}, report.Findings...)})
			}
			for _, f := range report.Findings {
				fmt.Fprintf(a.out, "%s: %s: %s\n", f.Kind, f.Path, f.Detail)
				a.printBreaks(f.Breaks)
			}
			if n := len(report.Findings); n > 0 {
				return fmt.Errorf("image %v: %d findings, see above", report.Image, n)
			}
			fmt.Fprintf(a.out, "%v: ok: %v, %d objects\n", report.Image, report.Format, report.Objects)
			return nil
		})
	}
	return c
}
