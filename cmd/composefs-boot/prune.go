package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// keepSystems is how many systems stay if nobody says otherwise: the one that runs, or boots next, and the one before it.
const keepSystems = 2

// pruneResult is what prune prints as JSON, and upgrade for what it has removed before.
type pruneResult struct {
	DryRun  bool           `json:"dry_run"`
	Removed []prunedSystem `json:"removed"`
	Stay    []boot.Stay    `json:"stay"` // what is kept beyond what was asked for
	ESP     int64          `json:"esp_bytes"`
	Objects int            `json:"objects_removed"`
	Bytes   int64          `json:"objects_bytes"`
}

type prunedSystem struct {
	Digest  string   `json:"digest"`
	Version string   `json:"version,omitempty"`
	Image   string   `json:"image,omitempty"`
	Files   []string `json:"files"` // on the ESP
	ESP     int64    `json:"esp_bytes"`
}

func (a *app) pruneCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "prune",
		Short: "Remove the systems that upgrades have left",
		Long: `Remove old systems: their boot entries, kernels and unified kernel images, their /etc, their names in the repository, and the objects
that nobody else needs. Upgrades do so by themselves, before they write anything.

What runs, what boots next, what somebody has set as the boot loader's default, and what is pinned, stays; and of those that stay, one has
been seen to come up. Besides these the next in the boot menu stay, so that there are --keep systems in all, without the pinned ones: with
two, rollback has one to return to. /var is the same for all systems, and stays.

Boot entries that others have made stay, and so does what they boot. What an interrupted run has left is removed by the next one.`,
		Example: `  composefs-boot prune --dry-run
  composefs-boot prune --keep 3`,
		Args: exactly(0),
	}
	var f hostFlags
	f.add(c)
	keep := addKeep(c)
	dry := c.Flags().BoolP("dry-run", "n", false, "only say what would be removed")
	c.RunE = func(c *cobra.Command, _ []string) error { return a.prune(c.Context(), f, *keep, *dry) }
	return c
}

func addKeep(c *cobra.Command) *uint {
	return c.Flags().Uint("keep", keepSystems, "how many systems stay, `N`, without those that are pinned")
}

func (a *app) prune(ctx context.Context, f hostFlags, keep uint, dry bool) error {
	h, err := f.change(dry)
	if err != nil {
		return err
	}
	defer h.end()
	booted, err := h.booted()
	if err != nil {
		return err
	}
	r, err := a.hostRepository(h, booted)
	if err != nil {
		return err
	}
	defer r.Close()
	p, err := h.planPrune(r, booted, keep, nil, boot.Origin{})
	if err != nil {
		return err
	}
	result := p.result(dry)
	if !dry {
		err = p.execute(ctx, a, r)
	}
	if err == nil {
		err = p.collect(ctx, a, r, &result)
	}
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(a.out, result)
	}
	if len(result.Removed) == 0 {
		fmt.Fprintln(a.out, "No system to remove")
	}
	a.printPrune(result)
	return nil
}

// hostRepository opens the repository of a machine.
func (a *app) hostRepository(h *host, booted *boot.Deployed) (*repo.Repo, error) {
	r, err := a.rootRepository(installFlags{root: h.Root, insecure: isInsecure(booted)})
	if err == nil && r == nil {
		err = fmt.Errorf("%s/composefs: no repository there", h.Root)
	}
	return r, err
}

// isInsecure reports whether a system is booted without verification.
func isInsecure(d *boot.Deployed) bool { return len(d.Entries) > 0 && d.Entries[0].Image.Insecure }

// pruning is what is removed of a machine, with the names that were given to what the systems were pulled from.
type pruning struct {
	boot.PrunePlan
	streams []string // refs of them
}

// planPrune decides which systems go. If one is about to be installed, that is its plan and its origin.
func (h *host) planPrune(r *repo.Repo, booted *boot.Deployed, keep uint, plan *boot.Plan, origin boot.Origin) (p pruning, err error) {
	o := boot.PruneOptions{Keep: int(min(keep, 1000)), Booted: booted.Digest, New: plan}
	if o.Chosen, err = h.chosen(); err != nil {
		return p, err
	}
	if p.PrunePlan, err = h.PlanPrune(o); err != nil {
		return p, err
	}
	needed := []boot.Origin{origin}
	for _, d := range h.Deployments {
		if slices.Contains(p.Systems(), d.Digest) {
			needed = append(needed, d.Origin)
		}
	}
	p.streams, err = staleNames(r, p.Remove, needed)
	return p, err
}

// staleNames finds the refs of the images and commits that systems were made of, which go, if no other system is upgraded by that name. A
// name that leads to something else by now is somebody's.
func staleNames(r *repo.Repo, gone []boot.Removal, needed []boot.Origin) ([]string, error) {
	images, err := oci.Tags(r)
	if err != nil {
		return nil, err
	}
	commits, err := ostree.Tags(r)
	if err != nil {
		return nil, err
	}
	ref := func(o boot.Origin) string {
		_, ref, _ := strings.Cut(o.Refspec, ":")
		return ref
	}
	var refs []string
	for _, d := range gone {
		o := d.Origin
		image := oci.Tag{Name: o.Image, Image: oci.Digest(o.Manifest)}
		if slices.Contains(images, image) && !slices.ContainsFunc(needed, func(n boot.Origin) bool { return n.Image == o.Image }) {
			refs = append(refs, oci.TagRef(o.Image))
		}
		led := func(t ostree.Ref) bool { return t.Name == ref(o) && t.Commit.String() == o.Commit }
		if slices.ContainsFunc(commits, led) && !slices.ContainsFunc(needed, func(n boot.Origin) bool { return ref(n) == ref(o) }) {
			refs = append(refs, ostree.TagRef(ref(o)))
		}
	}
	return refs, nil
}

