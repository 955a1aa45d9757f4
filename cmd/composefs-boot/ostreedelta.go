package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/delta"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

func (a *app) ostreeApplyDeltaCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "apply-delta PATH [NAME]",
		Short: "Make a commit of a static delta that is a file",
		Long: `Make a commit of a static delta, and its composefs images. PATH is a delta in one file, a superblock with its parts beside it, or the
directory that they are in. The commit gets the NAME, if one is given. The commit that the delta begins with must be here.

Every object is checked, and the commit or the delta must be signed by who is trusted: by a remote, or through --gpg-key. Without signatures
say --no-verify, which trusts whoever has made the file.`,
		Example: `  composefs-boot --repo r ostree apply-delta --gpg-key key.asc update.delta my-os/stable
  composefs-boot --repo r ostree apply-delta --remote my-os --bootable /media/usb/superblock`,
		Args: between(1, 2),
	}
	var f ostreePullFlags
	f.add(c)
	for _, name := range []string{"base-name", "depth"} { // a delta has its own base, and one commit
		c.Flags().MarkHidden(name)
	}
	trusted := c.Flags().String("remote", "", "trust whom the remote of this `NAME` trusts")
	keys := c.Flags().StringArray("gpg-key", nil, "trust the GPG keys in this `FILE`")
	noVerify := c.Flags().Bool("no-verify", false, "take what nobody whom we know has signed")
	c.RunE = func(c *cobra.Command, args []string) error {
		o, err := f.options(a)
		if err != nil {
			return err
		}
		var policy sign.Policy
		if !*noVerify {
			policy, err = a.trust(*trusted, *keys)
			if errors.Is(err, remote.ErrNoKeys) {
				err = fmt.Errorf("%s: %w: say --gpg-key FILE, --remote NAME, or --no-verify to trust whoever has made it", args[0], err)
			}
			if err != nil {
				return err
			}
		}
		d, err := delta.OpenOffline(args[0])
		if err != nil {
			return err
		}
		defer d.Close()
		origin := ostreeOrigin{Delta: d.Name.String()}
		if len(policy) > 0 {
			if origin.Signers, err = d.Signers(policy); err != nil {
				return fmt.Errorf("%s: commit %v: %w", args[0], d.To, err)
			}
		}
		return a.withRepo(func(r *repo.Repo) error { return a.applyDelta(c.Context(), r, d, args, origin, o) })
	}
	return c
}

// trust returns whom a remote trusts, or nobody but some keys.
func (a *app) trust(name string, keys []string) (sign.Policy, error) {
	store, err := a.remotes()
	if err != nil {
		return nil, err
	}
	config := remote.Anonymous("", keys)
	if name != "" {
		if config, err = store.Get(name); err != nil {
			return nil, err
		}
		config.TrustAlso(keys)
	}
	t, err := config.Trust(store.System())
	return t.Commits, err
}

func (a *app) applyDelta(ctx context.Context, r *repo.Repo, d *delta.Offline, args []string, origin ostreeOrigin, o ostree.PullOptions) error {
	o.Prefetch = d.Prefetch
	if _, err := ostree.Open(r, d.To.String()); err != nil && !d.From.IsZero() {
		if _, err := ostree.Open(r, d.From.String()); errors.Is(err, repo.ErrNotFound) {
			return fmt.Errorf("%s: commit %v, which the delta begins with, is not here: pull that first", args[0], d.From)
		}
		o.Base = append(o.Base, d.From.String())
	}
	list, err := a.bringCommits(ctx, r, d, args[0], []string{d.To.String()}, o)
	if err != nil {
		return err
	}
	if len(args) > 1 {
		if err := ostree.SetTag(ctx, r, d.To, args[1], a.lock()); err != nil {
			return err
		}
		list[0].Ref = args[1]
	}
	return a.printPulled(r, list, []ostreeOrigin{origin}, o)
}

func (a *app) ostreeStaticDeltaCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "static-delta",
		Short: "Make static deltas of an OSTree repository",
		Long: `Make static deltas of an OSTree repository, and look at them. A static delta makes one commit out of another, or out of nothing: who
updates fetches a few files instead of thousands of objects. Readers find those that are in the repository by its summary.`,
		Example: `  composefs-boot ostree static-delta generate ./repo my-os/stable
  composefs-boot ostree static-delta list ./repo`,
	}
	c.AddCommand(a.deltaGenerateCommand(), a.deltaListCommand(), a.deltaShowCommand(), a.deltaDeleteCommand())
	return c
}

// ostreeDeltaResult is a static delta as JSON has it, and static-delta generate and show print it.
type ostreeDeltaResult struct {
	Name      string            `json:"name"`
	From      *ostree.Checksum  `json:"from,omitempty"`
	To        ostree.Checksum   `json:"to"`
	Time      time.Time         `json:"time"`
	Signed    []string          `json:"signed"` // the schemes of the signatures
	Parts     []ostreeDeltaPart `json:"parts"`
	Fallbacks []string          `json:"fallbacks"`
	Size      uint64            `json:"size"`          // of all parts, in bytes
	Makes     uint64            `json:"makes"`         // size of what they make, without symbolic links
	Fallback  uint64            `json:"fallback_size"` // of what is to be fetched besides
}

type ostreeDeltaPart struct {
	Size       uint64           `json:"size"`
	Makes      uint64           `json:"makes"`
	Objects    int              `json:"objects"`
	Inline     bool             `json:"inline"`
	Operations delta.Operations `json:"operations"`
}

// deltaFlags are those of static-delta generate.
type deltaFlags struct {
	from                           string
	empty, inline, noDiff, ifNot   bool
	dry                            bool
	file                           string
	minFallback, maxDiff, maxChunk uint32
	keys                           []string
}

func (a *app) deltaGenerateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "generate REPOSITORY COMMIT",
		Short: "Make a static delta",
		Long: `Make a static delta that leads to a commit of the OSTree repository in a directory, in that or in a file. COMMIT is a ref or a checksum. It
begins with the commit before that one, unless --from or --empty says otherwise. The same commits give the same bytes; the delta's time is
SOURCE_DATE_EPOCH, or that of the commit.

Files that are similar to others are described by the changes; large ones that are not are left to be fetched by themselves, unless the
delta is for a file, whose readers cannot fetch anything. Deltas are signed with keys of ed25519 or spki.`,
		Example: `  composefs-boot ostree static-delta generate ./repo my-os/stable
  composefs-boot ostree static-delta generate --from my-os/stable^^ --sign-key ed25519=secret.key ./repo my-os/stable
  composefs-boot ostree static-delta generate --file update.delta ./repo my-os/stable`,
		Args: exactly(2),
	}
	var f deltaFlags
	flags := c.Flags()
	flags.StringVar(&f.from, "from", "", "begin with this `COMMIT`")
	flags.BoolVar(&f.empty, "empty", false, "begin with nothing")
	flags.BoolVar(&f.inline, "inline", false, "put everything into one file")
	flags.StringVar(&f.file, "file", "", "write the delta into this `FILE`, and not into the repository")
	flags.Uint32Var(&f.minFallback, "min-fallback-size", delta.DefaultMinFallback/1e6, "leave files of more than `N` MB to be fetched by themselves; 0 for none")
	flags.Uint32Var(&f.maxDiff, "max-bsdiff-size", delta.DefaultMaxDiff/1e6, "describe changes of files of up to `N` MB, old and new together")
	flags.Uint32Var(&f.maxChunk, "max-chunk-size", delta.DefaultMaxPart/1e6, "put up to `N` MB into a part, before compression")
	flags.BoolVar(&f.noDiff, "disable-bsdiff", false, "do not describe changes of files")
	flags.BoolVar(&f.ifNot, "if-not-exists", false, "do nothing if the repository has this delta")
	flags.StringArrayVar(&f.keys, "sign-key", nil, "sign with a secret key: ed25519=`FILE` or spki=FILE")
	flags.BoolVarP(&f.dry, "dry-run", "n", false, "only say what the delta would be")
	c.MarkFlagsMutuallyExclusive("from", "empty")
	c.RunE = func(c *cobra.Command, args []string) error {
		if c.Flags().Changed("file") {
			f.inline = true
			if !c.Flags().Changed("min-fallback-size") {
				f.minFallback = 0
			}
		}
		return a.withDeltas(args[0], func(l *ostree.Local, root *os.Root) error {
			return a.generateDelta(c.Context(), l, root, args[1], f)
		})
	}
	return c
}

