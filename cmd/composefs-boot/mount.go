package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/boot/setuproot"
	"github.com/composefs-boot/composefs-boot/repo"
)

func (a *app) mountCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "mount NAME MOUNTPOINT",
		Short: "Mount an image",
		Long: `Mount an image of the repository, by its digest or the name of a ref. In a repository that requires fs-verity, the image
and every file are verified. Needs root.`,
		Example: `  composefs-boot --repo r mount refs/my-os /mnt
  composefs-boot --repo r mount --upperdir up --workdir work --read-write DIGEST /mnt`,
		Args: exactly(2),
	}
	var o setuproot.MountOptions
	c.Flags().StringVar(&o.Upper, "upperdir", "", "`DIRECTORY` for what is changed")
	c.Flags().StringVar(&o.Work, "workdir", "", "`DIRECTORY` that the kernel works in, on the same file system")
	c.Flags().BoolVar(&o.Writable, "read-write", false, "make the mount writable (with --upperdir)")
	dry := c.Flags().Bool("dry-run", false, "print the steps and mount nothing")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if (o.Upper == "") != (o.Work == "") || o.Writable && o.Upper == "" {
			return usageError{errors.New("--upperdir and --workdir go together, and --read-write needs them")}
		}
		return a.withRepo(func(r *repo.Repo) error {
			f, d, err := r.OpenImage(args[0])
			if err != nil {
				return err
			}
			f.Close()
			steps, err := setuproot.PlanMount(r.Path(), karg.Make(d, 1, !r.RequiresVerity()), args[1], o)
			if err != nil {
				return err
			}
			if *dry {
				fmt.Fprint(a.out, setuproot.Format(steps))
				return nil
			}
			_, err = setuproot.Execute(steps)
			return err
		})
	}
	return c
}
