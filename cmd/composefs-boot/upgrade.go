package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

// upgradeFlags are those of upgrade and switch.
type upgradeFlags struct {
	host       hostFlags
	check, dry bool
	noPrune    bool
	keep       *uint
	arguments  []string
	image      sourceFlags
	uki        installUKI
}

// upgradeResult is what upgrade and switch print as JSON.
type upgradeResult struct {
	DryRun   bool           `json:"dry_run"`
	Image    string         `json:"image"`
	Manifest string         `json:"manifest,omitempty"`
	Commit   *commitUpgrade `json:"commit,omitempty"`
	Booted   string         `json:"booted"`             // digest of the system that goes on until the reboot
	Same     bool           `json:"up_to_date"`         // the next boot has this manifest or commit already: nothing was done
	Download *oci.Download  `json:"download,omitempty"` // that was to be made
	Pulled   *oci.PullStats `json:"pulled,omitempty"`   // that was made
	Install  *installResult `json:"install,omitempty"`  // of the new system
	Renames  []boot.Rename  `json:"renames,omitempty"`  // of boot entries
	Pruned   *pruneResult   `json:"pruned,omitempty"`   // old systems that were removed

	Loader *boot.LoaderUpdate `json:"loader,omitempty"`
}

func (a *app) upgradeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "upgrade",
		Short: "Install the newest version of this machine's image",
		Long: `Pull the image or OSTree commit that the booted system was installed from again, and install it beside that system: the next boot
has it, with the kernel arguments of the booted one. Only layers are downloaded that are not there, or objects, or a delta. If the image
has not changed, or the ref leads to the same commit, nothing is done.

Commits are verified by the keys of the remote, which the install has left in the repository of the system (composefs-boot --system ostree
remote list). With --gpg-key, more keys count, also for upgrades to come. A commit that is older than the last one is refused: switch
takes it.

The machine keeps its state: /var is the same for both systems, and /etc of the new one gets the changes that were made to /etc so far,
file by file. The booted system stays and can be chosen from the menu; composefs-boot rollback returns to it. Whatever fails on the
way, and whenever the power does, the system boots that booted before.

Before anything is written, systems are removed that are older than the one that runs, as composefs-boot prune does, with the space that
this frees; --keep N has more of them stay, and composefs-boot pin one of them. If the new system brings a newer systemd-boot than the EFI
system partition has, it takes the place of that; if that is signed, the new one must be, too, by the flags or by the same signer. Other
boot loaders, and newer ones, are left as they are.

A unified kernel image is installed if the image brings one, or made, if the booted system has one, with the flags of install: with an
initramfs made here, if the booted one has such.`,
		Example: `  composefs-boot upgrade && systemctl reboot
  composefs-boot upgrade --check            # what would be downloaded
  composefs-boot upgrade --dry-run          # what would be written; what is downloaded for that stays for the upgrade`,
		Args: exactly(0),
	}
	f := a.addUpgrade(c)
	c.RunE = func(c *cobra.Command, _ []string) error { return a.upgrade(c.Context(), "", *f) }
	return c
}

func (a *app) switchCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "switch SOURCE",
		Short: "Install another image on this machine",
		Long: `Install another image beside the booted system, as upgrade does; from then on, upgrades are of that image. SOURCE may be a directory,
too: then there is nothing to upgrade from.

` + imageNames + "\n\n" + commitNames,
		Example: `  composefs-boot switch docker://registry.example/os:2
  composefs-boot switch ostree:my-os:my-os/testing
  composefs-boot switch --check docker://registry.example/os:2`,
		Args: exactly(1),
	}
	f := a.addUpgrade(c)
	c.RunE = func(c *cobra.Command, args []string) error { return a.upgrade(c.Context(), args[0], *f) }
	return c
}

