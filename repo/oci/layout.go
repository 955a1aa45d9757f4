package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const refName = "org.opencontainers.image.ref.name"

// Layout is a directory with images, as the OCI image layout specification describes it: index.json, and blobs/ALGORITHM/HEX.
// It is a Source.
type Layout struct {
	root *os.Root
	name string
	tag  string
}

// OpenLayout opens a layout for the image with a tag, or for its only image if the tag is "".
func OpenLayout(dir, tag string) (*Layout, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Layout{root, dir, tag}, nil
}

// Close closes the directory.
func (l *Layout) Close() error { return l.root.Close() }

// Manifest returns a manifest, see Source.
func (l *Layout) Manifest(_ context.Context, d Digest) ([]byte, error) {
	if d != "" {
		return l.read(blobPath(d))
	}
	b, err := l.read("index.json")
	if err != nil {
		return nil, fmt.Errorf("%w (%s is not an OCI layout)", err, l.name)
	}
	i, _, err := isIndex(b)
	if err != nil {
		return nil, fmt.Errorf("%s/index.json: %w", l.name, err)
	}
	var chosen []Descriptor
	var tags []string
	for _, m := range i.Manifests {
		tag := m.Annotations[refName]
		if l.tag == "" || tag == l.tag {
			chosen = append(chosen, m)
		}
		if tag != "" {
			tags = append(tags, tag)
		}
	}
	// Artifacts are there for the images that they refer to. Indexes need not say there of which type they are.
	images := slices.DeleteFunc(slices.Clone(chosen), func(d Descriptor) bool {
		return d.ArtifactType != "" || d.MediaType == typeOCIIndex && len(chosen) > 1 && l.refers(d.Digest)
	})
	if l.tag == "" && len(images) > 0 {
		chosen = images
	}
	switch {
	case len(chosen) == 0:
		return nil, fmt.Errorf("%s: no image %q: there are: %s", l.name, l.tag, strings.Join(tags, ", "))
	case len(chosen) > 1 && l.tag == "" && !onePerPlatform(chosen):
		return nil, fmt.Errorf("%s: several images: add :TAG, one of: %s", l.name, strings.Join(tags, ", "))
	case len(chosen) > 1:
		return b, nil // an index by platform
	}
	return l.read(blobPath(chosen[0].Digest))
}

// refers reports whether an index refers to another manifest.
func (l *Layout) refers(d Digest) bool {
	b, err := l.read(blobPath(d))
	if err != nil {
		return false // that will be said when it is wanted
	}
	subject, _, _, err := refersTo(b)
	return err == nil && subject != ""
}

func onePerPlatform(list []Descriptor) bool {
	seen := map[Platform]bool{}
	for _, d := range list {
		if d.Platform == nil || seen[*d.Platform] {
			return false
		}
		seen[*d.Platform] = true
	}
	return true
}

// Blob opens a blob, see Source.
func (l *Layout) Blob(_ context.Context, d Descriptor, offset int64) (io.ReadCloser, int64, error) {
	f, info, err := l.open(blobPath(d.Digest))
	if err != nil {
		return nil, 0, err
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Size(), nil
}

func blobPath(d Digest) string { return "blobs/" + strings.Replace(string(d), ":", "/", 1) }

func (l *Layout) open(name string) (*os.File, fs.FileInfo, error) {
	f, err := l.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe there would block
	if err != nil {
		return nil, nil, Permanent(fmt.Errorf("%s: %w", l.name, err))
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, nil, Permanent(fmt.Errorf("%s/%s: %w", l.name, name, err))
	}
	return f, info, nil
}

func (l *Layout) read(name string) ([]byte, error) {
	f, _, err := l.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readJSON(f)
}

// readJSON reads a manifest or config whose size nobody vouches for.
func readJSON(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxJSON+1))
	if err == nil && len(b) > maxJSON {
		err = fmt.Errorf("more than %d bytes", maxJSON)
	}
	return b, err
}
