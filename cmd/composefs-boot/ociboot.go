package main

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// ociBootFlags are those of oci prepare-boot.
type ociBootFlags struct {
	dir       string
	id        string
	arguments []string
	dry       bool
	install   installFlags // what readSystem needs to know
}

func (a *app) ociPrepareBootCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "prepare-boot IMAGE [VERITY]",
		Short: "Make an image of the repository bootable on this machine",
		Long: `Make the composefs image to boot of an image of the repository, write its kernel and boot entry, or its unified kernel image, to the
boot partition, and its state beside the repository, below state/deploy. The boot loader is left as it is. The space is planned
before the first byte, and files of others stay.

IMAGE is a tag, or the digest of a config or manifest with "@" before it; VERITY is the digest that the stream of the config is to
have. How the initramfs finds the physical root belongs to --cmdline.`,
		Example: `  composefs-boot --system oci prepare-boot --bootdir /boot --cmdline root=UUID=... --cmdline rw my-os
  composefs-boot --system oci prepare-boot --entry-id my-os-2 --dry-run my-os`,
		Args: between(1, 2),
	}
	var f ociBootFlags
	flags := c.Flags()
	flags.StringVar(&f.dir, "bootdir", "/boot", "the mounted boot partition `DIR`")
	flags.StringVar(&f.id, "entry-id", "", "the name of the boot entry, `ID` [default: composefs- and the digest]")
	flags.StringArrayVar(&f.arguments, "cmdline", nil, "a kernel argument to add, `TEXT`")
	flags.BoolVarP(&f.dry, "dry-run", "n", false, "print what would be written, and write nothing to the boot partition")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error { return a.ociPrepareBoot(c.Context(), r, args, f) })
	}
	return c
}

func (a *app) ociPrepareBoot(ctx context.Context, r *repo.Repo, args []string, f ociBootFlags) error {
	i, err := r.Begin(ctx, a.lock())
	if err != nil {
		return err
	}
	defer i.Abort()
	image, err := openOCI(ctx, r, args)
	if err != nil {
		return err
	}
	s, err := a.putSystem(ctx, &treeSource{a: a, name: args[0], image: image, repo: r}, r, i, f.install)
	if err != nil {
		return err
	}
	scratch := &boot.Scratch{}
	defer scratch.Close()
	d := boot.Deployment{ID: f.id, NoLoader: true, Arguments: f.arguments, Insecure: !r.RequiresVerity(), Arch: runtime.GOARCH,
		Scratch: scratch, Manifest: string(image.Digest)}
	if transport.Is(args[0]) {
		d.Image = args[0] // the tag that oci pull gives without another name
	}
	plan, err := boot.PlanInstall(s, d)
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	esp, err := plan.PlanESP(f.dir)
	if err != nil {
		return err
	}
	result := newInstallResult(s, plan, installFlags{dry: f.dry}).withESP(esp)
	if f.dry {
		return a.printInstall(result)
	}
	root, err := filepath.Abs(filepath.Join(r.Path(), ".."))
	if err != nil {
		return err
	}
	release, err := boot.Lock(root)
	if err != nil {
		return err
	}
	defer release()
	if err := i.Commit(); err != nil {
		return err
	}
	if err := plan.WriteState(root, objectsOf(r)); err != nil {
		return err
	}
	if err := esp.Execute(); err != nil {
		return err
	}
	return a.printInstall(result)
}
