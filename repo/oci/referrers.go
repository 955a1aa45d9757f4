package oci

import (
	"context"
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo"
)

// Referring is a Source that knows which artifacts refer to an image.
type Referring interface {
	Source
	// Referrers returns the artifacts whose subject is the manifest with this digest.
	Referrers(ctx context.Context, subject Digest) ([]Descriptor, error)
}

// pinned is a source opened for the image with a digest, which the manifest must have.
type pinned struct {
	Source
	digest Digest
}

func (p pinned) Manifest(ctx context.Context, d Digest) ([]byte, error) {
	if d != "" {
		return p.Source.Manifest(ctx, d)
	}
	b, err := p.Source.Manifest(ctx, p.digest)
	if err == nil {
		err = p.digest.verify(b)
	}
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", p.digest, err)
	}
	return b, nil
}

// maxReferrers is how many artifacts are taken for one image, and those for them.
const maxReferrers = 1000

// PullReferrers brings the artifacts that refer to an image, and those that refer to them, and returns their digests. A source that
// does not know of any has none.
func PullReferrers(ctx context.Context, r *repo.Repo, source Source, image Digest, o PullOptions) ([]Digest, error) {
	from, ok := source.(Referring)
	if !ok {
		return nil, nil
	}
	o.Tag, o.Transform, o.KeepBlobs = "", nil, false
	seen := map[Digest]bool{image: true}
	var list []Digest
	for subjects := []Digest{image}; len(subjects) > 0; subjects = subjects[1:] {
		artifacts, err := from.Referrers(ctx, subjects[0])
		if err != nil {
			return list, fmt.Errorf("referrers of %s: %w", subjects[0], err)
		}
		for _, d := range artifacts {
			if seen[d.Digest] {
				continue
			}
			if seen[d.Digest] = true; len(seen) > maxReferrers {
				return list, fmt.Errorf("image %s: more than %d artifacts refer to it", image, maxReferrers)
			}
			if _, err := Pull(ctx, r, pinned{source, d.Digest}, o); err != nil {
				return list, fmt.Errorf("referrer %s: %w", d.Digest, err)
			}
			list = append(list, d.Digest)
			subjects = append(subjects, d.Digest)
		}
	}
	return list, nil
}

// Referrers returns the artifacts of the layout that refer to an image, see Referring.
func (l *Layout) Referrers(_ context.Context, subject Digest) ([]Descriptor, error) {
	b, err := l.read("index.json")
	if err != nil {
		return nil, err
	}
	i, _, err := isIndex(b)
	if err != nil {
		return nil, fmt.Errorf("%s/index.json: %w", l.name, err)
	}
	var list []Descriptor
	for _, d := range i.Manifests {
		b, err := l.read(blobPath(d.Digest))
		if err != nil || d.Digest.verify(b) != nil {
			continue // nobody has asked for this one
		}
		if m, err := parseManifest(b); err == nil && m.Subject != nil && m.Subject.Digest == subject {
			list = append(list, d)
		}
	}
	return list, nil
}

// Referrers returns the artifacts of the repository that refer to an image, see Referring.
func (s *Stored) Referrers(_ context.Context, subject Digest) ([]Descriptor, error) {
	digests, err := Referrers(s.r, subject)
	list := make([]Descriptor, len(digests))
	for k, d := range digests {
		list[k].Digest = d
	}
	return list, err
}