// withDeltas opens an OSTree repository.
func (a *app) withDeltas(path string, f func(*ostree.Local, *os.Root) error) error {
	l, err := ostree.OpenLocal(path)
	if err != nil {
		return err
	}
	defer l.Close()
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	return f(l, root)
}

func (a *app) generateDelta(ctx context.Context, l *ostree.Local, root *os.Root, to string, f deltaFlags) error {
	o, err := f.options(ctx, l, to)
	if err != nil {
		return err
	}
	if f.ifNot && f.file == "" {
		names, err := delta.List(root)
		if err != nil || slices.Contains(names, o.Name) {
			return err
		}
	}
	switch {
	case f.dry:
		dir, err := os.MkdirTemp("", "static-delta-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		return a.writeDelta(ctx, l, o, filepath.Join(dir, "superblock"))
	case f.file != "":
		return a.writeDelta(ctx, l, o, f.file)
	}
	if err := delta.Save(ctx, root, l, o); err != nil {
		return fmt.Errorf("%s: %w", l.Path, err)
	}
	return a.showDelta(filepath.Join(l.Path, o.Path()))
}

// options returns what the flags say about a delta.
func (f *deltaFlags) options(ctx context.Context, l *ostree.Local, to string) (o delta.Options, err error) {
	o = delta.Options{MaxPart: int64(f.maxChunk) * 1e6, MinFallback: int64(f.minFallback) * 1e6, MaxDiff: int64(f.maxDiff) * 1e6, Inline: f.inline}
	if f.noDiff {
		o.MaxDiff = 0
	}
	if o.To, err = commitOf(ctx, l, to); err != nil {
		return o, err
	}
	b, err := l.Metadata(ctx, ostree.ObjectName{Checksum: o.To, Kind: ostree.KindCommit})
	if err != nil {
		return o, err
	}
	commit, err := ostree.ParseCommit(b)
	if err != nil {
		return o, err
	}
	switch {
	case f.from != "":
		o.From, err = commitOf(ctx, l, f.from)
	case f.empty:
	case commit.Parent.IsZero():
		err = usageError{fmt.Errorf("commit %v has none before it: say --empty, or --from COMMIT", o.To)}
	default:
		o.From = commit.Parent
		_, err = l.Metadata(ctx, ostree.ObjectName{Checksum: o.From, Kind: ostree.KindCommit})
		if errors.Is(err, ostree.ErrNotFound) {
			err = fmt.Errorf("%w: it came before %v: say --empty, or --from COMMIT", err, o.To)
		}
	}
	if err != nil {
		return o, err
	}
	when, err := sourceDate(commit.When())
	if err != nil {
		return o, err
	}
	o.Time = uint64(when.Unix())
	o.CommitMeta, err = l.Metadata(ctx, ostree.ObjectName{Checksum: o.To, Kind: ostree.KindCommitMeta})
	if err != nil && !errors.Is(err, ostree.ErrNotFound) {
		return o, err
	}
	o.Sign, err = f.signer()
	return o, err
}

// commitOf returns the commit that a ref or a checksum names.
func commitOf(ctx context.Context, l *ostree.Local, name string) (ostree.Checksum, error) {
	if ostree.IsChecksum(name) {
		return ostree.ParseChecksum(name)
	}
	c, err := l.Ref(ctx, name)
	if err != nil {
		return c, fmt.Errorf("%s: ref %q: %w", l.Path, name, err)
	}
	return c, nil
}

// signer returns what signs a superblock, nil if there are no keys.
func (f *deltaFlags) signer() (func([]byte) ([]byte, error), error) {
	var signers []sign.Signer
	for _, key := range f.keys {
		scheme, path, ok := strings.Cut(key, "=")
		if !ok {
			return nil, usageError{fmt.Errorf("--sign-key %s: want ed25519=FILE or spki=FILE", key)}
		}
		secret, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		s, err := sign.KeySigner(scheme, secret)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		signers = append(signers, s)
	}
	if len(signers) == 0 {
		return nil, nil
	}
	return func(superblock []byte) ([]byte, error) { return sign.Add(nil, superblock, signers...) }, nil
}

// writeDelta makes a delta of which the superblock has this path; it is there when it is complete.
func (a *app) writeDelta(ctx context.Context, l *ostree.Local, o delta.Options, path string) error {
	err := delta.Generate(ctx, l, o, func(name string, r io.Reader) error {
		to := filepath.Join(filepath.Dir(path), name)
		if name == "superblock" {
			to = path
		}
		f, err := os.CreateTemp(filepath.Dir(to), ".delta-")
		if err != nil {
			return err
		}
		defer os.Remove(f.Name())
		if _, err = io.Copy(f, r); err == nil {
			err = f.Chmod(0o644)
		}
		if err == nil {
			err = f.Sync()
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		return os.Rename(f.Name(), to)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", l.Path, err)
	}
	return a.showDelta(path)
}

// ostreeDeltasResult is what static-delta list prints as JSON.
type ostreeDeltasResult struct {
	Deltas []string `json:"deltas"`
}

func (a *app) deltaListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list REPOSITORY",
		Short:   "List the static deltas in an OSTree repository",
		Long:    "List the static deltas in the OSTree repository in a directory: TO, or FROM-TO, the checksums of the commits.",
		Example: "  composefs-boot ostree static-delta list ./repo",
		Args:    exactly(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return a.withDeltas(args[0], func(_ *ostree.Local, root *os.Root) error {
				names, err := delta.List(root)
				if err != nil {
					return err
				}
				result := ostreeDeltasResult{Deltas: []string{}}
				for _, name := range names {
					result.Deltas = append(result.Deltas, name.String())
					if !a.json {
						fmt.Fprintln(a.out, name)
					}
				}
				if a.json {
					return printJSON(a.out, result)
				}
				return nil
			})
		},
	}
}

func (a *app) deltaShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show PATH | REPOSITORY NAME",
		Short: "Show what is in a static delta",
		Long: `Show what is in a static delta: one in a file, or in the directory PATH, or the one in an OSTree repository that list shows by this NAME.
Its parts are read, and compared with their checksums.`,
		Example: `  composefs-boot ostree static-delta show update.delta
  composefs-boot ostree static-delta show --json ./repo FROM-TO`,
		Args: between(1, 2),
		RunE: func(_ *cobra.Command, args []string) error {
			path := args[0]
			if len(args) == 2 {
				name, err := delta.ParseName(args[1])
				if err != nil {
					return usageError{err}
				}
				path = filepath.Join(path, name.Path())
			}
			return a.showDelta(path)
		},
	}
}

