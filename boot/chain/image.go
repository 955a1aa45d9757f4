package chain

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/extract"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/uki"
)

// image is an image of the repository, verified.
type image struct {
	links []Link
	tree  *fstree.Tree // nil if it is not right
}

// rest checks what comes after the initramfs: the images, and that they belong to what boots them.
func (v *verifier) rest(boots []boot) ([]Link, error) {
	if v.Repo == nil {
		way := "no repository was given: name one with --repo"
		return []Link{{Image, "", Unchecked, "it is not looked at", way}, {Objects, "", Unchecked, "they are not looked at", way}}, nil
	}
	var images, others []Link
	type pair struct {
		kernel, osrel *uki.Section
		image         *image
	}
	seen := map[pair]bool{}
	shown := map[*image]bool{}
	for _, b := range boots {
		for _, i := range b.images {
			checked, err := v.image(i)
			if err != nil {
				return images, err
			}
			if !shown[checked] {
				images = append(images, checked.links...)
				shown[checked] = true
			}
			what := pair{b.sources[0], b.sources[2], checked}
			if checked.tree == nil || seen[what] && what.kernel != nil {
				continue
			}
			seen[what] = true
			kernel, err := v.kernel(b, checked.tree)
			if err != nil {
				return images, err
			}
			others = append(others, kernel)
			if b.isUKI {
				release, err := v.osRelease(b, checked.tree)
				if err != nil {
					return images, err
				}
				others = append(others, release)
			}
		}
	}
	if len(shown) == 0 {
		return []Link{{Image, "", Unchecked, "the command line names none", ""}}, nil
	}
	return append(images, others...), nil
}

