package setuproot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/karg"
)

// Look fills in what the disk and the kernel have: w.There and w.Abilities. It changes nothing.
func (w *World) Look() error {
	sysroot, err := os.OpenFile(w.Sysroot, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("%w: the physical root must be mounted there", err)
	}
	defer sysroot.Close()
	var image *os.File // what the kernel is tried on
	w.There = make([]bool, len(w.Choice.Images))
	if w.RootFS == "" {
		repository, err := openBeneath(sysroot, "composefs", unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return refuse("no repository in the physical root, %s: %w: is it the right partition?", w.Sysroot, err)
		}
		defer repository.Close()
		for k, i := range w.Choice.Images {
			f, err := openImage(repository, i.Digest)
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				return refuse("image %v: %w", i.Digest, err)
			}
			w.There[k] = true
			defer f.Close()
			// The kernel reads a file that it tries to mount. One that the plan will refuse is not shown to it at all.
			if image == nil && measure(f, i) == nil {
				image = f
			}
		}
	}
	w.Abilities = Probe(image)
	return nil
}

// Choose returns the image that the plan mounts.
func (w World) Choose() (karg.Image, error) { return w.choose() }

// Probe finds out what the kernel can do by trying it on things that are thrown away. The image is needed for one of them;
// without it, that one counts as missing.
func Probe(image *os.File) Abilities {
	var a Abilities
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		a.Explanation = " (" + unix.ByteSliceToString(name.Release[:]) + ")"
	}
	fs, err := openFS("erofs")
	if errors.Is(err, unix.EPERM) {
		a.NotAllowed = true
		return a
	}
	if err == nil {
		a.Erofs = true
		if image != nil {
			fs.flag("ro")
			fs.set("source", procPath(image))
			fs.create()
			// Kernels that want a block device say so; any other answer comes from reading the file.
			a.FileErofs = !errors.Is(fs.err, unix.ENOTBLK)
		}
		fs.close()
	}
	a.probeOverlay()
	a.FloatTrees = floatTrees()
	return a
}

func (a *Abilities) probeOverlay() {
	root, err := os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return
	}
	defer root.Close()
	fs, err := openFS("overlay")
	if err != nil {
		return
	}
	defer fs.close()
	a.Overlay = true
	set := func(key, value string) error {
		fs.err = nil
		fs.set(key, value)
		return fs.err
	}
	// Before Linux 6.5 overlayfs took whatever it was given, and complained at the mount.
	if set("no-such-parameter", "x") == nil {
		return
	}
	a.Verity = set("verity", "require") == nil
	err = set("datadir+", "") // the value is wrong; that must be the complaint
	a.DataLayers = err == nil || !strings.Contains(err.Error(), "nknown parameter")
	fs.err = nil
	fs.layer("lowerdir+", root, true)
	a.LayerFD = fs.err == nil
}

// floatTrees reports whether a mount can be mounted on one that is not attached. Any two will do.
func floatTrees() bool {
	var mounts [2]*os.File
	for k := range mounts {
		var err error
		if mounts[k], err = cloneTree(unix.AT_FDCWD, "/proc", 0); err != nil {
			return false
		}
		defer mounts[k].Close()
	}
	return moveMount(mounts[1], mounts[0], ".") == nil
}
