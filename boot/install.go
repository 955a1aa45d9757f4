package boot

import (
	"bytes"
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
)

// System is an operating system that is ready to be installed: its image is made, and its files can be opened.
type System struct {
	Tree      *fstree.Tree // as Transform left it; Resources were found before that
	Open      fstree.Open
	Digest    fsverity.Digest
	Format    erofs.Format
	Resources []Resource
	Release   OSRelease
}

// Deployment says how a system is to be installed.
type Deployment struct {
	// RootArgument tells the initramfs where the physical root is, "root=UUID=...".
	RootArgument string
	// Arguments are added to the kernel command line.
	Arguments []string
	// Insecure boots the image without verification.
	Insecure bool
	// Arch is the architecture as Go names it.
	Arch string
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
}

// efiNames are the names of the boot loader by architecture: in the tree and at the place where firmware looks.
var efiNames = map[string][2]string{
	"amd64":   {"systemd-bootx64.efi", "BOOTX64.EFI"},
	"arm64":   {"systemd-bootaa64.efi", "BOOTAA64.EFI"},
	"riscv64": {"systemd-bootriscv64.efi", "BOOTRISCV64.EFI"},
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
	hexDigest := s.Digest.String()
	image := karg.Make(s.Digest, version, d.Insecure).String()
	line := strings.Join(append([]string{image, d.RootArgument, "rw"}, d.Arguments...), " ")
	if c, err := karg.Parse(line); err != nil || c.Images[0].String() != image {
		return Plan{}, fmt.Errorf("kernel arguments %q: they would change which image is booted", d.Arguments)
	}
	p := Plan{Digest: s.Digest, Karg: line, State: "state/deploy/" + hexDigest}
	loader, err := loaderFiles(s, d.Arch)
	if err != nil {
		return p, err
	}
	p.ESP = loader
	kind, sum, err := p.bootFiles(s)
	if err != nil {
		return p, err
	}
	if kind == "uki" {
		if len(d.Arguments) > 0 || d.Insecure {
			return p, errors.New("the unified kernel image in the tree has its own command line: no argument can be added to it")
		}
		p.Karg = ""
	}
	origin := fmt.Sprintf("[boot]\nboot_type=%s\ndigest=%s\n", kind, sum)
	p.Files = []Place{text(p.State+"/"+hexDigest+".origin", origin)}
	for _, f := range p.ESP {
		p.ESPSize += f.Size
	}
	if v := s.Tree.Lookup("var"); v != nil && v.Dir() != nil {
		p.Var = v
	}
	return p, nil
}

func text(name, content string) Place {
	return Place{Path: name, Size: int64(len(content)),
		Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }}
}

func (s System) place(name string, f File) Place {
	return Place{Path: name, Size: int64(f.Inode.Size()), Open: func() (io.ReadCloser, error) {
		if inline, ok := f.Inode.Content.(fstree.Inline); ok {
			return io.NopCloser(bytes.NewReader(inline)), nil
		}
		return s.Open(f.Path, f.Inode)
	}}
}

// loaderFiles are systemd-boot, from the tree, and its configuration.
func loaderFiles(s System, arch string) ([]Place, error) {
	names, ok := efiNames[arch]
	if !ok {
		return nil, fmt.Errorf("architecture %s: no boot loader is known for it", arch)
	}
	dir := "/usr/lib/systemd/boot/efi/"
	loader := regular(s.Tree, dir+names[0]+".signed")
	if loader == nil {
		loader = regular(s.Tree, dir+names[0])
	}
	if loader == nil {
		return nil, fmt.Errorf("no boot loader in the tree: add %s%s (Debian: systemd-boot-efi)", dir[1:], names[0])
	}
	list := []Place{
		s.place("EFI/BOOT/"+names[1], *loader),
		s.place("EFI/systemd/"+names[0], *loader),
		text("loader/loader.conf", "timeout 3\nconsole-mode keep\neditor no\n"),
	}
	for k := range list {
		list[k].Loader = true
	}
	return list, nil
}

// bootFiles adds the kernel and the entry of the system. It returns how it is booted, in bootc's words, and the SHA-256 of
// what is.
func (p *Plan) bootFiles(s System) (kind, sum string, err error) {
	for _, r := range slices.Backward(s.Resources) {
		if r.Kind == KindUKI {
			h := sha256.New()
			if err := s.hash(h, r.Kernel); err != nil {
				return "", "", err
			}
			// Not under its name in the tree, which another version's may have as well.
			p.ESP = append(p.ESP, s.place("EFI/Linux/composefs-"+p.Digest.String()[:32]+".efi", r.Kernel))
			return "uki", hex.EncodeToString(h.Sum(nil)), nil
		}
	}
	var best *Resource
	for k := range s.Resources {
		if r := &s.Resources[k]; len(r.Initrds) > 0 {
			best = r // the newest, which is the last
		}
	}
	if best == nil {
		return "", "", errNoKernel
	}
	h := sha256.New()
	for _, f := range append([]File{best.Kernel}, best.Initrds...) {
		if err := s.hash(h, f); err != nil {
			return "", "", err
		}
	}
	sum = hex.EncodeToString(h.Sum(nil))
	// Deployments with the same kernel share its files, as with bootc.
	dir := "EFI/Linux/bootc_composefs-" + sum
	entry := &bls.Entry{}
	set := func(key string, values ...string) {
		if err == nil {
			err = entry.SetAll(key, values)
		}
	}
	set("title", s.Release.PrettyName)
	if s.Release.VersionID != "" {
		set("version", s.Release.VersionID)
	}
	set("sort-key", s.Release.ID)
	set("linux", "/"+dir+"/vmlinuz")
	p.ESP = append(p.ESP, s.place(dir+"/vmlinuz", best.Kernel))
	var initrds []string
	for k, f := range best.Initrds {
		name := dir + "/initrd"
		if k > 0 {
			name = fmt.Sprintf("%s%d", name, k+1)
		}
		initrds = append(initrds, "/"+name)
		p.ESP = append(p.ESP, s.place(name, f))
	}
	set("initrd", initrds...)
	set("options", p.Karg)
	if err != nil {
		return "", "", err
	}
	p.ESP = append(p.ESP, text("loader/entries/composefs-"+p.Digest.String()[:32]+".conf", string(entry.Bytes())))
	return "bls", sum, nil
}

func (s System) hash(h io.Writer, f File) error {
	r, err := s.place("", f).Open()
	if err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	defer r.Close()
	_, err = io.Copy(h, r)
	return err
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
	dir(p.State + "/etc")
	if p.Var != nil {
		dir(p.State).Set("var", p.Var)
	} else {
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
