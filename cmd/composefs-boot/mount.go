package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/boot/setuproot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/fuse"
)

type mountFlags struct {
	setuproot.MountOptions
	fuse string // "auto", "yes" or "no"
	dry  bool
}

func (a *app) mountCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "mount NAME MOUNTPOINT",
		Short: "Mount an image",
		Long: `Mount an image of the repository, by its digest or the name of a ref. In a repository that requires fs-verity, the image
and every file are verified.

The kernel mounts for root only. For others, and with --fuse yes, this program serves the image by FUSE until it is unmounted
or interrupted: read-only, and every file is verified when it is opened.`,
		Example: `  composefs-boot --repo r mount refs/my-os /mnt
  composefs-boot --repo r mount --fuse yes refs/my-os ~/my-os
  composefs-boot --repo r mount --upperdir up --workdir work --read-write DIGEST /mnt`,
		Args: exactly(2),
	}
	var o mountFlags
	o.add(c, a.name)
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := o.check(); err != nil {
			return err
		}
		return a.withRepo(func(r *repo.Repo) error { return a.mount(c.Context(), r, args[0], args[1], o) })
	}
	return c
}

func (o *mountFlags) add(c *cobra.Command, program string) {
	c.Flags().StringVar(&o.Upper, "upperdir", "", "`DIRECTORY` for what is changed")
	c.Flags().StringVar(&o.Work, "workdir", "", "`DIRECTORY` that the kernel works in, on the same file system")
	c.Flags().BoolVar(&o.Writable, "read-write", false, "make the mount writable (with --upperdir)")
	c.Flags().BoolVar(&o.dry, "dry-run", false, "print the steps and mount nothing")
	how := "auto"
	if program == "cfsctl" {
		how = "no"
	}
	c.Flags().StringVar(&o.fuse, "fuse", how, "serve the image by FUSE: yes, no, or auto, `WHEN` the kernel does not permit to mount")
}

func (o *mountFlags) check() error {
	if (o.Upper == "") != (o.Work == "") || o.Writable && o.Upper == "" {
		return usageError{errors.New("--upperdir and --workdir go together, and --read-write needs them")}
	}
	switch {
	case o.fuse != "auto" && o.fuse != "yes" && o.fuse != "no":
		return usageError{fmt.Errorf("--fuse %s: want auto, yes or no", o.fuse)}
	case o.fuse == "yes" && o.Upper != "":
		return usageError{errors.New("a mount by FUSE is read-only: leave --upperdir and --workdir out, or --fuse yes")}
	}
	return nil
}

func (a *app) mount(ctx context.Context, r *repo.Repo, name, target string, o mountFlags) error {
	image, d, err := r.OpenImage(name)
	if err != nil {
		return err
	}
	defer image.Close()
	if o.fuse != "yes" {
		err := a.mountByKernel(r, d, target, o)
		denied := errors.Is(err, setuproot.ErrNotPermitted) || errors.Is(err, unix.EPERM)
		if o.fuse == "no" || o.Upper != "" || !denied {
			return err
		}
	}
	if o.dry {
		fmt.Fprintf(a.out, "mount %s with FUSE\n", target)
		return nil
	}
	return a.mountByFUSE(ctx, r, image, d, target)
}

func (a *app) mountByKernel(r *repo.Repo, d fsverity.Digest, target string, o mountFlags) error {
	steps, err := setuproot.PlanMount(r.Path(), karg.Make(d, 1, !r.RequiresVerity()), target, o.MountOptions)
	if err != nil {
		return err
	}
	if o.dry {
		fmt.Fprint(a.out, setuproot.Format(steps))
		return nil
	}
	_, err = setuproot.Execute(steps)
	return err
}

// mountByFUSE serves an image, which has been verified, until it is unmounted or the context ends.
func (a *app) mountByFUSE(ctx context.Context, r *repo.Repo, image *os.File, d fsverity.Digest, target string) error {
	info, err := image.Stat()
	if err != nil {
		return err
	}
	tree, _, err := erofs.Read(image, info.Size())
	if err != nil {
		return fmt.Errorf("image %v: %w", d, err)
	}
	m, err := fuse.Image{Tree: tree, Open: r.OpenObject, Source: "composefs:" + d.String(), Errors: a.err}.Mount(target)
	if err != nil {
		return err
	}
	if !a.quiet {
		fmt.Fprintf(a.err, "mounted at %s (FUSE): unmount with fusermount3 -u %s or interrupt\n", target, target)
	}
	done := make(chan struct{})
	go func() {
		m.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	signal.Reset(os.Interrupt, unix.SIGTERM) // the next one ends the program at once
	inUse, err := m.Unmount()
	if err != nil {
		return err
	}
	if inUse {
		fmt.Fprintf(a.err, "%s is in use: it is unmounted, and served until nobody uses it; interrupt again to end now\n", target)
	}
	<-done
	return nil
}
