package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// app is what all commands share: where they read and print, and the global flags.
type app struct {
	name     string // composefs-boot or cfsctl
	in       io.Reader
	out, err io.Writer

	repo          string
	user, system  bool
	hash          string
	format        string
	requireVerity bool
	noUpgrade     bool
	noRepo        bool
	json          bool
	quiet         bool
	lockTimeout   time.Duration
}

const userRepository = ".var/lib/composefs"
const systemRepository = "/sysroot/composefs"

func newRoot(name string, in io.Reader, out, errOut io.Writer) *cobra.Command {
	a := &app{name: name, in: in, out: out, err: errOut}
	root := &cobra.Command{
		Use:   name,
		Short: "Make, keep, check and install verified operating system images",
		Long: `composefs-boot turns an operating system into a composefs image whose digest stands on the kernel command line,
and makes machines that boot from it only while every byte is right.

Where cfsctl (composefs-rs) has a command, this program has the same one, with the same flags and the same output; it also
answers to the name cfsctl. For the C tools there are mkcomposefs, composefs-info and mount.composefs, as commands and as names,
and ukify for systemd's.`,
		Example: `  composefs-boot install ./tree --disk disk.img        a bootable disk from a directory, without root
  composefs-boot --no-repo compute-karg ./tree         the kernel argument that names the image
  composefs-boot --repo r init && composefs-boot --repo r create-image --bootable ./tree my-os
  composefs-boot --repo r fsck`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see %s --help)", err, c.CommandPath())}
	})
	f := root.PersistentFlags()
	f.StringVar(&a.repo, "repo", "", "the repository at `PATH`")
	f.BoolVar(&a.user, "user", false, "the repository of the user, $HOME/"+userRepository)
	f.BoolVar(&a.system, "system", false, "the repository of the system, "+systemRepository)
	f.StringVar(&a.hash, "hash", "", "digest `ALGORITHM`: sha256 or sha512 [default: that of the repository, or sha512]")
	f.StringVar(&a.format, "erofs-version", "", "image `FORMAT`: 0, 1 or 2 [default: that of the repository, or 1]")
	f.BoolVar(&a.requireVerity, "require-verity", false, "an error if the repository does not require fs-verity")
	f.BoolVar(&a.noUpgrade, "no-upgrade", false, "an error for a repository without meta.json, which is written otherwise")
	f.BoolVar(&a.noRepo, "no-repo", false, "use no repository, for commands that need none")
	f.BoolVar(&a.json, "json", false, "print the result as JSON")
	f.BoolVarP(&a.quiet, "quiet", "q", false, "print no progress")
	f.DurationVar(&a.lockTimeout, "lock-timeout", 0, "give up waiting for other users of the repository after this `TIME` [default: never]")
	root.MarkFlagsMutuallyExclusive("repo", "user", "system", "no-repo")
	root.AddCommand(a.imageCommands()...)
	root.AddCommand(a.repositoryCommands()...)
	root.AddCommand(a.mountCommand(), a.diffCommand(), a.lsCommand(), a.extractCommand(), a.exportCommand(), a.installCommand())
	root.AddCommand(a.initrdCommand(), a.ukiCommand(), a.keysCommand(), a.chainCommand(), a.manCommand(root))
	root.AddCommand(a.ociCommand(), a.ostreeCommand())
	root.AddCommand(a.upgradeCommand(), a.switchCommand(), a.rollbackCommand(), a.statusCommand(), a.pruneCommand())
	root.AddCommand(a.pinCommands()...)
	root.AddCommand(a.mkcomposefsCommand(), a.infoCommand(), a.mountComposefsCommand(), a.ukifyCommand())
	return root
}

// exactly and between check the number of arguments, as an error of the command line.
func exactly(n int) cobra.PositionalArgs { return between(n, n) }

func between(least, most int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := cobra.RangeArgs(least, most)(c, args); err != nil {
			return usageError{fmt.Errorf("%w (usage: %s)", err, c.UseLine())}
		}
		return nil
	}
}

// path returns where the repository is.
func (a *app) path() (string, error) {
	switch {
	case a.noRepo:
		return "", usageError{errors.New("this command needs a repository: leave --no-repo out")}
	case a.repo != "":
		return a.repo, nil
	case a.user || !a.system && os.Geteuid() != 0:
		home, err := os.UserHomeDir()
		return filepath.Join(home, userRepository), err
	}
	return systemRepository, nil
}

func (a *app) open() (*repo.Repo, error) {
	path, err := a.path()
	if err != nil {
		return nil, err
	}
	return repo.Open(path, repo.Options{RequireVerity: a.requireVerity, Upgrade: !a.noUpgrade})
}

// checkHash tells whether a repository has the digests that --hash says, for commands that use its objects.
func (a *app) checkHash(r *repo.Repo) error {
	if a.hash == "" {
		return nil
	}
	alg, err := fsverity.ParseAlgorithm(a.hash)
	if err != nil {
		return usageError{err}
	}
	if alg != r.Algorithm() {
		return fmt.Errorf("%s: the repository has %v digests, not %v: leave --hash out", r.Path(), r.Algorithm(), alg)
	}
	return nil
}

// withRepo calls f with the open repository.
func (a *app) withRepo(f func(*repo.Repo) error) error {
	r, err := a.open()
	if err != nil {
		return err
	}
	defer r.Close()
	if err := a.checkHash(r); err != nil {
		return err
	}
	return f(r)
}

// algorithm and erofsFormat are what the flags say, or what the repository says, if r is not nil, or the default.
func (a *app) algorithm(r *repo.Repo) (fsverity.Algorithm, error) {
	switch {
	case a.hash != "":
		return fsverity.ParseAlgorithm(a.hash)
	case r != nil:
		return r.Algorithm(), nil
	}
	return fsverity.SHA512, nil
}

func (a *app) erofsFormat(r *repo.Repo) (erofs.Format, error) {
	switch {
	case a.format != "":
		return erofs.ParseFormat(a.format)
	case r != nil:
		return r.Format(), nil
	}
	return erofs.V1, nil
}

func (a *app) lock() repo.LockOptions {
	return repo.LockOptions{Timeout: a.lockTimeout, Waiting: func(holder string) {
		if !a.quiet {
			fmt.Fprintf(a.err, "waiting for %s, which is using the repository\n", holder)
		}
	}}
}

func (a *app) manCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:     "man DIRECTORY",
		Short:   "Write the manual pages",
		Example: "  composefs-boot man /usr/local/share/man/man8",
		Args:    exactly(1),
		RunE: func(c *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root.DisableAutoGenTag = true
			// A date would make every build another one.
			epoch := time.Unix(0, 0).UTC()
			return doc.GenManTree(root, &doc.GenManHeader{Section: "8", Source: "composefs-boot " + version, Date: &epoch}, args[0])
		},
	}
}
