package secureboot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// A change is made below staged, which gets the name committed when it is on the disk to the last byte; then its files are
// moved over those of the directory.
const (
	staged    = ".new"
	committed = ".commit"
)

// Create makes files in a directory, which is made as well if it is not there. None may be there yet. If that fails, what was
// made is removed.
func Create(dir string, files []File) error {
	if err := CheckPlace(dir); err != nil {
		return err
	}
	err := os.Mkdir(dir, 0o700)
	made := err == nil
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	files = slices.Clone(files)
	for k := range files {
		files[k].Name = filepath.Join(dir, files[k].Name)
	}
	if err := CreateFiles(files); err != nil {
		if made {
			os.Remove(dir)
		}
		return err
	}
	return syncDir(dir)
}

// CreateFiles makes files in directories that are there. None may be there yet. If that fails, what was made is removed.
func CreateFiles(files []File) (err error) {
	for _, f := range files {
		if f.Private {
			if err := CheckPlace(filepath.Dir(f.Name)); err != nil {
				return err
			}
		}
		if _, err := os.Lstat(f.Name); err == nil {
			return errExists(f.Name)
		}
	}
	var made []string
	defer func() {
		if err != nil {
			for _, path := range made {
				os.Remove(path)
			}
		}
	}()
	for _, f := range files {
		wrote, err := f.write(f.Name)
		if wrote {
			made = append(made, f.Name)
		}
		if errors.Is(err, fs.ErrExist) {
			return errExists(f.Name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func errExists(path string) error {
	return fmt.Errorf("%s: it is there already: keys are never overwritten; name another place, or see \"keys rotate\"", path)
}

// write makes the file, and tells whether it did even if that fails later. It is never there with other bits than it is to
// have, whatever the umask is.
func (f File) write(path string) (made bool, err error) {
	mode := fs.FileMode(0o644)
	if f.Private {
		mode = 0o600
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false, err
	}
	err = out.Chmod(mode)
	// A file system like FAT has no such bits, and may show the key to everyone.
	if info, statErr := out.Stat(); err == nil && f.Private {
		if err = statErr; err == nil && info.Mode().Perm()&0o077 != 0 {
			err = fmt.Errorf("%s: the file system gives others the bits %v: name a directory on another one", path, info.Mode().Perm())
		}
	}
	if err == nil {
		_, err = out.Write(f.Data)
	}
	if err == nil {
		err = out.Sync()
	}
	return true, errors.Join(err, out.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// CheckPlace tells whether private keys may be written to a directory that is there or would be made: others must not be able
// to write to it, and it must not be in a composefs repository, which is copied to machines.
func CheckPlace(dir string) error {
	path, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	} else if real, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(real, filepath.Base(path))
	}
	at, sticky := path, false
	info, err := os.Stat(at)
	if errors.Is(err, fs.ErrNotExist) {
		// In a directory like /tmp, a directory of one's own is as good as elsewhere.
		at, sticky = filepath.Dir(path), true
		info, err = os.Stat(at)
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s: no directory", at)
	}
	if info.Mode().Perm()&0o022 != 0 && !(sticky && info.Mode()&fs.ModeSticky != 0) {
		return fmt.Errorf("%s: others may write to it (%v), no place for private keys: chmod go-w %s, or name another", at, info.Mode().Perm(), at)
	}
	for at := path; ; at = filepath.Dir(at) {
		if isRepository(at) {
			return fmt.Errorf("%s: it is in the composefs repository %s, no place for private keys: name another", path, at)
		}
		if at == filepath.Dir(at) {
			return nil
		}
	}
}

// isRepository goes by names alone, and takes old ones without meta.json and half-made ones for repositories, too.
func isRepository(dir string) bool {
	has := func(name string) bool { _, err := os.Lstat(filepath.Join(dir, name)); return err == nil }
	return has("objects") && (has("meta.json") || has("images") || has("streams"))
}

// Apply makes the files of a change in the directory, over those that are there. Either all of them are there in the end or,
// after an error before that, none.
func (d *Dir) Apply(files []File) error {
	if err := CheckPlace(d.Path); err != nil {
		return err
	}
	unlock, err := lock(d.Path)
	if err != nil {
		return err
	}
	defer unlock()
	if err := recoverChange(d.Path); err != nil {
		return err
	}
	// Two commands may have read the same state; the second one would undo what the first did.
	now, err := readState(d.Path)
	if err != nil {
		return err
	}
	if now != d.state {
		return fmt.Errorf("%s: another program has changed it meanwhile: try again", d.Path)
	}
	top := filepath.Join(d.Path, staged)
	if err := os.Mkdir(top, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(top, f.Name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
			_, err = f.write(path)
		}
		if err != nil {
			return errors.Join(err, os.RemoveAll(top))
		}
	}
	for _, dir := range []string{"", "old", "updates"} {
		if err := syncDir(filepath.Join(top, dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(err, os.RemoveAll(top))
		}
	}
	if err := os.Rename(top, filepath.Join(d.Path, committed)); err != nil {
		return errors.Join(err, os.RemoveAll(top))
	}
	return recoverChange(d.Path)
}

// recoverChange completes a change that was committed and drops one that was not. It may be interrupted and called again.
func recoverChange(dir string) error {
	if err := os.RemoveAll(filepath.Join(dir, staged)); err != nil {
		return err
	}
	top := filepath.Join(dir, committed)
	if _, err := os.Lstat(top); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(top, path)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, name)
		if !e.IsDir() {
			return os.Rename(path, to)
		}
		return os.MkdirAll(to, 0o755)
	})
	if err != nil {
		return fmt.Errorf("%s: the change that is complete in %s could not be moved: %w", dir, committed, err)
	}
	for _, sub := range []string{"", "old", "updates"} {
		if err := syncDir(filepath.Join(dir, sub)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.RemoveAll(top)
}

func lock(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: lock: %w", dir, err)
	}
	return func() { d.Close() }, nil
}
