package pid1

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// ModuleList is where the list of modules is in the initramfs.
const ModuleList = "/usr/lib/composefs/modules"

// Module is a line of the list: "WHEN PATH".
type Module struct {
	// When is the type of the root file system for which the module is loaded: "xfs"; "boot": always, first of all.
	When string
	Path string // of the uncompressed file, absolute
}

// WhenBoot is what is loaded always.
const WhenBoot = "boot"

const (
	maxModuleList = 1 << 20 // bytes
	maxModules    = 4096
)

// Name is the module's name as the kernel has it.
func (m Module) Name() string { return moduleName(strings.TrimSuffix(path.Base(m.Path), ".ko")) }

// FormatModules writes a list that ParseModules reads.
func FormatModules(list []Module) []byte {
	var b strings.Builder
	b.WriteString("# Kernel modules in the order in which they are loaded: for any root (boot) or for a root of this type.\n")
	for _, m := range list {
		fmt.Fprintf(&b, "%s %s\n", m.When, m.Path)
	}
	return []byte(b.String())
}

// ParseModules reads a list. Empty lines and those that begin with "#" do not count. The error names the line.
func ParseModules(text []byte) ([]Module, error) {
	if len(text) > maxModuleList {
		return nil, fmt.Errorf("larger than %d bytes", maxModuleList)
	}
	var list []Module
	number := 0
	for line := range strings.Lines(string(text)) {
		number++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		when, file, _ := strings.Cut(line, " ")
		if !path.IsAbs(file) || path.Clean(file) != file || strings.ContainsAny(file, "\x00 ") {
			return nil, fmt.Errorf("line %d: %.200q: want WHEN /PATH", number, line)
		}
		if len(list) == maxModules {
			return nil, fmt.Errorf("line %d: more than %d modules", number, maxModules)
		}
		list = append(list, Module{when, file})
	}
	return list, nil
}

// load loads a module with what the command line has for it, and does not wait for the devices that it finds: the port of
// a disk controller where nothing is connected takes a second. That it is there already, or that the machine has nothing
// for it to do, is no error.
func (m Module) load(r Request) error {
	name := m.Name()
	if r.Without[name] {
		return nil
	}
	f, err := os.Open(m.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	parameters := append([]string{"async_probe"}, r.Parameters[name]...)
	err = unix.FinitModule(int(f.Fd()), strings.Join(parameters, " "), 0)
	if err == nil || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return fmt.Errorf("module %s: %w", name, err)
}
