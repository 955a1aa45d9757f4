// Package repo is the composefs repository: a store of objects named by their fs-verity digest, of the images that are
// made of them, and of the streams from which images can be made again.
//
//	meta.json             version, digest algorithm, features, default image format
//	objects/xx/yyy...     contents, named by digest: two digits, slash, the rest
//	images/HEX            link to the object that is the image
//	images/refs/NAME      link to images/HEX; NAME may have slashes
//	streams/NAME          link to the object that is the splitstream
//	streams/refs/NAME     link to streams/NAME
//	tmp/                  unfinished files, on file systems that have no unnamed ones
//
// The layout is that of composefs-rs 0.9 (repository_format.rs). What refs lead to is kept; the rest is garbage.
//
// Changes are made by an [Import]: contents are written to files without a name, one call makes a whole batch of them
// durable, and only then they get their names. So an object that has a name is whole, whenever the machine stops, and
// an image that has a name has all its objects. An interrupted import leaves objects that the next one finds.
//
// An object is trusted if its digest has been measured: by the kernel, where the file has fs-verity enabled, or by reading
// it. Its name or size prove nothing.
//
// All access is relative to descriptors and follows no symbolic link. Links in images/ and streams/ are read as text.
package repo

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Errors that callers decide on.
var (
	// ErrNotFound: there is no image, stream or object of that name.
	ErrNotFound = errors.New("not found in the repository")
	// ErrCorrupt: a file's content is not what its name says.
	ErrCorrupt = errors.New("the content has another digest than the name")
	// ErrNoVerity: the repository was made for fs-verity, and the file has none.
	ErrNoVerity = errors.New("fs-verity is not enabled, which this repository requires")
	// ErrReadOnly: the repository cannot be changed.
	ErrReadOnly = errors.New("the repository is read-only")
)

// errNoRepository tells of a directory that is none.
var errNoRepository = errors.New("not a composefs repository")

// Config is what a repository is made with.
type Config struct {
	Algorithm fsverity.Algorithm
	Format    erofs.Format // of images, unless another one is asked for
	// Insecure makes a repository that does not require fs-verity, for file systems without it. Objects get it all the
	// same where it is to be had.
	Insecure bool
}

// Options says how a repository is opened.
type Options struct {
	RequireVerity bool // an error if the repository does not require fs-verity
	Upgrade       bool // write the meta.json of a repository from the time before it
	KeepCached    bool // what is stored will be read soon: it stays in memory where possible
}

// Repo is an open repository. It may be used from several goroutines.
type Repo struct {
	path     string
	dir      *os.File
	objects  string // what stands before the path of an object: "objects/", or "" in a store
	meta     Meta
	verity   bool   // objects must have fs-verity enabled
	readOnly string // why it cannot be changed

	keepCached bool

	digesters sync.Pool // of *fsverity.Digester, with their buffers

	mu       sync.Mutex
	locks    int                      // shared locks that this process holds
	verified map[fsverity.Digest]bool // objects that have been measured since the first of these locks was taken
}

// Init makes a repository in a directory, which is created if need be. A repository that is there already is left alone if
// it has the same configuration, and is an error otherwise. It reports whether it made one.
func Init(path string, c Config) (created bool, err error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return false, err
	}
	dir, err := os.OpenFile(path, unix.O_DIRECTORY, 0)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	meta := newMeta(c)
	have, err := readMeta(dir)
	if err == nil {
		if !have.equal(meta) {
			return false, fmt.Errorf("%s: a repository with %s and images of format %v is there: cannot make it one with %s and %v",
				path, have.Algorithm, have.Formats.Default, meta.Algorithm, meta.Formats.Default)
		}
		return false, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	if err := writeMeta(dir, meta, c); err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return true, nil
}

