package setuproot

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// The steps of a plan, in the order in which they occur.

// stepPrivate makes a mount namespace for putting the root together, on kernels where a mount must be attached before
// another one can be mounted on it. Nobody else sees this namespace, and it goes before the new root is attached.
type stepPrivate struct{ place string }

// stepSysroot opens the physical root.
type stepSysroot struct{ path string }

// stepRepository opens the repository: composefs in the physical root, or any other.
type stepRepository struct{ path string }

// stepBindRoot takes a directory as the root, without any verification.
type stepBindRoot struct{ path string }

// stepOpen opens the image.
type stepOpen struct{ image karg.Image }

// stepMeasure has the kernel tell the digest of the open image.
type stepMeasure struct{ image karg.Image }

// stepErofs mounts the open image.
type stepErofs struct {
	file  bool
	idmap string // path of a user namespace by which the owners are mapped, "" for none
}

// stepOverlay mounts the image together with the objects.
type stepOverlay struct {
	source      string // what /proc/mounts shows first
	objects     string // directories, with ":" between them; "" for that of the repository
	verity      bool   // every object must have the fs-verity digest that the image names
	fd          bool
	upper, work string // for a mount that is writable in these directories
	writable    bool
}

// stepMemory makes a directory writable, in memory.
type stepMemory struct {
	dir string
	fd  bool
}

// stepBind mounts a directory of the state over one of the root.
type stepBind struct {
	dir   string
	image karg.Image
}

// stepUpper makes a directory writable, in the state.
type stepUpper struct {
	dir   string
	image karg.Image
	fd    bool
}

// stepPhysical makes the physical root visible below the new one.
type stepPhysical struct{}

// stepAttach makes the new root visible.
type stepAttach struct{ sysroot, target string }

func (s stepPrivate) String() string { return "work in a private mount namespace" }
func (s stepSysroot) String() string { return "open the physical root at " + s.path }
func (s stepRepository) String() string {
	return "open the repository " + cmp.Or(s.path, "composefs in it")
}
func (s stepBindRoot) String() string { return "take " + s.path + " as the root, unverified" }
func (s stepOpen) String() string {
	return fmt.Sprintf("open image %v", s.image.Digest)
}
func (s stepMeasure) String() string {
	if s.image.Insecure {
		return "do not require fs-verity, as \"?\" in the argument asks for"
	}
	return fmt.Sprintf("measure it: %v must be its fs-verity digest", s.image.Digest.Algorithm())
}
func (s stepErofs) String() string {
	how := "through a loop device"
	if s.file {
		how = "from the file"
	}
	if s.idmap != "" {
		how += ", owners mapped by " + s.idmap
	}
	return "mount erofs " + how
}
func (s stepOverlay) String() string {
	verity := "verity=require"
	if !s.verity {
		verity = "without verity"
	}
	text := fmt.Sprintf("mount overlay: the image over %s, %s, layers as %s", cmp.Or(s.objects, "objects"), verity, layers(s.fd))
	if s.upper != "" {
		text += ", changes to " + s.upper
	}
	if s.writable {
		text += ", writable"
	}
	return text
}
func (s stepMemory) String() string {
	return fmt.Sprintf("make /%s writable in memory, layers as %s", strings.TrimPrefix(s.dir, "."), layers(s.fd))
}
func (s stepBind) String() string {
	return fmt.Sprintf("mount state/deploy/%v/%s at /%s", s.image.Digest, s.dir, s.dir)
}
func (s stepUpper) String() string {
	return fmt.Sprintf("make /%s writable in state/deploy/%v/%s, layers as %s", s.dir, s.image.Digest, s.dir, layers(s.fd))
}
func (s stepPhysical) String() string { return "mount the physical root at /sysroot" }
func (s stepAttach) String() string {
	if s.sysroot == s.target {
		return "replace " + s.target + " by the new root"
	}
	return "attach the new root at " + s.target
}

func layers(fd bool) string {
	if fd {
		return "descriptors"
	}
	return "paths"
}

func (s stepPrivate) do(r *run) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	r.place = s.place
	return os.NewSyscallError("mount", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
}