func (a *app) addUpgrade(c *cobra.Command) *upgradeFlags {
	f := &upgradeFlags{}
	f.host.add(c)
	flags := c.Flags()
	flags.BoolVar(&f.check, "check", false, "only say what would be downloaded, and change nothing")
	flags.BoolVarP(&f.dry, "dry-run", "n", false, "print the plan, and change nothing but what is downloaded to the repository")
	flags.StringArrayVar(&f.arguments, "karg", nil, "a kernel argument to add, `TEXT`")
	f.keep = addKeep(c)
	flags.BoolVar(&f.noPrune, "no-prune", false, "remove no old systems")
	f.uki.addTo(flags)
	f.image.add(c)
	return f
}

// upgrade installs a source, or if it is "", the image that the booted system comes from.
func (a *app) upgrade(ctx context.Context, source string, f upgradeFlags) error {
	if err := f.uki.check(); err != nil {
		return err
	}
	keys, err := f.uki.openKeys()
	defer keys.close()
	if err != nil {
		return err
	}
	h, err := f.host.change(f.check || f.dry)
	if err != nil {
		return err
	}
	defer h.end()
	booted, err := h.booted()
	if err != nil {
		return err
	}
	again := source == ""
	var commit commitName
	switch {
	case again && booted.Origin.Image == "" && booted.Origin.Refspec != "":
		commit, err = rememberedCommit(booted.Origin.Refspec)
	case again:
		if source = booted.Origin.Image; source == "" {
			return fmt.Errorf("image %v: it is not known where it comes from, a directory perhaps: say composefs-boot switch IMAGE once", booted.Digest)
		}
	case isCommit(source):
		if commit, err = parseCommit(source); err == nil {
			commit, err = commit.absolute()
		}
	default:
		source, err = absolute(source)
	}
	if err != nil {
		return err
	}
	if commit.ref != "" {
		source = commit.String()
	}
	if f.check && fromDirectory(source) {
		return usageError{fmt.Errorf("--check is for OCI images and OSTree commits, and %s is none: see --dry-run", source)}
	}
	if fromDirectory(source) {
		if err := boot.RefuseKeys(source, keys.public()); err != nil {
			return err
		}
	}
	r, err := a.hostRepository(h, booted)
	if err != nil {
		return err
	}
	defer r.Close()
	u := &upgrade{a: a, f: f, h: h, r: r, booted: booted, again: again,
		result: upgradeResult{DryRun: f.dry || f.check, Image: source, Booted: booted.Digest.String()}}
	if isCommit(source) {
		if err = u.openCommits(ctx, commit); err == nil {
			defer u.commits.close()
			err = u.lookCommit(ctx)
		}
	} else if transport.Is(source) {
		err = u.look(ctx)
	}
	if err != nil {
		return fmt.Errorf("%w (nothing has changed: the machine boots as before)", err)
	}
	if !u.result.Same && !f.check {
		if err := u.install(ctx); err != nil {
			return fmt.Errorf("%w (the machine boots as before)", err)
		}
		u.collect(ctx)
	}
	return a.printUpgrade(u.result)
}

// absolute makes the name of an image that is a path one that can be remembered.
func absolute(source string) (string, error) {
	name, path, ok := strings.Cut(source, ":")
	if !ok || !transport.Is(source) || !slices.Contains([]string{"oci", "oci-archive", "docker-archive", "dir"}, name) {
		return source, nil
	}
	path, err := filepath.Abs(path)
	return name + ":" + path, err
}

// upgrade is an upgrade of a machine.
type upgrade struct {
	a       *app
	f       upgradeFlags
	h       *host
	r       *repo.Repo
	booted  *boot.Deployed
	again   bool // the source is what the booted system comes from
	result  upgradeResult
	pruning *pruning // nil: nothing is removed

	// Of OSTree commits.
	remotes *remote.Store
	commits *commitStore
	refspec string
}

// look asks what is new.
func (u *upgrade) look(ctx context.Context) error {
	name := u.result.Image
	source, err := u.f.image.openImage(ctx, name)
	if err != nil {
		return err
	}
	defer source.Close()
	o := oci.PullOptions{Retry: oci.DefaultRetry}
	if u.f.image.platform != "" {
		if o.Platform, err = oci.ParsePlatform(u.f.image.platform); err != nil {
			return usageError{err}
		}
	}
	image, download, err := oci.Look(ctx, u.r, source, o)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	u.result.Manifest, u.result.Download = string(image.Digest), &download
	next := u.h.Next()
	u.result.Same = next != nil && next.Origin.Manifest == u.result.Manifest && next.Origin.Image == name
	return nil
}