func (a *app) showDelta(path string) error {
	d, err := delta.OpenOffline(path)
	if err != nil {
		return err
	}
	defer d.Close()
	result := ostreeDeltaResult{Name: d.Name.String(), To: d.To, Time: time.Unix(int64(d.Time), 0).UTC(), Signed: []string{},
		Parts: []ostreeDeltaPart{}, Fallbacks: []string{}}
	if !d.From.IsZero() {
		result.From = &d.From
	}
	if d.Signed != nil {
		s, err := sign.Parse(d.Signatures)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for scheme := range s {
			result.Signed = append(result.Signed, scheme)
		}
		slices.Sort(result.Signed)
	}
	for _, f := range d.Fallbacks {
		result.Fallbacks = append(result.Fallbacks, f.ObjectName.String())
		result.Fallback += f.Size
	}
	for i, p := range d.Parts {
		ops, err := d.Count(context.Background(), i, d.Part)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		result.Parts = append(result.Parts, ostreeDeltaPart{p.Size, p.Makes, len(p.Objects), p.Inline(), ops})
		result.Size += p.Size
		result.Makes += p.Makes
	}
	if a.json {
		return printJSON(a.out, result)
	}
	result.print(a.out)
	return nil
}

func (r *ostreeDeltaResult) print(w io.Writer) {
	fmt.Fprintf(w, "delta     %s\ntime      %s\n", r.Name, r.Time.Format(time.RFC3339))
	if len(r.Signed) > 0 {
		fmt.Fprintf(w, "signed    %s (not verified)\n", strings.Join(r.Signed, ", "))
	}
	for i, p := range r.Parts {
		where := ""
		if p.Inline {
			where = ", inline"
		}
		fmt.Fprintf(w, "part %-4d %d objects, %s out of %s%s; %d spliced, %d written, %d patched\n", i, p.Objects, cfsctlSize(int64(p.Makes)), cfsctlSize(int64(p.Size)),
			where, p.Operations.Splice, p.Operations.Open-p.Operations.Patch, p.Operations.Patch)
	}
	for _, f := range r.Fallbacks {
		fmt.Fprintf(w, "fallback  %s\n", f)
	}
	fmt.Fprintf(w, "size      %s, makes %s", cfsctlSize(int64(r.Size)), cfsctlSize(int64(r.Makes)))
	if len(r.Fallbacks) > 0 {
		fmt.Fprintf(w, "; %s to be fetched besides", cfsctlSize(int64(r.Fallback)))
	}
	fmt.Fprintln(w)
}

