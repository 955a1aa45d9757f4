package oci

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
)

const (
	tagDir      = "oci"           // below streams/refs
	referrerDir = "oci-referrers" // SUBJECT/ARTIFACT
	memberDir   = "oci-members"   // INDEX/MANIFEST
)

// Slashes would be directories; a name is one file.
var (
	encoder = strings.NewReplacer("%", "%25", "/", "%2F")
	decoder = strings.NewReplacer("%25", "%", "%2F", "/")
)

// Tag is a name of an image. What it leads to is kept.
type Tag struct {
	Name  string
	Image Digest
}

// Tags returns all tags, sorted by the names of their refs.
func Tags(r *repo.Repo) ([]Tag, error) {
	refs, err := r.StreamRefs(tagDir)
	if err != nil {
		return nil, err
	}
	var tags []Tag
	for _, ref := range refs {
		digest, ok := strings.CutPrefix(ref.Target, manifestStream)
		if d, err := ParseDigest(digest); ok && err == nil {
			tags = append(tags, Tag{decoder.Replace(ref.Name), d})
		}
	}
	return tags, nil
}

// checkTag tells why an image cannot have this name.
func checkTag(name string) error {
	switch {
	case name == "":
		return errors.New("empty tag")
	case strings.HasPrefix(name, "@"):
		return fmt.Errorf("tag %q: a name with @ before it is a digest", name)
	}
	return nil
}

// TagRef is the ref of a name of an image, below streams/refs.
func TagRef(name string) string { return tagDir + "/" + encoder.Replace(name) }

// resolve returns the image that a tag leads to.
func resolve(r *repo.Repo, name string) (Digest, error) {
	tags, err := Tags(r)
	if err != nil {
		return "", err
	}
	for _, t := range tags {
		if t.Name == name {
			return t.Image, nil
		}
	}
	return "", fmt.Errorf("image %q: %w (oci images lists what is there; a digest has @ before it)", name, repo.ErrNotFound)
}

// Resolve returns the digest of an image or artifact, by its tag or by the digest itself with "@" before it. Whether it is sound is not
// looked at.
func Resolve(r *repo.Repo, name string) (Digest, error) {
	digest, ok := strings.CutPrefix(name, "@")
	if !ok {
		return resolve(r, name)
	}
	d, err := ParseDigest(digest)
	if err == nil {
		_, err = r.StreamObject(manifestStream + string(d))
	}
	if err != nil {
		return "", fmt.Errorf("image %s: %w", name, err)
	}
	return d, nil
}

// SetTag gives an image a name, in place of the image that had it.
func SetTag(ctx context.Context, r *repo.Repo, image Digest, name string, l repo.LockOptions) error {
	if err := checkTag(name); err != nil {
		return err
	}
	i, err := r.Begin(ctx, l)
	if err != nil {
		return err
	}
	defer i.Abort()
	stream := manifestStream + string(image)
	d, err := r.StreamObject(stream)
	if err != nil {
		return err
	}
	if _, err := OpenIndex(r, image); err == nil {
		return fmt.Errorf("%s: %w: it gets no name", image, ErrIndex)
	}
	if err := i.NameStream(stream, d, TagRef(name)); err != nil {
		return err
	}
	return i.Commit()
}

// Untag takes a name away. The image is garbage if it has no other, and so are the artifacts that refer to it, see Follows.
func Untag(ctx context.Context, r *repo.Repo, name string, l repo.LockOptions) error {
	if err := checkTag(name); err != nil {
		return err
	}
	if err := r.RemoveStreamRef(ctx, TagRef(name), l); err != nil {
		return fmt.Errorf("tag %q: %w", name, err)
	}
	return nil
}

// Names are what keeps an image or artifact, and what it keeps itself.
type Names struct {
	Tags     []string
	Referred []Referrer
}

// Referrer is an artifact and what it refers to.
type Referrer struct{ Subject, Artifact Digest }

// Remove takes all names of an image away, and the refs of the artifacts that refer to it; of an artifact, those that keep it with what it
// refers to. It returns what is gone.
func Remove(ctx context.Context, r *repo.Repo, image Digest, l repo.LockOptions) (Names, error) {
	var gone Names
	n, err := namesOf(r, image)
	if err != nil {
		return gone, err
	}
	for _, name := range n.Tags {
		if err := Untag(ctx, r, name, l); err != nil {
			return gone, err
		}
		gone.Tags = append(gone.Tags, name)
	}
	for _, a := range n.Referred {
		if err := r.RemoveStreamRef(ctx, referrerRef(a.Subject, a.Artifact), l); err != nil {
			return gone, err
		}
		gone.Referred = append(gone.Referred, a)
	}
	return gone, nil
}

