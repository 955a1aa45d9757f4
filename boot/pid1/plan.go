package pid1

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Sysroot is where the physical root is mounted, and where the new root is put.
const Sysroot = "/sysroot"

// Step is one thing to do.
type Step interface {
	fmt.Stringer
	do(*run) error
}

// run is a plan that is being executed.
type run struct {
	request  Request
	modules  []Module
	host     Host
	blocks   blocks
	device   Device
	init     string   // found in the new root
	problems []string // modules that did not load, told if something comes of it
	slow     []string // modules that took long
}

// Plan decides what to do between the kernel's command line and the system's init.
func Plan(r Request, modules []Module) []Step {
	boot := 0
	for _, m := range modules {
		if m.When == WhenBoot {
			boot++
		}
	}
	steps := []Step{stepModules{boot}, stepPhase{"enter-initrd"}, stepDevice{r.Root, r.Wait},
		stepMount{r.Types, r.Flags, r.Mount, r.ReadOnly}, stepSetUp{}, stepFindInit{r.Init}, stepHandOver{}, stepPhase{"leave-initrd"}}
	for _, dir := range moved {
		steps = append(steps, stepMove{dir})
	}
	return append(steps, stepSwitch{}, stepExecute{})
}

// Format returns the plan as text, a step a line.
func Format(steps []Step) string {
	var b strings.Builder
	for _, s := range steps {
		fmt.Fprintln(&b, s)
	}
	return b.String()
}

// stepModules loads the modules for any root.
type stepModules struct{ count int }

// stepDevice waits for the device of the physical root.
type stepDevice struct {
	root Source
	wait time.Duration
}

// stepMount mounts it.
type stepMount struct {
	types    []string
	data     string
	flags    uintptr
	readOnly bool
}

// stepSetUp makes the image the root.
type stepSetUp struct{}

func (s stepModules) String() string { return fmt.Sprintf("load %d kernel modules", s.count) }
func (s stepDevice) String() string {
	if s.wait == forEver {
		return fmt.Sprintf("wait for %v, for ever", s.root)
	}
	return fmt.Sprintf("wait for %v, at most %v", s.root, s.wait)
}
func (s stepMount) String() string {
	text := "mount it at " + Sysroot
	if len(s.types) > 0 {
		text += " as " + strings.Join(s.types, " or ")
	}
	if s.readOnly {
		text += ", read-only"
	}
	if s.data != "" {
		text += ", with " + s.data
	}
	return text
}
func (s stepSetUp) String() string { return "make the composefs image the root at " + Sysroot }

func (s stepModules) do(r *run) error {
	r.load(WhenBoot)
	return nil
}

// load loads the modules for a type of file system. That one fails is told later, if what it is needed for fails.
func (r *run) load(when string) {
	for _, m := range r.modules {
		if m.When != when {
			continue
		}
		start := time.Now()
		if err := m.load(r.request); err != nil {
			r.problems = append(r.problems, err.Error())
		}
		if took := time.Since(start); took >= 100*time.Millisecond {
			r.slow = append(r.slow, fmt.Sprintf("%s %d ms", m.Name(), took.Milliseconds()))
		}
	}
}

func (s stepDevice) do(r *run) error {
	loader := ""
	if s.root.Kind == Auto {
		var err error
		if loader, err = readLoaderPartition(); err != nil {
			return fmt.Errorf("no root= on the kernel command line, and the boot loader does not tell its partition: add root=UUID=...: %w", err)
		}
	}
	const first, longest = 5 * time.Millisecond, 200 * time.Millisecond
	start := time.Now()
	told := false
	for pause := first; ; pause = min(2*pause, longest) {
		device, ok, seen, err := r.blocks.find(s.root, loader)
		if err != nil {
			return err
		}
		if ok {
			r.device = device
			return nil
		}
		waited := time.Since(start)
		if waited >= s.wait {
			return notFound(s, seen, r.problems)
		}
		if waited > 5*time.Second && !told {
			told = true
			r.host.Report(Info, fmt.Sprintf("still waiting for %v", s.root))
		}
		time.Sleep(pause)
	}
}

// notFound says what to do and what there is. The list comes last, since long messages are cut.
func notFound(s stepDevice, seen, problems []string) error {
	text := "there is no block device: put the disk's driver into the initramfs (composefs-boot initrd build --module NAME)"
	if len(seen) > 0 {
		text = "correct root= on the kernel command line, or add rootwait; there is " + strings.Join(seen, ", ")
	}
	if len(problems) > 0 {
		text += "; not loaded: " + strings.Join(problems, ", ")
	}
	return fmt.Errorf("not found in %v: %s", s.wait, text)
}

// readLoaderPartition reads which partition the boot loader was started from.
func readLoaderPartition() (uuid string, err error) {
	err = withVariables(func(dir string) error {
		uuid, err = loaderPartition(dir)
		return err
	})
	return uuid, err
}

func (s stepMount) do(r *run) error {
	types := s.types
	if len(types) == 0 {
		f, err := r.device.Identify()
		if err != nil {
			return fmt.Errorf("%s: %w: say rootfstype= on the kernel command line", r.device.Path, err)
		}
		if f.Type == "LUKS" {
			return fmt.Errorf("%s is encrypted, and this initramfs has no keys: use the one that dracut makes", r.device.Path)
		}
		types = []string{f.Type}
	}
	flags := s.flags
	// The partition table decides where the command line does not even say where the root is.
	if s.readOnly || r.device.ReadOnly && r.request.Root.Kind == Auto {
		flags |= unix.MS_RDONLY
	}
	var errs []error
	for _, t := range types {
		r.load(t)
		err := unix.Mount(r.device.Path, Sysroot, t, flags, s.data)
		if err == nil {
			return nil
		}
		if err == unix.ENODEV {
			err = fmt.Errorf("this kernel knows no %s: put its module into the initramfs (composefs-boot initrd build --module %s)", t, t)
			if len(r.problems) > 0 {
				err = fmt.Errorf("%w; not loaded: %s", err, strings.Join(r.problems, ", "))
			}
		}
		errs = append(errs, fmt.Errorf("%s as %s: %w", r.device.Path, t, err))
	}
	return errors.Join(errs...)
}

func (s stepSetUp) do(r *run) error {
	// The rules of udev make this link for a root that is found by its type; setting up the root looks for it.
	if r.request.Root.Kind == Auto {
		os.Symlink(r.device.Name, "/dev/gpt-auto-root")
	}
	return r.host.SetUp()
}