func (a *app) deltaDeleteCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "delete REPOSITORY NAME...",
		Short: "Delete static deltas of an OSTree repository",
		Long:  "Delete static deltas of the OSTree repository in a directory, by the names that list shows. Write its summary again after that.",
		Example: `  composefs-boot ostree static-delta delete ./repo FROM-TO
  composefs-boot ostree static-delta delete --dry-run ./repo FROM-TO`,
		Args: between(2, 1<<20),
	}
	dry := c.Flags().BoolP("dry-run", "n", false, "only say which would be deleted")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return a.withDeltas(args[0], func(_ *ostree.Local, root *os.Root) error { return a.deleteDeltas(root, args[1:], *dry) })
	}
	return c
}

func (a *app) deleteDeltas(root *os.Root, args []string, dry bool) error {
	there, err := delta.List(root)
	if err != nil {
		return err
	}
	var names []delta.Name
	for _, arg := range args {
		name, err := delta.ParseName(arg)
		if err != nil {
			return usageError{err}
		}
		if !slices.Contains(there, name) {
			return fmt.Errorf("%s: delta %s: %w", root.Name(), name, ostree.ErrNotFound)
		}
		names = append(names, name)
	}
	word := "Deleted"
	if dry {
		word = "Would delete"
	}
	result := ostreeDeltasResult{Deltas: []string{}}
	for _, name := range names {
		if !dry {
			if err := delta.Remove(root, name); err != nil {
				return err
			}
		}
		result.Deltas = append(result.Deltas, name.String())
		if !a.json {
			fmt.Fprintln(a.out, word, name)
		}
	}
	if a.json {
		return printJSON(a.out, result)
	}
	return nil
}
