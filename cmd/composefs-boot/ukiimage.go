package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/uki"
)

// ukiImageArgument returns the kernel argument for --image: of an image in the repository, which is verified, or of the one
// that a directory would have.
func (a *app) ukiImageArgument(ctx context.Context, name string) (string, error) {
	if info, err := os.Stat(name); err == nil && info.IsDir() {
		d, format, err := a.compute(ctx, name, treeFlags{bootable: true, xattrs: fstree.XattrsAllowlist.String()})
		if err != nil {
			return "", fmt.Errorf("--image: %w", err)
		}
		return argument(d, format), nil
	}
	r, err := a.repositoryWith(name, "directory")
	if err != nil {
		return "", fmt.Errorf("--image: %w", err)
	}
	defer r.Close()
	d, err := r.ImageDigest(name)
	if err != nil {
		return "", fmt.Errorf("--image: %w (see: images)", err)
	}
	_, format, err := r.ReadImage(name)
	if errors.Is(err, repo.ErrNotFound) {
		err = fmt.Errorf("%w (see: images)", err)
	}
	if err != nil {
		return "", fmt.Errorf("--image: %w", err)
	}
	return argument(d, format), nil
}

// addImage puts the argument in front of the command lines of the parts: that of the base, and those of profiles to be joined,
// which take its place.
func addImage(p *uki.Parts, arg string) error {
	if !p.Linux.IsSet() && !p.Profile.IsSet() {
		return usageError{errors.New("--image: an addon's command line is appended to one that names the image: leave it out")}
	}
	var err error
	if p.Cmdline, err = withImage(p.Cmdline, arg); err != nil {
		return fmt.Errorf("--cmdline: %w", err)
	}
	for _, m := range p.Join {
		for n, profile := range m.Profiles {
			k := slices.IndexFunc(profile, func(s uki.Section) bool { return s.Name == ".cmdline" })
			if k < 0 {
				continue
			}
			c, err := withImage(profile[k].Content, arg)
			if err != nil {
				return fmt.Errorf("--join-profile: profile %s: %w", profileName(m, n), err)
			}
			profile[k] = uki.NewSection(".cmdline", c)
		}
	}
	return nil
}

// profileName names a profile by its ID, or by its number if it has none.
func profileName(m *uki.Image, n int) string {
	if id := m.ID(max(0, n-1)); id != "" {
		return id
	}
	return fmt.Sprint(n)
}

// maxCmdline limits a command line, in bytes: the kernel takes 2048 on x86, and at most 64 KiB elsewhere.
const maxCmdline = 1 << 16

// withImage returns a command line with the argument in front, where nothing that others append can come before it. A line that
// has the argument already stays as it is; one with another is refused.
func withImage(line uki.Content, arg string) (uki.Content, error) {
	if !line.IsSet() {
		return uki.Text(arg), nil
	}
	if line.Size > maxCmdline {
		return line, fmt.Errorf("%d bytes, at most %d are read", line.Size, maxCmdline)
	}
	b, err := io.ReadAll(line.Reader())
	if err != nil {
		return line, err
	}
	text := string(b)
	if strings.TrimLeft(text, " \t\r\n\x00") == "" {
		return uki.Text(arg), nil
	}
	choice, err := karg.Parse(text)
	if errors.Is(err, karg.ErrNone) {
		return uki.Text(arg + " " + text), nil
	}
	if err != nil {
		return line, fmt.Errorf("%w: leave it out, --image puts the right one there", err)
	}
	for _, i := range choice.Images {
		if i.String() != arg {
			return line, fmt.Errorf("it names another image, %v: leave that out, --image is %s", i, arg)
		}
	}
	if len(choice.Ignored) > 0 {
		return line, fmt.Errorf("it has a second composefs argument, %.200s: leave that out", choice.Ignored[0])
	}
	return line, nil
}
