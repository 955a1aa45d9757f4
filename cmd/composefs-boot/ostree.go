package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

func (a *app) ostreeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "ostree",
		Short: "Pull OSTree commits into the repository, look at them, publish them",
		Long: `Pull OSTree commits into the repository, look at them, make others and publish them. A commit is named by the ref by which it was
pulled, or another name that it was given; or by its checksum, or as many digits of it as no other commit begins with. A ^ behind it means
the commit before.`,
		Example: `  composefs-boot --repo r ostree pull-local --bootable /ostree/repo my-os/stable
  composefs-boot --repo r ostree images`,
	}
	c.AddCommand(a.ostreePullLocalCommand(), a.ostreeMountCommand(), a.ostreeDumpCommand(), a.ostreeComputeIDCommand(),
		a.ostreeInspectCommand(), a.ostreeTagCommand(), a.ostreeUntagCommand(), a.ostreeRemoveCommand(), a.ostreeImagesCommand(),
		a.ostreeFsckCommand(), a.ostreeDiffCommand(), a.ostreeLogCommand(), a.ostreeListRefsCommand(), a.ostreeRemotePullCommand(),
		a.ostreeRemoteCommand(), a.ostreeApplyDeltaCommand(), a.ostreeStaticDeltaCommand(), a.ostreeCommitCommand(),
		a.ostreeSignCommand(), a.ostreeExportCommand(), a.ostreeSummaryCommand())
	return c
}

// ostreePullResult is what ostree pull and pull-local print as JSON.
type ostreePullResult struct {
	Commits []ostreePulled `json:"commits"`
}

type ostreePulled struct {
	Commit  string            `json:"commit"`
	Verity  string            `json:"verity"` // of the stream
	Image   string            `json:"image"`
	Ref     string            `json:"ref,omitempty"`
	Stats   ostree.PullStats  `json:"stats"`
	Parents []ostree.Checksum `json:"parents,omitempty"` // with --depth
	Images  []linkedImage     `json:"images"`
	Karg    string            `json:"karg,omitempty"` // of the image to boot
	*ostreeOrigin
}

// ostreePullFlags are those of all commands that bring commits.
type ostreePullFlags struct {
	bases    []string
	depth    int
	bootable bool
}

func (f *ostreePullFlags) add(c *cobra.Command) {
	c.Flags().StringArrayVar(&f.bases, "base-name", nil, "`NAME` of a commit here whose objects are not fetched, besides the parent and the ref's last one")
	c.Flags().IntVar(&f.depth, "depth", 0, "bring this `NUMBER` of commits that came before, too; -1 for all")
	c.Flags().BoolVar(&f.bootable, "bootable", false, "make an image to boot, too: /usr/etc as /etc, SELinux labels, empty /boot and /sysroot")
}

// options returns what these flags, and the global ones, say.
func (f *ostreePullFlags) options(a *app) (ostree.PullOptions, error) {
	o := ostree.PullOptions{Base: f.bases, Depth: f.depth, Lock: a.lock(), Progress: &ostree.Progress{}}
	if f.depth < -1 {
		return o, usageError{fmt.Errorf("--depth %d: want a number of commits, or -1 for all", f.depth)}
	}
	if a.format != "" {
		format, err := erofs.ParseFormat(a.format)
		if err != nil {
			return o, usageError{err}
		}
		o.Formats = []erofs.Format{format}
	}
	if f.bootable {
		o.Transform = boot.Transform
	}
	return o, nil
}

func (a *app) ostreePullLocalCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pull-local PATH REF...",
		Short: "Pull commits from an OSTree repository on this machine",
		Long: `Pull commits from the OSTree repository in the directory PATH, of any mode, and make their composefs images. REF is a ref, REMOTE:REF,
or the checksum of a commit; with ^ behind a ref, the commit before that one. A ref becomes the name of the commit here, when everything
is durable.

Every object is checked. What the repository has of other commits, the parent and the last one of the ref, is not read again, and a pull
that was interrupted goes on where it was.`,
		Example: `  composefs-boot --repo r ostree pull-local /ostree/repo my-os/stable
  composefs-boot --repo r ostree pull-local --bootable --depth 2 ./repo my-os/stable my-os/testing`,
		Args: between(2, 1<<20),
	}
	var f ostreePullFlags
	f.add(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		o, err := f.options(a)
		if err != nil {
			return err
		}
		return a.withRepo(func(r *repo.Repo) error {
			source, err := ostree.OpenLocal(args[0])
			if err != nil {
				return err
			}
			defer source.Close()
			return a.ostreePull(c.Context(), r, source, args[0], args[1:], o)
		})
	}
	return c
}

// ostreePull brings commits from a source of this name, and prints what has come.
func (a *app) ostreePull(ctx context.Context, r *repo.Repo, source ostree.Source, from string, refs []string, o ostree.PullOptions) error {
	list, err := a.bringCommits(ctx, r, source, from, refs, o)
	if err != nil {
		return err
	}
	return a.printPulled(r, list, nil, o)
}

