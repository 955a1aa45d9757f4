package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/docker/distribution/registry/api/errcode"
	v2 "github.com/docker/distribution/registry/api/v2"
	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/transports"
	"go.podman.io/image/v5/types"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// Target is a place that an image is given to, an oci.Target: an OCI layout, or a registry, which refuses a blob that has another
// digest, and a manifest that names a blob which is not there.
type Target struct {
	oci.Target
	io.Closer
}

// OpenTarget opens what a name names to put an image there: docker://HOST/NAME:TAG, or oci:DIR[:TAG].
func OpenTarget(ctx context.Context, name string, o Options) (*Target, error) {
	transport, rest, _ := strings.Cut(name, ":")
	switch transport {
	case "oci":
		dir, tag := splitLayout(rest)
		l, err := oci.CreateLayout(dir, tag)
		if err != nil {
			return nil, err
		}
		return &Target{l, l}, nil
	case "docker":
	default:
		return nil, fmt.Errorf("image %q: images are given to docker://HOST/NAME:TAG or oci:DIR[:TAG]", name)
	}
	sys := o.system()
	ref, err := transports.Get(transport).ParseReference(rest)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	r := &registryTarget{image: &Image{transport: transport, sys: sys, ref: ref, retry: o.Retry}, retry: o.Retry}
	if r.to, err = ref.NewImageDestination(ctx, sys); err != nil {
		return nil, fmt.Errorf("image %s: %w", name, r.image.explain(err))
	}
	return &Target{r, r.to}, nil
}

// registryTarget is a registry.
type registryTarget struct {
	image *Image // for its errors
	to    types.ImageDestination
	retry oci.Retry
	lists bool // it is known to list what refers to an image by itself
}

func infoOf(d oci.Descriptor) types.BlobInfo {
	return types.BlobInfo{Digest: digest.Digest(d.Digest), Size: d.Size, MediaType: d.MediaType}
}

func (r *registryTarget) Has(ctx context.Context, d oci.Descriptor) (have bool, err error) {
	err = r.retry.Do(ctx, func() (err error) {
		have, _, err = r.to.TryReusingBlob(ctx, infoOf(d), none.NoCache, false)
		return r.image.explain(err)
	})
	return have, err
}

func (r *registryTarget) PutBlob(ctx context.Context, d oci.Descriptor, content io.Reader) error {
	_, err := r.to.PutBlob(ctx, content, infoOf(d), none.NoCache, false)
	if lostUpload(err) {
		return err
	}
	return r.image.explain(err)
}

// lostUpload reports whether a registry has forgotten an upload, or got other bytes than were sent: a new one may be better.
func lostUpload(err error) bool {
	var code errcode.ErrorCoder
	return errors.As(err, &code) && slices.Contains([]errcode.ErrorCode{v2.ErrorCodeBlobUploadUnknown, v2.ErrorCodeBlobUploadInvalid,
		v2.ErrorCodeDigestInvalid, v2.ErrorCodeSizeInvalid}, code.ErrorCode())
}

func (r *registryTarget) PutManifest(ctx context.Context, d oci.Descriptor, content []byte, as oci.Known) error {
	var instance *digest.Digest
	if as != oci.KnownByName {
		instance = new(digest.Digest(d.Digest))
	}
	err := r.retry.Do(ctx, func() error { return r.image.explain(r.to.PutManifest(ctx, content, instance)) })
	var m oci.Manifest
	if err == nil {
		err = json.Unmarshal(content, &m)
	}
	if err != nil || m.Subject == nil {
		return err
	}
	d.Annotations = m.Annotations // the list of artifacts has them, too
	if err := r.refer(ctx, m.Subject.Digest, d); err != nil {
		return fmt.Errorf("referrers of %s: %w", m.Subject.Digest, err)
	}
	return nil
}

// putTag stores a manifest or index under another tag of the same repository.
func (r *registryTarget) putTag(ctx context.Context, tag string, content []byte) error {
	tagged, err := reference.WithTag(reference.TrimNamed(r.image.ref.DockerReference()), tag)
	if err != nil {
		return err
	}
	ref, err := docker.NewReference(tagged)
	if err != nil {
		return err
	}
	to, err := ref.NewImageDestination(ctx, r.image.sys)
	if err != nil {
		return r.image.explain(err)
	}
	defer to.Close()
	return r.retry.Do(ctx, func() error { return r.image.explain(to.PutManifest(ctx, content, nil)) })
}
