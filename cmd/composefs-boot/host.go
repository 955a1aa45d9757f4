package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/boot/karg"
)

// hostFlags say where a machine has its systems.
type hostFlags struct {
	root, esp string
}

// systemRoot is the physical root of the machine that runs.
const systemRoot = "/sysroot"

func (f *hostFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.root, "root", systemRoot, "the mounted physical root `DIR`")
	c.Flags().StringVar(&f.esp, "esp", "", "the mounted EFI system partition `DIR` [default: that of the boot loader, which is mounted if need be]")
}

// host is a machine with its systems.
type host struct {
	*boot.Host
	flags hostFlags // with the ESP
	end   func()
}

// open finds the systems of a machine. It is to be ended.
func (f hostFlags) open() (*host, error) {
	h := &host{flags: f, end: func() {}}
	var err error
	if f.esp == "" {
		if h.flags.esp, h.end, err = loaderESP(); err != nil {
			return nil, err
		}
	}
	if h.Host, err = boot.ReadHost(f.root, h.flags.esp); err != nil {
		h.end()
		return nil, err
	}
	return h, nil
}

// booted returns the deployment that runs, or if this is not the machine's own root, the one that it boots next. It is an error if there
// is none.
func (h *host) booted() (*boot.Deployed, error) {
	d := h.Next()
	if h.flags.root == systemRoot {
		line, err := os.ReadFile("/proc/cmdline")
		if err != nil {
			return nil, err
		}
		c, err := karg.Parse(string(line))
		if err != nil {
			return nil, fmt.Errorf("/proc/cmdline: %w: say --root and --esp for another machine's systems", err)
		}
		d = nil
		for _, i := range c.Images {
			if d == nil {
				d = h.Find(i.Digest)
			}
		}
	}
	if d == nil {
		return nil, fmt.Errorf("%s: no system is installed there that could be upgraded: use composefs-boot install", h.flags.root)
	}
	return d, nil
}

// loaderESP finds the partition that the boot loader was started from, by the variable that it sets, and returns where it is mounted.
// If it is not, it is mounted until end is called.
func loaderESP() (dir string, end func(), err error) {
	const variable = "/sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
	unknown := func(err error) error {
		return fmt.Errorf("the EFI system partition is not known: %w: mount it and say --esp DIR", err)
	}
	b, err := os.ReadFile(variable)
	if err != nil {
		return "", nil, unknown(err)
	}
	// 4 bytes of attributes, and the text in UTF-16.
	uuid := strings.ToLower(string(bytes.ReplaceAll(b[min(4, len(b)):], []byte{0}, nil)))
	device := "/dev/disk/by-partuuid/" + uuid
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return "", nil, unknown(&os.PathError{Op: "stat", Path: device, Err: err})
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", nil, err
	}
	if dir := mountPoint(string(mounts), unix.Major(st.Rdev), unix.Minor(st.Rdev)); dir != "" {
		return dir, func() {}, nil
	}
	if dir, err = os.MkdirTemp("", "composefs-esp-"); err != nil {
		return "", nil, err
	}
	if err := unix.Mount(device, dir, "vfat", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "umask=0077"); err != nil {
		return "", nil, errors.Join(unknown(&os.PathError{Op: "mount", Path: device, Err: err}), os.Remove(dir))
	}
	return dir, func() {
		unix.Unmount(dir, 0)
		os.Remove(dir)
	}, nil
}

// mountPoint finds where the whole of a device is mounted for writing; "" if it is not. See proc_pid_mountinfo(5).
func mountPoint(mounts string, major, minor uint32) string {
	found := ""
	for line := range strings.Lines(mounts) {
		f := strings.Fields(line)
		if len(f) > 5 && f[2] == fmt.Sprintf("%d:%d", major, minor) && f[3] == "/" && strings.HasPrefix(f[5]+",", "rw,") &&
			!strings.Contains(f[4], `\`) && filepath.IsAbs(f[4]) {
			found = f[4]
		}
	}
	return found
}
