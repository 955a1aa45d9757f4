package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

func (a *app) repositoryCommands() []*cobra.Command {
	return []*cobra.Command{a.initCommand(), a.gcCommand(), a.fsckCommand(), a.catCommand(), a.transactionCommand()}
}

// initResult is what init prints as JSON.
type initResult struct {
	Path      string `json:"path"`
	Created   bool   `json:"created"`
	Algorithm string `json:"algorithm"`
	Verity    bool   `json:"verity_required"`
}

func (a *app) initCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "init [PATH]",
		Short: "Make a repository",
		Long: `Make a repository: a directory with meta.json, which has fs-verity enabled as the sign that all objects must have it.

On a file system without fs-verity, --insecure makes a repository that does not require it.`,
		Example: `  composefs-boot init /sysroot/composefs
  composefs-boot --repo r init --insecure --algorithm fsverity-sha256-12`,
		Args: between(0, 1),
	}
	algorithm := c.Flags().String("algorithm", "", "fs-verity algorithm: fsverity-sha512-12 or fsverity-sha256-12 [default: fsverity-sha512-12]")
	insecure := c.Flags().Bool("insecure", false, "do not require fs-verity")
	c.RunE = func(_ *cobra.Command, args []string) error {
		path := ""
		if len(args) == 1 {
			path = args[0]
		} else {
			var err error
			if path, err = a.path(); err != nil {
				return err
			}
		}
		config := repo.Config{Insecure: *insecure}
		var err error
		if config.Algorithm, err = a.algorithm(nil); err != nil {
			return usageError{err}
		}
		if *algorithm != "" {
			if config.Algorithm, err = fsverity.ParseAlgorithm(*algorithm); err != nil {
				return usageError{err}
			}
		}
		if config.Format, err = a.erofsFormat(nil); err != nil {
			return usageError{err}
		}
		created, err := repo.Init(path, config)
		if err != nil {
			return err
		}
		r, err := repo.Open(path, repo.Options{})
		if err != nil {
			return err
		}
		defer r.Close()
		if a.json {
			return printJSON(a.out, initResult{path, created, r.Algorithm().Name(), r.RequiresVerity()})
		}
		if !created {
			fmt.Fprintf(a.out, "Repository already initialized at %s\n", path)
			return nil
		}
		verity := "required"
		if !r.RequiresVerity() {
			verity = "not required (insecure)"
		}
		fmt.Fprintf(a.out, "Initialized composefs repository at %s\n  algorithm: %s\n  verity:    %s\n", path, r.Algorithm().Name(), verity)
		return nil
	}
	return c
}

// gcResult is what gc prints as JSON.
type gcResult struct {
	DryRun    bool     `json:"dry_run"`
	Objects   int      `json:"objects_removed"`
	Bytes     int64    `json:"objects_bytes"`
	Images    int      `json:"images_pruned"`
	Streams   int      `json:"streams_pruned"`
	Temporary int      `json:"temporary_removed"`
	Recent    int      `json:"objects_recent"`
	Odd       []string `json:"odd"`
}

func (a *app) gcCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "gc",
		Short: "Remove what no ref leads to",
		Long: `Remove the objects, images and streams that no ref leads to.

What changed less than --grace ago is kept, since an interrupted import would find it again; the default is an hour, and no
time under the name cfsctl. Nothing is removed if an image or stream cannot be read.`,
		Example: `  composefs-boot --repo r gc --dry-run
  composefs-boot --repo r gc --root DIGEST --grace 24h`,
		Args: exactly(0),
	}
	roots := c.Flags().StringArrayP("root", "r", nil, "an image or stream to keep besides, by `NAME`")
	dry := c.Flags().BoolP("dry-run", "n", false, "print what would be removed, and remove nothing")
	margins := repo.DefaultMargins
	if a.name == "cfsctl" {
		margins = repo.Margins{Temporary: margins.Temporary}
	}
	grace := c.Flags().Duration("grace", margins.Objects, "keep what changed less than this `TIME` ago")
	c.RunE = func(c *cobra.Command, _ []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			margins.Objects = *grace
			plan, err := r.GC(c.Context(), repo.GCOptions{Roots: *roots, Margins: margins, Lock: a.lock(), DryRun: *dry})
			if err != nil {
				return err
			}
			if a.json {
				odd := append([]string{}, plan.Odd...)
				return printJSON(a.out, gcResult{*dry, len(plan.Objects), plan.Bytes, len(plan.Images), len(plan.Streams),
					len(plan.Temporary), plan.Recent, odd})
			}
			if *dry {
				fmt.Fprintln(a.out, "Dry run (no files deleted):")
			}
			fmt.Fprintf(a.out, "Objects: %d removed (%d bytes)\n", len(plan.Objects), plan.Bytes)
			// cfsctl does not see beforehand which names will lead nowhere.
			if (len(plan.Images) > 0 || len(plan.Streams) > 0) && !(*dry && a.name == "cfsctl") {
				fmt.Fprintf(a.out, "Pruned symlinks: %d images, %d streams\n", len(plan.Images), len(plan.Streams))
			}
			if plan.Recent > 0 {
				fmt.Fprintf(a.out, "Kept for now: %d objects that changed less than %v ago\n", plan.Recent, *grace)
			}
			for _, name := range plan.Odd {
				fmt.Fprintf(a.err, "%s: not of this repository, left alone\n", name)
			}
			return nil
		})
	}
	return c
}

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
}