// image verifies an image and its objects, once.
func (v *verifier) image(i karg.Image) (*image, error) {
	if known := v.images[i.Digest]; known != nil {
		return known, nil
	}
	name := i.Digest.String()
	short := name[:12]
	checked := &image{}
	v.images[i.Digest] = checked
	broken := func(kind Kind, found, way string) {
		checked.links = append(checked.links, Link{kind, short, Broken, found, way})
	}
	if a := v.Repo.Algorithm(); a != i.Digest.Algorithm() {
		broken(Image, fmt.Sprintf("its digest is %v, the repository %s has %v: it cannot be there", i.Digest.Algorithm(), v.Repo.Path(), a),
			"name the right repository, or make one with \"convert\"")
		return checked, nil
	}
	report, err := v.Repo.VerifyImage(v.ctx, name, v.Verify)
	if errors.Is(err, repo.ErrNotFound) {
		broken(Image, fmt.Sprintf("not in the repository %s", v.Repo.Path()), "make it there with \"create-image\", or build the UKI for an image that is there (see: images)")
		return checked, nil
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	var bad []repo.Finding
	for _, f := range report.Findings {
		if strings.HasPrefix(f.Path, "images/") {
			broken(Image, f.Detail, "heal it with \"fsck --repair\"")
		} else {
			bad = append(bad, f)
		}
	}
	if len(checked.links) > 0 {
		return checked, nil
	}
	checked.links = []Link{{Image, short, OK, fmt.Sprintf("measured, %v", report.Format), ""}}
	if len(bad) > 0 {
		f := bad[0]
		found := fmt.Sprintf("%s: %s", f.Path, f.Detail)
		if len(f.Breaks) > 0 && len(f.Breaks[0].Paths) > 0 {
			found += ": " + f.Breaks[0].Paths[0] + " in the image"
		}
		if len(bad) > 1 {
			found += fmt.Sprintf(", and %d more", len(bad)-1)
		}
		broken(Objects, found, "heal them with \"fsck --repair --from\" where they still are")
		return checked, nil
	}
	checked.links = append(checked.links, Link{Objects, short, OK, fmt.Sprintf("%d measured", report.Objects), ""})
	if checked.tree, _, err = v.Repo.ReadImage(name); err != nil {
		return nil, err
	}
	return checked, nil
}

// content opens a file of an image, verified. It is closed with the verifier.
func (v *verifier) content(i *fstree.Inode) (uki.Content, error) {
	switch c := i.Content.(type) {
	case fstree.Inline:
		return uki.Bytes(c), nil
	case *fstree.Object:
		objects := extract.Objects{Repo: v.Repo}
		f, err := objects.Open(c)
		if err != nil {
			return uki.Content{}, err
		}
		v.files = append(v.files, f)
		return uki.Content{ReaderAt: f, Size: int64(c.Size)}, nil
	}
	return uki.Content{}, errors.New("not a regular file")
}

const modules = "/usr/lib/modules"

// kernel checks that the kernel is the one that the image's modules are for.
func (v *verifier) kernel(b boot, tree *fstree.Tree) (Link, error) {
	link := Link{Kind: Kernel, Where: b.where, Status: Broken, WayOut: "build it with the kernel of the image"}
	says, err := uki.Uname(b.linux)
	if err != nil {
		says = ""
	}
	if says != "" && b.uname != "" && says != b.uname {
		link.Found = fmt.Sprintf("release %.80q, but .uname says %.80q", says, b.uname)
		return link, nil
	}
	release := cmp.Or(says, b.uname)
	if release == "" {
		link.Status, link.Found, link.WayOut = Unchecked, "it does not say its release", "build it with --uname"
		return link, nil
	}
	var there []string
	if dir := tree.Lookup(modules); dir != nil && dir.Dir() != nil {
		for _, e := range dir.Dir().Entries {
			if e.Inode.Dir() != nil {
				there = append(there, e.Name)
			}
		}
	}
	if len(there) == 0 {
		link.Status, link.Found, link.WayOut = Unchecked, fmt.Sprintf("%.80s; the image has no modules to compare it with", release), ""
		return link, nil
	}
	dir := tree.Lookup(modules + "/" + release)
	if strings.Contains(release, "/") || dir == nil || dir.Dir() == nil {
		link.Found = fmt.Sprintf("%.80q, the image has modules for %s", release, strings.Join(there, ", "))
		return link, nil
	}
	link.Status, link.Found, link.WayOut = OK, release+", the image has its modules", ""
	file := dir.Dir().Lookup("vmlinuz")
	if file == nil || file.Type() != fstree.TypeRegular {
		return link, nil
	}
	theirs, err := v.content(file)
	if err != nil {
		return link, err
	}
	switch how, err := sameKernel(b.linux, theirs); {
	case err != nil:
		return link, fmt.Errorf("%s/%s/vmlinuz: %w", modules, release, err)
	case how == "":
		link.Status, link.Found = Broken, fmt.Sprintf("%s, but other bytes than the image's vmlinuz of that release", release)
		link.WayOut = "build it with the kernel of the image"
	default:
		link.Found = fmt.Sprintf("%s, %s as the image's vmlinuz", release, how)
	}
	return link, nil
}

// sameKernel tells in which way two kernels are the same, "" if they are not: a kernel that is signed, or that was decompressed
// to be started, is still the same.
func sameKernel(ours, theirs uki.Content) (string, error) {
	a, err := hashOf(ours)
	if err != nil {
		return "", err
	}
	b, err := hashOf(theirs)
	if err != nil || a == b {
		return "the same", err
	}
	if theirs, err = uki.Kernel(theirs); err != nil {
		return "", nil // no kernel for UEFI, so another one
	}
	one, err := uki.ParsePE(ours, ours.Size)
	if err != nil {
		return "", nil
	}
	two, err := uki.ParsePE(theirs, theirs.Size)
	if err != nil {
		return "", nil
	}
	a, errA := one.Authenticode()
	b, errB := two.Authenticode()
	if errA == nil && errB == nil && a == b {
		return "the same but for signatures and compression", nil
	}
	return "", nil
}

func hashOf(c uki.Content) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	_, err = io.Copy(h, c.Reader())
	h.Sum(sum[:0])
	return sum, err
}

// osRelease checks that the UKI and the image are of the same system.
func (v *verifier) osRelease(b boot, tree *fstree.Tree) (Link, error) {
	link := Link{Kind: OSRelease, Where: b.where}
	if b.osrel == "" {
		link.Status, link.Found, link.WayOut = Warning, "no .osrel: boot loaders do not list it", "build it with --os-release"
		return link, nil
	}
	theirs := ""
	for _, name := range []string{"/etc/os-release", "/usr/lib/os-release"} {
		i := tree.Lookup(name)
		if i == nil || i.Type() != fstree.TypeRegular || i.Size() > maxText {
			continue
		}
		c, err := v.content(i)
		if err != nil {
			return link, err
		}
		text, err := io.ReadAll(c.Reader())
		if err != nil {
			return link, err
		}
		theirs = string(text)
		break
	}
	switch ours, image := osID(b.osrel), osID(theirs); {
	case theirs == "":
		link.Status, link.Found = Unchecked, "ID="+ours+"; the image has no os-release"
	case ours != image:
		link.Status, link.Found = Broken, fmt.Sprintf("ID=%.80s, the image has ID=%.80s", ours, image)
		link.WayOut = "build it with the os-release of the image"
	default:
		link.Status, link.Found = OK, "ID="+ours
	}
	return link, nil
}

// osID returns the ID of an os-release, which is "linux" if it has none.
func osID(text string) string {
	id := "linux"
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "ID="); ok {
			id = strings.Trim(value, `"'`)
		}
	}
	return id
}