// install brings the new system, and makes it the one that boots next.
func (u *upgrade) install(ctx context.Context) error {
	i, err := u.r.Begin(ctx, u.a.lock())
	if err != nil {
		return err
	}
	defer i.Abort()
	from := &treeSource{a: u.a, name: u.result.Image, repo: u.r}
	if isCommit(from.name) {
		if err := u.pullCommit(ctx, from); err != nil {
			return err
		}
	} else if transport.Is(from.name) {
		tag := from.name
		if u.f.dry {
			tag = "" // then garbage collection may have it
		}
		pulled, err := u.a.pull(ctx, u.r, from.name, u.f.image.imageFlags, oci.PullOptions{Tag: tag})
		if err != nil {
			return err
		}
		from.image, u.result.Pulled = pulled.Image, &pulled.Stats
		u.result.Manifest = from.manifest()
	}
	s, err := u.a.putSystem(ctx, from, u.r, i, installFlags{uki: u.f.uki})
	if err != nil {
		return err
	}
	scratch := &boot.Scratch{}
	defer scratch.Close()
	plan, err := u.plan(ctx, from, s, scratch)
	if err != nil {
		return err
	}
	if s.Digest != u.booted.Digest {
		if err := plan.PlanCarry(ctx, u.h.Root, u.booted.Digest, u.r); err != nil {
			return err
		}
	}
	if err := u.planPrune(from, &plan); err != nil {
		return err
	}
	esp, err := plan.PlanESP(u.h.ESP)
	if err != nil {
		return err
	}
	for _, d := range u.h.Deployments {
		if slices.ContainsFunc(d.Entries, func(e boot.Entry) bool { return e.Path == esp.First }) {
			esp.First = "" // it will not, see below
		}
	}
	install := newInstallResult(s, plan, installFlags{dry: u.f.dry}).withESP(esp)
	u.result.Install = &install
	if u.f.dry {
		return nil
	}
	if err := i.Commit(); err != nil {
		return err
	}
	if u.pruning != nil {
		if err := u.pruning.execute(ctx, u.a, u.r); err != nil {
			return err
		}
	}
	if err := plan.WriteState(u.h.Root, objectsOf(u.r)); err != nil {
		return err
	}
	if err := plan.WriteOrigin(u.h.Root); err != nil {
		return err
	}
	if err := esp.Execute(); err != nil {
		return err
	}
	after, err := boot.ReadHost(u.h.Root, u.h.ESP)
	if err != nil {
		return err
	}
	if u.result.Renames, install.First, err = after.PlanFirst(s.Digest); err != nil {
		return err
	}
	return boot.ExecuteRenames(u.h.ESP, u.result.Renames)
}

// planPrune makes room: what it frees on the ESP counts for the new system.
func (u *upgrade) planPrune(from *treeSource, plan *boot.Plan) error {
	if u.f.noPrune {
		return nil
	}
	origin := boot.Origin{Refspec: u.refspec}
	if from.image != nil {
		origin.Image = from.name
	}
	p, err := u.h.planPrune(u.r, u.booted, *u.f.keep, plan, origin)
	if errors.Is(err, boot.ErrForeignLoader) {
		u.result.Pruned = &pruneResult{DryRun: u.f.dry, Removed: []prunedSystem{},
			Stay: []boot.Stay{{Digest: u.booted.Digest, Why: err.Error()}}}
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w (with --no-prune, no old system is looked at)", err)
	}
	if p.Nothing() && len(p.Stay) == 0 {
		return nil
	}
	plan.Freed = p.PrunePlan.Bytes
	result := p.result(u.f.dry)
	u.pruning, u.result.Pruned = &p, &result
	return nil
}

