// Package initrd builds an initramfs that has one program: composefs-setup-root, as /init.
//
// # What is in it
//
//	[microcode]                      an archive of its own in front, never compressed, for the kernel's early loader
//	init                             composefs-setup-root; package boot/pid1 says what it does
//	usr/lib/composefs/modules        which kernel modules are loaded, in their order: [pid1.ParseModules]
//	usr/lib/composefs/setup-root-conf.toml
//	usr/lib/modules/VERSION/...      the modules, not compressed: the archive is
//	usr/lib/firmware/...             the same; lib is a link to usr/lib
//	dev/console                      and empty directories to mount on
//
// The format is newc cpio, which the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst). There is
// no shell, no udev and no kmod: dependencies of modules are known when the archive is made.
//
// # Reproducibility
//
// Names are sorted, every time is [Config.Time], every owner is root, and inode numbers count up: the same input gives the
// same bytes, whoever builds it. It needs no privileges: the only device node is a record in the archive.
package initrd

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/composefs-boot/composefs-boot/boot/pid1"
)

// Config says what is to be in an initramfs. It holds plain values; nothing is read before [Config.Plan].
type Config struct {
	// SetupRoot is the path of the program composefs-setup-root, statically linked.
	SetupRoot string
	// ModulesDir is the directory of a kernel's modules, with modules.dep: usr/lib/modules/VERSION of some system. "" for a
	// kernel that has everything built in.
	ModulesDir string
	// System has SetupRoot and ModulesDir where their paths do not begin with a slash; nil: all files are on this machine.
	System fs.FS
	// Modules are names of modules to be loaded beside [Storage], [Needed] and those of [Roots].
	Modules []string
	// FirmwareDir is where Firmware is looked for; "" means ModulesDir/../../firmware.
	FirmwareDir string
	// Firmware are names as drivers ask for them, "vendor/file.bin", or patterns as of path.Match.
	Firmware []string
	// MicrocodeDir is a directory with intel-ucode and amd-ucode, as Linux firmware has them; "" for no microcode.
	MicrocodeDir string
	// SetupConfig is the text of setup-root-conf.toml; nil for none, which means the defaults.
	SetupConfig []byte
	Compression Compression
	// Time is SOURCE_DATE_EPOCH: the time of everything. The zero value means 1970-01-01.
	Time time.Time
}

// Plan is what an initramfs will have. The contents have been read.
type Plan struct {
	// Files are all entries of the archive, sorted by path.
	Files []File
	// Early are those of the microcode's archive, in front.
	Early []File
	// Modules are the kernel modules in the order in which they are loaded.
	Modules []pid1.Module

	compression Compression
	time        time.Time
}

// File is an entry of an archive.
type File struct {
	Path string // without a slash in front
	Mode uint32 // type and permissions, as in stat(2)
	Data []byte // of a file; the target of a link
	// Major and Minor are those of a device.
	Major, Minor uint32
}

// Size is the number of bytes of the content.
func (f File) Size() int64 { return int64(len(f.Data)) }

// IsDir reports whether it is a directory.
func (f File) IsDir() bool { return f.Mode&cpio.S_IFMT == typeDir }

// maxFile limits a file that is taken in, in bytes, after decompression.
const maxFile = 512 << 20

// Write plans and writes an initramfs.
func Write(ctx context.Context, w io.Writer, c Config) error {
	p, err := c.Plan(ctx)
	if err != nil {
		return err
	}
	return p.Write(w)
}

