package main

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// ostreeImagesResult is what ostree images prints as JSON.
type ostreeImagesResult struct {
	Commits []ostreeImage `json:"commits"`
	Partial []string      `json:"partial"` // pulls of these have not come to an end
}

type ostreeImage struct {
	Name    string        `json:"name"`
	Commit  string        `json:"commit"`
	Version string        `json:"version,omitempty"`
	Time    string        `json:"time,omitempty"`
	Images  []linkedImage `json:"images"`
}

func (a *app) ostreeImagesCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "images",
		Short:   "List the commits that have names",
		Long:    "List the commits that have names. With --json, their versions, times and composefs images come along.",
		Example: "  composefs-boot --repo r ostree images --json",
		Args:    exactly(0),
		RunE: func(*cobra.Command, []string) error {
			return a.withRepo(func(r *repo.Repo) error {
				tags, err := ostree.Tags(r)
				if err != nil {
					return err
				}
				if a.json {
					return a.ostreeImagesJSON(r, tags)
				}
				var rows [][]string
				for _, t := range tags {
					rows = append(rows, []string{fstree.Printable(t.Name), t.Commit.String()})
				}
				if len(rows) == 0 {
					fmt.Fprintln(a.out, "No ostree commits found")
					return nil
				}
				printTable(a.out, []string{"NAME", "COMMIT"}, rows)
				return nil
			})
		},
	}
}

func (a *app) ostreeImagesJSON(r *repo.Repo, tags []ostree.Ref) error {
	result := ostreeImagesResult{Commits: []ostreeImage{}, Partial: []string{}}
	for _, t := range tags {
		e := ostreeImage{Name: t.Name, Commit: t.Commit.String(), Images: []linkedImage{}}
		s, err := ostree.Open(r, e.Commit)
		if err == nil {
			e.Images = commitImages(s)
			var c *ostree.Commit
			if c, err = s.Commit(r); err == nil {
				e.Version, e.Time = c.Text("version"), c.When().Format(commitTime)
			}
		}
		if err != nil {
			fmt.Fprintf(a.err, "%s: %v\n", t.Name, err)
		}
		result.Commits = append(result.Commits, e)
	}
	partial, err := ostree.Partial(r)
	if err != nil {
		return err
	}
	for _, c := range partial {
		result.Partial = append(result.Partial, c.String())
	}
	return printJSON(a.out, result)
}

// ostreeInspectResult is what ostree inspect prints as JSON.
type ostreeInspectResult struct {
	Commit   string            `json:"commit"`
	Parent   string            `json:"parent,omitempty"`
	Time     string            `json:"time"`
	Tree     string            `json:"tree"`
	DirMeta  string            `json:"dirmeta"`
	Subject  string            `json:"subject"`
	Body     string            `json:"body"`
	Metadata map[string]string `json:"metadata"`
	Detached []string          `json:"detached_metadata,omitempty"` // its keys
	Objects  int               `json:"objects"`
	Verity   string            `json:"verity"` // of the stream
	Images   []linkedImage     `json:"images"`
}

const commitTime = "2006-01-02 15:04:05 UTC"

func (a *app) ostreeInspectCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "inspect COMMIT",
		Short: "Print a commit",
		Long: `Print a commit: its parent, time, tree, subject and body. With --metadata, its metadata alone: strings, numbers and lists as they are,
bytes in hexadecimal, and values of other types as <TYPE:BYTES>.`,
		Example: `  composefs-boot --repo r ostree inspect my-os/stable
  composefs-boot --repo r ostree inspect --metadata 2828e5bb`,
		Args: exactly(1),
	}
	metadata := c.Flags().Bool("metadata", false, "print the metadata alone, KEY=VALUE")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			s, err := ostree.Open(r, args[0])
			if err != nil {
				return err
			}
			return a.inspectCommit(r, s, *metadata)
		})
	}
	return c
}

