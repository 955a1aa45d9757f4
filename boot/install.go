package boot

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/uki"
)

// System is an operating system that is ready to be installed: its image is made, and its files can be opened.
type System struct {
	Tree      *fstree.Tree // as Transform left it; Resources were found before that
	Open      fstree.Open
	Digest    fsverity.Digest
	Format    erofs.Format
	Resources []Resource
	Release   OSRelease
	// Merged tells that files of the same content and metadata are one inode, as in an OSTree commit. In /var, which is written
	// to, each is a file of its own.
	Merged bool
}

// Deployment says how a system is to be installed.
type Deployment struct {
	// ID is the name of the boot entry, without suffix; "" makes one of the image's digest.
	ID string
	// NoLoader leaves the boot loader out, which is there already.
	NoLoader bool
	// RootArgument tells the initramfs where the physical root is, "root=UUID=..."; "" if the arguments do.
	RootArgument string
	// Arguments are added to the kernel command line.
	Arguments []string
	// Version is what the boot menu sorts type 1 entries by, the newest first; "" for that of the release.
	Version string
	// Image and Manifest, or Refspec and Commit, are kept in the origin, see there.
	Image, Manifest string
	Refspec, Commit string
	// Insecure boots the image without verification.
	Insecure bool
	// Arch is the architecture as Go names it.
	Arch string

	// Unified makes a unified kernel image, for a system that brings none; nil makes a type 1 entry.
	Unified *Unified
	// Tries is how often the firmware may start a unified kernel image before it counts as bad, unless the system says that it
	// is good; 0 means that nobody counts.
	Tries uint
	// Addons are put beside unified kernel images.
	Addons []Addon
	// Sign signs what is made, for Secure Boot; nil leaves it unsigned.
	Sign *Signing
	// Enroll is keys for the firmware, which have to trust what is installed; nil for none.
	Enroll *Enrollment
	// Scratch keeps what goes to the ESP. It is needed as long as the plan.
	Scratch *Scratch
}

// Place is a file of an install: where it goes, how large it is, what is in it.
type Place struct {
	Path string // relative to the root of the ESP or of the physical root
	Size int64
	Open func() (io.ReadCloser, error) `json:"-"`
	// Loader marks the boot loader and its configuration, whose names other systems on the same ESP use as well.
	Loader bool
}

// Plan is what an install puts where. It is plain values; nothing has been written.
type Plan struct {
	Digest  fsverity.Digest
	Karg    string  // the whole kernel command line; "" if a unified kernel image brings its own
	ESP     []Place // in the order in which they are written: what names a file comes after it
	State   string  // directory of the deployment, relative to the physical root
	Files   []Place // below the physical root, besides the repository
	ESPSize int64   // bytes of ESP, the sum
	// Var is what /var begins with, from the image; nil if it has none.
	Var *fstree.Inode
	// Etc is what /etc begins with, if the state has all of it; nil if the state has the changes to that of the image.
	Etc *fstree.Inode
	// Carry is what comes from another deployment, see PlanCarry; nil: nothing.
	Carry *Carry
	// Freed is what is removed from the ESP before the plan is carried out, in bytes, see PrunePlan.
	Freed int64
}

// errNoKernel tells what a tree needs.
var errNoKernel = errors.New("nothing to boot in the tree: put the kernel at usr/lib/modules/VERSION/vmlinuz and its " +
	"initramfs beside it as initramfs.img, or a unified kernel image into boot/EFI/Linux")

// PlanInstall decides what is put onto the ESP and beside the repository.
func PlanInstall(s System, d Deployment) (Plan, error) {
	version := 1
	if s.Format == erofs.V2 {
		version = 2
	}
	image := karg.Make(s.Digest, version, d.Insecure)
	line := d.line(image)
	if c, err := karg.Parse(line); err != nil || c.Images[0] != image {
		return Plan{}, fmt.Errorf("kernel arguments %q: they would change which image is booted", d.Arguments)
	}
	p := Plan{Digest: s.Digest, Karg: line, State: statePath(s.Digest)}
	if d.ID == "" {
		d.ID = entryID(s.Digest)
	}
	if !d.NoLoader {
		loader, err := loaderFiles(s, d)
		if err != nil {
			return p, err
		}
		p.ESP = loader
	}
	// How it is booted, in bootc's words.
	kind, add := "bls", func() (string, error) { return p.entryFiles(s, d) }
	if d.Unified != nil || slices.ContainsFunc(s.Resources, func(r Resource) bool { return r.Kind == KindUKI }) {
		kind, add = "uki", func() (string, error) { return p.unifiedFiles(s, d, image) }
	} else if len(d.Addons) > 0 {
		return p, errors.New("an addon belongs to a unified kernel image, and the tree has none: make one with --uki")
	}
	sum, err := add()
	if err != nil {
		return p, err
	}
	origin := Origin{Image: d.Image, Manifest: d.Manifest, Refspec: d.Refspec, Commit: d.Commit, BootType: kind, BootDigest: sum,
		Native: d.Unified != nil && d.Unified.Native}
	p.Files = []Place{text(originPath(s.Digest), origin.text())}
	for _, f := range p.ESP {
		p.ESPSize += f.Size
	}
	if v := s.Tree.Lookup("var"); v != nil && v.Dir() != nil {
		p.Var = v
		if s.Merged {
			p.Var = unlinked(v)
		}
	}
	binds, err := s.bindsEtc()
	if etc := s.Tree.Lookup("etc"); binds && etc != nil && etc.Dir() != nil {
		p.Etc = unlinked(etc)
	}
	return p, err
}

