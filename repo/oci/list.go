package oci

import (
	"errors"
	"fmt"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Tagged is an image under one of its names.
type Tagged struct {
	Tag
	*Image    // nil if it cannot be read
	Err       error
	Referrers int
}

// List returns the images that have tags, sorted by the names of the refs.
func List(r *repo.Repo) ([]Tagged, error) {
	tags, err := Tags(r)
	if err != nil {
		return nil, err
	}
	list := make([]Tagged, len(tags))
	for k, t := range tags {
		list[k].Tag = t
		list[k].Image, list[k].Err = open(r, t.Image)
		referrers, err := Referrers(r, t.Image)
		if err != nil {
			return nil, err
		}
		list[k].Referrers = len(referrers)
	}
	return list, nil
}

// FindLinked returns the image, tagged or not, of which a composefs image was made.
func FindLinked(r *repo.Repo, image fsverity.Digest) (*Image, error) {
	names, err := r.Streams()
	if err != nil {
		return nil, err
	}
	var broken error
	for _, name := range names {
		digest, ok := strings.CutPrefix(name, manifestStream)
		d, err := ParseDigest(digest)
		if !ok || err != nil {
			continue
		}
		i, err := open(r, d)
		if errors.Is(err, ErrIndex) {
			continue
		}
		if err != nil {
			broken = fmt.Errorf("image %s: %w", d, err)
			continue
		}
		for _, l := range i.Linked {
			if l.Digest == image {
				return i, nil
			}
		}
	}
	return nil, errors.Join(fmt.Errorf("no OCI image of composefs image %v: %w", image, repo.ErrNotFound), broken)
}