func (a *app) inspectCommit(r *repo.Repo, s *ostree.Stored, metadata bool) error {
	objects, err := s.Objects(r)
	if err != nil {
		return err
	}
	c, err := s.Commit(r)
	if err != nil {
		return err
	}
	keys, values, err := metadataTexts(c.Metadata)
	if err != nil {
		return fmt.Errorf("commit %v: metadata: %w", s.Checksum, err)
	}
	parent := ""
	if !c.Parent.IsZero() {
		parent = c.Parent.String()
	}
	switch {
	case a.json:
		result := ostreeInspectResult{s.Checksum.String(), parent, c.When().Format(commitTime), c.RootTree.String(), c.RootMeta.String(),
			c.Subject, c.Body, map[string]string{}, nil, objects.Len(), s.Stream().String(), commitImages(s)}
		for k, key := range keys {
			result.Metadata[key] = values[k]
		}
		if result.Detached, err = detachedKeys(r, s); err != nil {
			return err
		}
		return printJSON(a.out, result)
	case metadata:
		for k, key := range keys {
			fmt.Fprintf(a.out, "%s=%s\n", fstree.Printable(key), fstree.Printable(values[k]))
		}
		return nil
	}
	fmt.Fprintf(a.out, "commit  %v\n", s.Checksum)
	if parent != "" {
		fmt.Fprintf(a.out, "parent  %s\n", parent)
	}
	fmt.Fprintf(a.out, "date    %s\ntree    %v\ndirmeta %v\n", c.When().Format(commitTime), c.RootTree, c.RootMeta)
	for _, text := range []string{c.Subject, c.Body} {
		if text != "" {
			fmt.Fprintf(a.out, "\n%s\n", printableLines(text))
		}
	}
	return nil
}

// printableLines is fstree.Printable for a text of several lines.
func printableLines(text string) string {
	lines := strings.Split(text, "\n")
	for k, line := range lines {
		lines[k] = fstree.Printable(line)
	}
	return strings.Join(lines, "\n")
}

// metadataTexts returns the keys of an a{sv} in their order, and the values as texts.
func metadataTexts(v gvariant.Value) (keys, values []string, err error) {
	n, err := v.Len()
	for i := 0; i < n && err == nil; i++ {
		var key, text string
		var value gvariant.Value
		if key, value, err = v.Entry(i); err == nil {
			text, err = metadataText(value)
		}
		keys, values = append(keys, key), append(values, text)
	}
	return keys, values, err
}

// metadataText is a value as cfsctl prints it.
func metadataText(v gvariant.Value) (string, error) {
	switch v.Type() {
	case "s":
		return v.String()
	case "b":
		b, err := v.Bool()
		return strconv.FormatBool(b), err
	case "u":
		n, err := v.Uint32()
		return strconv.FormatUint(uint64(n), 10), err
	case "t":
		n, err := v.Uint64()
		return strconv.FormatUint(n, 10), err
	case "ay":
		return hex.EncodeToString(v.Bytes()), nil
	case "as":
		n, err := v.Len()
		list := make([]string, n)
		for i := 0; i < n && err == nil; i++ {
			var e gvariant.Value
			if e, err = v.At(i); err == nil {
				list[i], err = e.String()
			}
		}
		return "[" + strings.Join(list, ", ") + "]", err
	}
	return fmt.Sprintf("<%s:%x>", v.Type(), v.Bytes()), nil
}

// detachedKeys returns the keys of the detached metadata of a commit.
func detachedKeys(r *repo.Repo, s *ostree.Stored) (keys []string, err error) {
	b, err := s.Detached(r)
	if b == nil || err != nil {
		return nil, err
	}
	v, err := gvariant.New("a{sv}", b)
	if err == nil {
		keys, _, err = metadataTexts(v)
	}
	if err != nil {
		return nil, fmt.Errorf("commit %v: detached metadata: %w", s.Checksum, err)
	}
	return keys, nil
}

// ostreeTree makes the tree of a commit: as it is, or bootable.
func (a *app) ostreeTree(r *repo.Repo, name string, bootable bool) (*fstree.Tree, error) {
	s, err := ostree.Open(r, name)
	if err != nil {
		return nil, err
	}
	o, err := s.Objects(r)
	if err != nil {
		return nil, err
	}
	if bootable {
		tree, err := ostree.BootTree(o, r, boot.Transform)
		if err != nil {
			return nil, fmt.Errorf("commit %s: %w", name, err)
		}
		return tree, nil
	}
	return o.Tree(ostree.CfsctlNames)
}

const bootableCommit = "make it bootable: /usr/etc as /etc, SELinux labels, empty /boot and /sysroot"

