package boot

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/uki"
)

// Unified says how a unified kernel image (UKI) is made for a system that brings none. What is not set is found in the tree:
// the newest kernel, the initramfs beside it, and systemd's stub.
type Unified struct {
	Linux  uki.Content
	Initrd uki.Content
	Stub   uki.Content
	// Native says that the initramfs was made for this system by the installer: so is that of an upgrade.
	Native bool
	// Version is the IMAGE_VERSION of the system, by which systemd-boot sorts the versions of a system, the newest first; "" for
	// that in os-release, or if there is none, VERSION_ID with the time.
	Version string
	// Time is the time in a version that has one.
	Time time.Time
	// Policy signs PCR policies, by which secrets in the TPM that are sealed to its public key can be had under this UKI.
	Policy *uki.PolicyKey
}

// Addon is a file for the directory beside a UKI: NAME.addon.efi, a program for UEFI without a kernel.
type Addon struct {
	Name    string
	Content uki.Content
}

// Scratch keeps what a plan is made of until it is executed: files that are open, and files without a name.
type Scratch struct {
	Dir   string // where there is room; "" for the usual place of temporary files
	files []io.Closer
}

// Close gives it all back.
func (s *Scratch) Close() error {
	var errs []error
	for _, f := range s.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Create makes a file without a name.
func (s *Scratch) Create() (*os.File, error) {
	f, err := os.CreateTemp(s.Dir, ".composefs-scratch-")
	if err != nil {
		return nil, err
	}
	s.files = append(s.files, f)
	return f, os.Remove(f.Name())
}

// Open opens a file of this machine.
func (s *Scratch) Open(name string) (uki.Content, error) {
	f, err := os.Open(name)
	if err != nil {
		return uki.Content{}, err
	}
	s.files = append(s.files, f)
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a file", name)
	}
	if err != nil {
		return uki.Content{}, err
	}
	return uki.Content{ReaderAt: f, Size: info.Size()}, nil
}

// content opens a file of the system.
func (s *Scratch) content(sys System, f File) (uki.Content, error) {
	if inline, ok := f.Inode.Content.(fstree.Inline); ok {
		return uki.Bytes(inline), nil
	}
	r, err := sys.Open(f.Path, f.Inode)
	if err != nil {
		return uki.Content{}, err
	}
	s.files = append(s.files, r)
	at, ok := r.(io.ReaderAt)
	if !ok {
		return uki.Content{}, fmt.Errorf("%s: not a file that can be read anywhere", f.Path)
	}
	return uki.Content{ReaderAt: at, Size: int64(f.Inode.Size())}, nil
}

// contentPlace is a file of an install that has the content.
func contentPlace(name string, c uki.Content) Place {
	return Place{Path: name, Size: c.Size, Open: func() (io.ReadCloser, error) { return opened{c.Reader()}, nil }}
}

// opened is content that is open as a file is; Scratch closes it.
type opened struct{ *io.SectionReader }

func (opened) Close() error { return nil }

// unifiedDir is where systemd-boot looks for UKIs.
const unifiedDir = "EFI/Linux/"

// unifiedFiles adds the UKIs of the system: those that it brings, or the one that is made. It returns the SHA-256 of the last
// one.
func (p *Plan) unifiedFiles(s System, d Deployment, image karg.Image) (sum string, err error) {
	var sealed []Resource
	for _, r := range s.Resources {
		if r.Kind == KindUKI {
			sealed = append(sealed, r)
		}
	}
	id := d.ID
	if len(sealed) == 0 {
		c, err := d.build(s, p.Karg)
		if err != nil {
			return "", err
		}
		return p.addUnified(id, c, d, nil)
	}
	if u := d.Unified; u != nil && (u.Linux.IsSet() || u.Initrd.IsSet() || u.Stub.IsSet() || u.Version != "") {
		return "", errors.New("the tree brings its own unified kernel image, which is taken as it is: leave out what another would be made of")
	}
	if len(d.Arguments) > 0 {
		return "", errors.New("the unified kernel image in the tree has its own command line: no argument can be added to it")
	}
	p.Karg = ""
	for _, r := range sealed {
		c, err := d.Scratch.content(s, r.Kernel)
		if err == nil {
			err = checkSealed(c, image)
		}
		if err == nil {
			err = d.verify(c)
		}
		if err != nil {
			return "", fmt.Errorf("%s: %w", r.Kernel.Path, err)
		}
		// Not under its name in the tree, which another version's may have as well.
		name := id
		if len(sealed) > 1 {
			name += "-" + r.ID()
		}
		var beside []Place
		for _, f := range r.Extra {
			c, err := d.Scratch.content(s, f)
			if err == nil && strings.HasSuffix(f.Path, addonSuffix) {
				err = d.checkAddon(Addon{path.Base(f.Path), c})
			}
			if err != nil {
				return "", fmt.Errorf("%s: %w", f.Path, err)
			}
			beside = append(beside, contentPlace(unifiedDir+name+extraSuffix+"/"+path.Base(f.Path), c))
		}
		if sum, err = p.addUnified(name, c, d, beside); err != nil {
			return "", err
		}
	}
	return sum, nil
}

