package delta

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// List returns the names of the deltas in an OSTree repository, those that need no commit first.
func List(repository *os.Root) ([]Name, error) {
	superblocks, err := fs.Glob(repository.FS(), "deltas/*/*/superblock")
	if err != nil {
		return nil, err
	}
	names := Digests{}
	for _, s := range superblocks {
		// What is called otherwise is none of ours.
		if name, err := ParsePath(path.Dir(s)); err == nil {
			names[name] = ostree.Checksum{}
		}
	}
	return names.Names(), nil
}

// Save makes a delta in an OSTree repository. It appears at once, and when it is durable, in place of an older one of that name. Readers
// find it when the summary is written again.
func Save(ctx context.Context, repository *os.Root, from ostree.Source, opts Options) error {
	if err := repository.MkdirAll("tmp", 0o777); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(filepath.Join(repository.Name(), "tmp"), "static-delta-")
	if err != nil {
		return err
	}
	temporary := path.Join("tmp", filepath.Base(dir))
	err = save(ctx, repository, temporary, from, opts)
	return errors.Join(err, repository.RemoveAll(temporary))
}

func save(ctx context.Context, repository *os.Root, temporary string, from ostree.Source, opts Options) error {
	if err := repository.Chmod(temporary, 0o755); err != nil {
		return err
	}
	err := Generate(ctx, from, opts, func(name string, r io.Reader) error {
		f, err := repository.Create(path.Join(temporary, name))
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		return errors.Join(err, f.Close())
	})
	if err != nil {
		return err
	}
	top, err := repository.Open(".")
	if err != nil {
		return err
	}
	defer top.Close()
	if err := unix.Syncfs(int(top.Fd())); err != nil {
		return os.NewSyscallError("syncfs", err)
	}
	place := opts.Path()
	if err := repository.MkdirAll(path.Dir(place), 0o777); err != nil {
		return err
	}
	// A directory that has files in it is not replaced by a rename. What is exchanged for it is removed as what was temporary.
	err = repository.Rename(temporary, place)
	if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOTEMPTY) {
		err = exchange(repository, temporary, place)
	}
	return err
}

func exchange(repository *os.Root, a, b string) error {
	from, err := repository.Open(path.Dir(a))
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := repository.Open(path.Dir(b))
	if err != nil {
		return err
	}
	defer to.Close()
	err = unix.Renameat2(int(from.Fd()), path.Base(a), int(to.Fd()), path.Base(b), unix.RENAME_EXCHANGE)
	if err != nil {
		return &os.LinkError{Op: "exchange", Old: a, New: b, Err: err}
	}
	return nil
}

// Remove removes a delta from an OSTree repository. The error is ostree.ErrNotFound if there is none.
func Remove(repository *os.Root, name Name) error {
	names, err := List(repository)
	if err != nil {
		return err
	}
	if !slices.Contains(names, name) {
		return fmt.Errorf("%s: delta %s: %w", strings.TrimSuffix(repository.Name(), "/"), name, ostree.ErrNotFound)
	}
	// Without its superblock it is none.
	if err := repository.Remove(name.Path() + "/superblock"); err != nil {
		return err
	}
	return repository.RemoveAll(name.Path())
}
