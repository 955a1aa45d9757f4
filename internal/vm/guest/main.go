// Command guest is the operating system of guests that need none: /sbin/init of an image. It prints what a test wants to know,
// in lines that begin with "guest:", and what the kernel command line asks for:
//
//	guest.boot=NAME=PATH,...   makes these the programs that the firmware starts, in this order
//	guest.write=FILE           writes the file /usr/lib/guest/FILE, attributes included, to the firmware's variable of its name
//
// With a TPM, it keeps secrets in /sysroot/secrets. At the first boot that has signed PCR policies, it seals two:
// "kernel" with the policy that the key has to approve of the policy of PCR 11, and "config" for which PCR 12 must be the same
// as well. At later boots it unseals them.
package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf16"

	"golang.org/x/sys/unix"
)

// say prints a line, also to a console that the kernel writes to at the same time.
func say(format string, args ...any) {
	fmt.Print("\nguest: " + fmt.Sprintf(format, args...) + "\n")
}

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "guest: this is to be the first process of a virtual machine")
		os.Exit(2)
	}
	os.WriteFile("/proc/sys/kernel/printk", []byte("1"), 0)
	if err := run(); err != nil {
		say("error: %v", err)
	}
	unix.Sync()
	say("done")
	time.Sleep(200 * time.Millisecond) // the console is slow
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	say("cmdline %s", strings.TrimSpace(string(line)))
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return err
	}
	for m := range strings.Lines(string(mounts)) {
		if f := strings.Fields(m); f[1] == "/" && f[2] == "overlay" {
			say("root %s %s", f[0], f[3])
		}
	}
	release, err := os.ReadFile("/usr/lib/os-release")
	if err != nil {
		return err
	}
	say("release %s", strings.TrimSpace(string(release)))
	filepath.WalkDir("/run/systemd", func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			say("handed %s", path)
		}
		return nil
	})
	if _, err := os.Stat(variables); err == nil {
		if err := firmware(strings.Fields(string(line))); err != nil {
			return err
		}
	}
	if _, err := os.Stat("/dev/tpmrm0"); err == nil {
		return secrets()
	}
	return nil
}

// variables are the firmware's, as files.
const variables = "/sys/firmware/efi/efivars"

const immutable = 0x10 // FS_IMMUTABLE_FL

// global is the vendor of the firmware's own variables.
const global = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"

func firmware(args []string) error {
	if err := unix.Mount("efivarfs", variables, "efivarfs", 0, ""); err != nil && err != unix.EBUSY {
		return fmt.Errorf("efivarfs: %w", err)
	}
	for _, name := range []string{"SecureBoot", "SetupMode"} {
		b, err := os.ReadFile(filepath.Join(variables, name+global))
		if err == nil && len(b) == 5 {
			say("%s %d", name, b[4])
		}
	}
	for _, a := range args {
		key, value, _ := strings.Cut(a, "=")
		switch key {
		case "guest.boot":
			if err := bootOrder(strings.Split(value, ",")); err != nil {
				return err
			}
		case "guest.write":
			b, err := os.ReadFile("/usr/lib/guest/" + value)
			if err == nil {
				err = set(filepath.Base(value), b)
			}
			if err != nil {
				say("variable %s refused: %v", value, err)
			} else {
				say("variable %s written", value)
			}
		}
	}
	return nil
}

// set writes a variable, attributes in front. The kernel makes most of them immutable, against programs that delete everything.
func set(name string, b []byte) error {
	path := filepath.Join(variables, name)
	f, err := os.OpenFile(path, os.O_RDONLY, 0)
	if err == nil {
		defer f.Close()
		flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
		if err == nil && flags&immutable != 0 {
			err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^immutable)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	// The firmware takes a variable in one piece.
	return os.WriteFile(path, b, 0o644)
}

// bootOrder makes the programs what the firmware tries, one after the other: load options as in UEFI Specification, 3.1.3,
// whose device path is a file on any disk.
func bootOrder(programs []string) error {
	le := binary.LittleEndian
	order := []byte{7, 0, 0, 0} // kept, for boot services, for the running system
	for k, p := range programs {
		name, path, _ := strings.Cut(p, "=")
		file := utf16z(strings.ReplaceAll(path, "/", `\`))
		option := slices.Clone(order[:4])
		option = le.AppendUint32(option, 1) // active
		option = le.AppendUint16(option, uint16(len(file)+8))
		option = append(option, utf16z(name)...)
		option = append(option, 4, 4) // media, file path
		option = le.AppendUint16(option, uint16(len(file)+4))
		option = append(append(option, file...), 0x7f, 0xff, 4, 0)
		number := uint16(0x1000 + k)
		if err := set(fmt.Sprintf("Boot%04X%s", number, global), option); err != nil {
			return err
		}
		order = le.AppendUint16(order, number)
	}
	if err := set("BootOrder"+global, order); err != nil {
		return err
	}
	say("boot order %d", len(programs))
	return nil
}

func utf16z(text string) []byte {
	var b []byte
	for _, u := range append(utf16.Encode([]rune(text)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