// addUnified adds a UKI with what is beside it. The stub looks for that under the name without a counter.
func (p *Plan) addUnified(id string, c uki.Content, d Deployment, beside []Place) (sum string, err error) {
	for _, a := range d.Addons {
		if err := d.checkAddon(a); err != nil {
			return "", fmt.Errorf("%s: %w", a.Name, err)
		}
		beside = append(beside, contentPlace(unifiedDir+id+extraSuffix+"/"+a.Name, a.Content))
	}
	h := sha256.New()
	if _, err := io.Copy(h, c.Reader()); err != nil {
		return "", err
	}
	name := bls.Name{ID: id, Ext: ".efi", Counted: d.Tries > 0, Left: d.Tries}
	p.ESP = append(append(p.ESP, beside...), contentPlace(unifiedDir+name.String(), c))
	return hex.EncodeToString(h.Sum(nil)), nil
}

// build makes a UKI.
func (d Deployment) build(s System, line string) (c uki.Content, err error) {
	u := *d.Unified
	if !u.Linux.IsSet() {
		kernel := newestKernel(s.Resources, !u.Initrd.IsSet())
		if kernel == nil {
			return c, errNoKernel
		}
		if u.Linux, err = d.Scratch.content(s, kernel.Kernel); err != nil {
			return c, err
		}
		if !u.Initrd.IsSet() {
			var all []uki.Content
			for _, f := range kernel.Initrds {
				c, err := d.Scratch.content(s, f)
				if err != nil {
					return c, err
				}
				all = append(all, c)
			}
			u.Initrd = uki.Join(all...)
		}
	}
	if !u.Initrd.IsSet() {
		return c, errors.New("no initramfs for the kernel: nothing would set up the root")
	}
	if !u.Stub.IsSet() {
		name := "/usr/lib/systemd/boot/efi/linux" + strings.TrimPrefix(efiNames[d.Arch][0], "systemd-boot") + ".stub"
		f := regular(s.Tree, name)
		if f == nil {
			return c, fmt.Errorf("no stub for unified kernel images in the tree: add %s (Debian: systemd-boot-efi)", name[1:])
		}
		if u.Stub, err = d.Scratch.content(s, *f); err != nil {
			return c, err
		}
	}
	stub, err := uki.ParsePE(u.Stub, u.Stub.Size)
	if err != nil {
		return c, fmt.Errorf("stub: %w", err)
	}
	f, err := d.Scratch.Create()
	if err != nil {
		return c, err
	}
	layout, err := u.layout(stub, uki.Parts{
		Linux: u.Linux, Initrd: []uki.Content{u.Initrd}, Cmdline: uki.Text(line), OSRelease: uki.Text(u.osRelease(s.Release)),
	})
	if err == nil {
		err = layout.Write(f)
	}
	if err != nil {
		return c, err
	}
	c = uki.Content{ReaderAt: f, Size: layout.Size}
	if d.Sign != nil {
		c, err = d.Sign.sign(c, d.Scratch)
	}
	if err == nil {
		err = d.verify(c)
	}
	return c, err
}

// layout plans a UKI of parts, with a policy if there is a key for it.
func (u Unified) layout(stub *uki.PE, parts uki.Parts) (*uki.Layout, error) {
	if u.Policy != nil {
		der, err := x509.MarshalPKIXPublicKey(u.Policy.Signer.Public())
		if err != nil {
			return nil, err
		}
		parts.PCRPKey = uki.Bytes(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	}
	image, err := parts.Image(stub)
	if err != nil {
		return nil, err
	}
	if u.Policy != nil {
		behind, err := image.Behind(stub)
		if err != nil {
			return nil, err
		}
		hashes, err := uki.HashSections(behind, uki.Banks)
		if err == nil {
			_, err = image.AddPolicies(hashes, []uki.PolicyKey{*u.Policy}, nil)
		}
		if err != nil {
			return nil, fmt.Errorf("PCR policy: %w", err)
		}
	}
	return uki.Append(stub, image)
}

// Kernel returns the newest kernel in the tree's usr/lib/modules, nil if there is none.
func (s System) Kernel() *Resource { return newestKernel(s.Resources, false) }

// CanBless tells whether the system, once it is up, marks the boot entry that it was started by as good.
func (s System) CanBless() bool { return regular(s.Tree, "/usr/lib/systemd/systemd-bless-boot") != nil }

// SetupConfig returns the text of the tree's setup-root-conf.toml, nil if it has none.
func (s System) SetupConfig() ([]byte, error) {
	f := regular(s.Tree, "/usr/lib/composefs/setup-root-conf.toml")
	if f == nil {
		return nil, nil
	}
	b, err := readSmall(s.Open, f.Path, f.Inode)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Path, err)
	}
	return b, nil
}

