package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// installFlags are those of install.
type installFlags struct {
	disk, root, esp   string
	work              string
	arguments         []string
	rootArgument      string
	insecure, dry     bool
	seed              string
	size, espSize     int64 // bytes
	espFree, rootFree int64
	arch              string
	target            string        // image or commit that upgrades are of
	upgrades          *upgradesFrom // that, if it is a commit
	refspec           string        // the same, in the origin
	image             sourceFlags
	uki               installUKI
}

// installResult is what install prints as JSON.
type installResult struct {
	DryRun  bool          `json:"dry_run"`
	Digest  string        `json:"digest"`
	Karg    string        `json:"karg"`
	Options string        `json:"kernel_command_line"`
	State   string        `json:"state"`
	ESP     []installFile `json:"esp"`
	ESPSize int64         `json:"esp_bytes"`
	Space   *espSpace     `json:"esp_space,omitempty"`
	First   string        `json:"boots_first,omitempty"` // another entry on an ESP that is in use
	Disk    *diskResult   `json:"disk,omitempty"`
	Upgrade string        `json:"upgrades_from,omitempty"` // an OSTree commit
}

type installFile struct {
	Path string    `json:"path"`
	Size int64     `json:"size"`
	Fate boot.Fate `json:"fate,omitempty"` // on an ESP that is in use

	Replaces []string `json:"replaces,omitempty"` // files there that go
}

// espSpace is the space on a mounted ESP.
type espSpace struct {
	Need int64 `json:"need"`
	Free int64 `json:"free"`
}

type diskResult struct {
	Path string     `json:"path"`
	Size int64      `json:"size"`
	ESP  diskRegion `json:"esp"`
	Root diskRegion `json:"root"`
}

type diskRegion struct {
	Offset int64 `json:"offset"`
	Size   int64 `json:"size"`
	Free   int64 `json:"free"`
}