// collect removes the objects of systems that are gone. The new one boots next, whatever comes of that.
func (u *upgrade) collect(ctx context.Context) {
	if u.pruning == nil || u.pruning.Nothing() {
		return
	}
	if err := u.pruning.collect(ctx, u.a, u.r, u.result.Pruned); err != nil {
		fmt.Fprintf(u.a.err, "objects of old systems are still there: %v (composefs-boot prune tries again)\n", err)
	}
}

// plan decides what is written: the new system is booted as the old one is.
func (u *upgrade) plan(ctx context.Context, from *treeSource, s boot.System, scratch *boot.Scratch) (boot.Plan, error) {
	now, err := sourceDate(time.Now())
	if err != nil {
		return boot.Plan{}, err
	}
	d := boot.Deployment{NoLoader: true, Arguments: u.f.arguments, Insecure: isInsecure(u.booted), Arch: runtime.GOARCH, Scratch: scratch,
		Version: s.Release.VersionAt(now), Manifest: from.manifest(), Refspec: u.refspec, Commit: from.checksum()}
	if from.image != nil {
		d.Image = from.name
	}
	sealed := slices.ContainsFunc(s.Resources, func(r boot.Resource) bool { return r.Kind == boot.KindUKI })
	if !sealed {
		d.Arguments = append(u.booted.Arguments(), u.f.arguments...)
	}
	if !sealed && u.booted.Origin.BootType == "uki" {
		if u.f.uki.sign == nil && slices.ContainsFunc(u.booted.Entries, func(e boot.Entry) bool { return e.Signed }) {
			return boot.Plan{}, errors.New("the unified kernel image of the booted system is signed, and the new one would not be: " +
				"say --secureboot-private-key and --secureboot-certificate, or take an image that brings its own in boot/EFI/Linux")
		}
		u.f.uki.make = true
		if u.booted.Origin.Native && u.f.uki.initrd == "" {
			u.f.uki.initrd = nativeInitrd
		}
	}
	if err := u.f.uki.deploy(ctx, from.name, s, now, &d); err != nil {
		return boot.Plan{}, err
	}
	plan, err := boot.PlanInstall(s, d)
	if err != nil {
		return plan, fmt.Errorf("%s: %w", from.name, err)
	}
	loader, err := plan.UpdateLoader(u.h.ESP, s, d)
	u.result.Loader = &loader
	return plan, err
}

func (a *app) printUpgrade(r upgradeResult) error {
	if a.json {
		return printJSON(a.out, r)
	}
	fmt.Fprintf(a.out, "source   %s\n", r.Image)
	if r.Manifest != "" {
		fmt.Fprintf(a.out, "manifest %s\n", r.Manifest)
	}
	if r.Commit != nil {
		a.printCommitUpgrade(*r.Commit)
	}
	if r.Same {
		fmt.Fprintln(a.out, "Up to date: the next boot has this image already")
		return nil
	}
	if d := r.Download; d != nil {
		fmt.Fprintf(a.out, "new      %s of %s, %d of %d layers\n", size(d.Bytes), size(d.Total), d.Layers, d.Of)
	}
	if p := r.Pulled; p != nil {
		fmt.Fprintf(a.out, "pulled   %s, %d layers, %d new objects of %s\n", size(p.Fetched), p.Layers-p.Present, p.Objects, size(p.Bytes))
	}
	if r.Install == nil {
		return nil
	}
	if err := a.printInstall(*r.Install); err != nil {
		return err
	}
	a.printRenames(r.Renames, "")
	if l := r.Loader; l.Left != "" {
		fmt.Fprintf(a.out, "loader   left as it is: %s\n", l.Left)
	} else if len(l.Files) > 0 {
		fmt.Fprintf(a.out, "loader   systemd-boot %s in place of %s\n", l.To, l.From)
	}
	if r.Pruned != nil {
		a.printPrune(*r.Pruned)
	}
	if !r.DryRun {
		fmt.Fprintln(a.out, "The next boot has it; composefs-boot rollback returns to the booted system")
	}
	return nil
}