// newestKernel returns the last of the kernels in usr/lib/modules.
func newestKernel(all []Resource, withInitrd bool) *Resource {
	for k := range slices.Backward(all) {
		if r := &all[k]; r.Kind == KindKernel && (len(r.Initrds) > 0 || !withInitrd) {
			return r
		}
	}
	return nil
}

// osRelease is the text by which systemd-boot names a UKI and sorts it: by IMAGE_ID or ID, then by IMAGE_VERSION. Most
// systems do not have that, and VERSION is the same for all builds of a release.
func (u Unified) osRelease(r OSRelease) string {
	version := u.Version
	if version == "" && r.ImageVersion == "" {
		version = r.VersionAt(u.Time)
	}
	text := r.Text
	if text == "" {
		text = fmt.Sprintf("ID=%s\nPRETTY_NAME=%q\n", r.ID, r.PrettyName)
	}
	if !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	if version != "" {
		text += "IMAGE_VERSION=" + version + "\n" // the last one counts
	}
	return text
}

// maxText limits a section that is read as text, in bytes. Command lines have 4096 at most on any architecture.
const maxText = 1 << 16

// sectionText returns what a section says that is in effect when a profile of a UKI, or an addon, is booted; "" if it has none.
func sectionText(m *uki.Image, profile int, name string) (string, error) {
	sections, err := m.Profile(profile)
	if err != nil {
		return "", err
	}
	for _, s := range sections {
		if s.Name != name {
			continue
		}
		if s.Size > maxText {
			return "", fmt.Errorf("section %s: %d bytes, at most %d are read", name, s.Size, maxText)
		}
		b, err := io.ReadAll(s.Reader())
		return string(bytes.TrimRight(b, "\x00")), err
	}
	return "", nil
}

// imageArguments are the arguments of a command line that name images, well-formed or not.
func imageArguments(line string) []string {
	var list []string
	for _, a := range karg.Split(line) {
		if a.Key == karg.KeyDigest || a.Key == karg.KeyV2 {
			list = append(list, a.Key+"="+a.Value)
		}
	}
	return list
}

// checkSealed refuses a UKI that boots another image than the tree's, in any of its profiles.
func checkSealed(c uki.Content, image karg.Image) error {
	m, _, err := uki.Read(c, c.Size)
	if err != nil {
		return err
	}
	for n := range m.Bootable() {
		line, err := sectionText(m, n, ".cmdline")
		if err != nil {
			return err
		}
		where := "its command line"
		if n > 0 {
			where = fmt.Sprintf("the command line of profile %d", n)
		}
		args := imageArguments(line)
		switch {
		case len(args) == 0:
			return fmt.Errorf("%s names no image, and this tree's is %v: build it with what compute-karg prints for the tree", where, image)
		case len(args) > 1:
			return fmt.Errorf("%s names %d images, %s: want one, this tree's %v", where, len(args), strings.Join(args, " and "), image)
		case args[0] != image.String():
			return fmt.Errorf("%s names %s, but this tree's image is %v: %s", where, args[0], image, wayOut(args[0], image))
		}
	}
	return nil
}

// wayOut tells how an argument could become the right one.
func wayOut(arg string, image karg.Image) string {
	c, err := karg.Parse(arg)
	if err != nil {
		return err.Error()
	}
	has := c.Images[0]
	switch {
	case has.Insecure != image.Insecure && has.Insecure:
		return "it would boot without verification, which has to be asked for with --insecure"
	case has.Insecure != image.Insecure:
		return "it boots with verification only: leave out --insecure"
	case has.Digest.Algorithm() != image.Digest.Algorithm() || has.Version != image.Version:
		return fmt.Sprintf("choose its kind with --hash %v --erofs-version %d", has.Digest.Algorithm(), has.Version)
	}
	return "the tree has changed since it was built; build it again"
}

// addonSuffix is what the stub takes for an addon.
const addonSuffix = ".addon.efi"

// checkAddon refuses what the stub would leave out, and what would name another image.
func (d Deployment) checkAddon(a Addon) error {
	if !strings.HasSuffix(a.Name, addonSuffix) || strings.ContainsAny(a.Name, "/\x00") {
		return fmt.Errorf("not the name of an addon: want NAME%s", addonSuffix)
	}
	m, _, err := uki.Read(a.Content, a.Content.Size)
	if err != nil {
		return err
	}
	if !m.IsAddon() {
		return errors.New("not an addon: it has a kernel, or nothing that would be added")
	}
	line, err := sectionText(m, 0, ".cmdline")
	if err != nil {
		return err
	}
	if args := imageArguments(line); len(args) > 0 {
		return fmt.Errorf("it adds %s: only the unified kernel image may say what is booted", strings.Join(args, " "))
	}
	return d.verify(a.Content)
}