func (a *app) installCommand() *cobra.Command {
	f := installFlags{arch: runtime.GOARCH}
	c := &cobra.Command{
		Use:   "install SOURCE (--disk FILE | --root DIR [--esp DIR])",
		Short: "Install an operating system",
		Long: `Install the operating system in the directory SOURCE, or in an OCI image or OSTree commit.

` + imageNames + ` The repository of the system gets the image with its layers, by which upgrades know what is there. The
name is remembered: composefs-boot upgrade pulls it again.

` + commitNames + ` The repository of the system gets
the commit, under the name of the ref. From a web server, it also gets the configuration of the remote with the keys that were trusted, and
composefs-boot upgrade pulls the ref again, verified by them.

With --disk a bootable disk image is made: an EFI system partition with systemd-boot, kernel, initramfs and boot entry, and
an ext4 root with the repository, on which every object has fs-verity enabled. No root is needed, and the same input gives
the same bytes: SOURCE_DATE_EPOCH and --seed decide what else could differ.

With --root the system is installed onto file systems that are mounted: the repository and the state below DIR, what the
firmware reads below the --esp directory. State that is there already stays. On the EFI system partition so do files of others:
another boot loader, a newer systemd-boot, a loader.conf. The space is planned before the first byte.

The tree needs a kernel at usr/lib/modules/VERSION/vmlinuz, with the initramfs beside it as initramfs.img and
composefs-setup-root in that, and systemd-boot at usr/lib/systemd/boot/efi.

With --uki, kernel, initramfs and command line become one program, a unified kernel image. The boot loader counts how often it is
tried, in its name, if the system has systemd-bless-boot to mark it as good. With --secureboot-private-key, it and the boot loader
are signed, and what else would be started must be signed. What a tree has in boot/EFI/Linux takes its place: it must name the
image of this very tree, and is installed as it is.

With --enroll-keys, systemd-boot enrols the keys when the firmware is in setup mode: by itself in virtual machines only, as some
hardware does not start any more without its vendor's keys; elsewhere choose it in the menu.`,
		Example: `  composefs-boot install ./tree --disk disk.img
  composefs-boot install ./tree --disk disk.img --karg console=ttyS0 --esp-free 268435456 --dry-run
  composefs-boot install ./tree --disk disk.img --uki --secureboot-private-key db.key --secureboot-certificate db.pem
  composefs-boot install ./tree --disk disk.img --uki --initrd native --kernel /usr/lib/modules/6.12.0 --addon console.addon.efi
  composefs-boot install ./tree --root /mnt --esp /mnt/efi --root-arg root=UUID=...
  composefs-boot install docker://registry.example/os:1 --disk disk.img
  composefs-boot install ostree:/ostree/repo:my-os/stable --disk disk.img
  composefs-boot install ostree:https://ostree.example.org/repo:my-os/stable --gpg-key key.asc --disk disk.img
  composefs-boot install ostree:./repo:my-os/stable --disk disk.img --target-image ostree:my-os:my-os/stable`,
		Args: exactly(1),
		RunE: func(c *cobra.Command, args []string) error { return a.install(c.Context(), args[0], f) },
	}
	flags := c.Flags()
	flags.StringVar(&f.disk, "disk", "", "make the disk image `FILE`")
	flags.StringVar(&f.root, "root", "", "install below the mounted physical root `DIR`")
	flags.StringVar(&f.esp, "esp", "", "the mounted EFI system partition `DIR`")
	flags.StringVar(&f.work, "workdir", "", "make temporary files in `DIR` [default: where the disk image is]")
	flags.StringArrayVar(&f.arguments, "karg", nil, "a kernel argument to add, `TEXT`")
	flags.StringVar(&f.rootArgument, "root-arg", "", "how the initramfs finds the physical root, `TEXT` [default: root=UUID= of the file system]")
	flags.BoolVar(&f.insecure, "insecure", false, "boot without verification (\"?\" in the kernel argument)")
	flags.BoolVarP(&f.dry, "dry-run", "n", false, "print the plan with all sizes, and change nothing")
	flags.StringVar(&f.seed, "seed", "", "`TEXT` that the disk's identifiers are made of [default: the image's digest]")
	flags.Int64Var(&f.size, "size", 0, "size of the disk in `BYTES` [default: as small as fits]")
	flags.Int64Var(&f.espSize, "esp-size", 0, "size of the EFI system partition in `BYTES` [default: as small as fits]")
	flags.Int64Var(&f.espFree, "esp-free", 64<<20, "`BYTES` to keep free on the EFI system partition, for upgrades")
	flags.Int64Var(&f.rootFree, "root-free", 256<<20, "`BYTES` to keep free on the root, for state and upgrades")
	flags.StringVar(&f.target, "target-image", "", "the `IMAGE` that composefs-boot upgrade pulls on the machine [default: SOURCE, if it is docker://..., or a commit from a web server]")
	flags.StringVar(&f.arch, "arch", f.arch, "`ARCHITECTURE` of the system: amd64, arm64 or riscv64")
	f.uki.addTo(flags)
	f.image.add(c)
	return c
}

func (a *app) install(ctx context.Context, source string, f installFlags) error {
	switch {
	case (f.disk == "") == (f.root == ""):
		return usageError{errors.New("say where to: either --disk FILE or --root DIR")}
	case f.disk != "" && f.esp != "":
		return usageError{errors.New("--esp goes with --root: a disk image has its own EFI system partition")}
	}
	if err := f.uki.check(); err != nil {
		return err
	}
	keys, err := f.uki.openKeys()
	defer keys.close()
	if err != nil {
		return err
	}
	if fromDirectory(source) { // it is read first: that is quick, and the rest is not
		if err := boot.RefuseKeys(source, keys.public()); err != nil {
			return err
		}
	}
	if f.target == "" && strings.HasPrefix(source, "docker:") {
		f.target = source // others are no names on other machines
	}
	if f.target != "" && fromDirectory(f.target) {
		return usageError{fmt.Errorf("--target-image %q: want TRANSPORT:REFERENCE, docker://... for example, or ostree:REMOTE:REF", f.target)}
	}
	if f.image.platform == "" {
		f.image.platform = oci.Platform{OS: "linux", Architecture: f.arch}.String()
	}
	if f.disk != "" {
		return a.installDisk(ctx, source, f)
	}
	return a.installRoot(ctx, source, f)
}

