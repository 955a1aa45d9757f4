package chain

import (
	"bytes"
	"debug/buildinfo"
	"errors"
	"io"
	"path"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/initrd"
)

// setupRoot is the program that verifies and mounts the image.
const setupRoot = "composefs-setup-root"

// maxInit limits a program /init that is looked at, in bytes; ours has 3 MiB.
const maxInit = 64 << 20

// initramfs looks for the program that verifies the image.
func (v *verifier) initramfs(boots []boot) []Link {
	return once(boots, 1, func(b boot) []Link {
		link := Link{Kind: Initramfs, Where: b.where}
		if !b.initrd.IsSet() || b.initrd.Size == 0 {
			link.Status, link.Found = Broken, "none: nothing verifies the image"
			link.WayOut = "build it with an --initrd that has " + setupRoot
			return []Link{link}
		}
		name, err := findSetupRoot(b.initrd.Reader())
		switch {
		case name != "":
			link.Status, link.Found = OK, setupRoot+" is "+name
		case err != nil:
			link.Status, link.Found = Unchecked, err.Error()
		default:
			link.Status, link.Found = Broken, "no "+setupRoot+" in it: the root is mounted unverified, or not at all"
			link.WayOut = "make it with \"initrd build\", or with dracut and --add composefs"
		}
		return []Link{link}
	})
}

// findSetupRoot returns the path of the program in an initramfs, "" if it is not there.
func findSetupRoot(r io.Reader) (found string, err error) {
	stop := errors.New("found")
	err = initrd.Scan(r, func(name string, mode uint32, content io.Reader) error {
		const typeMask, regular = 0o170000, 0o100000
		if mode&typeMask != regular {
			return nil
		}
		switch {
		case path.Base(name) == setupRoot:
			found = "/" + name
		case name == "init":
			// In the native initramfs it has no name of its own.
			b, err := io.ReadAll(io.LimitReader(content, maxInit))
			if err != nil {
				return err
			}
			if info, err := buildinfo.Read(bytes.NewReader(b)); err == nil && strings.HasSuffix(info.Path, "/"+setupRoot) {
				found = "/init"
			}
		}
		if found != "" {
			return stop
		}
		return nil
	})
	if found != "" {
		err = nil
	}
	return found, err
}
