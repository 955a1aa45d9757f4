package oci

import (
	"context"
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo"
)

// Referring is a Source that knows which artifacts refer to an image.
type Referring interface {
	Source
	// Referrers returns the artifacts whose subject is the manifest with this digest. If a type is asked for, others may be left out,
	// or not. Who asks has to look whether the manifests themselves say so.
	Referrers(ctx context.Context, subject Digest, artifactType string) ([]Descriptor, error)
}

// pinned is a source opened for the image with a digest, which the manifest must have.
type pinned struct {
	Source
	digest Digest
}

// asked is a source whose manifest is known already.
type asked struct {
	Source
	manifest []byte
}

func (a asked) Manifest(ctx context.Context, d Digest) ([]byte, error) {
	if d != "" {
		return a.Source.Manifest(ctx, d)
	}
	return a.manifest, nil
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

// PullReferrers brings the artifacts that refer to an image, and those that refer to them, or only those of a type if that is not "", and
// returns their digests. A source that does not know of any has none. What a source lists though it is no artifact that refers to the
// image, or an index of several, is left.
func PullReferrers(ctx context.Context, r *repo.Repo, source Source, image Digest, artifactType string, o PullOptions) ([]Digest, error) {
	from, ok := source.(Referring)
	if !ok {
		return nil, nil
	}
	o.Tag, o.Transform, o.KeepBlobs, o.asIs = "", nil, false, true
	seen := map[Digest]bool{image: true}
	var list []Digest
	for subjects := []Digest{image}; len(subjects) > 0; subjects = subjects[1:] {
		artifacts, err := from.Referrers(ctx, subjects[0], artifactType)
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
			refers, err := pullReferrer(ctx, r, source, d.Digest, subjects[0], artifactType, o)
			if err != nil {
				return list, fmt.Errorf("referrer %s: %w", d.Digest, err)
			}
			if refers {
				list = append(list, d.Digest)
				subjects = append(subjects, d.Digest)
			}
		}
	}
	return list, nil
}

// pullReferrer brings an artifact if it refers to the subject, and has the type. Registries do not always know the types.
func pullReferrer(ctx context.Context, r *repo.Repo, source Source, artifact, subject Digest, artifactType string, o PullOptions) (refers bool, err error) {
	var b []byte
	err = o.Retry.Do(ctx, func() (err error) {
		b, err = pinned{source, artifact}.Manifest(ctx, "")
		return err
	})
	if err != nil {
		return false, err
	}
	if is, err := IsIndex(b); err != nil || is {
		return false, err
	}
	m, err := parseManifest(b)
	if err != nil || m.Subject == nil || m.Subject.Digest != subject || artifactType != "" && m.kind() != artifactType {
		return false, err
	}
	_, err = Pull(ctx, r, asked{source, b}, o)
	return err == nil, err
}

// Referrers returns the artifacts of the layout that refer to an image, see Referring.
func (l *Layout) Referrers(_ context.Context, subject Digest, _ string) ([]Descriptor, error) {
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
		m, err := parseManifest(b)
		if err == nil && m.Subject != nil && m.Subject.Digest == subject {
			list = append(list, d)
		}
	}
	return list, nil
}

// Referrers returns the artifacts of the repository that refer to an image, see Referring.
func (s *Stored) Referrers(_ context.Context, subject Digest, _ string) ([]Descriptor, error) {
	digests, err := Referrers(s.r, subject)
	list := make([]Descriptor, len(digests))
	for k, d := range digests {
		list[k].Digest = d
	}
	return list, err
}