// config is what a new repository is made with.
func (a *app) config(insecure bool) (repo.Config, error) {
	alg, err := a.algorithm(nil)
	if err != nil {
		return repo.Config{}, usageError{err}
	}
	format, err := a.erofsFormat(nil)
	if err != nil {
		return repo.Config{}, usageError{err}
	}
	return repo.Config{Algorithm: alg, Format: format, Insecure: insecure}, nil
}

// objectsOf opens the contents of files that an import has made visible.
func objectsOf(r *repo.Repo) fstree.Open {
	return func(name string, inode *fstree.Inode) (io.ReadCloser, error) {
		o, ok := inode.Content.(*fstree.Object)
		if !ok {
			return nil, fmt.Errorf("%s: not an object", name)
		}
		return r.OpenObject(o.Digest)
	}
}

// readSystem reads the source, whose large files go to the sink, and makes it bootable. Its files are opened in the source.
func (a *app) readSystem(ctx context.Context, from *treeSource, sink fstree.Sink, f installFlags) (boot.System, error) {
	s, source := boot.System{Open: from.open(), Merged: from.commit != nil}, from.name
	var err error
	if s.Tree, err = from.read(ctx, sink, nil, treeFlags{xattrs: fstree.XattrsAllowlist.String()}); err != nil {
		return s, err
	}
	if !fromDirectory(source) {
		if err := boot.RefuseKeysIn(s.Tree, s.Open, f.uki.public); err != nil {
			return s, fmt.Errorf("%s: %w", source, err)
		}
	}
	// Before /boot is emptied.
	if s.Resources, err = boot.FindResources(s.Tree, s.Open); err != nil {
		return s, fmt.Errorf("%s: %w", source, err)
	}
	if s.Release, err = boot.ReadOSRelease(s.Tree, s.Open); err != nil {
		return s, fmt.Errorf("%s: %w", source, err)
	}
	return s, bootable(s.Tree, s.Open, source, treeFlags{bootable: true})
}

// putSystem reads the source into a repository and makes its image, with a ref that keeps it. Commit is left to the caller.
func (a *app) putSystem(ctx context.Context, from *treeSource, r *repo.Repo, i *repo.Import, f installFlags) (boot.System, error) {
	s, err := a.readSystem(ctx, from, i, f)
	if err != nil {
		return s, err
	}
	if s.Format, err = a.erofsFormat(r); err != nil {
		return s, usageError{err}
	}
	if s.Digest, err = i.PutImage(s.Tree, s.Format, ""); err != nil {
		return s, err
	}
	return s, i.Name(s.Digest, "deploy/"+s.Digest.String())
}

