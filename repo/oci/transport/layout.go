package transport

import (
	"context"
	"strings"

	"go.podman.io/image/v5/manifest"
	"go.podman.io/image/v5/types"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// openLayout opens DIRECTORY or DIRECTORY:TAG. repo/oci reads layouts itself: it tells what is there if the tag is not.
func openLayout(name string) (*oci.Layout, error) { return oci.OpenLayout(splitLayout(name)) }

func splitLayout(name string) (dir, tag string) {
	if k := strings.LastIndexByte(name, ':'); k >= 0 && !strings.Contains(name[k:], "/") {
		return name[:k], name[k+1:]
	}
	return name, ""
}

func (i *Image) layoutManifest(ctx context.Context, d oci.Digest) ([]byte, error) {
	b, err := i.layout.Manifest(ctx, d)
	if err != nil {
		return nil, err
	}
	if err := i.allow(ctx, d, b, layoutImage{i.ref, b}); err != nil {
		return nil, err
	}
	return b, nil
}

// layoutImage is what the policy is asked about: layouts have no signatures.
type layoutImage struct {
	ref      types.ImageReference
	manifest []byte
}

func (l layoutImage) Reference() types.ImageReference { return l.ref }

func (l layoutImage) Manifest(context.Context) ([]byte, string, error) {
	return l.manifest, manifest.GuessMIMEType(l.manifest), nil
}

func (l layoutImage) Signatures(context.Context) ([][]byte, error) { return nil, nil }
