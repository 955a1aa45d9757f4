package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/extract"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// image is an image that a command reads files from, without mounting it.
type image struct {
	name    string
	file    *os.File
	size    int64
	objects extract.Objects
}

// openImage opens an image: a file, or else one of the repository, which is verified. Contents that are not in the image are
// looked for in the directory of objects, if one is given, and in the repository.
func (a *app) openImage(name, objectsDir string) (*image, error) {
	i := &image{name: name}
	if err := i.open(a, objectsDir); err != nil {
		i.close()
		return nil, err
	}
	return i, nil
}

func (i *image) open(a *app, objectsDir string) error {
	info, err := os.Stat(i.name)
	switch {
	case errors.Is(err, os.ErrNotExist), err == nil && info.IsDir():
		if i.objects.Repo, err = a.repositoryWith(i.name, "image file"); err != nil {
			return err
		}
		if i.file, err = openNamed(i.objects.Repo, i.name, "image file"); err != nil {
			return err
		}
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s: not a regular file: want an image file, a ref or a digest", i.name)
	default:
		if i.file, err = os.Open(i.name); err != nil {
			return err
		}
		// Objects of a file that is given alone are looked for only where somebody said.
		if objectsDir == "" {
			if i.objects.Repo, err = a.openIfThere(); err != nil {
				return err
			}
		}
	}
	if info, err = i.file.Stat(); err != nil {
		return err
	}
	i.size = info.Size()
	if objectsDir != "" {
		if i.objects.Dir, err = os.OpenFile(objectsDir, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			return fmt.Errorf("--objects: %w", err)
		}
	}
	return nil
}

func (i *image) close() {
	if i.file != nil {
		i.file.Close()
	}
	if i.objects.Repo != nil {
		i.objects.Repo.Close()
	}
	if i.objects.Dir != nil {
		i.objects.Dir.Close()
	}
}

// tree reads the whole image.
func (i *image) tree() (*fstree.Tree, error) {
	tree, _, err := erofs.Read(i.file, i.size)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.name, err)
	}
	return tree, nil
}

// repositoryWith opens the repository to look for an image in, after what was looked for first is not there.
func (a *app) repositoryWith(name, first string) (*repo.Repo, error) {
	r, err := a.open()
	if err != nil {
		return nil, fmt.Errorf("%s: no such %s, and no repository with an image of that name: %w", name, first, err)
	}
	if err := a.checkHash(r); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// openNamed opens an image of the repository.
func openNamed(r *repo.Repo, name, first string) (*os.File, error) {
	_, err := r.ImageDigest(name)
	if err == nil {
		var f *os.File
		if f, _, err = r.OpenImage(name); err == nil {
			return f, nil
		}
		if !errors.Is(err, repo.ErrNotFound) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%s: no such %s, and no image of that name in the repository %s (see: images): %w", name, first, r.Path(), err)
}