func (a *app) installDisk(ctx context.Context, source string, f installFlags) (err error) {
	// A rename would put the image into the place of the device's node, not onto the device.
	if info, err := os.Stat(f.disk); err == nil && !info.Mode().IsRegular() {
		return fmt.Errorf("%s: it is there and not a file: make the image in a new file, and copy that to a device with dd", f.disk)
	}
	// The build machine's file system may be without fs-verity; the disk's root gets it in any case.
	config, err := a.config(true)
	if err != nil {
		return err
	}
	work := f.work
	if work == "" {
		work = filepath.Dir(f.disk)
	}
	staging, err := os.MkdirTemp(work, ".composefs-install-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(staging)
	repository := filepath.Join(staging, "composefs")
	if _, err := repo.Init(repository, config); err != nil {
		return err
	}
	r, err := repo.Open(repository, repo.Options{KeepCached: true})
	if err != nil {
		return err
	}
	defer r.Close()
	if err := f.readTarget(a, r); err != nil {
		return err
	}
	i, err := r.Begin(ctx, a.lock())
	if err != nil {
		return err
	}
	defer i.Abort()
	// An OCI image or OSTree commit is in the repository then, with its name.
	from, err := a.openTree(ctx, source, r, r.Algorithm(), f.image, f.tag(source))
	if err != nil {
		return err
	}
	s, err := a.putSystem(ctx, from, r, i, f)
	if err != nil {
		return err
	}
	if err := f.remember(r, from); err != nil {
		return err
	}
	if err := i.Commit(); err != nil {
		return err
	}
	s.Open = objectsOf(r)
	seed := []byte(f.seed)
	if f.seed == "" {
		seed = s.Digest.Bytes()
	}
	when, err := sourceDate(time.Unix(s.Tree.Root.Mtime.Sec, 0))
	if err != nil {
		return err
	}
	rootArgument := f.rootArgument
	if rootArgument == "" {
		rootArgument = "root=UUID=" + disk.ID(seed, disk.RootFilesystem)
	}
	scratch := &boot.Scratch{Dir: staging}
	defer scratch.Close()
	plan, err := f.plan(ctx, from, s, rootArgument, scratch)
	if err != nil {
		return err
	}
	// What was in /boot is on the ESP now, and no part of the image.
	if _, err := r.GC(ctx, repo.GCOptions{Follows: oci.Follows, Lock: a.lock()}); err != nil {
		return err
	}
	state, err := plan.StateTree()
	if err != nil {
		return err
	}
	var done, total atomic.Int64
	layout := disk.Layout{
		Size: f.size, Arch: f.arch, Seed: seed, Time: when,
		ESP:  disk.ESP{Size: f.espSize, Free: f.espFree, Files: plan.ESPFiles()},
		Root: disk.Root{Dir: staging, Overlay: state, Open: s.Open, Free: f.rootFree},
		Progress: func(d, t int64) {
			done.Store(d)
			total.Store(t)
		},
	}
	diskPlan, err := layout.Plan()
	if err != nil {
		return err
	}
	result := newInstallResult(s, plan, f)
	result.Disk = &diskResult{f.disk, diskPlan.Size, region(diskPlan.ESP), region(diskPlan.Root)}
	if !f.dry {
		p := a.startProgress(func() progressEvent {
			return progressEvent{What: "writing " + f.disk, Bytes: done.Load(), Total: total.Load()}
		})
		err = writeDisk(ctx, diskPlan, f.disk)
		p.end()
		if err != nil {
			return err
		}
	}
	return a.printInstall(result)
}

// writeDisk writes the image under another name first: what is at the path is a whole disk, or what was there before.
func writeDisk(ctx context.Context, plan *disk.Plan, path string) error {
	out, err := os.CreateTemp(filepath.Dir(path), ".composefs-disk-")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	err = plan.Write(ctx, out)
	if err == nil {
		err = out.Chmod(0o644)
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return err
	}
	return os.Rename(out.Name(), path)
}

func region(p disk.Partition) diskRegion { return diskRegion{p.Offset, p.Size, p.Free} }

// sourceDate is SOURCE_DATE_EPOCH, the time of everything that has none of its own, or another one if that is not set.
func sourceDate(otherwise time.Time) (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH=%q: want seconds since 1970", text)
	}
	return time.Unix(n, 0), nil
}

// tag is the name that an OCI image gets in the repository: by that, upgrades know what is there.
func (f installFlags) tag(source string) string {
	if transport.Is(f.target) {
		return f.target
	}
	return source
}

// readTarget looks at where upgrades come from, if that is a web server with OSTree commits: before anything is pulled.
func (f *installFlags) readTarget(a *app, r *repo.Repo) (err error) {
	if isCommit(f.target) {
		f.upgrades, err = a.targetCommit(f.target, r, f.image.commitFlags)
	}
	return err
}

