package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// signFlags say who signs.
type signFlags struct {
	keys       []string
	gpgKey     string
	passphrase string
}

func (f *signFlags) add(c *cobra.Command) {
	c.Flags().StringArrayVar(&f.keys, "sign-key", nil, "sign with the secret key in a file: gpg=`FILE`, ed25519=FILE or spki=FILE")
	c.Flags().StringVar(&f.gpgKey, "gpg-key-id", "", "which key of the GPG files: the end of its fingerprint")
	c.Flags().StringVar(&f.passphrase, "passphrase-file", "", "`FILE` with the passphrase of the GPG keys")
}

const signNames = `A secret key for --sign-key is gpg=FILE, as gpg --export-secret-keys writes it; ed25519=FILE, 64 bytes in base64; or spki=FILE, a PEM block
PRIVATE KEY, as openssl genpkey writes it.`

func (f *signFlags) signers() (list []sign.Signer, err error) {
	var passphrase []byte
	if f.passphrase != "" {
		if passphrase, err = os.ReadFile(f.passphrase); err != nil {
			return nil, err
		}
		passphrase = []byte(strings.TrimRight(string(passphrase), "\r\n"))
	}
	for _, k := range f.keys {
		scheme, path, ok := strings.Cut(k, "=")
		if !ok || !slices.Contains([]string{"gpg", "ed25519", "spki"}, scheme) {
			return nil, usageError{fmt.Errorf("--sign-key %q: want gpg=FILE, ed25519=FILE or spki=FILE", k)}
		}
		one, err := readSigner(scheme, path, f.gpgKey, passphrase)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list = append(list, one)
	}
	return list, nil
}