// errCorrupt ends fsck with exit code 1 after the findings have been printed.
var errCorrupt = errors.New("the repository is damaged, see above")

func (a *app) fsckCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "fsck",
		Short: "Check the repository",
		Long: `Check that every object has the content that its name says, and that images, streams and refs lead to what is there.

The exit code is 1 if something is wrong; with --json it is 0 if the check itself could be done.`,
		Example: `  composefs-boot --repo r fsck
  composefs-boot --repo r fsck --metadata-only --json`,
		Args: exactly(0),
	}
	metadata := c.Flags().Bool("metadata-only", false, "do not look at the content of objects")
	c.RunE = func(c *cobra.Command, _ []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			var checked atomic.Int64
			p := a.startProgress(func() progressEvent { return progressEvent{What: "checking", Files: checked.Load()} })
			report, err := r.Fsck(c.Context(), repo.FsckOptions{MetadataOnly: *metadata, Lock: a.lock(), Checked: &checked})
			p.end()
			if err != nil {
				return err
			}
			if a.json {
				result := fsckResult{OK: report.OK(), HasMetadata: true, ObjectsChecked: report.Objects, ObjectsCorrupt: report.ObjectsBad,
					StreamsChecked: report.Streams, StreamsCorrupt: report.StreamsBad, ImagesChecked: report.Images,
					ImagesCorrupt: report.ImagesBad, BrokenLinks: report.BrokenLinks, MissingObjects: report.MissingObjects,
					Errors: []string{}, VerityRequired: r.RequiresVerity(), MetadataOnly: *metadata, Findings: []repo.Finding{}}
				for _, f := range report.Findings {
					result.Errors = append(result.Errors, f.String())
					result.Findings = append(result.Findings, f)
				}
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
			}
			return fmt.Errorf("%s: %w", r.Path(), errCorrupt)
		})
	}
	return c
}

func (a *app) catCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "cat NAME | cat IMAGE PATH...",
		Short: "Print what a stream was made from, or files of an image",
		Long: `With one argument: put the file of which a splitstream is the split form together again and print it. NAME is that of the
stream, or of a ref with "refs/" before it.

With more: print files of an image, without mounting it. IMAGE is an image file, or else a ref or digest of the repository.
Symbolic links lead to files of the image. A content outside of the image is verified before the first byte of it is printed.`,
		Example: `  composefs-boot --repo r cat oci-config-sha256:DIGEST
  composefs-boot --repo r cat my-os /etc/os-release
  composefs-boot cat --objects r/objects my-os.erofs /usr/bin/bash > bash`,
		Args: between(1, 1<<20),
	}
	objects := c.Flags().String("objects", "", "the `DIRECTORY` of objects of an image [default: that of the repository]")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) == 1 {
			return a.catStream(args[0])
		}
		return a.catFiles(args[0], *objects, args[1:])
	}
	return c
}

func (a *app) catStream(name string) error {
	return a.withRepo(func(r *repo.Repo) error {
		d, err := r.StreamObject(name)
		if err != nil {
			return err
		}
		f, err := r.OpenObject(d)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := r.Verify(f, d); err != nil {
			return fmt.Errorf("stream %q: %w", name, err)
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		s, err := splitstream.Open(f, info.Size(), r.Algorithm())
		if err != nil {
			return fmt.Errorf("stream %q: %w", name, err)
		}
		return s.WriteTo(a.out, func(d fsverity.Digest) (io.ReadCloser, error) { return r.OpenObject(d) })
	})
}

func (a *app) transactionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "transaction",
		Short: "Keep garbage collection away until interrupted",
		Long:  "Hold the lock that keeps garbage collection away, until the program is interrupted.",
		Args:  exactly(0),
		RunE: func(c *cobra.Command, _ []string) error {
			return a.withRepo(func(r *repo.Repo) error {
				release, err := r.LockShared(c.Context(), a.lock())
				if err != nil {
					return err
				}
				defer release()
				return sleep(c.Context())
			})
		},
	}
}

// sleep waits until the context ends, which is what is expected.
func sleep(ctx context.Context) error {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(time.Hour):
		}
	}
	return nil
}
