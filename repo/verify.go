package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// VerifyOptions says how an image is verified.
type VerifyOptions struct {
	Read    bool          // read objects that have fs-verity, too, so that the kernel checks every block of them
	Checked *atomic.Int64 // counts objects as they are measured, if it is not nil
	Lock    LockOptions
}

// VerifyReport is what is wrong with one image.
type VerifyReport struct {
	Image    fsverity.Digest
	Format   erofs.Format
	Objects  int
	Findings []Finding
}

// VerifyImage verifies an image by any of its names: its digest, its structure, and every object that it needs. An error means
// that it could not be done, or that there is no such image; findings are in the report.
func (r *Repo) VerifyImage(ctx context.Context, name string, o VerifyOptions) (VerifyReport, error) {
	release, err := r.LockShared(ctx, o.Lock)
	if err != nil {
		return VerifyReport{}, err
	}
	defer release()
	f, d, err := r.OpenImage(name)
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNoVerity) {
		kind := ObjectCorrupt
		if errors.Is(err, ErrNoVerity) {
			kind = ObjectNoVerity
		}
		return VerifyReport{Image: d, Findings: []Finding{{Kind: kind, Path: "images/" + d.String(), Detail: err.Error()}}}, nil
	}
	if err != nil {
		return VerifyReport{Image: d}, err
	}
	defer f.Close()
	return r.verifyImage(ctx, f, d, "images/"+d.String(), o)
}

// VerifyImageFile does the same for an image that is a file anywhere; the objects are those of the repository. Its digest is
// computed, and is for the caller to compare.
func (r *Repo) VerifyImageFile(ctx context.Context, path string, o VerifyOptions) (VerifyReport, error) {
	release, err := r.LockShared(ctx, o.Lock)
	if err != nil {
		return VerifyReport{}, err
	}
	defer release()
	f, err := os.Open(path)
	if err != nil {
		return VerifyReport{}, err
	}
	defer f.Close()
	d, _, err := fsverity.OfReader(r.Algorithm(), f)
	if err != nil {
		return VerifyReport{}, err
	}
	return r.verifyImage(ctx, f, d, path, o)
}

func (r *Repo) verifyImage(ctx context.Context, f *os.File, d fsverity.Digest, name string, o VerifyOptions) (VerifyReport, error) {
	report := VerifyReport{Image: d}
	tree, format, err := readImage(f)
	if err != nil {
		report.Findings = []Finding{{Kind: ImageCorrupt, Path: name, Detail: err.Error()}}
		return report, nil
	}
	report.Format = format
	paths, sizes := map[fsverity.Digest][]string{}, map[fsverity.Digest]int64{}
	if err := tree.Walk(func(path string, i *fstree.Inode) error {
		object, isObject := i.Content.(*fstree.Object)
		if !isObject || object.Size == 0 {
			return nil
		}
		switch need := objectOf(i); {
		case need.Algorithm() != r.Algorithm() || object.Digest.IsZero():
			report.Findings = append(report.Findings, Finding{Kind: ImageCorrupt, Path: name,
				Detail: fmt.Sprintf("%s: no digest of %v: its content cannot be verified", path, r.Algorithm())})
		case need != object.Digest:
			report.Findings = append(report.Findings, Finding{Kind: ImageCorrupt, Path: name,
				Detail: fmt.Sprintf("%s: leads to object %v, but has digest %v", path, need, object.Digest)})
		default:
			if size, again := sizes[need]; again && size != int64(object.Size) {
				report.Findings = append(report.Findings, Finding{Kind: ImageCorrupt, Path: name,
					Detail: fmt.Sprintf("%s: %d bytes, but %s has %d and the same object", path, object.Size, paths[need][0], size)})
			}
			paths[need] = append(paths[need], path)
			sizes[need] = int64(object.Size)
		}
		return nil
	}); err != nil {
		return report, err
	}
	report.Objects = len(paths)
	if err := r.measureAll(ctx, paths, sizes, name, o, &report); err != nil {
		return report, err
	}
	slices.SortFunc(report.Findings, func(a, b Finding) int { return slices.Compare([]string{a.Path, a.Detail}, []string{b.Path, b.Detail}) })
	return report, nil
}

// measureAll measures objects, those of one directory together.
func (r *Repo) measureAll(ctx context.Context, paths map[fsverity.Digest][]string, sizes map[fsverity.Digest]int64,
	image string, o VerifyOptions, report *VerifyReport) error {
	var byDirectory [256][]fsverity.Digest
	for d := range paths {
		k := d.Bytes()[0]
		byDirectory[k] = append(byDirectory[k], d)
	}
	m := newMeasurer(r)
	m.read = o.Read
	var mu sync.Mutex
	var failed error
	work := make(chan []fsverity.Digest)
	var workers sync.WaitGroup
	result := func(d fsverity.Digest, found measured) {
		if o.Checked != nil {
			o.Checked.Add(1)
		}
		err := found.err
		if err == nil && found.size != sizes[d] {
			err = fmt.Errorf("%d bytes, but the image says %d", found.size, sizes[d])
		}
		if err == nil {
			return
		}
		f := Finding{Kind: ObjectUnreadable, Path: "objects/" + d.ObjectPath(), Detail: err.Error(), object: d}
		switch {
		case found.err == nil:
			f.Kind = ImageCorrupt
		case errors.Is(err, ErrNotFound):
			f.Kind = ImageObjectMissing
		case errors.Is(err, ErrNoVerity):
			f.Kind = ObjectNoVerity
		case errors.Is(err, ErrCorrupt), errors.Is(err, unix.EIO):
			f.Kind = ObjectCorrupt
		}
		list := paths[d]
		n := min(len(list), mostPaths)
		f.Breaks = []Broken{{Name: image, Paths: list[:n], More: len(list) - n}}
		mu.Lock()
		report.Findings = append(report.Findings, f)
		mu.Unlock()
	}
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for list := range work {
				if err := r.measureDirectory(m, list, result); err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
				}
			}
		})
	}
	for _, list := range byDirectory {
		if len(list) > 0 && ctx.Err() == nil {
			work <- list
		}
	}
	close(work)
	workers.Wait()
	return errors.Join(failed, ctx.Err())
}

func (r *Repo) measureDirectory(m *measurer, list []fsverity.Digest, result func(fsverity.Digest, measured)) error {
	slices.SortFunc(list, fsverity.Digest.Compare)
	dir, err := r.openat("objects/"+list[0].ObjectPath()[:2], unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		for _, d := range list {
			result(d, measured{err: ErrNotFound})
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	names := make([]string, len(list))
	for k, d := range list {
		names[k] = d.FileName()
	}
	m.objects(int(dir.Fd()), names, list, func(k int, found measured) { result(list[k], found) })
	return nil
}
