package repo

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// BeginStore starts an import into a directory of objects that has no repository around it: what mkcomposefs
// --digest-store fills, and basedir= of mount.composefs names. The directory is made with its parents if need be. Its
// objects are named by sha256 digests and readable by all; they have fs-verity enabled where the file system can, and share
// their data with the files that they come from where it can do that.
//
// An object that is there is kept, if its content is right, and replaced otherwise. Images cannot be put into a store.
func BeginStore(path string) (*Import, error) {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.OpenFile(path, unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	r := &Repo{path: path, dir: dir, meta: Meta{algorithm: fsverity.SHA256}, verified: map[fsverity.Digest]bool{}}
	r.digesters.New = func() any { return fsverity.NewDigester(fsverity.SHA256) }
	// On file systems without unnamed files there is a directory for them now, which goes if it is empty.
	i := newImport(r, dir, func() { os.Remove(filepath.Join(path, "tmp")) })
	i.store = true
	return i, nil
}

// unsuitable tells that the file system has fs-verity, but not for this file: its blocks are too small, or the kernel
// lacks the algorithm.
func unsuitable(err error) bool { return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOPKG) }