// Open opens a repository.
func Open(path string, o Options) (*Repo, error) {
	dir, err := os.OpenFile(path, unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	r := &Repo{path: path, dir: dir, objects: "objects/", keepCached: o.KeepCached, verified: map[fsverity.Digest]bool{}}
	if err := r.open(o); err != nil {
		dir.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (r *Repo) open(o Options) error {
	var err error
	if r.meta, err = readMeta(r.dir); err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
		objects, err := r.openat("objects", unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return fmt.Errorf("%w: no meta.json (make one with: composefs-boot init %s)", errNoRepository, r.path)
		}
		objects.Close()
		if !o.Upgrade {
			return fmt.Errorf("%w (write it with: composefs-boot init --ensure %s)", errOld, r.path)
		}
		if r.meta, r.verity, err = upgrade(r.dir); err != nil {
			return err
		}
	}
	r.digesters.New = func() any { return fsverity.NewDigester(r.meta.algorithm) }
	if unknown := r.meta.unknown(); unknown != "" {
		r.readOnly = "it has features that this program does not know: " + unknown
	}
	f, err := r.openat("meta.json", unix.O_RDONLY)
	if errors.Is(err, os.ErrNotExist) && o.Upgrade { // it could not be written
		if o.RequireVerity && !r.verity {
			return ErrNoVerity
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	switch _, err := fsverity.Measure(f); {
	case err == nil:
		r.verity = true
	case !errors.Is(err, fsverity.ErrNotEnabled) && !errors.Is(err, fsverity.ErrNotSupported):
		return fmt.Errorf("meta.json: %w", err)
	case o.RequireVerity:
		return fmt.Errorf("meta.json: %w", ErrNoVerity)
	}
	return nil
}

// Close closes the repository.
func (r *Repo) Close() error { return r.dir.Close() }

// Path returns the path under which the repository was opened.
func (r *Repo) Path() string { return r.path }

// Algorithm returns the algorithm of the repository's digests.
func (r *Repo) Algorithm() fsverity.Algorithm { return r.meta.algorithm }

// Format returns the format that images have unless another one is asked for.
func (r *Repo) Format() erofs.Format { return r.meta.Formats.Default.format() }

// Formats returns the formats in which every image is made that the repository's configuration names: the default first.
func (r *Repo) Formats() []erofs.Format { return r.meta.Formats.images() }

// RequiresVerity reports whether every object must have fs-verity enabled.
func (r *Repo) RequiresVerity() bool { return r.verity }

// openat opens a path below the repository, through no symbolic link.
func (r *Repo) openat(path string, flags int) (*os.File, error) {
	return openBeneath(r.dir, path, flags)
}

func openBeneath(dir *os.File, path string, flags int) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), path, &how)
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		if flags&unix.O_DIRECTORY != 0 {
			// os.File.ReadDir looks files up below this name, where the file system does not tell their type.
			path = fmt.Sprintf("/proc/self/fd/%d", fd)
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// mkdir makes a directory below the repository with its parents and opens it.
func (r *Repo) mkdir(path string) (*os.File, error) {
	f, err := r.openat(path, unix.O_RDONLY|unix.O_DIRECTORY)
	if !errors.Is(err, unix.ENOENT) {
		return f, err
	}
	parent := r.dir
	if up := filepath.Dir(path); up != "." {
		if parent, err = r.mkdir(up); err != nil {
			return nil, err
		}
		defer parent.Close()
	}
	if err := unix.Mkdirat(int(parent.Fd()), filepath.Base(path), 0o755); err != nil && err != unix.EEXIST {
		return nil, &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	return r.openat(path, unix.O_RDONLY|unix.O_DIRECTORY)
}

// writable tells why the repository cannot be changed.
func (r *Repo) writable() error {
	if r.readOnly != "" {
		return fmt.Errorf("%s: %w: %s", r.path, ErrReadOnly, r.readOnly)
	}
	if err := unix.Faccessat2(int(r.dir.Fd()), "", unix.W_OK, unix.AT_EMPTY_PATH|unix.AT_EACCESS); err != nil {
		return fmt.Errorf("%s: %w: %w", r.path, ErrReadOnly, err)
	}
	return nil
}

// OpenObject opens an object. Its content is not verified: see Verify.
func (r *Repo) OpenObject(d fsverity.Digest) (*os.File, error) {
	f, err := r.openat("objects/"+d.ObjectPath(), unix.O_RDONLY|unix.O_NONBLOCK) // a pipe there would block
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("object %v: %w", d, ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("object %v: %w", d, err)
	}
	return f, nil
}

// Verify measures a file: by the kernel if it has fs-verity enabled, by reading it otherwise, which a repository that
// requires fs-verity does not allow. The error is ErrCorrupt, ErrNoVerity or that of reading.
func (r *Repo) Verify(f *os.File, want fsverity.Digest) error {
	got, err := fsverity.Measure(f)
	if errors.Is(err, fsverity.ErrNotEnabled) || errors.Is(err, fsverity.ErrNotSupported) {
		if r.verity {
			return ErrNoVerity
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return ErrCorrupt
		}
		if want.Algorithm() != r.Algorithm() {
			return ErrCorrupt
		}
		d := r.digesters.Get().(*fsverity.Digester)
		defer r.digesters.Put(d)
		d.Reset()
		if _, err := d.ReadFrom(io.NewSectionReader(f, 0, info.Size())); err != nil {
			return err
		}
		got = d.Sum()
	} else if err != nil {
		return err
	}
	if got != want {
		return ErrCorrupt
	}
	return nil
}

// digestOfLink returns the digest that the last part of a link's text is.
func digestOfLink(target string) (fsverity.Digest, error) {
	dir, name := filepath.Split(strings.TrimSuffix(target, "/"))
	if len(name) == 62 || len(name) == 126 {
		return fsverity.ParseObjectPath(filepath.Base(dir) + "/" + name)
	}
	return fsverity.ParseHex(name)
}
