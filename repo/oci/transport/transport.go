// Package transport opens images where they are: in registries, in archives, in the storage of container engines. It is the
// network and the containers libraries behind [oci.Source]; repo/oci itself knows none of it.
//
// An image is named as containers-transports(5) describes, docker://HOST/NAME:TAG for example; [Names] are the transports. What
// the machine's administrator has configured for container engines counts here as well: registries.conf(5) with mirrors and blocked
// registries, auth.json(5) with credential helpers, certs.d(5), policy.json(5), and the proxies of the environment. If there is no
// policy.json, every image is accepted.
//
// What a source says is not believed here either: repo/oci compares all digests. The policy is asked about the very bytes of the
// manifest that are handed out, and an index is told from a manifest by repo/oci, so that no image comes past it. Of artifacts that refer
// to an image, signatures for example, it is only asked whether it rejects them.
//
// Blobs of registries are asked for by range, so that each byte comes once. A registry that knows no ranges sends the beginning
// again, which is passed over. Archives of OCI layouts are unpacked to a temporary directory first. The storage of container engines
// keeps layers uncompressed, and gives them so.
//
// Signatures by OpenPGP need the build tag containers_image_openpgp. A program without it refuses every image if there is a policy.
package transport

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
	_ "go.podman.io/image/v5/directory"
	_ "go.podman.io/image/v5/docker"
	_ "go.podman.io/image/v5/docker/archive"
	"go.podman.io/image/v5/image"
	"go.podman.io/image/v5/manifest"
	_ "go.podman.io/image/v5/oci/archive"
	_ "go.podman.io/image/v5/oci/layout"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/transports"
	"go.podman.io/image/v5/types"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// Names are the transports, as they stand before the first colon of an image's name.
var Names = []string{"docker", "oci", "oci-archive", "docker-archive", "dir", "containers-storage"}

const storageName = "containers-storage"

// Is reports whether a name is that of an image, for it begins with the name of a transport and a colon.
func Is(name string) bool {
	transport, _, ok := strings.Cut(name, ":")
	return ok && slices.Contains(Names, transport)
}

// Options say how images are reached. Zero values leave it to the machine's configuration.
type Options struct {
	AuthFile   string // credentials, see auth.json(5)
	CertDir    string // *.crt of authorities, *.cert and *.key of this machine
	SkipVerify *bool  // true: any certificate of a registry is accepted, and HTTP
	Scratch    string // directory for archives that must be unpacked; "": /var/tmp, or $TMPDIR
	Retry      oci.Retry
}

func (o Options) system() *types.SystemContext {
	sys := &types.SystemContext{
		AuthFilePath: o.AuthFile, DockerCertPath: o.CertDir, BigFilesTemporaryDir: o.Scratch, DockerRegistryUserAgent: "composefs-boot",
	}
	if o.SkipVerify != nil {
		sys.DockerInsecureSkipTLSVerify = types.NewOptionalBool(*o.SkipVerify)
	}
	return sys
}

// Image is an open image, an oci.Source.
type Image struct {
	transport string
	sys       *types.SystemContext
	ref       types.ImageReference
	source    types.ImageSource // nil for an OCI layout
	layout    *oci.Layout
	noRanges  atomic.Bool // the registry always sends blobs from the beginning
	retry     oci.Retry

	mu        sync.Mutex
	storage   map[oci.Digest]types.BlobInfo // containers-storage: layers of the manifest, as they are kept
	referrers map[oci.Digest]bool           // artifacts that were listed, see Referrers, and manifests of those that are indexes
}

// The libraries log, at times in the middle of the output of a program.
func init() { logrus.SetOutput(io.Discard) }

