// Package publish writes commits into OSTree repositories, and the files by which their readers find them.
//
// A repository is a directory:
//
//	config                     mode, and more; a key file
//	objects/xx/yyy.TYPE        objects, see package ostree
//	refs/heads/REF             the checksum of a commit
//	deltas/, delta-indexes/    static deltas, see package delta
//	summary, summary.sig       what there is, and signatures, see package summary
//	state/CHECKSUM.commitpartial   the commit lacks objects
//	tmp/, .lock
//
// A commit is written from the leaves to the root: contents, dirtrees and dirmetas first, under temporary names in tmp/; when they are
// durable, they get their own names; then the commit; then the refs. So whoever stops it at any moment leaves a repository in which
// everything that a commit or ref leads to is there, besides files in tmp/, which ostree removes after a day. What is there already, of an
// interrupted export, too, is not written again.
//
// Others may write at the same time: the lock is shared, only who removes objects (ostree prune) has it alone.
package publish

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// Init makes a repository in a directory, which is created if need be. One that is there already is left alone if it has the same mode,
// and is an error otherwise. It reports whether it made one.
func Init(dir string, mode ostree.Mode, collection string) (created bool, err error) {
	if strings.ContainsAny(collection, "\n\r") {
		return false, fmt.Errorf("collection %q: not a name", collection)
	}
	if l, err := ostree.OpenLocal(dir); err == nil {
		defer l.Close()
		if l.Mode != mode {
			return false, fmt.Errorf("%s: an OSTree repository of mode %s is there already: want %s", dir, l.Mode, mode)
		}
		return false, nil
	} else if _, there := os.Lstat(filepath.Join(dir, "objects")); there == nil {
		return false, err
	}
	text := fmt.Sprintf("[core]\nrepo_version=1\nmode=%s\n", mode)
	if collection != "" {
		text += "collection-id=" + collection + "\n"
	}
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return false, err
	}
	// One that was made by half is finished.
	if have, err := os.ReadFile(filepath.Join(dir, "config")); err == nil && string(have) != text {
		return false, fmt.Errorf("%s: there is another config, and no OSTree repository: remove it, or choose another directory", dir)
	}
	// The objects come last: by them others know that the repository is there.
	for _, sub := range []string{"tmp", "extensions", "state", "refs/heads", "refs/mirrors", "refs/remotes"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o777); err != nil {
			return false, err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(text), 0o666); err != nil {
		return false, err
	}
	return true, os.Mkdir(filepath.Join(dir, "objects"), 0o777)
}

// Repository is a repository that is written to. Close gives it free.
type Repository struct {
	*ostree.Local

	root  *os.Root
	top   *os.File
	lock  *os.File
	stage string // a directory in tmp/, "" as long as there is none
}

// Open opens a repository to write to it. It waits while somebody removes objects.
func Open(ctx context.Context, dir string, l repo.LockOptions) (*Repository, error) {
	local, err := ostree.OpenLocal(dir)
	if err != nil {
		return nil, err
	}
	r := &Repository{Local: local}
	if err := r.open(ctx, l); err != nil {
		r.Close()
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return r, nil
}

func (r *Repository) open(ctx context.Context, l repo.LockOptions) (err error) {
	if r.root, err = os.OpenRoot(r.Path); err != nil {
		return err
	}
	if r.top, err = r.root.Open("."); err != nil {
		return err
	}
	if r.lock, err = r.root.OpenFile(".lock", os.O_CREATE|os.O_RDWR, 0o660); err != nil {
		return err
	}
	if l.Timeout > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, l.Timeout)
		defer stop()
	}
	for waited := false; ; waited = true {
		err := unix.FcntlFlock(r.lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
			return os.NewSyscallError("fcntl", err)
		}
		if !waited && l.Waiting != nil {
			l.Waiting("")
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf(".lock: %w: somebody removes objects of it", repo.ErrLocked)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Close gives the repository free, and removes what was not finished.
func (r *Repository) Close() error {
	var err error
	if r.stage != "" {
		err = r.root.RemoveAll(r.stage)
	}
	for _, f := range []*os.File{r.lock, r.top} {
		if f != nil {
			f.Close()
		}
	}
	if r.root != nil {
		r.root.Close()
	}
	return errors.Join(err, r.Local.Close())
}

// staged makes a directory for files that have no name yet, and returns the path of one in it.
func (r *Repository) staged(name string) (string, error) {
	if r.stage == "" {
		if err := r.root.MkdirAll("tmp", 0o777); err != nil {
			return "", err
		}
		dir, err := os.MkdirTemp(filepath.Join(r.Path, "tmp"), "export-")
		if err != nil {
			return "", err
		}
		r.stage = path.Join("tmp", filepath.Base(dir))
	}
	return path.Join(r.stage, name), nil
}

// barrier makes everything durable that was written so far.
func (r *Repository) barrier() error {
	return os.NewSyscallError("syncfs", unix.Syncfs(int(r.top.Fd())))
}

// small is a file of the repository that is written whole.
type small struct {
	name string
	data []byte
}

// replace writes small files under their names, in place of older ones. All are durable before the first has its name; the names appear
// in this order. A file that has this content already is left alone: web servers make ETags of its time.
func (r *Repository) replace(files ...small) error {
	files = slices.DeleteFunc(slices.Clone(files), func(f small) bool {
		is, err := r.root.ReadFile(f.name)
		return err == nil && bytes.Equal(is, f.data)
	})
	if len(files) == 0 {
		return nil
	}
	var staged []string
	for k, f := range files {
		if err := r.root.MkdirAll(path.Dir(f.name), 0o777); err != nil {
			return err
		}
		temporary, err := r.staged(fmt.Sprintf("small-%d", k))
		if err != nil {
			return err
		}
		if err := r.root.WriteFile(temporary, f.data, 0o666); err != nil {
			return err
		}
		staged = append(staged, temporary)
	}
	if err := r.barrier(); err != nil {
		return err
	}
	for k, f := range files {
		if err := r.later(staged[k], f.name); err != nil {
			return err
		}
		if err := r.root.Rename(staged[k], f.name); err != nil {
			return err
		}
	}
	return nil
}

// later makes the time of a file a second later than that of the one whose place it takes: a web server that knows seconds alone would say
// that it is the same.
func (r *Repository) later(file, than string) error {
	old, err := r.root.Stat(than)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if t := old.ModTime().Truncate(time.Second).Add(time.Second); t.After(time.Now()) {
		return r.root.Chtimes(file, time.Time{}, t)
	}
	return nil
}

// has reports whether a file is there.
func (r *Repository) has(name string) (bool, error) {
	_, err := r.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Collection returns the name of the collection that the repository's own refs belong to, "" if to none.
func (r *Repository) Collection() string {
	id, _ := r.Config.Get("core", "collection-id")
	return id
}
