package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// mkcomposefs is a run of the command of that name.
type mkcomposefs struct {
	source, image string // image is "" with --print-digest-only

	store                          string
	fromFile, hardlinks            bool
	printDigest, digestOnly        bool
	epoch, skipDevices, skipXattrs bool
	userXattrs, versionSet         bool
	least, most                    int // format versions
	threads                        int
}

func (a *app) mkcomposefsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "mkcomposefs",
		Short: "Make an image of a directory or dumpfile, as the program mkcomposefs does",
		Long: `Make a composefs image of the directory SOURCE and write it to IMAGE, "-" for standard output. It has the bytes that
mkcomposefs 1.0.8 writes. Every name is a file of its own, and every extended attribute is kept.

  --digest-store=PATH  store the contents of files of more than 64 bytes in this directory, by their sha256 fs-verity
                       digest; give it to mount.composefs as basedir=
  --print-digest       print the fs-verity digest of the image
  --print-digest-only  print it and write no image; IMAGE is left out
  --use-epoch          make all mtimes zero
  --skip-devices       leave device nodes out
  --skip-xattrs        leave extended attributes out
  --user-xattrs        keep user.* attributes only
  --hardlinks          keep hard links as such
  --from-file          SOURCE is a dumpfile, "-" for standard input; the options above but those that print do nothing
  --min-version=N      the format version, 0 or 1 [default: 0]
  --max-version=N      the format version for trees with whiteouts [default: 1, or that of --min-version]
  --threads=N          how many files are read at the same time [default: one for each processor]

With CFS_PARSE_STRICT in the environment, a dumpfile must be exactly as a program would write it.`,
		Example: `  mkcomposefs --digest-store=objects --print-digest ./tree tree.cfs
  mkcomposefs --print-digest-only ./tree
  composefs-info dump tree.cfs | mkcomposefs --from-file - copy.cfs`,
	}
	return a.dropIn(c, "mkcomposefs [OPTION]... SOURCE IMAGE", func(c *cobra.Command, args []string, common []option) error {
		m, err := parseMkcomposefs(args, common)
		if err != nil {
			return err
		}
		return a.mkcomposefs(c.Context(), m)
	})
}

func parseMkcomposefs(args []string, common []option) (mkcomposefs, error) {
	var m mkcomposefs
	number := func(what string, v *int) func(string) error {
		return func(s string) (err error) {
			if *v, err = strconv.Atoi(strings.TrimLeft(s, " \t")); err != nil {
				return fmt.Errorf("%s %q: not a number", what, s)
			}
			m.versionSet = m.versionSet || v != &m.threads
			return nil
		}
	}
	operands, err := getopt(args, append(common,
		option{"digest-store", true, func(s string) error { m.store = s; return nil }},
		flag("print-digest", &m.printDigest),
		flag("print-digest-only", &m.digestOnly),
		flag("use-epoch", &m.epoch),
		flag("skip-devices", &m.skipDevices),
		flag("skip-xattrs", &m.skipXattrs),
		flag("user-xattrs", &m.userXattrs),
		flag("hardlinks", &m.hardlinks),
		flag("from-file", &m.fromFile),
		option{"min-version", true, number("--min-version", &m.least)},
		option{"max-version", true, number("--max-version", &m.most)},
		option{"threads", true, func(s string) error {
			if err := number("--threads", &m.threads)(s); err != nil {
				return err
			}
			if m.threads <= 0 {
				return fmt.Errorf("--threads %s: want 1 or more", s)
			}
			return nil
		}},
	))
	if err != nil {
		return m, err
	}
	if !m.versionSet {
		m.most = 1
	}
	m.most = max(m.most, m.least)
	switch {
	case m.least < 0 || m.most > 1:
		err = fmt.Errorf("format versions %d to %d: there are 0 and 1", m.least, m.most)
	case len(operands) == 0 || operands[0] == "":
		err = errors.New("no SOURCE: give a directory, or a dumpfile with --from-file")
	case len(operands) > 2:
		err = fmt.Errorf("%q: one operand too many after SOURCE and IMAGE", operands[2])
	case m.digestOnly && len(operands) == 2:
		err = fmt.Errorf("%q: with --print-digest-only there is no IMAGE: leave one of them out", operands[1])
	case !m.digestOnly && (len(operands) == 1 || operands[1] == ""):
		err = errors.New("no IMAGE: give the path of the image, or --print-digest-only")
	case m.skipXattrs && m.userXattrs && !m.fromFile:
		err = errors.New("--skip-xattrs and --user-xattrs: leave one of them out")
	}
	if err != nil {
		return m, err
	}
	m.source = operands[0]
	if !m.digestOnly {
		m.image = operands[1]
	}
	m.printDigest = m.printDigest || m.digestOnly
	return m, nil
}