// printPulled prints what has come, and of what comes from a web server, more about it.
func (a *app) printPulled(r *repo.Repo, list []ostree.Pulled, more []ostreeOrigin, o ostree.PullOptions) error {
	format := r.Format()
	if len(o.Formats) > 0 {
		format = o.Formats[0]
	}
	result := ostreePullResult{}
	for k, p := range list {
		image, _ := p.Find(false, format)
		one := ostreePulled{Commit: p.Checksum.String(), Verity: p.Stream().String(), Image: image.String(), Ref: p.Ref, Stats: p.Stats,
			Parents: p.Parents, Images: commitImages(p.Stored)}
		bootable, hasBoot := p.Find(true, format)
		hasBoot = hasBoot && o.Transform != nil
		if hasBoot {
			one.Karg = argument(bootable, format)
		}
		if more != nil {
			one.ostreeOrigin = &more[k]
		}
		result.Commits = append(result.Commits, one)
		if a.json {
			continue
		}
		fmt.Fprintf(a.out, "commit  %s\nverity  %s\nimage   %s\n", one.Commit, one.Verity, one.Image)
		if p.Ref != "" {
			fmt.Fprintf(a.out, "tagged  %s\n", p.Ref)
		}
		if more != nil {
			more[k].print(a)
		}
		fmt.Fprintf(a.out, "objects %d metadata + %d files fetched\n", p.Stats.Metadata, p.Stats.Files)
		if len(p.Parents) > 0 {
			fmt.Fprintf(a.out, "parents %d\n", len(p.Parents))
		}
		if hasBoot {
			fmt.Fprintf(a.out, "Boot image: %v\n", bootable)
		}
	}
	if a.json {
		return printJSON(a.out, result)
	}
	return nil
}

// bringCommits is ostree.Pull with progress on the terminal.
func (a *app) bringCommits(ctx context.Context, r *repo.Repo, source ostree.Source, from string, refs []string, o ostree.PullOptions) ([]ostree.Pulled, error) {
	p := a.startProgress(func() progressEvent {
		return progressEvent{What: fmt.Sprintf("pulling from %s, %d objects to come,", from, o.Progress.Pending.Load()),
			Files: o.Progress.Files.Load(), Bytes: o.Progress.Bytes.Load()}
	})
	defer p.end()
	list, err := ostree.Pull(ctx, r, source, refs, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from, err)
	}
	return list, nil
}

// commitImages returns the composefs images of a commit as JSON has them.
func commitImages(s *ostree.Stored) []linkedImage {
	list := []linkedImage{}
	for _, l := range s.Linked {
		e := linkedImage{ID: l.Digest.String(), Bootable: l.Bootable, Version: 1}
		if l.Format == erofs.V2 {
			e.Version = 2
		}
		list = append(list, e)
	}
	return list
}

func (a *app) ostreeMountCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "mount COMMIT MOUNTPOINT",
		Short: "Mount the composefs image of a commit",
		Long:  "Mount the composefs image of a commit. See composefs-boot mount for how it is mounted and verified.",
		Example: `  composefs-boot --repo r ostree mount my-os/stable /mnt
  composefs-boot --repo r ostree mount --bootable --fuse yes my-os/stable ~/my-os`,
		Args: exactly(2),
	}
	var o mountFlags
	o.add(c, a.name)
	c.Flags().Bool("foreground", false, "")
	c.Flags().MarkHidden("foreground") // that of cfsctl: this program always stays
	bootable := c.Flags().Bool("bootable", false, "mount the image to boot")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := o.check(); err != nil {
			return err
		}
		return a.withRepo(func(r *repo.Repo) error {
			s, err := ostree.Open(r, args[0])
			if err != nil {
				return err
			}
			format, err := a.erofsFormat(r)
			if err != nil {
				return usageError{err}
			}
			d, ok := s.Find(*bootable, format)
			if !ok && !*bootable && a.format == "" {
				d, ok = s.Image()
			}
			if !ok {
				return fmt.Errorf("commit %s has no composefs image of this kind: pull it again%s", args[0], map[bool]string{true: " with --bootable"}[*bootable])
			}
			return a.mount(c.Context(), r, d.String(), args[1], o)
		})
	}
	return c
}

// ostreeListRefsResult is what ostree list-refs prints as JSON.
type ostreeListRefsResult struct {
	Refs []ostreeRef `json:"refs"`
}

type ostreeRef struct {
	Name   string `json:"name"`
	Commit string `json:"commit"`
}

func (a *app) listLocalRefs(path string) error {
	source, err := ostree.OpenLocal(path)
	if err != nil {
		return err
	}
	defer source.Close()
	refs, err := source.Refs()
	if err != nil {
		return err
	}
	return a.printRefs(refs)
}

// printRefs prints refs that are elsewhere.
func (a *app) printRefs(refs []ostree.Ref) error {
	result := ostreeListRefsResult{Refs: []ostreeRef{}}
	for _, r := range refs {
		result.Refs = append(result.Refs, ostreeRef{r.Name, r.Commit.String()})
		if !a.json {
			fmt.Fprintf(a.out, "%v %s\n", r.Commit, r.Name)
		}
	}
	if a.json {
		return printJSON(a.out, result)
	}
	return nil
}