// execute removes all but the objects.
func (p pruning) execute(ctx context.Context, a *app, r *repo.Repo) error {
	for _, ref := range p.streams { // they only save downloads
		if err := r.RemoveStreamRef(ctx, ref, a.lock()); err != nil && !errors.Is(err, repo.ErrNotFound) {
			return err
		}
	}
	return p.Execute(ctx, r, a.lock())
}

// collect removes the objects that nobody needs, or only counts them.
func (p pruning) collect(ctx context.Context, a *app, r *repo.Repo, result *pruneResult) error {
	o := repo.GCOptions{Follows: oci.Follows, Margins: repo.DefaultMargins, Lock: a.lock(), DryRun: result.DryRun}
	for _, d := range p.Systems() {
		o.Roots = append(o.Roots, d.String()) // bootc gives the images of its systems no names
	}
	if result.DryRun {
		for _, ref := range p.ImageRefs() {
			o.Without = append(o.Without, "images/refs/"+ref)
		}
		for _, ref := range p.streams {
			o.Without = append(o.Without, "streams/refs/"+ref)
		}
	}
	gone, err := r.GC(ctx, o)
	result.Objects, result.Bytes = gone.Objects, gone.Bytes
	return err
}

func (p pruning) result(dry bool) pruneResult {
	r := pruneResult{DryRun: dry, Removed: []prunedSystem{}, Stay: append([]boot.Stay{}, p.Stay...), ESP: p.PrunePlan.Bytes}
	for _, d := range p.Remove {
		s := prunedSystem{Digest: d.Digest.String(), Version: d.Version(), Image: originName(d.Origin), Files: []string{}, ESP: d.Bytes}
		for _, e := range d.Entries {
			s.Files = append(s.Files, e.Path)
		}
		s.Files = append(s.Files, d.Files...)
		r.Removed = append(r.Removed, s)
	}
	return r
}

// originName is how an image or commit is named that upgrades are of; "" for none.
func originName(o boot.Origin) string {
	if o.Image == "" && o.Refspec != "" {
		return commitPrefix + o.Refspec
	}
	return o.Image
}

func (a *app) printPrune(r pruneResult) {
	removed, freed := "removed ", "freed   "
	if r.DryRun {
		removed, freed = "would remove", "would free"
	}
	for _, s := range r.Removed {
		words := slices.DeleteFunc([]string{s.Digest[:12], s.Version, s.Image}, func(w string) bool { return w == "" })
		fmt.Fprintf(a.out, "%s %s\n", removed, strings.Join(words, " "))
		for _, name := range s.Files {
			fmt.Fprintf(a.out, "         %s\n", name)
		}
	}
	for _, s := range r.Stay {
		fmt.Fprintf(a.out, "stays    %s: %s\n", s.Digest.String()[:12], s.Why)
	}
	if r.ESP > 0 || r.Objects > 0 {
		fmt.Fprintf(a.out, "%s %s on the ESP, %d objects of %s\n", freed, size(r.ESP), r.Objects, size(r.Bytes))
	}
}

func (a *app) pinCommands() []*cobra.Command {
	command := func(use, short, long, example string, pinned bool) *cobra.Command {
		c := &cobra.Command{Use: use + " [DIGEST]", Short: short, Long: long, Example: example, Args: between(0, 1)}
		var f hostFlags
		f.add(c)
		c.RunE = func(_ *cobra.Command, args []string) error {
			h, err := f.change(false)
			if err != nil {
				return err
			}
			defer h.end()
			d, err := h.named(args)
			if err != nil {
				return err
			}
			if err := h.Pin(d, pinned); err != nil {
				return err
			}
			if a.json {
				return printJSON(a.out, pinResult{d.String(), pinned})
			}
			word := "Unpinned"
			if pinned {
				word = "Pinned"
			}
			fmt.Fprintf(a.out, "%s %s\n", word, d)
			return nil
		}
		return c
	}
	return []*cobra.Command{
		command("pin", "Keep a system", `Keep a system, whatever upgrades come: neither they nor prune remove it. DIGEST is the beginning of its digest, as status shows
it; without it, the booted system is kept.`, "  composefs-boot pin\n  composefs-boot pin 3f8a90", true),
		command("unpin", "Let upgrades remove a system", `Let upgrades and prune remove a system again, as they do with all that are old. DIGEST is the beginning of its digest;
without it, it is the booted system.`, "  composefs-boot unpin 3f8a90", false),
	}
}

// pinResult is what pin and unpin print as JSON.
type pinResult struct {
	Digest string `json:"digest"`
	Pinned bool   `json:"pinned"`
}

// named finds the system that an argument names by the first digits of its digest; without one, that is the booted one.
func (h *host) named(args []string) (fsverity.Digest, error) {
	if len(args) == 0 {
		booted, err := h.booted()
		if err != nil {
			return fsverity.Digest{}, err
		}
		return booted.Digest, nil
	}
	var found []fsverity.Digest
	for _, d := range h.Deployments {
		if strings.HasPrefix(d.Digest.String(), strings.ToLower(args[0])) {
			found = append(found, d.Digest)
		}
	}
	switch len(found) {
	case 0:
		return fsverity.Digest{}, fmt.Errorf("system %q: there is none with that digest (composefs-boot status lists them)", args[0])
	case 1:
		return found[0], nil
	}
	return fsverity.Digest{}, fmt.Errorf("system %q: it is %v or %v or another one: say more digits", args[0], found[0], found[1])
}