// line is the kernel command line. The native initramfs follows init= in front of the image alone, where nobody can have
// appended it.
func (d Deployment) line(image karg.Image) string {
	var before, after []string
	for _, a := range d.Arguments {
		if strings.HasPrefix(a, "init=") {
			before = append(before, a)
		} else {
			after = append(after, a)
		}
	}
	fixed := []string{image.String(), d.RootArgument, "rw"}
	if d.RootArgument == "" {
		fixed = fixed[:1]
	}
	return strings.Join(slices.Concat(before, fixed, after), " ")
}

func text(name, content string) Place {
	return Place{Path: name, Size: int64(len(content)),
		Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }}
}

// entryFiles adds the kernel, its initramfs and the type 1 entry that names them. It returns the SHA-256 of kernel and
// initramfs.
func (p *Plan) entryFiles(s System, d Deployment) (sum string, err error) {
	var best *Resource
	for k := range s.Resources {
		if r := &s.Resources[k]; len(r.Initrds) > 0 {
			best = r // the newest, which is the last
		}
	}
	if best == nil {
		return "", errNoKernel
	}
	h := sha256.New()
	var contents []uki.Content
	for _, f := range append([]File{best.Kernel}, best.Initrds...) {
		c, err := d.Scratch.content(s, f)
		if err == nil {
			_, err = io.Copy(h, c.Reader())
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", f.Path, err)
		}
		contents = append(contents, c)
	}
	if err := d.verify(contents[0]); err != nil {
		return "", fmt.Errorf("%s: %w: or make a unified kernel image with --uki", best.Kernel.Path, err)
	}
	sum = hex.EncodeToString(h.Sum(nil))
	// Deployments with the same kernel share its files, as with bootc.
	dir := unifiedDir + kernelPrefix + sum
	entry := &bls.Entry{}
	set := func(key string, values ...string) {
		if err == nil {
			err = entry.SetAll(key, values)
		}
	}
	set("title", s.Release.PrettyName)
	if v := cmp.Or(d.Version, s.Release.VersionID); v != "" {
		set("version", v)
	}
	set("sort-key", s.Release.ID)
	set("linux", "/"+dir+"/vmlinuz")
	p.ESP = append(p.ESP, contentPlace(dir+"/vmlinuz", contents[0]))
	var initrds []string
	for k, c := range contents[1:] {
		name := dir + "/initrd"
		if k > 0 {
			name = fmt.Sprintf("%s%d", name, k+1)
		}
		initrds = append(initrds, "/"+name)
		p.ESP = append(p.ESP, contentPlace(name, c))
	}
	set("initrd", initrds...)
	set("options", p.Karg)
	if err != nil {
		return "", err
	}
	p.ESP = append(p.ESP, text("loader/entries/"+d.ID+".conf", string(entry.Bytes())))
	return sum, nil
}

// unlinked copies a directory, with an inode for each name.
func unlinked(i *fstree.Inode) *fstree.Inode {
	own := *i
	if d := i.Dir(); d != nil {
		content := &fstree.Directory{}
		for _, e := range d.Entries {
			content.Set(e.Name, unlinked(e.Inode))
		}
		own.Content = content
	} else {
		own.Nlink = 1
	}
	return &own
}

// ESPFiles returns the files of the ESP for a disk image.
func (p Plan) ESPFiles() []disk.File {
	var files []disk.File
	for _, f := range p.ESP {
		files = append(files, disk.File{Path: f.Path, Size: f.Size, Open: f.Open})
	}
	return files
}

// StateTree returns the physical root's files besides the repository as a tree: the state of the deployment with what /var
// begins with, owners and attributes included.
func (p Plan) StateTree() (*fstree.Tree, error) {
	t := fstree.New()
	dir := func(name string) *fstree.Directory {
		d := t.Root.Dir()
		for part := range strings.SplitSeq(name, "/") {
			next := d.Lookup(part)
			if next == nil {
				next = fstree.NewDir(0o755)
				d.Set(part, next)
			}
			d = next.Dir()
		}
		return d
	}
	if p.Etc != nil {
		dir(p.State).Set("etc", p.Etc)
	} else {
		dir(p.State + "/etc")
	}
	switch {
	case p.Carry != nil:
		dir(p.State).Set("var", &fstree.Inode{Perm: 0o777, Nlink: 1, Content: fstree.Symlink(p.Carry.link)})
		switch {
		case p.Carry.etc == nil:
		case p.Etc != nil:
			dir(p.State).Set("etc", p.Carry.etc)
		default:
			dir(p.State+"/etc").Set("upper", p.Carry.etc)
		}
	case p.Var != nil:
		dir(p.State).Set("var", p.Var)
	default:
		dir(p.State + "/var")
	}
	for _, f := range p.Files {
		r, err := f.Open()
		if err != nil {
			return nil, err
		}
		content, err := io.ReadAll(r)
		r.Close()
		if err != nil {
			return nil, err
		}
		dir(path.Dir(f.Path)).Set(path.Base(f.Path), &fstree.Inode{Perm: 0o644, Nlink: 1, Content: fstree.Inline(content)})
	}
	return t, nil
}
