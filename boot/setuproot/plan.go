// Package setuproot makes the root of the running system from a composefs image.
//
// It runs in the initramfs, where the physical root file system is mounted at /sysroot and nothing on it is trusted but
// what the kernel command line vouches for. The way is: look at the command line, the configuration, the disk and the
// kernel ([Look]); decide ([World.Plan]); do it ([Execute]). A plan is a list of steps that print themselves.
//
// What it relies on:
//
//   - The digest comes from the command line alone. No file on the disk weakens it: meta.json is not even read.
//   - The file that is measured is the file that is mounted: both use the same open descriptor. Before it is measured,
//     nothing of it is read.
//   - Nothing below /sysroot is reached through a symbolic link. The names in images/ are links; their text is not
//     followed but the object of the digest opened.
//   - The new root is put together where nobody sees it and attached in one step at the end. A refusal leaves /sysroot
//     as it was.
//   - What the kernel can do is tried, not concluded from its version.
package setuproot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/karg"
)

// Abilities is what the running kernel can do.
type Abilities struct {
	Erofs       bool   // EROFS is there
	Overlay     bool   // overlayfs is there
	Verity      bool   // overlayfs knows verity=require: Linux 6.6
	DataLayers  bool   // overlayfs knows data-only layers, one by one: Linux 6.7
	LayerFD     bool   // overlayfs takes layers as descriptors: Linux 6.13; before that as paths
	FileErofs   bool   // EROFS mounts a file without a loop device: Linux 6.12
	NotAllowed  bool   // the caller may not mount: nothing else is known
	FloatTrees  bool   // mounts can be put together before they are attached: Linux 6.15
	Explanation string // which kernel it is
}

// World is all that a plan depends on.
type World struct {
	Choice    karg.Choice
	Config    Config
	Abilities Abilities
	// There tells for each image of the choice whether it is on the disk.
	There []bool
	// RootFS is the path of a directory that is used instead of an image, for tests; "" otherwise.
	RootFS string
	// Sysroot and Target are the directories where the physical root is and where the new one goes.
	Sysroot, Target string
}

// Step is one thing to do.
type Step interface {
	fmt.Stringer
	do(*run) error
}

// ErrRefused tells that the system must not boot like this. Its text says why, and the way out.
var ErrRefused = errors.New("refused")

// ErrNotPermitted is the refusal of who may not mount.
var ErrNotPermitted = refuse("mounting is not permitted: it needs root")

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrRefused}, args...)...)
}

// choose returns the image to boot. One that is not there may be replaced only by one that is verified as strictly.
func (w World) choose() (karg.Image, error) {
	first := w.Choice.Images[0]
	for k, image := range w.Choice.Images {
		if !w.There[k] {
			continue
		}
		if !image.MayReplace(first) {
			return image, refuse("image %v is missing on the disk, and %v is weaker: boot another entry, or install the image again",
				first.Digest, image)
		}
		return image, nil
	}
	return first, refuse("image %v is missing on the disk, in %s/composefs/images: boot another entry, or install the image again",
		first.Digest, w.Sysroot)
}

// Plan decides what to do. The error wraps ErrRefused.
func (w World) Plan() ([]Step, error) {
	image := w.Choice.Images[0]
	var steps []Step
	if w.RootFS != "" {
		steps = append(steps, stepBindRoot{w.RootFS})
	} else {
		var err error
		if image, err = w.choose(); err != nil {
			return nil, err
		}
		if err := w.Abilities.enough(!image.Insecure); err != nil {
			return nil, err
		}
	}
	if !w.Abilities.FloatTrees {
		steps = append([]Step{stepPrivate{w.Target}}, steps...)
	}
	steps = append(steps, stepSysroot{w.Sysroot})
	if w.RootFS == "" {
		steps = append(steps, stepRepository{}, stepOpen{image}, stepMeasure{image},
			stepErofs{file: w.Abilities.FileErofs}, overlayOf(image, w.Abilities))
	}
	if w.Config.TransientRoot {
		steps = append(steps, stepMemory{".", w.Abilities.LayerFD})
	}
	for _, m := range []struct {
		dir string
		how Mount
	}{{"etc", w.Config.Etc}, {"var", w.Config.Var}} {
		switch m.how {
		case Bind:
			steps = append(steps, stepBind{m.dir, image})
		case Overlay:
			steps = append(steps, stepUpper{m.dir, image, w.Abilities.LayerFD})
		case Transient:
			steps = append(steps, stepMemory{m.dir, w.Abilities.LayerFD})
		}
	}
	return append(steps, stepPhysical{}, stepAttach{w.Sysroot, w.Target}), nil
}

// enough tells what the kernel lacks to mount an image, with or without verity=require.
func (a Abilities) enough(verity bool) error {
	lacks := ""
	switch {
	case a.NotAllowed:
		return ErrNotPermitted
	case !a.Erofs:
		lacks = "the file system erofs (module erofs)"
	case !a.Overlay:
		lacks = "the file system overlay (module overlay)"
	case !a.DataLayers:
		lacks = "data-only layers of overlayfs (Linux 6.7)"
	case verity && !a.Verity:
		lacks = "verity=require of overlayfs (Linux 6.6)"
	default:
		return nil
	}
	return refuse("this kernel%s lacks %s: boot a newer one, 6.12 or later is best", a.Explanation, lacks)
}

// MountOptions says how Mount mounts an image.
type MountOptions struct {
	Upper, Work string // directories for what is changed; "" for none
	Writable    bool
}

// PlanMount is the plan for mounting an image of a repository anywhere, as composefs-boot mount does.
func PlanMount(repository string, image karg.Image, target string, o MountOptions) ([]Step, error) {
	dir, err := os.Open(repository)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	f, err := openImage(dir, image.Digest)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := measure(f, image); err != nil {
		return nil, err
	}
	a := Probe(f)
	if err := a.enough(!image.Insecure); err != nil {
		return nil, err
	}
	var steps []Step
	if !a.FloatTrees {
		steps = append(steps, stepPrivate{target})
	}
	overlay := overlayOf(image, a)
	overlay.upper, overlay.work, overlay.writable = o.Upper, o.Work, o.Writable
	return append(steps, stepRepository{repository}, stepOpen{image}, stepMeasure{image}, stepErofs{file: a.FileErofs},
		overlay, stepAttach{"", target}), nil
}

// overlayOf mounts an image of the repository as it is.
func overlayOf(image karg.Image, a Abilities) stepOverlay {
	return stepOverlay{source: "composefs:" + image.Digest.String(), verity: !image.Insecure, fd: a.LayerFD}
}

// Format returns the plan as text, a step a line.
func Format(steps []Step) string {
	var b strings.Builder
	for _, s := range steps {
		fmt.Fprintln(&b, s)
	}
	return b.String()
}
