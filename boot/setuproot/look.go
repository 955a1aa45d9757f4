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
	if fs, err := openFS("erofs"); err == nil {
		a.Erofs = true
		if image != nil {
			fs.flag("ro")
			fs.set("source", procPath(image))
			mount, err := fs.mount(0)
			if err == nil {
				mount.Close()
			}
			// Kernels that want a block device say so; any other answer comes from reading the file.
			a.FileErofs = err == nil || !errors.Is(err, unix.ENOTBLK)
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
	works := func(configure func(*filesystem)) bool {
		fs, err := openFS("overlay")
		if err != nil {
			return false
		}
		defer fs.close()
		a.Overlay = true
		configure(fs)
		return fs.err == nil
	}
	// Before Linux 6.5 overlayfs took whatever it was given, and complained at the mount.
	if works(func(fs *filesystem) { fs.set("no-such-parameter", "x") }) {
		return
	}
	a.Verity = works(func(fs *filesystem) { fs.set("verity", "require") })
	a.DataLayers = works(func(fs *filesystem) {
		fs.set("datadir+", "")
		if fs.err != nil && !strings.Contains(fs.err.Error(), "nknown parameter") {
			fs.err = nil // the value is wrong, but the key is known
		}
	})
	a.LayerFD = works(func(fs *filesystem) { fs.layer("lowerdir+", root, true) })
}

// floatTrees reports whether a mount can be mounted on one that is not attached.
func floatTrees() bool {
	var mounts [2]*os.File
	for k := range mounts {
		fs, err := openFS("tmpfs")
		if err != nil {
			return false
		}
		mounts[k], err = fs.mount(0)
		fs.close()
		if err != nil {
			return false
		}
		defer mounts[k].Close()
	}
	if err := unix.Mkdirat(int(mounts[0].Fd()), "on", 0o755); err != nil {
		return false
	}
	return moveMount(mounts[1], mounts[0], "on") == nil
}