// namesOf returns the tags of an image, and the artifacts that refer to it, and itself if it refers to something.
func namesOf(r *repo.Repo, image Digest) (Names, error) {
	var n Names
	tags, err := Tags(r)
	if err != nil {
		return n, err
	}
	for _, t := range tags {
		if t.Image == image {
			n.Tags = append(n.Tags, t.Name)
		}
	}
	refs, err := r.StreamRefs(referrerDir)
	for _, ref := range refs {
		subject, artifact, _ := strings.Cut(ref.Name, "/")
		if subject == string(image) || artifact == string(image) {
			n.Referred = append(n.Referred, Referrer{Digest(subject), Digest(artifact)})
		}
	}
	return n, err
}

// Freed is what garbage collection removes besides, when names have been taken away. Bytes are those of the objects.
type Freed struct {
	Names   `json:"-"`
	Objects int   `json:"objects"`
	Bytes   int64 `json:"objects_bytes"`
	Images  int   `json:"images"`
	Streams int   `json:"streams"`
}

// UntagFrees returns what would be free without a tag, see Untag.
func UntagFrees(ctx context.Context, r *repo.Repo, name string, l repo.LockOptions) (Freed, error) {
	if _, err := resolve(r, name); err != nil {
		return Freed{}, err
	}
	return frees(ctx, r, Names{Tags: []string{name}}, l)
}

// RemoveFrees returns what would be free without images, see Remove.
func RemoveFrees(ctx context.Context, r *repo.Repo, images []Digest, l repo.LockOptions) (Freed, error) {
	var all Names
	for _, image := range images {
		n, err := namesOf(r, image)
		if err != nil {
			return Freed{}, err
		}
		all.Tags, all.Referred = append(all.Tags, n.Tags...), append(all.Referred, n.Referred...)
	}
	return frees(ctx, r, all, l)
}

func frees(ctx context.Context, r *repo.Repo, n Names, l repo.LockOptions) (Freed, error) {
	o := repo.GCOptions{DryRun: true, Follows: Follows, Lock: l}
	before, err := r.GC(ctx, o)
	if err != nil {
		return Freed{}, err
	}
	for _, name := range n.Tags {
		o.Without = append(o.Without, "streams/refs/"+TagRef(name))
	}
	for _, a := range n.Referred {
		o.Without = append(o.Without, "streams/refs/"+referrerRef(a.Subject, a.Artifact))
	}
	after, err := r.GC(ctx, o)
	return Freed{n, after.Objects - before.Objects, after.Bytes - before.Bytes, len(after.Images) - len(before.Images),
		len(after.Streams) - len(before.Streams)}, err
}

func referrerRef(subject, artifact Digest) string {
	return referrerDir + "/" + string(subject) + "/" + string(artifact)
}

// Follows tells garbage collection, see repo.GCOptions, that an artifact stays as long as the image that it refers to, and a manifest as
// long as the index that it is in.
func Follows(ref string) string {
	for _, dir := range []string{referrerDir, memberDir} {
		leader, ok := strings.CutPrefix(path.Dir(ref), "streams/refs/"+dir+"/")
		if d, err := ParseDigest(leader); ok && err == nil {
			return manifestStream + string(d)
		}
	}
	return ""
}

// Referrers returns the artifacts that refer to an image, signatures for example.
func Referrers(r *repo.Repo, image Digest) ([]Digest, error) {
	return manifestsBelow(r, referrerDir+"/"+string(image))
}

// manifestsBelow returns the manifests to which the refs of a directory lead.
func manifestsBelow(r *repo.Repo, dir string) ([]Digest, error) {
	refs, err := r.StreamRefs(dir)
	if err != nil {
		return nil, err
	}
	var list []Digest
	for _, ref := range refs {
		if d, err := ParseDigest(ref.Name); err == nil && ref.Target == manifestStream+ref.Name {
			list = append(list, d)
		}
	}
	return list, nil
}

// allReferrers returns the artifacts that refer to an image, those that refer to them, and the manifests of those that are indexes.
func allReferrers(r *repo.Repo, image Digest) ([]Digest, error) {
	all := []Digest{image}
	for k := 0; k < len(all); k++ {
		list, err := Referrers(r, all[k])
		if err != nil {
			return nil, err
		}
		members, err := manifestsBelow(r, memberDir+"/"+string(all[k]))
		if err != nil {
			return nil, err
		}
		for _, d := range append(list, members...) {
			if !slices.Contains(all, d) {
				all = append(all, d)
			}
		}
	}
	return all[1:], nil
}
