// Package pid1 is what an initramfs does around the root mount, when composefs-setup-root is its /init.
//
// It mounts /proc, /sys, /dev and /run, loads the kernel modules of a list, waits for the device that root= names, mounts
// it at /sysroot, has the root set up by its caller, moves the four mounts there, deletes the initramfs, and executes the
// system's init. What is to be done is a list of steps that print themselves ([Plan]). Where systemd's initramfs is watched by
// the TPM, it does the same: PCR 11 is extended with the phases of the boot, and what systemd-stub left is handed over.
//
// What it relies on:
//
//   - The disk is not trusted: partition tables and superblocks are read only to find the device. Whatever is found, its
//     content counts only if the digest on the command line vouches for it.
//   - The command line may be longer than what was signed: the first root= counts, and init= only if the caller says so.
//   - There is no shell, and no program but this one. A failure is told on the console; then the machine halts, or
//     restarts if the command line has composefs.onfail=reboot.
package pid1

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Level is how important a message is, as the kernel writes it before messages.
type Level string

// The levels.
const (
	Error Level = "<3>"
	Warn  Level = "<4>"
	Info  Level = "<6>"
)

// Host is what the package needs of the program that it is part of.
type Host struct {
	// Signed tells whether somebody vouches for the kernel command line, so that init= counts.
	Signed func() (bool, error)
	// SetUp makes the composefs image the root at Sysroot, where the physical root is mounted.
	SetUp func() error
	// Report tells people something: a line on the console.
	Report func(Level, string)
}

// restartDelay is how long the reason can be read before a restart.
const restartDelay = 5 * time.Second

// Run is the life of process 1: it becomes the system's init, or ends in a halt or restart. It does not return.
func Run(h Host) {
	onFail := Halt
	err := boot(h, &onFail)
	h.Report(Error, err.Error())
	end(h, onFail)
}

// boot returns only if there is an error.
func boot(h Host, onFail *OnFail) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("a defect of this program: %v", p)
		}
	}()
	if err := mountAPI(); err != nil {
		return err
	}
	openConsole()
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	signed, err := h.Signed()
	if err != nil {
		return err
	}
	request, err := ParseRequest(string(line), signed)
	*onFail = request.Fail
	if err != nil {
		return err
	}
	text, err := os.ReadFile(ModuleList)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	modules, err := ParseModules(text)
	if err != nil {
		return fmt.Errorf("%s: %w", ModuleList, err)
	}
	r := &run{request: request, modules: modules, host: h, blocks: blocks{"/sys/class/block", "/dev"}}
	return r.execute(Plan(request, modules))
}

// execute carries out the steps, the last of which does not return if all is well. Before that one it tells how long the
// others took.
func (r *run) execute(steps []Step) error {
	var times []string
	for k, s := range steps {
		if k == len(steps)-1 {
			text := "initramfs done: " + strings.Join(times, ", ")
			if len(r.slow) > 0 {
				text += " (slow modules: " + strings.Join(r.slow, ", ") + ")"
			}
			r.host.Report(Info, text)
		}
		start := time.Now()
		if err := s.do(r); err != nil {
			return fmt.Errorf("%v: %w", s, err)
		}
		if took := time.Since(start); took >= time.Millisecond {
			name, _, _ := strings.Cut(s.String(), " ")
			times = append(times, fmt.Sprintf("%s %d ms", name, took.Milliseconds()))
		}
	}
	return nil
}

// mountAPI mounts what the kernel shows. What is mounted already, as /dev may be, stays.
func mountAPI() error {
	// As systemd mounts them, which leaves alone what is mounted.
	const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		dir, kind string
		flags     uintptr
		data      string
	}{
		{"/proc", "proc", quiet, ""},
		{"/sys", "sysfs", quiet, ""},
		{"/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_STRICTATIME, "mode=0755,size=4m,nr_inodes=1m"},
		{"/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_STRICTATIME, "mode=0755,size=20%,nr_inodes=800k"},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.dir, m.kind, m.flags, m.data); err != nil && err != unix.EBUSY {
			return fmt.Errorf("%s: mount %s: %w", m.dir, m.kind, err)
		}
	}
	return os.MkdirAll(Sysroot, 0o755)
}

// openConsole makes the console standard input, output and error. The kernel does it, unless /dev/console is missing in the
// initramfs; then they are /dev/null.
func openConsole() {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return
	}
	for k := range 3 {
		unix.Dup3(fd, k, 0) // an error, and right, where they are the same
	}
	if fd > 2 {
		unix.Close(fd)
	}
}

// end says what happens now, and does it.
func end(h Host, onFail OnFail) {
	if onFail == Reboot {
		h.Report(Error, fmt.Sprintf("this system does not boot: restarting in %v, as composefs.onfail=reboot says", restartDelay))
	} else {
		h.Report(Error, "this system does not boot: halted. Restart and choose another boot entry, or repair the disk from another system")
	}
	unix.Sync()
	command := unix.LINUX_REBOOT_CMD_HALT
	if onFail == Reboot {
		time.Sleep(restartDelay)
		command = unix.LINUX_REBOOT_CMD_RESTART
	}
	unix.Reboot(command)
	for { // if the machine cannot even do that
		time.Sleep(time.Hour)
	}
}
