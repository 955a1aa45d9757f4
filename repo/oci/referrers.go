package oci

import (
	"context"
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Referring is a Source that knows which artifacts refer to an image.
type Referring interface {
	Source
	// Referrers returns the artifacts whose subject is the manifest with this digest. If a type is asked for, others may be left out,
	// or not. Who asks has to look whether the manifests themselves say so.
	Referrers(ctx context.Context, subject Digest, artifactType string) ([]Descriptor, error)
}

// asked is a source of which a manifest is known already.
type asked struct {
	Source
	digest   Digest
	manifest []byte
}

func (a asked) Manifest(ctx context.Context, d Digest) ([]byte, error) {
	if d != a.digest {
		return a.Source.Manifest(ctx, d)
	}
	return a.manifest, nil
}

// readManifest reads a manifest or index that has this digest.
func readManifest(ctx context.Context, source Source, d Digest, retry Retry) (text []byte, err error) {
	err = retry.Do(ctx, func() error {
		text, err = source.Manifest(ctx, d)
		return err
	})
	if err == nil {
		err = d.verify(text)
	}
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	return text, nil
}

// maxReferrers is how many artifacts are taken for one image, and those for them.
const maxReferrers = 1000

// PullReferrers brings the artifacts that refer to an image, and those that refer to them, or only those of a type if that is not "", and
// returns their digests. An artifact that is an index comes with all its manifests, to which others may refer as well. A source that does
// not know of any has none. What a source lists though it does not refer to the image is left.
//
// Artifacts are known by their digests, which others have signed perhaps: the layers of those that are container images are kept as they
// come, so that they can be given back.
func PullReferrers(ctx context.Context, r *repo.Repo, source Source, image Digest, artifactType string, o PullOptions) ([]Digest, error) {
	from, ok := source.(Referring)
	if !ok {
		return nil, nil
	}
	o.Tag, o.Transform, o.Expected, o.KeepBlobs = "", nil, fsverity.Digest{}, true
	c := &collector{r: r, source: source, o: o, kind: artifactType, members: map[Digest]bool{}}
	seen := map[Digest]bool{image: true}
	var list []Digest
	for c.subjects = []Digest{image}; len(c.subjects) > 0; c.subjects = c.subjects[1:] {
		subject := c.subjects[0]
		artifacts, err := from.Referrers(ctx, subject, artifactType)
		if err != nil {
			return list, fmt.Errorf("referrers of %s: %w", subject, err)
		}
		for _, d := range artifacts {
			if seen[d.Digest] {
				continue
			}
			if seen[d.Digest] = true; len(seen) > maxReferrers {
				return list, fmt.Errorf("image %s: more than %d artifacts refer to it", image, maxReferrers)
			}
			refers, err := c.referrer(ctx, d.Digest, subject)
			if err != nil {
				return list, fmt.Errorf("referrer %s: %w", d.Digest, err)
			}
			if refers {
				list = append(list, d.Digest)
			}
		}
	}
	return list, nil
}

// collector brings artifacts.
type collector struct {
	r        *repo.Repo
	source   Source
	o        PullOptions
	kind     string          // that is asked for, "" for all
	subjects []Digest        // to which others may refer
	members  map[Digest]bool // manifests of indexes that are there
	named    int             // by indexes, each as often as it is
}

// referrer brings an artifact if it refers to the subject, and has the type. Registries do not always know the types.
func (c *collector) referrer(ctx context.Context, artifact, subject Digest) (refers bool, err error) {
	text, err := readManifest(ctx, c.source, artifact, c.o.Retry)
	if err != nil {
		return false, err
	}
	to, kind, isIndex, err := refersTo(text)
	if err != nil || to != subject || c.kind != "" && kind != c.kind {
		return false, err
	}
	if isIndex {
		err = c.index(ctx, artifact, text, 1)
	} else {
		err = c.manifest(ctx, artifact, text)
	}
	return err == nil, err
}

// refersTo returns what a manifest or index refers to, "" if to nothing, and the type of it.
func refersTo(text []byte) (subject Digest, kind string, isIndex bool, err error) {
	var m Manifest
	if isIndex, err = IsIndex(text); err == nil && isIndex {
		err = unmarshal(text, &m)
	} else if err == nil {
		m, err = parseManifest(text)
	}
	if m.Subject != nil {
		subject = m.Subject.Digest
	}
	return subject, m.kind(), isIndex, err
}

// manifest brings an artifact that is none but itself.
func (c *collector) manifest(ctx context.Context, d Digest, text []byte) error {
	o := c.o
	o.digest = d
	_, err := Pull(ctx, c.r, asked{c.source, d, text}, o)
	if err == nil {
		c.subjects = append(c.subjects, d)
	}
	return err
}

// index brings the manifests of an index, and the index when they are there.
func (c *collector) index(ctx context.Context, d Digest, text []byte, depth int) error {
	if depth > maxIndexDepth {
		return fmt.Errorf("index %s: more than %d indexes in each other", d, maxIndexDepth)
	}
	x, err := ParseIndex(d, text)
	if err != nil {
		return err
	}
	if c.named += len(x.Manifests); c.named > maxReferrers {
		return fmt.Errorf("index %s: more than %d manifests in it, and in others", d, maxReferrers)
	}
	for _, m := range x.Manifests {
		if c.members[m.Digest] {
			continue
		}
		c.members[m.Digest] = true
		text, err := readManifest(ctx, c.source, m.Digest, c.o.Retry)
		if err != nil {
			return err
		}
		is, err := IsIndex(text)
		if err == nil && is {
			err = c.index(ctx, m.Digest, text, depth+1)
		} else if err == nil {
			err = c.manifest(ctx, m.Digest, text)
		}
		if err != nil {
			return fmt.Errorf("manifest %s: %w", m.Digest, err)
		}
	}
	c.subjects = append(c.subjects, d)
	return x.store(ctx, c.r, c.o.Lock)
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
		if to, _, _, err := refersTo(b); err == nil && to == subject {
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