// Plan reads what is to be in the initramfs. It errs if a module or firmware is missing that is asked for by name; modules
// of the built-in lists that the kernel does not have are left out.
func (c Config) Plan(ctx context.Context) (*Plan, error) {
	p := &Plan{compression: c.Compression, time: c.Time}
	program, machine, err := c.readProgram()
	if err != nil {
		return nil, err
	}
	b := builder{}
	b.file("init", 0o755, program)
	b.add(File{Path: "dev/console", Mode: typeChar | 0o600, Major: 5, Minor: 1})
	b.add(File{Path: "lib", Mode: typeLink | 0o777, Data: []byte("usr/lib")})
	for _, dir := range []string{"proc", "sys", "dev", "run", "sysroot", "usr/lib"} {
		b.dir(dir)
	}
	if c.SetupConfig != nil {
		b.file("usr/lib/composefs/setup-root-conf.toml", 0o644, c.SetupConfig)
	}
	if c.ModulesDir != "" {
		if p.Modules, err = b.modules(ctx, c, machine); err != nil {
			return nil, err
		}
	} else if len(c.Modules) > 0 {
		return nil, fmt.Errorf("module %s: no directory of modules is given", c.Modules[0])
	}
	if err := b.firmware(ctx, c); err != nil {
		return nil, err
	}
	p.Files = b.sorted()
	if c.MicrocodeDir != "" {
		if p.Early, err = microcode(c.MicrocodeDir); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// inSystem tells where a file or directory is.
func (c Config) inSystem(name string) bool { return c.System != nil && !filepath.IsAbs(name) }

// readProgram reads composefs-setup-root, and refuses what would not run.
func (c Config) readProgram() ([]byte, elf.Machine, error) {
	name := c.SetupRoot
	var data []byte
	var err error
	if c.inSystem(name) {
		data, err = fs.ReadFile(c.System, name)
	} else {
		data, err = readFile(name)
	}
	if err != nil {
		return nil, 0, err
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, 0, fmt.Errorf("%s: not a program: %w", name, err)
	}
	for _, s := range f.Progs {
		if s.Type == elf.PT_INTERP {
			return nil, 0, fmt.Errorf("%s: dynamically linked, and the initramfs has no libraries: build it with CGO_ENABLED=0", name)
		}
	}
	return data, f.Machine, nil
}

// modules adds the kernel modules and the list of them.
func (b builder) modules(ctx context.Context, c Config, machine elf.Machine) ([]pid1.Module, error) {
	var dir fs.FS
	var err error
	if c.inSystem(c.ModulesDir) {
		dir, err = fs.Sub(c.System, c.ModulesDir)
	} else {
		// Symbolic links must not lead out of the directory.
		var root *os.Root
		if root, err = os.OpenRoot(c.ModulesDir); err == nil {
			defer root.Close()
			dir = root.FS()
		}
	}
	if err != nil {
		return nil, err
	}
	d, err := readDepmod(dir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.ModulesDir, err)
	}
	list, err := d.choose(c.Modules)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.ModulesDir, err)
	}
	real, err := filepath.Abs(c.ModulesDir)
	if err != nil {
		return nil, err
	}
	var result []pid1.Module
	for _, m := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		stem, _ := cutCompression(m.file)
		name := path.Join("usr/lib/modules", filepath.Base(real), stem)
		result = append(result, pid1.Module{When: m.when, Path: "/" + name})
		if b[name] != nil {
			continue // for another root as well
		}
		f, err := dir.Open(m.file)
		if err != nil {
			return nil, err
		}
		data, err := decompress(f, m.file)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(c.ModulesDir, m.file), err)
		}
		if header, err := elf.NewFile(bytes.NewReader(data)); err != nil {
			return nil, fmt.Errorf("%s: not a module: %w", filepath.Join(c.ModulesDir, m.file), err)
		} else if header.Machine != machine {
			return nil, fmt.Errorf("%s: for %v, but %s is for %v", filepath.Join(c.ModulesDir, m.file), header.Machine, c.SetupRoot, machine)
		}
		b.file(name, 0o644, data)
	}
	b.file(strings.TrimPrefix(pid1.ModuleList, "/"), 0o644, pid1.FormatModules(result))
	return result, nil
}

// firmware adds what Config.Firmware names.
func (b builder) firmware(ctx context.Context, c Config) error {
	if len(c.Firmware) == 0 {
		return nil
	}
	dir := c.FirmwareDir
	if dir == "" {
		if c.ModulesDir == "" {
			return fmt.Errorf("firmware %s: no directory of firmware is given", c.Firmware[0])
		}
		dir = filepath.Join(c.ModulesDir, "../../firmware")
	}
	for _, pattern := range c.Firmware {
		if !filepath.IsLocal(pattern) {
			return fmt.Errorf("firmware %q: want a path below %s", pattern, dir)
		}
		var names []string
		for _, ending := range append([]string{""}, endings...) {
			found, err := filepath.Glob(filepath.Join(dir, pattern+ending))
			if err != nil {
				return fmt.Errorf("firmware %q: %w", pattern, err)
			}
			names = append(names, found...)
		}
		if len(names) == 0 {
			return fmt.Errorf("firmware %s: not in %s", pattern, dir)
		}
		for _, name := range names {
			if err := ctx.Err(); err != nil {
				return err
			}
			data, err := readFile(name)
			if err != nil {
				return err
			}
			relative, err := filepath.Rel(dir, name)
			if err != nil {
				return err
			}
			stem, _ := cutCompression(relative)
			b.file("usr/lib/firmware/"+stem, 0o644, data)
		}
	}
	return nil
}

// readFile reads a file of the host, decompressed if its name says that it is compressed.
func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := decompress(f, name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return data, nil
}

// builder collects the entries of an archive by their paths.
type builder map[string]*File

func (b builder) add(f File) {
	if dir := path.Dir(f.Path); dir != "." {
		b.dir(dir)
	}
	b[f.Path] = &f
}

func (b builder) dir(name string) {
	if b[name] == nil {
		b.add(File{Path: name, Mode: typeDir | 0o755})
	}
}

func (b builder) file(name string, perm uint32, data []byte) {
	b.add(File{Path: name, Mode: typeFile | perm, Data: data})
}

// sorted returns the entries so that a directory comes before what is in it.
func (b builder) sorted() []File {
	var list []File
	for _, f := range b {
		list = append(list, *f)
	}
	slices.SortFunc(list, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return list
}

var errTooLarge = errors.New("too large")