// Open opens the image of a name. Registries are asked for its manifest already.
func Open(ctx context.Context, name string, o Options) (*Image, error) {
	transport, rest, _ := strings.Cut(name, ":")
	if !Is(name) {
		return nil, fmt.Errorf("image %q: want TRANSPORT:REFERENCE, with one of %s", name, strings.Join(Names, ", "))
	}
	i := &Image{transport: transport, sys: o.system(), retry: o.Retry, referrers: map[oci.Digest]bool{}}
	kind := transports.Get(transport)
	if kind == nil {
		return nil, fmt.Errorf("image %s: this program was built with cgo, and so without %s: build it with \"make build\"", name, transport)
	}
	var err error
	i.ref, err = kind.ParseReference(rest)
	switch {
	case err != nil:
	case transport == "oci":
		i.layout, err = openLayout(rest)
	default:
		err = o.Retry.Do(ctx, func() error {
			i.source, err = i.ref.NewImageSource(ctx, i.sys)
			return i.explain(err)
		})
	}
	if err != nil && transport == storageName {
		err = fmt.Errorf("%w (it is to be had by podman unshare composefs-boot ..., or by skopeo copy %s oci:DIR)", err, name)
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	return i, nil
}

// Close lets go of the image, and removes what was unpacked.
func (i *Image) Close() error {
	if i.layout != nil {
		return i.layout.Close()
	}
	return i.source.Close()
}

// Remote reports whether the image is behind a network, see oci.PullOptions.Resume.
func (i *Image) Remote() bool { return i.transport == "docker" }

// Manifest returns a manifest that the policy accepts, or an index; see oci.Source.
func (i *Image) Manifest(ctx context.Context, d oci.Digest) ([]byte, error) {
	if i.layout != nil {
		return i.layoutManifest(ctx, d)
	}
	var instance *digest.Digest
	if d != "" {
		instance = new(digest.Digest(d))
	}
	unparsed := image.UnparsedInstance(i.source, instance)
	b, mediaType, err := unparsed.Manifest(ctx)
	if err != nil {
		return nil, i.explain(err)
	}
	if err := i.allow(ctx, d, b, unparsed); err != nil {
		return nil, err
	}
	if is, _ := oci.IsIndex(b); i.transport == storageName && !is {
		err = i.findLayers(ctx, b, mediaType, instance)
	}
	return b, i.explain(err)
}

// allow asks the policy about a manifest. Of an artifact that refers to an image, and is none itself, no signature is wanted: it is not
// run, and often it is a signature. About an index the policy is asked when an image of it is chosen; one that is an artifact comes with
// all its manifests.
func (i *Image) allow(ctx context.Context, d oci.Digest, b []byte, what types.UnparsedImage) error {
	isIndex, err := oci.IsIndex(b)
	if err != nil {
		return err
	}
	i.mu.Lock()
	artifact := i.referrers[d]
	i.mu.Unlock()
	switch {
	case isIndex && !artifact:
		return nil
	case isIndex:
		x, err := oci.ParseIndex(d, b)
		if err != nil {
			return err
		}
		i.listed(x.Manifests)
	case artifact:
		is, err := oci.IsImage(b)
		if err != nil {
			return err
		}
		artifact = !is
	}
	if err := allow(ctx, i.sys, what, artifact); err != nil {
		return oci.Permanent(err)
	}
	return nil
}

// listed notes artifacts that an image leads to.
func (i *Image) listed(list []oci.Descriptor) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, d := range list {
		i.referrers[d.Digest] = true
	}
}

// findLayers learns under which digests the storage has the layers of a manifest.
func (i *Image) findLayers(ctx context.Context, b []byte, mediaType string, instance *digest.Digest) error {
	m, err := manifest.FromBlob(b, mediaType)
	if err != nil {
		return err
	}
	kept, err := i.source.LayerInfosForCopy(ctx, instance)
	if err != nil {
		return err
	}
	named := m.LayerInfos()
	if len(kept) != len(named) {
		return fmt.Errorf("%d layers are kept, the manifest names %d", len(kept), len(named))
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.storage = map[oci.Digest]types.BlobInfo{}
	for k, info := range kept {
		i.storage[oci.Digest(named[k].Digest)] = info
	}
	return nil
}

// Blob opens a blob, see oci.Source.
func (i *Image) Blob(ctx context.Context, d oci.Descriptor, offset int64) (io.ReadCloser, int64, error) {
	if i.layout != nil {
		return i.layout.Blob(ctx, d, offset)
	}
	info := types.BlobInfo{Digest: digest.Digest(d.Digest), Size: d.Size, MediaType: d.MediaType}
	if i.Remote() {
		r, err := i.registryBlob(ctx, info, offset)
		return r, d.Size, i.explain(err)
	}
	i.mu.Lock()
	if kept, ok := i.storage[d.Digest]; ok {
		info = kept
	}
	i.mu.Unlock()
	r, size, err := i.source.GetBlob(ctx, info, none.NoCache)
	if err != nil {
		return nil, 0, oci.Permanent(err)
	}
	if file, ok := r.(io.Seeker); ok {
		_, err = file.Seek(offset, io.SeekStart)
	} else {
		_, err = io.CopyN(io.Discard, r, offset)
	}
	if err != nil {
		r.Close()
		return nil, 0, err
	}
	return r, size, nil
}