func (s stepSysroot) do(r *run) (err error) {
	r.sysroot, err = os.OpenFile(s.path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	return err
}

func (s stepRepository) do(r *run) (err error) {
	if s.path != "" {
		r.repository, err = os.OpenFile(s.path, unix.O_PATH|unix.O_DIRECTORY, 0)
		return err
	}
	r.repository, err = openBeneath(r.sysroot, "composefs", unix.O_PATH|unix.O_DIRECTORY)
	return err
}

func (s stepBindRoot) do(r *run) error {
	root, err := cloneTree(unix.AT_FDCWD, s.path, 0)
	if err != nil {
		return err
	}
	return r.stack(root)
}

func (s stepOpen) do(r *run) (err error) {
	r.image, err = openImage(r.repository, s.image.Digest)
	return err
}

// openImage opens an image of the repository by its digest.
func openImage(repository *os.File, d fsverity.Digest) (*os.File, error) {
	// That the name is there says that the image was finished. Where it leads is not followed.
	images, err := openBeneath(repository, "images", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer images.Close()
	var st unix.Stat_t
	if err := unix.Fstatat(int(images.Fd()), d.String(), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, &os.PathError{Op: "stat", Path: "images/" + d.String(), Err: err}
	}
	return openRegular(repository, "objects/"+d.ObjectPath())
}

func (s stepMeasure) do(r *run) error {
	if s.image.Insecure {
		r.warnings = append(r.warnings, fmt.Sprintf("image %v is NOT verified, as \"?\" in the argument asks for", s.image.Digest))
	}
	return measure(r.image, s.image)
}

// measure refuses an open file that is not the image, as far as the argument wants to know.
func measure(f *os.File, image karg.Image) error {
	got, err := fsverity.Measure(f)
	switch {
	case err == nil && got != image.Digest:
		return refuse("image %v has the fs-verity digest %v: it was replaced; boot another entry, or install the image again",
			image.Digest, got)
	case image.Insecure:
		return nil
	case errors.Is(err, fsverity.ErrNotEnabled), errors.Is(err, fsverity.ErrNotSupported):
		return refuse("image %v: %w: it was replaced, or installed without fs-verity; boot another entry, or install the image again",
			image.Digest, err)
	}
	return err
}

func (s stepErofs) do(r *run) error {
	source := r.image
	if !s.file {
		loop, err := loopDevice(r.image)
		if err != nil {
			return err
		}
		defer loop.Close() // the mount keeps it
		source = loop
	}
	fs, err := openFS("erofs")
	if err != nil {
		return err
	}
	defer fs.close()
	fs.flag("ro")
	fs.set("source", procPath(source))
	r.erofs, err = fs.mount(unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		// The first bytes are read at the mount: that is where a changed superblock shows.
		if errors.Is(err, unix.EIO) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EUCLEAN) {
			return refuse("the image cannot be read, its content was changed: %w", err)
		}
		return err
	}
	if s.idmap != "" {
		if err := mapOwners(r.erofs, s.idmap); err != nil {
			return err
		}
	}
	return r.visible(r.erofs)
}

func (s stepOverlay) do(r *run) error {
	objects, err := s.openObjects(r)
	for _, dir := range objects {
		defer dir.Close()
	}
	if err != nil {
		return err
	}
	fs, err := openFS("overlay")
	if err != nil {
		return err
	}
	defer fs.close()
	fs.set("source", s.source)
	fs.set("metacopy", "on")
	fs.set("redirect_dir", "on")
	if s.verity {
		fs.set("verity", "require")
	}
	fs.layer("lowerdir+", r.erofs, s.fd)
	for _, dir := range objects {
		fs.layer("datadir+", dir, s.fd)
	}
	for key, path := range map[string]string{"upperdir": s.upper, "workdir": s.work} {
		if path == "" {
			continue
		}
		dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return err
		}
		defer dir.Close()
		fs.layer(key, dir, s.fd)
	}
	attributes := unix.MOUNT_ATTR_RDONLY
	if s.writable {
		attributes = 0
	}
	root, err := fs.mount(attributes)
	if err != nil {
		return err
	}
	return r.stack(root)
}

