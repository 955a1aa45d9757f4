package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

func (a *app) repositoryCommands() []*cobra.Command {
	return []*cobra.Command{a.initCommand(), a.gcCommand(), a.fsckCommand(), a.verifyCommand(), a.convertCommand(), a.catCommand(), a.transactionCommand()}
}

// initResult is what init prints as JSON.
type initResult struct {
	Path      string      `json:"path"`
	Created   bool        `json:"created"`
	Status    repo.Status `json:"status"` // created, opened or upgraded
	Algorithm string      `json:"algorithm"`
	Verity    bool        `json:"verity_required"`
}

func (a *app) initCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "init [PATH]",
		Short: "Make a repository",
		Long: `Make a repository: a directory with meta.json, which has fs-verity enabled as the sign that all objects must have it.

On a file system without fs-verity, --insecure makes a repository that does not require it.

With --ensure a repository that is there stays as it is, whatever its configuration, and one from the time before meta.json gets
one. With --reset-metadata its images and streams are removed, and it is made anew around the objects that it has.`,
		Example: `  composefs-boot init /sysroot/composefs
  composefs-boot --repo r init --ensure
  composefs-boot --repo r init --insecure --algorithm fsverity-sha256-12`,
		Args: between(0, 1),
	}
	algorithm := c.Flags().String("algorithm", "", "fs-verity algorithm: fsverity-sha512-12 or fsverity-sha256-12 [default: fsverity-sha512-12]")
	insecure := c.Flags().Bool("insecure", false, "do not require fs-verity")
	ensure := c.Flags().Bool("ensure", false, "leave a repository that is there as it is")
	reset := c.Flags().Bool("reset-metadata", false, "remove meta.json, images and streams first, and keep the objects")
	c.RunE = func(c *cobra.Command, args []string) error {
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
		if *reset {
			if err := repo.ResetMetadata(c.Context(), path, a.lock()); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		var status repo.Status
		if *ensure {
			status, err = repo.Ensure(path, config)
		} else {
			var created bool
			if created, err = repo.Init(path, config); created {
				status = repo.Created
			} else {
				status = repo.Opened
			}
		}
		if err != nil {
			return err
		}
		r, err := repo.Open(path, repo.Options{})
		if err != nil {
			return err
		}
		defer r.Close()
		if a.json {
			return printJSON(a.out, initResult{path, status == repo.Created, status, r.Algorithm().Name(), r.RequiresVerity()})
		}
		switch {
		case status == repo.Upgraded:
			fmt.Fprintf(a.out, "Upgraded legacy repository at %s\n", path)
			return nil
		case status == repo.Opened && *ensure:
			fmt.Fprintf(a.out, "Repository already initialized at %s (existing configuration preserved)\n", path)
			return nil
		case status == repo.Opened:
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
		Long: `Remove the objects, images and streams that no ref leads to. An artifact that refers to an OCI image stays as long as the image.

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
			plan, err := r.GC(c.Context(), repo.GCOptions{Roots: *roots, Margins: margins, Follows: oci.Follows, Lock: a.lock(),
				DryRun: *dry})
			if err != nil {
				return err
			}
			if a.json {
				odd := append([]string{}, plan.Odd...)
				return printJSON(a.out, gcResult{*dry, plan.Objects, plan.Bytes, len(plan.Images), len(plan.Streams),
					len(plan.Temporary), plan.Recent, odd})
			}
			if *dry {
				fmt.Fprintln(a.out, "Dry run (no files deleted):")
			}
			fmt.Fprintf(a.out, "Objects: %d removed (%d bytes)\n", plan.Objects, plan.Bytes)
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
		s, err := r.OpenStream(d, 0)
		if err != nil {
			return fmt.Errorf("stream %q: %w", name, err)
		}
		defer s.Close()
		return s.WriteTo(a.out, r)
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
