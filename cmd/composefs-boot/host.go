package main

import (
	"bufio"
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

// change finds the systems of a machine, and unless it is a dry run, keeps others from changing them until it is ended.
func (f hostFlags) change(dry bool) (*host, error) {
	if dry {
		return f.open()
	}
	release, err := boot.Lock(f.root)
	if err != nil {
		return nil, err
	}
	h, err := f.open()
	if err != nil {
		release()
		return nil, err
	}
	end := h.end
	h.end = func() {
		end()
		release()
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

// loaderVariable reads a variable that systemd-boot sets or follows.
func loaderVariable(name string) (string, error) {
	b, err := os.ReadFile("/sys/firmware/efi/efivars/" + name + "-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f")
	// 4 bytes of attributes, and the text in UTF-16.
	return string(bytes.ReplaceAll(b[min(4, len(b)):], []byte{0}, nil)), err
}

// chosen returns the defaults that somebody has set for the boot loader, which come before the order of the menu: patterns for the names
// of entries.
func (h *host) chosen() ([]string, error) {
	var list []string
	if h.flags.root == systemRoot {
		for _, name := range []string{"LoaderEntryOneShot", "LoaderEntryDefault", "LoaderEntryPreferred"} {
			if text, err := loaderVariable(name); err == nil {
				list = append(list, text)
			}
		}
	}
	config, err := os.Open(filepath.Join(h.ESP, "loader/loader.conf"))
	if errors.Is(err, os.ErrNotExist) {
		return list, nil
	}
	if err != nil {
		return nil, err
	}
	defer config.Close()
	lines := bufio.NewScanner(config)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) == 2 && (f[0] == "default" || f[0] == "preferred") {
			list = append(list, f[1])
		}
	}
	return list, lines.Err()
}

// loaderESP finds the partition that the boot loader was started from, by the variable that it sets, and returns where it is mounted.
// If it is not, it is mounted until end is called.
func loaderESP() (dir string, end func(), err error) {
	unknown := func(err error) error {
		return fmt.Errorf("the EFI system partition is not known: %w: mount it and say --esp DIR", err)
	}
	uuid, err := loaderVariable("LoaderDevicePartUUID")
	if err != nil {
		return "", nil, unknown(err)
	}
	device := "/dev/disk/by-partuuid/" + strings.ToLower(uuid)
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