// remember finds out what the origin says about upgrades to OSTree commits. The repository, which may be nil in a dry run, gets what they
// need.
func (f *installFlags) remember(r *repo.Repo, from *treeSource) (err error) {
	if f.target == "" {
		f.upgrades = from.from
	}
	if f.upgrades != nil {
		f.refspec, err = f.upgrades.remember(r, f.dry)
	}
	return err
}

// plan decides what an install of a system writes.
func (f installFlags) plan(ctx context.Context, from *treeSource, s boot.System, rootArgument string, scratch *boot.Scratch) (boot.Plan, error) {
	d := boot.Deployment{RootArgument: rootArgument, Arguments: f.arguments, Insecure: f.insecure, Arch: f.arch, Scratch: scratch,
		Manifest: from.manifest(), Refspec: f.refspec, Commit: from.checksum()}
	if transport.Is(f.target) {
		d.Image = f.target
	}
	when, err := sourceDate(time.Unix(s.Tree.Root.Mtime.Sec, 0))
	if err != nil {
		return boot.Plan{}, err
	}
	if err := f.uki.deploy(ctx, from.name, s, when, &d); err != nil {
		return boot.Plan{}, err
	}
	plan, err := boot.PlanInstall(s, d)
	if err != nil {
		return plan, fmt.Errorf("%s: %w", from.name, err)
	}
	return plan, nil
}

func newInstallResult(s boot.System, plan boot.Plan, f installFlags) installResult {
	r := installResult{DryRun: f.dry, Digest: s.Digest.String(), Karg: argument(s.Digest, s.Format), Options: plan.Karg,
		State: plan.State, ESPSize: plan.ESPSize}
	if f.refspec != "" {
		r.Upgrade = commitPrefix + f.refspec
	}
	for _, p := range plan.ESP {
		r.ESP = append(r.ESP, installFile{Path: p.Path, Size: p.Size})
	}
	return r
}

// withESP adds what becomes of the files on a mounted ESP, if there is one.
func (r installResult) withESP(e boot.ESPPlan) installResult {
	if e.Dir == "" {
		return r
	}
	r.Space, r.First = &espSpace{e.Need, e.Free}, e.First
	for k, f := range e.Files {
		r.ESP[k] = installFile{f.Path, f.Size, f.Fate, f.Replaces}
	}
	return r
}

func (a *app) printInstall(r installResult) error {
	if a.json {
		return printJSON(a.out, r)
	}
	if r.DryRun {
		fmt.Fprintln(a.out, "Dry run (nothing is written):")
	}
	fmt.Fprintf(a.out, "image   %s\n", r.Digest)
	if r.Options != "" {
		fmt.Fprintf(a.out, "options %s\n", r.Options)
	}
	fmt.Fprintf(a.out, "state   %s\n", r.State)
	notes := map[boot.Fate]string{boot.Same: " (there already)", boot.Kept: " (another one is there and stays)"}
	for _, f := range r.ESP {
		note := notes[f.Fate]
		if len(f.Replaces) > 0 {
			note += " (in place of " + strings.Join(f.Replaces, ", ") + ")"
		}
		fmt.Fprintf(a.out, "esp     %10s  %s%s\n", size(f.Size), f.Path, note)
	}
	if r.Space != nil {
		fmt.Fprintf(a.out, "esp     %10s  to be written, %s free\n", size(r.Space.Need), size(r.Space.Free))
	}
	if r.First != "" {
		fmt.Fprintf(a.out, "note    %s comes first in the boot menu (see --image-version)\n", r.First)
	}
	if r.Upgrade != "" {
		fmt.Fprintf(a.out, "upgrade %s\n", r.Upgrade)
	}
	if d := r.Disk; d != nil {
		fmt.Fprintf(a.out, "disk    %10s  %s: ESP %s (%s free), root %s (%s free)\n", size(d.Size), d.Path,
			size(d.ESP.Size), size(d.ESP.Free), size(d.Root.Size), size(d.Root.Free))
	}
	return nil
}