func (a *app) ostreeDumpCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "dump COMMIT",
		Short: "Print the file tree of a commit as a composefs dumpfile",
		Long: `Print the file tree of a commit as a composefs dumpfile. As in the plain image, and as composefs-rs 0.9 has it, there is a NUL at the end
of the names of extended attributes; not with --bootable.`,
		Example: "  composefs-boot --repo r ostree dump my-os/stable",
		Args:    exactly(1),
	}
	bootable := c.Flags().Bool("bootable", false, bootableCommit)
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			tree, err := a.ostreeTree(r, args[0], *bootable)
			if err != nil {
				return err
			}
			return dumpfile.Write(a.out, tree, dumpfile.Cfsctl)
		})
	}
	return c
}

func (a *app) ostreeComputeIDCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "compute-id COMMIT",
		Short:   "Print the digest of a commit's composefs image",
		Long:    "Print the digest of a commit's composefs image, which is computed from its objects; nothing is stored.",
		Example: "  composefs-boot --repo r --erofs-version 2 ostree compute-id --bootable my-os/stable",
		Args:    exactly(1),
	}
	bootable := c.Flags().Bool("bootable", false, bootableCommit)
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			return a.printDigest(r, func() (*fstree.Tree, error) { return a.ostreeTree(r, args[0], *bootable) })
		})
	}
	return c
}

// ostreeLogResult is what ostree log prints as JSON: the newest first.
type ostreeLogResult struct {
	Log  []ostreeLogEntry `json:"log"`
	More bool             `json:"more"` // there is a commit before them, which is not here
}

type ostreeLogEntry struct {
	Commit  string `json:"commit"`
	Parent  string `json:"parent,omitempty"`
	Time    string `json:"time"`
	Version string `json:"version,omitempty"`
	Subject string `json:"subject"`
	Body    string `json:"body"`
}

func (a *app) ostreeLogCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "log COMMIT",
		Short:   "Print a commit and those before it",
		Long:    "Print a commit and those before it, the newest first, as far as they are in the repository: see pull-local --depth.",
		Example: "  composefs-boot --repo r ostree log my-os/stable",
		Args:    exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.withRepo(func(r *repo.Repo) error {
				s, err := ostree.Open(r, args[0])
				if err != nil {
					return err
				}
				list, more, err := s.History(r)
				if err != nil {
					return err
				}
				result := ostreeLogResult{[]ostreeLogEntry{}, more}
				for k, e := range list {
					entry := ostreeLogEntry{e.Checksum.String(), "", e.When().Format(commitTime), e.Text("version"), e.Subject, e.Body}
					if !e.Parent.IsZero() {
						entry.Parent = e.Parent.String()
					}
					result.Log = append(result.Log, entry)
					if !a.json {
						a.printLogEntry(entry, k > 0)
					}
				}
				if a.json {
					return printJSON(a.out, result)
				}
				if more {
					fmt.Fprintf(a.out, "\nThe commit before that is not here: pull with --depth\n")
				}
				return nil
			})
		},
	}
}

func (a *app) printLogEntry(e ostreeLogEntry, another bool) {
	if another {
		fmt.Fprintln(a.out)
	}
	fmt.Fprintf(a.out, "commit  %s\ndate    %s\n", e.Commit, e.Time)
	if e.Version != "" {
		fmt.Fprintf(a.out, "version %s\n", fstree.Printable(e.Version))
	}
	for _, text := range []string{e.Subject, e.Body} {
		if text != "" {
			fmt.Fprintf(a.out, "\n    %s\n", strings.ReplaceAll(printableLines(text), "\n", "\n    "))
		}
	}
}

func (a *app) ostreeDiffCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "diff COMMIT COMMIT",
		Short: "Compare the file trees of two commits",
		Long:  "Compare the file trees of two commits as diff does, with a line for each path that differs. The exit code is 1 if they differ.",
		Example: `  composefs-boot --repo r ostree diff 6b4bf01e my-os/stable
  composefs-boot --repo r ostree diff --stat my-os/stable my-os/testing`,
		Args: exactly(2),
	}
	bootable := c.Flags().Bool("bootable", false, bootableCommit)
	stat := c.Flags().Bool("stat", false, "print numbers alone")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error {
			sides := make([]*side, 2)
			for k, name := range args {
				sides[k] = &side{name: name}
				var err error
				if sides[k].tree, err = a.ostreeTree(r, name, *bootable); err != nil {
					return err
				}
			}
			return a.diff(sides[0], sides[1], *stat, nil)
		})
	}
	return c
}