func readSigner(scheme, path, id string, passphrase []byte) (sign.Signer, error) {
	if scheme != "gpg" {
		secret, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		return sign.KeySigner(scheme, secret)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return sign.GPGSigner(f, id, passphrase)
}

// ostreeCommitFlags say what a commit is made of, and what it says.
type ostreeCommitFlags struct {
	branch, subject, body, bodyFile, parent, timestamp, collection string
	orphan, noBindings, bootable, dry                              bool
	strings, variants, detached, binds                             []string
	uid, gid                                                       int64
	modes, skips, policy                                           string
	ownPolicy, ifChanged                                           bool
	changes                                                        ostree.Changes
	image                                                          sourceFlags
	sign                                                           signFlags
}

func (f *ostreeCommitFlags) add(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVarP(&f.branch, "branch", "b", "", "`REF` that the commit is made for, and by which it is known here")
	flags.BoolVar(&f.orphan, "orphan", false, "make a commit without a ref: garbage collection removes it, unless it is tagged")
	flags.StringVarP(&f.subject, "subject", "s", "", "one line about it")
	flags.StringVarP(&f.body, "body", "m", "", "more about it")
	flags.StringVarP(&f.bodyFile, "body-file", "F", "", "`FILE` with more about it")
	flags.StringVar(&f.parent, "parent", "", "`COMMIT` that came before, here or elsewhere, or none [default: the one that the branch leads to here]")
	flags.StringVar(&f.timestamp, "timestamp", "", "`TIME` of the commit, @SECONDS since 1970 or 2006-01-02T15:04:05Z [default: SOURCE_DATE_EPOCH, or now]")
	flags.StringArrayVar(&f.strings, "add-metadata-string", nil, "add a string to the metadata, `KEY=VALUE`")
	flags.StringArrayVar(&f.variants, "add-metadata", nil, "add a value of any type to the metadata, `KEY=VALUE`, as GVariant text: \"uint32 5\", \"['a', 'b']\"")
	flags.StringArrayVar(&f.detached, "add-detached-metadata-string", nil, "add a string to what is beside the commit, `KEY=VALUE`")
	flags.StringArrayVar(&f.binds, "bind-ref", nil, "say that it is meant for this `REF`, too")
	flags.BoolVar(&f.noBindings, "no-bindings", false, "do not say which refs it is meant for")
	flags.StringVar(&f.collection, "collection-id", "", "say that it is meant for this collection")
	flags.BoolVar(&f.bootable, "bootable", false, "say which kernel it has, and make the image to boot, too")
	flags.Int64Var(&f.uid, "owner-uid", -1, "owner of all files, a `UID`")
	flags.Int64Var(&f.gid, "owner-gid", -1, "group of all files, a `GID`")
	flags.BoolVar(&f.changes.Canonical, "canonical-permissions", false, "files of root, modes of 0755 at most, no extended attributes: for bare-user-only")
	flags.BoolVar(&f.changes.NoXattrs, "no-xattrs", false, "no extended attributes")
	flags.BoolVar(&f.changes.ROExecutables, "mode-ro-executables", false, "take the permission to write away from executables")
	flags.BoolVar(&f.changes.SkipSpecial, "skip-special", false, "leave out devices, pipes and sockets, which OSTree cannot hold")
	flags.StringVar(&f.modes, "statoverride", "", "`FILE` with other permissions: lines of +NUMBER or =NUMBER, decimal, a space and a path")
	flags.StringVar(&f.skips, "skip-list", "", "`FILE` with paths to leave out, one in each line")
	flags.StringVar(&f.policy, "selinux-policy", "", "label files by the SELinux policy of the system in the directory `PATH`, which may be /")
	flags.BoolVarP(&f.ownPolicy, "selinux-policy-from-base", "P", false, "label files by the SELinux policy in the tree itself")
	flags.BoolVar(&f.ifChanged, "skip-if-unchanged", false, "make no commit if the parent has the same tree, and print that one's checksum")
	flags.BoolVarP(&f.dry, "dry-run", "n", false, "print the checksum that the commit would have, and keep nothing")
	f.image.add(c)
	f.sign.add(c)
}

// describe returns what the commit says, but for its parent.
func (f *ostreeCommitFlags) describe() (d ostree.Description, err error) {
	d = ostree.Description{Subject: f.subject, Body: f.body, Collection: f.collection, Bootable: f.bootable}
	if (f.branch == "") != f.orphan {
		return d, usageError{errors.New("want --branch REF, or --orphan")}
	}
	if f.bodyFile != "" {
		text, err := os.ReadFile(f.bodyFile)
		if err != nil {
			return d, err
		}
		d.Body = string(text)
	}
	now, err := f.time()
	if err != nil {
		return d, err
	}
	d.Time = uint64(now.Unix())
	if d.Metadata, err = metadataStrings(f.strings); err != nil {
		return d, err
	}
	for _, text := range f.variants {
		key, value, ok := strings.Cut(text, "=")
		if !ok {
			return d, usageError{fmt.Errorf("--add-metadata %q: want KEY=VALUE", text)}
		}
		v, err := gvariant.ParseText(value)
		if err != nil {
			return d, usageError{fmt.Errorf("--add-metadata %s: %w", key, err)}
		}
		d.Metadata = append(d.Metadata, ostree.MetadataEntry{Key: key, Value: v})
	}
	if !f.noBindings {
		d.Refs = []string{}
		if f.branch != "" {
			d.Refs = append(d.Refs, f.branch)
		}
		d.Refs = append(d.Refs, f.binds...)
		for _, ref := range d.Refs {
			if err := summary.CheckRef(ref); err != nil {
				return d, usageError{err}
			}
		}
	}
	for n, to := range map[*int64]**uint32{&f.uid: &f.changes.Owner, &f.gid: &f.changes.Group} {
		if *n < -1 || *n > 1<<32-2 {
			return d, usageError{fmt.Errorf("owner %d: want a number below 4294967295", *n)}
		}
		if *n >= 0 {
			*to = new(uint32(*n))
		}
	}
	if err := f.changes.Check(); err != nil {
		return d, usageError{err}
	}
	return d, f.readOverrides()
}

// readOverrides reads the files that say what becomes of single files.
func (f *ostreeCommitFlags) readOverrides() error {
	for path, read := range map[string]func(string) error{f.modes: f.changes.ReadModes, f.skips: f.changes.ReadSkips} {
		if path == "" {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := read(string(text)); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

func (f *ostreeCommitFlags) time() (time.Time, error) {
	if f.timestamp == "" {
		return sourceDate(time.Now())
	}
	if seconds, ok := strings.CutPrefix(f.timestamp, "@"); ok {
		if n, err := strconv.ParseUint(seconds, 10, 40); err == nil {
			return time.Unix(int64(n), 0), nil
		}
	} else if t, err := time.Parse(time.RFC3339, f.timestamp); err == nil && t.Unix() >= 0 {
		return t, nil
	}
	return time.Time{}, usageError{fmt.Errorf("--timestamp %q: want @SECONDS since 1970, or 2006-01-02T15:04:05Z", f.timestamp)}
}

// metadataStrings reads KEY=VALUE.
func metadataStrings(list []string) (entries []ostree.MetadataEntry, err error) {
	for _, text := range list {
		key, value, ok := strings.Cut(text, "=")
		if !ok {
			return nil, usageError{fmt.Errorf("metadata %q: want KEY=VALUE", text)}
		}
		v, err := gvariant.Encode("s", value)
		if err != nil {
			return nil, usageError{err}
		}
		entries = append(entries, ostree.MetadataEntry{Key: key, Value: v})
	}
	return entries, nil
}

// ostreeCommitResult is what ostree commit prints as JSON.
type ostreeCommitResult struct {
	Commit  string        `json:"commit"`
	Parent  string        `json:"parent,omitempty"`
	Ref     string        `json:"ref,omitempty"`
	Objects int           `json:"objects"`
	Left    int           `json:"left_out"`          // with --skip-special
	Skipped bool          `json:"skipped,omitempty"` // with --skip-if-unchanged: the commit is the parent
	Image   string        `json:"image,omitempty"`
	Images  []linkedImage `json:"images,omitempty"`
	Karg    string        `json:"karg,omitempty"` // of the image to boot
}

func (a *app) ostreeCommitCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "commit SOURCE",
		Short: "Make an OSTree commit from a directory, an image or a dumpfile",
		Long: `Make an OSTree commit, keep it in the repository with its composefs images, and print its checksum. SOURCE is a directory; an OCI image
(docker://..., oci:...); an OSTree commit, here by its ref or checksum or elsewhere as ostree:PATH:REF; an image of the repository by its
ref or digest; or an image or dumpfile as a file, whose contents are in the repository.

The commit is the one that ostree commit makes of the same tree with the same options, of the same checksum. What OSTree cannot hold is
lost: times, and extended attributes without a value. Devices, pipes and sockets are refused. Options change the tree in this order: owners,
--mode-ro-executables, --statoverride and --skip-list, --canonical-permissions and --no-xattrs, SELinux labels. ostree export writes the
commit into an OSTree repository.

` + signNames,
		Example: `  composefs-boot --repo r ostree commit -b my-os/stable -s "Release 2" --bootable --add-metadata-string version=2 ./tree
  composefs-boot --repo r ostree commit -b my-os/stable --sign-key gpg=secret.gpg docker://registry.example/os:2
  composefs-boot --repo r ostree commit --orphan --parent none --timestamp @0 --dry-run ./tree`,
		Args: exactly(1),
	}
	var f ostreeCommitFlags
	f.add(c)
	c.MarkFlagsMutuallyExclusive("branch", "orphan")
	c.MarkFlagsMutuallyExclusive("body", "body-file")
	c.MarkFlagsMutuallyExclusive("selinux-policy", "selinux-policy-from-base")
	c.RunE = func(c *cobra.Command, args []string) error {
		return a.withRepo(func(r *repo.Repo) error { return a.ostreeCommit(c.Context(), r, args[0], f) })
	}
	return c
}

func (a *app) ostreeCommit(ctx context.Context, r *repo.Repo, name string, f ostreeCommitFlags) error {
	d, err := f.describe()
	if err != nil {
		return err
	}
	signers, err := f.sign.signers()
	if err != nil {
		return err
	}
	if d.Parent, err = commitParent(r, f.parent, f.branch); err != nil {
		return err
	}
	i, err := r.Begin(ctx, a.lock())
	if err != nil {
		return err
	}
	defer i.Abort()
	source := commitSource{a: a, repo: r, sink: i, store: r}
	if f.dry {
		source.sink, source.store = scan.Digests(r.Algorithm()), nil
	}
	defer source.close()
	if err := source.read(ctx, name, f.image); err != nil {
		return err
	}
	result := ostreeCommitResult{Ref: f.branch}
	if result.Left, err = f.changes.Apply(source.tree); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if f.policy != "" || f.ownPolicy {
		if err := labelCommit(ctx, source, f.policy); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if !d.Parent.IsZero() {
		result.Parent = d.Parent.String()
	}
	objects, err := ostree.Compose(ctx, source.tree, source.open, source.sink, r.Algorithm(), d)
	if errors.Is(err, ostree.ErrSpecial) {
		err = fmt.Errorf("%w (--skip-special leaves out others)", err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	result.Commit, result.Objects = objects.Commit.String(), objects.Len()
	if f.ifChanged && !d.Parent.IsZero() {
		if result.Skipped, err = sameTree(r, objects, d.Parent); err != nil {
			return err
		}
	}
	if result.Skipped {
		result.Commit = result.Parent
	} else if !f.dry {
		if err := a.storeCommit(ctx, r, i, objects, f, signers, &result); err != nil {
			return err
		}
	}
	if a.json {
		return printJSON(a.out, result)
	}
	fmt.Fprintln(a.out, result.Commit)
	return nil
}

// sameTree reports whether a commit has the tree of its parent, which is here.
func sameTree(r *repo.Repo, objects *ostree.Objects, parent ostree.Checksum) (bool, error) {
	s, err := ostree.Open(r, parent.String())
	if err != nil {
		return false, fmt.Errorf("--skip-if-unchanged: %w", err)
	}
	before, err := s.Commit(r)
	if err != nil {
		return false, err
	}
	data, err := objects.Metadata(ostree.ObjectName{Checksum: objects.Commit, Kind: ostree.KindCommit})
	if err != nil {
		return false, err
	}
	now, err := ostree.ParseCommit(data)
	return err == nil && now.RootTree == before.RootTree && now.RootMeta == before.RootMeta, err
}

// storeCommit keeps a commit.
func (a *app) storeCommit(ctx context.Context, r *repo.Repo, i *repo.Import, objects *ostree.Objects, f ostreeCommitFlags, signers []sign.Signer,
	result *ostreeCommitResult) error {
	o := ostree.StoreOptions{Tag: f.branch}
	format, err := a.erofsFormat(r)
	if err != nil {
		return usageError{err}
	}
	if a.format != "" {
		o.Formats = []erofs.Format{format}
	}
	if f.bootable {
		o.Transform = boot.Transform
	}
	if o.Detached, err = f.detachedMetadata(objects, signers); err != nil {
		return err
	}
	s, err := ostree.Store(ctx, r, i, objects, o)
	if err == nil {
		err = i.Commit()
	}
	if err != nil {
		return err
	}
	image, _ := s.Find(false, format)
	result.Image, result.Images = image.String(), commitImages(s)
	if bootable, ok := s.Find(true, format); ok && f.bootable {
		result.Karg = argument(bootable, format)
	}
	return nil
}

// detachedMetadata makes what is beside the commit: strings, and signatures. It is nil if there are none.
func (f *ostreeCommitFlags) detachedMetadata(objects *ostree.Objects, signers []sign.Signer) (detached []byte, err error) {
	entries, err := metadataStrings(f.detached)
	if err != nil {
		return nil, err
	}
	if len(entries) > 0 {
		list := gvariant.List{}
		for _, e := range entries {
			list = append(list, gvariant.Tuple{e.Key, e.Value})
		}
		v, err := gvariant.Encode("a{sv}", list)
		if err != nil {
			return nil, err
		}
		detached = v.Bytes()
	}
	if len(signers) == 0 {
		return detached, nil
	}
	data, err := objects.Metadata(ostree.ObjectName{Checksum: objects.Commit, Kind: ostree.KindCommit})
	if err != nil {
		return nil, err
	}
	return sign.Add(detached, data, signers...)
}

// commitParent returns the parent of a new commit: the one that is named, or the one that its branch leads to.
func commitParent(r *repo.Repo, name, branch string) (ostree.Checksum, error) {
	switch {
	case name == "none":
		return ostree.Checksum{}, nil
	case ostree.IsChecksum(name):
		return ostree.ParseChecksum(name)
	case name != "":
		return ostree.Resolve(r, name)
	case branch == "":
		return ostree.Checksum{}, nil
	}
	tags, err := ostree.Tags(r)
	for _, t := range tags {
		if t.Name == branch {
			return t.Commit, err
		}
	}
	return ostree.Checksum{}, err
}

// asIs are the flags of a tree that nothing is changed in.
var asIs = treeFlags{asIs: true, xattrs: fstree.XattrsAll.String(), noCache: true}

// commitSource is the tree that a commit is made of.
type commitSource struct {
	a     *app
	repo  *repo.Repo
	sink  fstree.Sink // takes the contents of a directory
	store *repo.Repo  // takes OCI images and commits from elsewhere; nil: a temporary one
	tree  *fstree.Tree
	open  fstree.Open
	end   func()
}

func (s *commitSource) close() {
	if s.end != nil {
		s.end()
	}
}

func (s *commitSource) read(ctx context.Context, name string, f sourceFlags) error {
	if transport.Is(name) || isCommit(name) {
		source, err := s.a.openTree(ctx, name, s.store, s.repo.Algorithm(), f, "")
		if err != nil {
			return err
		}
		s.end, s.open = source.end, source.open()
		s.tree, err = source.read(ctx, s.sink, nil, asIs)
		return err
	}
	side := &side{name: name}
	err := s.a.readSide(side)
	switch {
	case side.dir:
		s.open = scan.Files(name)
		s.tree, err = s.a.read(ctx, name, s.sink, nil, asIs)
		return err
	case errors.Is(err, repo.ErrNotFound):
		var commit *ostree.Stored
		if commit, err = ostree.Open(s.repo, name); err != nil {
			if errors.Is(err, repo.ErrNotFound) {
				err = fmt.Errorf("%s: neither a file or directory, nor an image or commit of the repository", name)
			}
			return err
		}
		objects, err := commit.Objects(s.repo)
		if err != nil {
			return err
		}
		side.tree, err = objects.Tree(ostree.RightNames)
		if err != nil {
			return err
		}
	case err != nil:
		return err
	}
	s.tree, s.open = side.tree, ostree.Files(s.repo)
	return sameAlgorithm(name, s.tree, s.repo.Algorithm())
}

// sameAlgorithm tells that the contents of a tree cannot be in the repository.
func sameAlgorithm(name string, tree *fstree.Tree, want fsverity.Algorithm) error {
	for _, a := range tree.Algorithms() {
		if a != want {
			return fmt.Errorf("%s: its contents are named by %v, those of the repository by %v", name, a, want)
		}
	}
	return nil
}