// openObjects opens the directories where the objects are, also if there is an error with one of them.
func (s stepOverlay) openObjects(r *run) (dirs []*os.File, err error) {
	if s.objects == "" {
		dir, err := openBeneath(r.repository, "objects", unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return nil, err
		}
		return []*os.File{dir}, nil
	}
	for path := range strings.SplitSeq(s.objects, ":") {
		dir, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return dirs, err
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// writable mounts an overlay over a directory of the new root, whose changes go to upper.
func (r *run) writable(dir, source string, state *os.File, fd bool) error {
	upper, made, err := ensureDir(state, "upper", 0o755)
	if err != nil {
		return err
	}
	defer upper.Close()
	work, _, err := ensureDir(state, "work", 0o700)
	if err != nil {
		return err
	}
	defer work.Close()
	// Not the root as it is: an overlay over a transient root would be one overlay too many for the kernel.
	base, err := openBeneath(r.lower, dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return noPlace(dir, err)
	}
	defer base.Close()
	if made {
		if err := likeLower(upper, base); err != nil {
			return err
		}
	}
	fs, err := openFS("overlay")
	if err != nil {
		return err
	}
	defer fs.close()
	fs.set("source", source)
	fs.layer("lowerdir+", base, fd)
	fs.layer("upperdir", upper, fd)
	fs.layer("workdir", work, fd)
	mount, err := fs.mount(0)
	if err != nil {
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EINVAL) && readOnly(state) {
			return fmt.Errorf("the physical root is mounted read-only: add \"rw\" to the kernel command line: %w", err)
		}
		return err
	}
	if dir == "." {
		return r.stack(mount)
	}
	defer mount.Close()
	return moveMount(mount, r.root, dir)
}

func (s stepMemory) do(r *run) error {
	fs, err := openFS("tmpfs")
	if err != nil {
		return err
	}
	defer fs.close()
	fs.set("source", "composefs-transient")
	fs.set("mode", "0755")
	memory, err := fs.mount(0)
	if err != nil {
		return err
	}
	defer memory.Close()
	if err := r.visible(memory); err != nil {
		return err
	}
	if err := r.writable(s.dir, "transient", memory, s.fd); err != nil || r.place == "" || s.dir == "." {
		return err
	}
	// It was attached to be a layer, over the new root, which must not be covered by it.
	return os.NewSyscallError("unmount", unix.Unmount(procPath(memory), unix.MNT_DETACH))
}

func (s stepBind) do(r *run) error {
	// An empty /var is what a system starts with. An empty /etc in place of the one that is gone has no accounts and no
	// policy: who can delete it must not gain by it.
	state, made, err := r.state(s.image, s.dir, s.dir == "var")
	if errors.Is(err, unix.ENOENT) {
		return refuse("%w: with mount = \"bind\" it must be there: install the image again, or boot another entry", err)
	}
	if err != nil {
		return err
	}
	defer state.Close()
	if made {
		base, err := openBeneath(r.lower, s.dir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return noPlace(s.dir, err)
		}
		defer base.Close()
		if err := likeLower(state, base); err != nil {
			return err
		}
	}
	tree, err := cloneTree(int(state.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	defer tree.Close()
	return noPlace(s.dir, moveMount(tree, r.root, s.dir))
}

// noPlace says what to do about an image without the directory that is to be mounted on.
func noPlace(dir string, err error) error {
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the image has no directory /%s: make it with one, or set mount = \"none\" in setup-root-conf.toml: %w", dir, err)
	}
	return err
}

func (s stepUpper) do(r *run) error {
	state, _, err := r.state(s.image, s.dir, true)
	if err != nil {
		return err
	}
	defer state.Close()
	return r.writable(s.dir, "overlay", state, s.fd)
}

func (s stepPhysical) do(r *run) error {
	tree, err := cloneTree(int(r.sysroot.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return err
	}
	defer tree.Close()
	err = moveMount(tree, r.root, "sysroot")
	if errors.Is(err, unix.ENOENT) {
		r.warnings = append(r.warnings, "the image has no directory /sysroot: the physical root will not be visible")
		return nil
	}
	return err
}

func (s stepAttach) do(r *run) error {
	if s.sysroot != s.target || s.sysroot == "" {
		return moveMountPath(r.root, s.target)
	}
	old, err := cloneTree(unix.AT_FDCWD, s.sysroot, unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	defer old.Close()
	if err := unix.Unmount(s.sysroot, unix.MNT_DETACH); err != nil {
		return &os.PathError{Op: "unmount", Path: s.sysroot, Err: err}
	}
	if err := moveMountPath(r.root, s.target); err != nil {
		return errors.Join(err, moveMountPath(old, s.sysroot))
	}
	return nil
}
