package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"

	"github.com/composefs-boot/composefs-boot/repo"
)

// ErrIndex tells that a digest is that of an index of several manifests.
var ErrIndex = errors.New("an index of several manifests, and not one image")

// maxIndexDepth is how many indexes are taken in each other.
const maxIndexDepth = 4

// Index is an artifact of the repository that is an index of manifests. Images are not kept as indexes: a pull chooses one of them.
type Index struct {
	Digest       Digest
	JSON         []byte // as it was pulled
	MediaType    string
	ArtifactType string // "" if it does not say
	Manifests    []Descriptor
	Subject      *Descriptor // the image that it refers to
}

// ParseIndex reads an index. It is known to have the digest.
func ParseIndex(d Digest, text []byte) (*Index, error) {
	i, is, err := isIndex(text)
	if err == nil && !is {
		err = errors.New("not an index")
	}
	if err != nil {
		return nil, fmt.Errorf("index %s: %w", d, err)
	}
	if len(i.Manifests) > maxReferrers {
		return nil, fmt.Errorf("index %s: %d manifests: at most %d are taken", d, len(i.Manifests), maxReferrers)
	}
	for k, m := range i.Manifests {
		if m.Digest == "" {
			return nil, fmt.Errorf("index %s: manifest %d: no digest", d, k)
		}
	}
	return &Index{d, text, cmp.Or(i.MediaType, typeOCIIndex), i.ArtifactType, i.Manifests, i.Subject}, nil
}

// OpenIndex opens an index of the repository by its digest. The error is repo.ErrContentType if it is that of an image.
func OpenIndex(r *repo.Repo, d Digest) (*Index, error) {
	at, err := r.StreamObject(manifestStream + string(d))
	if err != nil {
		return nil, err
	}
	text, _, err := readExternal(r, at, IndexContent, d)
	if err != nil {
		return nil, fmt.Errorf("index %s: %w", d, err)
	}
	return ParseIndex(d, text)
}

// store keeps an index whose manifests are in the repository. They get refs of their own: the stream of a manifest may be replaced by
// another one of the same name, so that a named reference would not keep it.
func (x *Index) store(ctx context.Context, r *repo.Repo, l repo.LockOptions) error {
	i, err := r.Begin(ctx, l)
	if err != nil {
		return err
	}
	defer i.Abort()
	for _, m := range x.Manifests {
		stream := manifestStream + string(m.Digest)
		at, err := r.StreamObject(stream)
		if err != nil {
			return fmt.Errorf("index %s: manifest %s: %w (somebody has removed it meanwhile: pull again)", x.Digest, m.Digest, err)
		}
		if err := i.NameStream(stream, at, memberRef(x.Digest, m.Digest)); err != nil {
			return err
		}
	}
	at, err := writeExternal(i, IndexContent, x.JSON, nil)
	if err != nil {
		return err
	}
	var refs []string
	if x.Subject != nil {
		refs = append(refs, referrerRef(x.Subject.Digest, x.Digest))
	}
	if err := i.NameStream(manifestStream+string(x.Digest), at, refs...); err != nil {
		return err
	}
	return i.Commit()
}

// lacks returns the manifests that are not there, or not kept.
func (x *Index) lacks(r *repo.Repo) []Digest {
	var list []Digest
	seen := map[Digest]bool{}
	for _, m := range x.Manifests {
		if seen[m.Digest] {
			continue
		}
		seen[m.Digest] = true
		named, err := r.StreamObject(manifestStream + string(m.Digest))
		kept, refErr := r.StreamObject(path.Join("refs", memberRef(x.Digest, m.Digest)))
		if err != nil || refErr != nil || named != kept {
			list = append(list, m.Digest)
		}
	}
	return list
}

func memberRef(index, manifest Digest) string {
	return memberDir + "/" + string(index) + "/" + string(manifest)
}
