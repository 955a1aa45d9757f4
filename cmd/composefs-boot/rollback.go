package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// rollbackResult is what rollback prints as JSON.
type rollbackResult struct {
	DryRun  bool          `json:"dry_run"`
	Digest  string        `json:"digest"` // of the system that boots next
	Renames []boot.Rename `json:"renames"`
	First   string        `json:"boots_first,omitempty"` // another system's entry
}

func (a *app) rollbackCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "rollback",
		Short: "Boot the system before this one",
		Long: `Have the machine boot the other system: the one before the last upgrade, or after another rollback, the upgrade again. An upgrade
that has not been booted yet is taken back. Nothing is removed.

The boot entry of the system that is left is marked as one that has no tries left, as systemd-boot does with systems that do not come
up; it can still be chosen from the menu. /var is the same for both systems, /etc is that of the other one.`,
		Example: `  composefs-boot rollback && systemctl reboot
  composefs-boot rollback --dry-run`,
		Args: exactly(0),
	}
	var f hostFlags
	f.add(c)
	dry := c.Flags().BoolP("dry-run", "n", false, "only say what would boot")
	c.RunE = func(*cobra.Command, []string) error { return a.rollback(f, *dry) }
	return c
}

func (a *app) rollback(f hostFlags, dry bool) error {
	h, err := f.change(dry)
	if err != nil {
		return err
	}
	defer h.end()
	booted, err := h.booted()
	if err != nil {
		return err
	}
	to, err := h.other(booted)
	if err != nil {
		return err
	}
	result := rollbackResult{DryRun: dry, Digest: to.String()}
	if result.Renames, result.First, err = h.PlanFirst(to); err != nil {
		return err
	}
	if !dry {
		if err := boot.ExecuteRenames(h.ESP, result.Renames); err != nil {
			return err
		}
	}
	if a.json {
		return printJSON(a.out, result)
	}
	word := "boots"
	if dry {
		word = "would boot"
	}
	fmt.Fprintf(a.out, "next    %s %s\n", word, to)
	a.printRenames(result.Renames, result.First)
	return nil
}

// other is the system that a rollback goes to.
func (h *host) other(booted *boot.Deployed) (to fsverity.Digest, err error) {
	if next := h.Next(); next != nil && next.Digest != booted.Digest && len(booted.Entries) > 0 {
		return booted.Digest, nil
	}
	for _, d := range h.Deployments {
		if d.Digest != booted.Digest && len(d.Entries) > 0 {
			return d.Digest, nil
		}
	}
	return to, fmt.Errorf("%s: no other system is installed that could be booted: there has been no upgrade, or its boot entry is gone", h.ESP)
}

func (a *app) printRenames(renames []boot.Rename, first string) {
	for _, r := range renames {
		fmt.Fprintf(a.out, "esp     %s -> %s\n", r.From, r.To)
	}
	if first != "" {
		fmt.Fprintf(a.out, "note    %s, of another system, comes first in the boot menu\n", first)
	}
}

// statusResult is what status prints as JSON: the systems in the order of the boot menu.
type statusResult struct {
	Deployments []deploymentStatus `json:"deployments"`
}

type deploymentStatus struct {
	Digest   string   `json:"digest"`
	Booted   bool     `json:"booted"`
	Next     bool     `json:"next"` // it boots if nobody chooses
	Bad      bool     `json:"bad"`  // no tries left, or rolled back
	Pinned   bool     `json:"pinned"`
	Image    string   `json:"image,omitempty"`
	Manifest string   `json:"manifest,omitempty"`
	Version  string   `json:"version,omitempty"`
	Entries  []string `json:"entries"`
}

func (a *app) statusCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "status",
		Short: "List the systems of this machine",
		Long: `List the systems that are installed, in the order of the boot menu: which one runs, which one boots next, and where they come from.
A default that somebody has set in loader.conf or with bootctl is not looked at.`,
		Example: `  composefs-boot status
  composefs-boot status --root /mnt --esp /mnt/efi --json`,
		Args: exactly(0),
	}
	var f hostFlags
	f.add(c)
	c.RunE = func(*cobra.Command, []string) error { return a.status(f) }
	return c
}

func (a *app) status(f hostFlags) error {
	h, err := f.open()
	if err != nil {
		return err
	}
	defer h.end()
	booted, err := h.booted()
	if err != nil {
		return err
	}
	next := h.Next()
	result := statusResult{Deployments: []deploymentStatus{}}
	for _, d := range h.Deployments {
		s := deploymentStatus{Digest: d.Digest.String(), Booted: f.root == systemRoot && d.Digest == booted.Digest,
			Next: next != nil && d.Digest == next.Digest, Bad: d.Bad(), Pinned: d.Pinned, Image: originName(d.Origin),
			Manifest: d.Origin.Manifest, Version: d.Version(), Entries: []string{}}
		for _, e := range d.Entries {
			s.Entries = append(s.Entries, e.Path)
		}
		result.Deployments = append(result.Deployments, s)
	}
	if a.json {
		return printJSON(a.out, result)
	}
	var rows [][]string
	for _, d := range result.Deployments {
		state := ""
		for _, s := range []struct {
			is   bool
			name string
		}{{d.Booted, "booted"}, {d.Next, "next"}, {d.Bad, "bad"}, {d.Pinned, "pinned"}, {len(d.Entries) == 0, "no entry"}} {
			if s.is && state != "" {
				state += ", "
			}
			if s.is {
				state += s.name
			}
		}
		rows = append(rows, []string{d.Digest[:12], state, d.Version, d.Image})
	}
	printTable(a.out, []string{"DIGEST", "STATE", "VERSION", "IMAGE"}, rows)
	return nil
}
