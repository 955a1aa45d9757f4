package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// ociFsckResult is what oci fsck prints as JSON.
type ociFsckResult struct {
	OK            bool             `json:"ok"`
	ImagesChecked int              `json:"images_checked"`
	ImagesCorrupt int              `json:"images_corrupted"`
	Errors        []string         `json:"errors"`
	Repo          fsckResult       `json:"repo"`
	Findings      []oci.Finding    `json:"findings"`
	Repair        *ociRepairResult `json:"repair,omitempty"`
}

type ociRepairResult struct {
	DryRun  bool              `json:"dry_run"`
	Steps   []oci.RepairStep  `json:"steps,omitempty"` // of a dry run
	Healed  []oci.Finding     `json:"healed"`
	Failed  map[string]string `json:"failed"` // by tag: why
	Fetched int64             `json:"bytes_fetched"`
}

func (a *app) ociFsckCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "fsck [IMAGE]",
		Short: "Check the repository and the images in it",
		Long: `Check the repository as fsck does, and that every tagged image, or the one with this tag, has what it needs: manifest and config with
their digests, layers with their diff IDs, composefs images; and so the artifacts that refer to it.

With --repair, what an image lacks is brought again: composefs images are made of the layers; manifest, config, layers and objects come
from what --from names, an image as for pull, or the path of another repository. They are asked for by their digests, so that it does
not matter what a tag there means by now. What can be healed without --from is healed without it. What has nothing to do with an image
is for fsck --repair.

With --dry-run as well, nothing is changed but it is said what would be brought again, and whether --from has it.

The exit code is 1 if something is wrong, or still wrong after a repair; with --json it is 0 if the check itself could be done, and
"ok" tells the outcome.`,
		Example: `  composefs-boot --repo r oci fsck
  composefs-boot --repo r oci fsck --metadata-only my-os
  composefs-boot --repo r oci fsck --repair --from oci:./layout my-os
  composefs-boot --repo r oci fsck --repair --dry-run`,
		Args: between(0, 1),
	}
	metadataOnly := c.Flags().Bool("metadata-only", false, "do not look at the content of objects")
	fix := c.Flags().Bool("repair", false, "bring again what images lack")
	dry := c.Flags().BoolP("dry-run", "n", false, "with --repair: only say what would be brought again")
	var reached imageFlags
	reached.add(c)
	c.Flags().MarkHidden("platform") // digests say which
	from := c.Flags().String("from", "", "with --repair: the `SOURCE` of what is not in the repository any more")
	c.RunE = func(c *cobra.Command, args []string) error {
		switch {
		case !*fix && *from != "":
			return usageError{errors.New("--from goes with --repair")}
		case !*fix && *dry:
			return usageError{errors.New("--dry-run goes with --repair")}
		case *fix && *metadataOnly:
			return usageError{errors.New("--repair looks at the content of objects: leave --metadata-only out")}
		}
		return a.withRepo(func(r *repo.Repo) error {
			o := oci.FsckOptions{Image: strings.Join(args, ""), MetadataOnly: *metadataOnly, Lock: a.lock()}
			if !*fix {
				return a.ociFsck(c.Context(), r, o, nil)
			}
			repaired, err := a.ociRepair(c.Context(), r, o.Image, *from, reached, *dry)
			if err != nil {
				return err
			}
			return a.ociFsck(c.Context(), r, o, repaired)
		})
	}
	return c
}

// openRepairSource opens another repository, or an image reference; nothing if the name is "".
func openRepairSource(ctx context.Context, name string, f imageFlags) (oci.Source, io.Closer, error) {
	if name == "" {
		return nil, io.NopCloser(nil), nil
	}
	if info, err := os.Stat(name); err != nil || !info.IsDir() {
		source, err := f.openImage(ctx, name)
		return source, source, err
	}
	other, err := repo.Open(name, repo.Options{})
	if err != nil {
		return nil, nil, err
	}
	return oci.NewStored(other, ""), other, nil
}

// ociRepair brings again what images lack, and says so.
func (a *app) ociRepair(ctx context.Context, r *repo.Repo, image, from string, f imageFlags, dry bool) (*ociRepairResult, error) {
	source, end, err := openRepairSource(ctx, from, f)
	if err != nil {
		return nil, err
	}
	defer end.Close()
	o := oci.RepairOptions{Image: image, Transform: boot.Transform, Retry: oci.DefaultRetry, Progress: &oci.Progress{}, DryRun: dry,
		Lock: a.lock()}
	p := a.startProgress(func() progressEvent { return progressEvent{What: "repairing", Bytes: o.Progress.Bytes.Load()} })
	report, err := oci.Repair(ctx, r, source, o)
	p.end()
	if err != nil {
		return nil, err
	}
	result := &ociRepairResult{DryRun: dry, Steps: report.Steps, Healed: append([]oci.Finding{}, report.Healed()...), Failed: map[string]string{}, Fetched: report.Fetched}
	for name, err := range report.Failed {
		result.Failed[name] = err.Error()
	}
	if a.json {
		return result, nil
	}
	for _, f := range result.Healed {
		fmt.Fprintln(a.out, "healed", strings.TrimPrefix(f.String(), "fsck: "))
	}
	for _, s := range result.Steps {
		where := "here"
		if s.From == oci.FromSource {
			where = fmt.Sprintf("from %s, %s", from, size(s.Bytes))
		}
		fmt.Fprintf(a.out, "would bring again: %s: %s %s: %s\n", s.Image, s.What, s.Digest, where)
	}
	word := "not healed"
	if dry {
		word = "cannot be healed"
	}
	for _, name := range slices.Sorted(maps.Keys(result.Failed)) {
		fmt.Fprintf(a.out, "%s: %s: %s\n", word, name, result.Failed[name])
	}
	if result.Fetched > 0 {
		fmt.Fprintf(a.out, "fetched %s\n", size(result.Fetched))
	}
	return result, nil
}

// ociFsck checks the repository and the images, after a repair or without one.
func (a *app) ociFsck(ctx context.Context, r *repo.Repo, o oci.FsckOptions, repaired *ociRepairResult) error {
	var checked atomic.Int64
	p := a.startProgress(func() progressEvent { return progressEvent{What: "checking", Files: checked.Load()} })
	report, err := r.Fsck(ctx, repo.FsckOptions{MetadataOnly: o.MetadataOnly, Checked: &checked, Lock: o.Lock})
	var images oci.FsckReport
	if err == nil {
		images, err = oci.Fsck(ctx, r, o)
	}
	p.end()
	if err != nil {
		return err
	}
	errs := []string{}
	for _, f := range images.Findings {
		errs = append(errs, f.String())
	}
	if a.json {
		return printJSON(a.out, ociFsckResult{report.OK() && len(errs) == 0, images.Images, images.Bad, errs,
			newFsckResult(r, report, o.MetadataOnly), append([]oci.Finding{}, images.Findings...), repaired})
	}
	err = a.printFsck(r, report, o.MetadataOnly, nil)
	fmt.Fprintf(a.out, "oci images: %d/%d ok\n", images.Images-images.Bad, images.Images)
	if len(errs) > 0 {
		fmt.Fprintf(a.out, "oci errors: %d\n", len(errs))
		for _, e := range errs {
			fmt.Fprintln(a.out, "  -", e)
		}
		err = fmt.Errorf("%s: %w", r.Path(), errCorrupt)
	}
	if err != nil && repaired == nil && a.name != "cfsctl" {
		err = fmt.Errorf("%w (--repair brings again what images lack)", err)
	}
	return err
}
