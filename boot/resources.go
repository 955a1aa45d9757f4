package boot

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Kind is where a boot resource was found.
type Kind string

// The kinds of boot resources.
const (
	KindKernel Kind = "kernel" // usr/lib/modules/VERSION/vmlinuz with initramfs.img
	KindEntry  Kind = "entry"  // a type 1 entry below boot/loader/entries, with the files that it names
	KindUKI    Kind = "uki"    // boot/EFI/Linux/NAME.efi
)

// File is a file of a tree.
type File struct {
	Path  string // absolute, in the tree
	Inode *fstree.Inode
}

// Resource is something to boot that a tree brings.
type Resource struct {
	Kind    Kind
	Version string // of the kernel, if its path tells
	Kernel  File   // the kernel or unified kernel image
	Initrds []File
	Entry   *bls.Entry // of KindEntry
	Name    string     // of the entry's or the image's file
	Extra   []File     // of KindUKI: what is in NAME.efi.extra.d, such as addons
}

// ID is the name of an entry or a unified kernel image without extension and boot counter.
func (r Resource) ID() string {
	n, err := bls.ParseName(r.Name)
	if err != nil {
		return r.Name
	}
	return n.ID
}

// maxEntryFile limits what is read of an entry or os-release, in bytes.
const maxEntryFile = 1 << 20

// FindResources returns what there is to boot in a tree, before Transform empties /boot: type 1 entries, then unified kernel
// images, then kernels, each by their names, the newest last. An entry that names files which are not there is an error.
func FindResources(t *fstree.Tree, open fstree.Open) ([]Resource, error) {
	var list []Resource
	for _, e := range dirEntries(t, "/boot/loader/entries") {
		name := "/boot/loader/entries/" + e.Name
		if !strings.HasSuffix(e.Name, ".conf") || e.Inode.Type() != fstree.TypeRegular {
			continue
		}
		r, err := entryResource(t, open, name, e.Inode)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		list = append(list, r)
	}
	for _, e := range dirEntries(t, "/boot/EFI/Linux") {
		if strings.HasSuffix(strings.ToLower(e.Name), ".efi") && e.Inode.Type() == fstree.TypeRegular {
			r := Resource{Kind: KindUKI, Name: e.Name, Kernel: File{"/boot/EFI/Linux/" + e.Name, e.Inode}}
			extra := "/boot/EFI/Linux/" + r.ID() + extraSuffix
			for _, e := range dirEntries(t, extra) {
				if e.Inode.Type() == fstree.TypeRegular {
					r.Extra = append(r.Extra, File{extra + "/" + e.Name, e.Inode})
				}
			}
			list = append(list, r)
		}
	}
	modules := dirEntries(t, "/usr/lib/modules")
	slices.SortStableFunc(modules, func(a, b fstree.Entry) int { return bls.CompareVersions(a.Name, b.Name) })
	for _, e := range modules {
		dir := "/usr/lib/modules/" + e.Name
		kernel := regular(t, dir+"/vmlinuz")
		if kernel == nil {
			continue
		}
		r := Resource{Kind: KindKernel, Version: e.Name, Name: e.Name, Kernel: *kernel}
		if initrd := regular(t, dir+"/initramfs.img"); initrd != nil {
			r.Initrds = []File{*initrd}
		}
		list = append(list, r)
	}
	return list, nil
}

func dirEntries(t *fstree.Tree, name string) []fstree.Entry {
	if dir := t.Lookup(name); dir != nil && dir.Dir() != nil {
		return slices.Clone(dir.Dir().Entries)
	}
	return nil
}

// regular returns a regular file of the tree, nil if there is none of that name.
func regular(t *fstree.Tree, name string) *File {
	if inode := t.Lookup(name); inode != nil && inode.Type() == fstree.TypeRegular {
		return &File{name, inode}
	}
	return nil
}

func entryResource(t *fstree.Tree, open fstree.Open, name string, inode *fstree.Inode) (Resource, error) {
	r := Resource{Kind: KindEntry, Name: path.Base(name)}
	text, err := readSmall(open, name, inode)
	if err != nil {
		return r, err
	}
	if r.Entry, err = bls.Parse(text); err != nil {
		return r, err
	}
	file := func(value string) (File, error) {
		// Paths of an entry are those of the boot partition, which the tree has at /boot.
		f := regular(t, path.Join("/boot", path.Clean("/"+value)))
		if f == nil {
			return File{}, fmt.Errorf("it names %s, which is not in /boot", value)
		}
		return *f, nil
	}
	for _, key := range []string{"linux", "efi", "uki"} {
		if value := r.Entry.Get(key); value != "" {
			if r.Kernel, err = file(value); err != nil {
				return r, err
			}
			break
		}
	}
	if r.Kernel.Inode == nil {
		return r, fmt.Errorf("names nothing to boot: no linux, efi or uki")
	}
	for _, value := range r.Entry.All("initrd") {
		f, err := file(value)
		if err != nil {
			return r, err
		}
		r.Initrds = append(r.Initrds, f)
	}
	return r, nil
}

func readSmall(open fstree.Open, name string, inode *fstree.Inode) ([]byte, error) {
	if inline, ok := inode.Content.(fstree.Inline); ok {
		return inline, nil
	}
	if inode.Size() > maxEntryFile {
		return nil, fmt.Errorf("%d bytes, at most %d are read", inode.Size(), maxEntryFile)
	}
	f, err := open(name, inode)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxEntryFile))
}

// OSRelease is what os-release tells: /etc/os-release or, as is usual, /usr/lib/os-release.
type OSRelease struct {
	ID         string
	VersionID  string
	PrettyName string

	ImageVersion string
	Text         string // the whole file
}

// ReadOSRelease reads os-release; a tree without one is "linux".
func ReadOSRelease(t *fstree.Tree, open fstree.Open) (OSRelease, error) {
	os := OSRelease{ID: "linux", PrettyName: "Linux"}
	f := regular(t, "/etc/os-release")
	if f == nil {
		f = regular(t, "/usr/lib/os-release")
	}
	if f == nil {
		return os, nil
	}
	text, err := readSmall(open, f.Path, f.Inode)
	if err != nil {
		return os, fmt.Errorf("%s: %w", f.Path, err)
	}
	os.Text = string(text)
	values := parseOSRelease(os.Text)
	os.ID = cmp.Or(values["ID"], os.ID)
	os.PrettyName = cmp.Or(values["PRETTY_NAME"], os.PrettyName)
	os.VersionID, os.ImageVersion = values["VERSION_ID"], values["IMAGE_VERSION"]
	return os, nil
}

// VersionAt is what tells the builds of a release apart in the boot menu, the newest first: IMAGE_VERSION, or if there is none,
// VERSION_ID with the time.
func (r OSRelease) VersionAt(t time.Time) string {
	return cmp.Or(r.ImageVersion, strings.TrimPrefix(r.VersionID+t.UTC().Format(".20060102150405"), "."))
}

// parseOSRelease returns the values of os-release; of several with the same name the last one counts.
func parseOSRelease(text string) map[string]string {
	values := map[string]string{}
	for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
		key, value, _ := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		value = strings.Trim(value, `"'`)
		if value != "" && !strings.ContainsAny(value, "\x00\r\n") {
			values[key] = value
		}
	}
	return values
}