func (a *app) mkcomposefs(ctx context.Context, m mkcomposefs) error {
	if m.image == "-" && isTerminal(a.out) {
		return errors.New("the image would go to the terminal: redirect standard output, or give a path")
	}
	var tree *fstree.Tree
	var err error
	if m.fromFile {
		tree, err = a.readDump(m.source)
	} else {
		tree, err = m.scan(ctx)
	}
	if err == nil {
		err = checkTree(tree)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", m.source, err)
	}
	format := erofs.Format(m.least)
	if m.most > m.least && hasWhiteout(tree) {
		format = erofs.Format(m.most)
	}
	// The old image stays as it is until there is a tree to make the new one of.
	d := fsverity.NewDigester(fsverity.SHA256)
	to := []io.Writer{}
	if m.printDigest {
		to = append(to, d)
	}
	switch m.image {
	case "":
	case "-":
		to = append(to, a.out)
	default:
		f, err := os.Create(m.image)
		if err != nil {
			return err
		}
		defer f.Close()
		to = append(to, f)
	}
	if err := erofs.Write(io.MultiWriter(to...), tree, format); err != nil {
		return fmt.Errorf("%s: %w", cmp.Or(m.image, m.source), err)
	}
	if m.printDigest {
		_, err = fmt.Fprintln(a.out, d.Sum())
	}
	return err
}

// readDump reads a dumpfile, or standard input.
func (a *app) readDump(path string) (*fstree.Tree, error) {
	in := a.in
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, errors.Unwrap(err)
		}
		defer f.Close()
		in = f
	}
	_, strict := os.LookupEnv("CFS_PARSE_STRICT")
	return dumpfile.ReadWith(in, dumpfile.Options{Strict: strict, Homes: true})
}

// scan reads the directory and fills the store.
func (m *mkcomposefs) scan(ctx context.Context) (*fstree.Tree, error) {
	if info, err := os.Lstat(m.source); err != nil {
		return nil, errors.Unwrap(err)
	} else if !info.IsDir() {
		return nil, errors.New("not a directory (for a symbolic link to one, add a slash; for a dumpfile, --from-file)")
	}
	sink := scan.Digests(fsverity.SHA256)
	var store *repo.Import
	if m.store != "" {
		var err error
		if store, err = repo.BeginStore(m.store); err != nil {
			return nil, err
		}
		defer store.Abort()
		sink = store
	}
	o := scan.Options{Xattrs: fstree.XattrsAll, NoXattrs: m.skipXattrs, Mounts: true, Workers: m.threads}
	if m.userXattrs {
		o.Xattrs = fstree.XattrsKeepUser
	}
	tree, err := scan.Dir(ctx, m.source, sink, o)
	if err != nil {
		return nil, errors.Unwrap(err) // the path of the source is said by the caller
	}
	m.change(tree)
	if store != nil {
		err = store.Commit()
	}
	return tree, err
}

// change makes the tree what the options ask for.
func (m *mkcomposefs) change(tree *fstree.Tree) {
	tree.Walk(func(_ string, i *fstree.Inode) error {
		if m.epoch {
			i.Mtime = fstree.Time{}
		}
		if m.userXattrs {
			i.RemoveXattr("security.capability")
		}
		dir := i.Dir()
		if dir == nil {
			return nil
		}
		kept := dir.Entries[:0]
		for _, e := range dir.Entries {
			if _, device := e.Inode.Content.(fstree.Device); device && m.skipDevices {
				continue
			}
			if !m.hardlinks && e.Inode.Dir() == nil {
				single := *e.Inode
				e.Inode = &single
			}
			kept = append(kept, e)
		}
		dir.Entries = kept
		return nil
	})
	tree.CountLinks()
}

func hasWhiteout(tree *fstree.Tree) bool {
	found := errors.New("found")
	return tree.Walk(func(_ string, i *fstree.Inode) error {
		if d, ok := i.Content.(fstree.Device); ok && !d.Block && d.Rdev == 0 {
			return found
		}
		return nil
	}) == found
}

// maxXattrs is how many bytes the attributes of a file may take for mkcomposefs: half of what fits in an inode.
const maxXattrs = 65535 / 2

// checkTree refuses trees that mkcomposefs refuses, though they could be images.
func checkTree(tree *fstree.Tree) error {
	return tree.Walk(func(path string, i *fstree.Inode) error {
		size := 12
		for _, x := range i.Xattrs {
			size += 7 + len(x.Name) + len(x.Value)
		}
		if len(i.Xattrs) > 0 && size > maxXattrs {
			return fmt.Errorf("%s: %d bytes of extended attributes, at most %d fit", path, size, maxXattrs)
		}
		if o, ok := i.Content.(*fstree.Object); ok && o.Digest.Algorithm() == fsverity.SHA512 {
			return fmt.Errorf("%s: a sha512 digest, and mkcomposefs knows sha256 alone (composefs-boot dump-to-image knows both)", path)
		}
		return nil
	})
}
