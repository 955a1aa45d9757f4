package initrd

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/pid1"
)

// Storage are the drivers of what a root is found on, in the order in which they are loaded. Those that a kernel does not
// have, or has built in, are left out.
var Storage = []string{
	// Buses.
	"virtio_pci", "virtio_mmio", "pci_hyperv", "vmd", "xhci_pci", "ehci_pci",
	// Disks of virtual machines.
	"virtio_blk", "virtio_scsi", "xen_blkfront", "hv_storvsc", "vmw_pvscsi",
	// Disks of other machines.
	"nvme", "ahci", "ata_piix", "sd_mod", "usb_storage", "uas", "sdhci_pci", "sdhci_acpi", "mmc_block", "ufshcd_pci",
	"megaraid_sas", "mpt3sas",
}

// Needed are the modules that the root mount itself needs. The digests of fs-verity are computed by the fastest driver that
// the processor can use, and the TPM is extended with the phases of the boot.
var Needed = []string{
	"erofs", "overlay", "loop", "efivarfs", "tpm_crb", "tpm_tis",
	"sha256_generic", "sha512_generic", "sha256", "sha512", "sha256_ssse3", "sha512_ssse3", "sha2_ce", "sha512_ce",
	"crc32c_generic", "crc32c_intel", "crc32c",
}

// Roots are the file systems that the physical root may have. Their modules are loaded for such a root only.
var Roots = []string{"ext4", "btrfs", "xfs"}

// Limits of the files that depmod writes, in bytes; a large kernel's modules.alias has 2 MiB.
const maxDepmod = 64 << 20

// module is a module to be loaded.
type module struct {
	when string // as in pid1.Module
	file string // relative to the directory of modules
}

// depmod is what depmod has found out about the modules of a kernel: depmod(8), modules.dep(5).
type depmod struct {
	file    map[string]string   // by name
	needs   map[string][]string // files, by file, what is needed last first
	before  map[string][]string // names of soft dependencies, by name
	after   map[string][]string
	alias   map[string][]string // names by literal alias
	builtin map[string]bool
}

// readDepmod reads modules.dep, and the other files if they are there.
func readDepmod(dir fs.FS) (*depmod, error) {
	d := &depmod{file: map[string]string{}, needs: map[string][]string{}, before: map[string][]string{}, after: map[string][]string{},
		alias: map[string][]string{}, builtin: map[string]bool{}}
	for _, f := range []struct {
		name string
		line func(string) error
	}{
		{"modules.dep", d.dep}, {"modules.softdep", d.softdep}, {"modules.weakdep", d.softdep}, {"modules.alias", d.aliases},
		{"modules.builtin", func(line string) error {
			d.builtin[nameOf(line)] = true
			return nil
		}},
	} {
		text, err := readDepmodFile(dir, f.name)
		if os.IsNotExist(err) && f.name != "modules.dep" {
			continue
		}
		if os.IsNotExist(err) {
			return nil, fmt.Errorf("%w: run depmod (depmod -b DIRECTORY VERSION for a system that is not running)", err)
		}
		if err != nil {
			return nil, err
		}
		number := 0
		for line := range strings.Lines(text) {
			number++
			if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
				continue
			}
			if err := f.line(line); err != nil {
				return nil, fmt.Errorf("%s: line %d: %w", f.name, number, err)
			}
		}
	}
	return d, nil
}

func readDepmodFile(dir fs.FS, name string) (string, error) {
	f, err := dir.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxDepmod+1))
	if err == nil && len(b) > maxDepmod {
		err = fmt.Errorf("%s: %w: more than %d bytes", name, errTooLarge, maxDepmod)
	}
	return string(b), err
}

// dep takes a line "FILE: FILE...".
func (d *depmod) dep(line string) error {
	file, needs, ok := strings.Cut(line, ":")
	if !ok {
		return fmt.Errorf("%.200q: want FILE: FILE...", line)
	}
	files := append([]string{file}, strings.Fields(needs)...)
	for _, f := range files {
		if !filepath.IsLocal(f) || path.Clean(f) != f || strings.ContainsAny(f, " \x00") {
			return fmt.Errorf("%.200q: want a path below the directory", f)
		}
	}
	d.file[nameOf(file)], d.needs[file] = file, files[1:]
	return nil
}

// softdep takes a line "softdep NAME pre: NAME... post: NAME..." or "weakdep NAME NAME". Some modules leave "pre:" out; kmod
// then ignores the line, and so do we: it is what the module asks for itself when it needs it.
func (d *depmod) softdep(line string) error {
	words := strings.Fields(line)
	if len(words) < 2 {
		return fmt.Errorf("%.200q: want softdep NAME pre: NAME...", line)
	}
	name := kernelName(words[1])
	var where map[string][]string
	if words[0] == "weakdep" {
		where = d.before // asked for at run time, when nobody is there to load it
	}
	for _, w := range words[2:] {
		switch {
		case w == "pre:":
			where = d.before
		case w == "post:":
			where = d.after
		case where != nil:
			where[name] = append(where[name], w)
		}
	}
	return nil
}

// aliases takes a line "alias ALIAS NAME". Those with wildcards are for devices.
func (d *depmod) aliases(line string) error {
	words := strings.Fields(line)
	if len(words) == 3 && !strings.ContainsAny(words[1], "*?[") {
		d.alias[words[1]] = append(d.alias[words[1]], kernelName(words[2]))
	}
	return nil
}

// nameOf returns the name of the module in a file.
func nameOf(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return kernelName(name)
}

func kernelName(name string) string { return strings.ReplaceAll(name, "-", "_") }

// choose returns the modules of the built-in lists and the named ones, with all that they need, in the order in which they
// are loaded. It is an error if a named one is not there.
func (d *depmod) choose(names []string) ([]module, error) {
	always := &closure{depmod: d, when: pid1.WhenBoot, seen: map[string]bool{}}
	for _, name := range slices.Concat(Storage, Needed) {
		always.name(name)
	}
	for _, name := range names {
		if !always.name(name) {
			return nil, fmt.Errorf("module %s: this kernel has none: leave it out, or take another kernel", name)
		}
	}
	list := always.list
	for _, root := range Roots {
		// Each file system has its own list: only one of them is loaded.
		own := &closure{depmod: d, when: root, seen: map[string]bool{}}
		for file := range always.seen {
			own.seen[file] = true
		}
		own.name(root)
		list = append(list, own.list...)
	}
	return list, nil
}

// closure collects modules with all that they need.
type closure struct {
	*depmod
	when string
	seen map[string]bool // files
	list []module
}

// name adds the module of a name, or those of an alias. It reports whether the kernel has one or has it built in.
func (c *closure) name(name string) bool {
	if file, ok := c.depmod.file[kernelName(name)]; ok {
		c.add(file)
		return true
	}
	found := c.builtin[kernelName(name)]
	for _, module := range c.alias[name] {
		if file, ok := c.depmod.file[module]; ok {
			c.add(file)
		}
		found = true
	}
	return found
}

// add adds a file after what it needs. Soft dependencies may form circles.
func (c *closure) add(file string) {
	if c.seen[file] {
		return
	}
	c.seen[file] = true
	name := nameOf(file)
	for _, before := range c.before[name] {
		c.name(before)
	}
	for _, need := range slices.Backward(c.needs[file]) {
		c.add(need)
	}
	c.list = append(c.list, module{c.when, file})
	for _, after := range c.after[name] {
		c.name(after)
	}
}
