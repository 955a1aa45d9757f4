package repo

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Status says what Ensure found and did.
type Status string

// What a repository was before.
const (
	Created  Status = "created"  // there was none
	Opened   Status = "opened"   // there was one, whatever its configuration
	Upgraded Status = "upgraded" // there was one without meta.json
)

// errOld tells of a repository from the time before meta.json.
var errOld = errors.New("a repository without meta.json")

// Ensure makes a repository unless there is one. One that is there stays as it is, except that it gets a meta.json if it has
// none. Another algorithm is an error, though: its objects would be of no use.
func Ensure(path string, c Config) (Status, error) {
	status := Opened
	r, err := Open(path, Options{})
	if errors.Is(err, errOld) {
		status = Upgraded
		r, err = Open(path, Options{Upgrade: true})
	}
	if err == nil {
		defer r.Close()
		if r.Algorithm() != c.Algorithm {
			return "", fmt.Errorf("%s: a repository with %s is there: say --algorithm %[2]s to use it", path, r.Algorithm().Name())
		}
		return status, nil
	}
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoRepository) {
		return "", err
	}
	if _, err := Init(path, c); err != nil {
		return "", err
	}
	return Created, nil
}

// upgrade writes the meta.json of a repository that has objects and no meta.json. What is in it is told by an object: the
// length of its name tells the algorithm, and whether it has fs-verity enabled tells whether all must have. Such a
// repository has images of V2: nobody wrote others then. Where it cannot be written, it is used all the same.
func upgrade(dir *os.File) (m Meta, verity bool, err error) {
	alg, verity, err := inferFrom(dir)
	if err != nil {
		return Meta{}, false, err
	}
	c := Config{Algorithm: alg, Format: erofs.V2, Insecure: !verity}
	m = newMeta(c)
	err = writeMeta(dir, m, c)
	if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EEXIST) {
		err = nil
	}
	return m, verity, err
}

// inferFrom looks at the first object.
func inferFrom(dir *os.File) (alg fsverity.Algorithm, verity bool, err error) {
	found := errors.New("found")
	for _, a := range []fsverity.Algorithm{fsverity.SHA512, fsverity.SHA256} {
		r := &Repo{dir: dir, meta: Meta{algorithm: a}}
		err := r.eachDirectory(func(sub *os.File, name string, objects []fsverity.Digest, _ []string) error {
			if len(objects) == 0 {
				return nil
			}
			f, err := openBeneath(sub, objects[0].FileName(), unix.O_RDONLY)
			if err != nil {
				return err
			}
			defer f.Close()
			alg = a
			switch d, err := fsverity.Measure(f); {
			case err == nil && d != objects[0]:
				return fmt.Errorf("object %v: %w", objects[0], ErrCorrupt)
			case err == nil:
				verity = true
			case !errors.Is(err, fsverity.ErrNotEnabled) && !errors.Is(err, fsverity.ErrNotSupported):
				return fmt.Errorf("object %v: %w", objects[0], err)
			}
			return found
		})
		if errors.Is(err, found) {
			return alg, verity, nil
		}
		if err != nil {
			return 0, false, err
		}
	}
	return 0, false, errors.New("no meta.json, and no object that tells what should be in it")
}

// ResetMetadata removes meta.json, images/ and streams/, so that the repository can be made anew with the objects that are
// there: those of the same algorithm are used again, the others are garbage. Nobody else may use the repository meanwhile.
func ResetMetadata(ctx context.Context, path string, l LockOptions) error {
	dir, err := os.OpenFile(path, unix.O_DIRECTORY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	r := &Repo{path: path, dir: dir, verified: map[fsverity.Digest]bool{}}
	defer r.Close()
	release, err := r.lockExclusive(ctx, l)
	if err != nil {
		return err
	}
	defer release()
	root, err := os.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	// The names go first: without meta.json they would be those of another algorithm for the next program.
	for _, name := range []string{"streams", "images", "meta.json"} {
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	return dir.Sync()
}
