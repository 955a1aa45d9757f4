package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// Names of streams, before the digest.
const (
	layerStream    = "oci-layer-"
	configStream   = "oci-config-"
	manifestStream = "oci-manifest-"
)

// Content types of streams.
const (
	LayerContent    = 0x726579616c69636f // "ocilayer"
	ConfigContent   = 0x67666e6f6369636f // "ociconfg"
	ManifestContent = 0x66696e616d69636f // "ocimanif"
	BlobContent     = 0x626f6c625f69636f // "oci_blob"
	IndexContent    = 0x7865646e6969636f // "ociindex"
)

// Image is an image or artifact of the repository.
type Image struct {
	Digest       Digest // of the manifest
	ManifestJSON []byte // as it was pulled
	ConfigJSON   []byte
	Manifest     Manifest
	Config       Config            // of an image; empty for artifacts
	Layers       []fsverity.Digest // the layers' streams, in the order of the manifest
	Linked       []LinkedImage
	Blobs        map[Digest]fsverity.Digest // objects: layers as they came, if that was kept; see PullOptions.KeepBlobs

	manifest, config fsverity.Digest // streams
}

// LinkedImage is a composefs image that was made of an OCI image.
type LinkedImage struct {
	Digest   fsverity.Digest
	Bootable bool
	Format   erofs.Format     // V1 stands for V0, too
	Xattrs   fstree.XattrMode // of a bootable one
}

// Named references of a config to the images that were made of it.
const (
	imageKey = "composefs.image"
	bootKey  = "composefs.image.boot"
	v1Suffix = ".v1"
	modeKey  = ".xattrs="
)

// key returns the named reference.
func (l LinkedImage) key() string {
	key := imageKey
	if l.Bootable {
		key = bootKey
	}
	if l.Format != erofs.V2 {
		key += v1Suffix
	}
	if l.Bootable && l.Xattrs != fstree.XattrsAllowlist {
		key += modeKey + l.Xattrs.String()
	}
	return key
}

// compare orders the plain images, then those to boot, V2 before V1: as composefs-rs writes them.
func (l LinkedImage) compare(o LinkedImage) int {
	if l.Bootable != o.Bootable {
		return map[bool]int{true: 1, false: -1}[l.Bootable]
	}
	return strings.Compare(l.key(), o.key())
}

// parseKey reads a named reference. It is false for one that leads to something else.
func parseKey(key string, d fsverity.Digest) (LinkedImage, bool) {
	l := LinkedImage{Digest: d, Format: erofs.V2}
	rest, ok := strings.CutPrefix(key, imageKey)
	if !ok {
		return l, false
	}
	rest, l.Bootable = strings.CutPrefix(rest, ".boot")
	rest, v1 := strings.CutPrefix(rest, v1Suffix)
	if v1 {
		l.Format = erofs.V1
	}
	if mode, ok := strings.CutPrefix(rest, modeKey); ok && l.Bootable {
		var err error
		l.Xattrs, err = fstree.ParseXattrMode(mode)
		return l, err == nil
	}
	return l, rest == ""
}

// Find returns the composefs image of a kind, see LinkedImage.
func (i *Image) Find(bootable bool, f erofs.Format, mode fstree.XattrMode) (fsverity.Digest, bool) {
	want := LinkedImage{Bootable: bootable, Format: f, Xattrs: mode}.key()
	for _, l := range i.Linked {
		if l.key() == want {
			return l.Digest, true
		}
	}
	return fsverity.Digest{}, false
}

// Stream returns the digest of the stream that keeps the manifest.
func (i *Image) Stream() fsverity.Digest { return i.manifest }

// ConfigStream returns the digest of the stream that keeps the config.
func (i *Image) ConfigStream() fsverity.Digest { return i.config }

// ConfigDigest returns the digest of the config, which container engines call the image ID.
func (i *Image) ConfigDigest() Digest { return i.Manifest.Config.Digest }

// Open opens an image by the name of a tag, or by the digest of its manifest with "@" before it. What is returned has been
// verified, but for the layers themselves.
func Open(r *repo.Repo, name string) (*Image, error) {
	var d Digest
	var err error
	if digest, ok := strings.CutPrefix(name, "@"); ok {
		d, err = ParseDigest(digest)
	} else {
		d, err = resolve(r, name)
	}
	if err != nil {
		return nil, err
	}
	i, err := open(r, d)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	return i, nil
}

func open(r *repo.Repo, d Digest) (*Image, error) {
	i := &Image{Digest: d}
	var err error
	if i.manifest, err = r.StreamObject(manifestStream + string(d)); err != nil {
		return nil, err
	}
	var refs, configRefs []splitstream.NamedRef
	if i.ManifestJSON, refs, err = readExternal(r, i.manifest, ManifestContent, d); err != nil {
		if _, wrong := OpenIndex(r, d); wrong == nil {
			err = ErrIndex
		}
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if i.Manifest, err = parseManifest(i.ManifestJSON); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	config := i.Manifest.Config.Digest
	var ok bool
	if i.config, ok = find(refs, "config:"+string(config)); !ok {
		return nil, fmt.Errorf("manifest %s: its stream leads to no config", d)
	}
	if i.ConfigJSON, configRefs, err = readExternal(r, i.config, ConfigContent, config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	return i, i.fill(refs, configRefs)
}

// OpenConfig opens an image by the digest of its config, without a manifest.
func OpenConfig(r *repo.Repo, d Digest) (*Image, error) {
	i := &Image{Manifest: Manifest{Config: Descriptor{MediaType: typeOCIConfig, Digest: d}}}
	var err error
	if i.config, err = r.StreamObject(configStream + string(d)); err != nil {
		return nil, err
	}
	var refs []splitstream.NamedRef
	if i.ConfigJSON, refs, err = readExternal(r, i.config, ConfigContent, d); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	var c Config
	if err := unmarshal(i.ConfigJSON, &c); err != nil {
		return nil, fmt.Errorf("config %s: %w", d, err)
	}
	i.Manifest.Layers = make([]Descriptor, len(c.RootFS.DiffIDs))
	return i, i.fill(nil, refs)
}

// fill sets what the named references of the manifest and the config lead to.
func (i *Image) fill(refs, configRefs []splitstream.NamedRef) (err error) {
	i.Blobs = map[Digest]fsverity.Digest{}
	for _, ref := range refs {
		if d, ok := strings.CutPrefix(ref.Name, blobKey); ok {
			i.Blobs[Digest(d)] = ref.Stream
		}
	}
	names := refs
	if i.Manifest.IsImage() {
		if i.Config, err = parseConfig(i.ConfigJSON, len(i.Manifest.Layers)); err != nil {
			return fmt.Errorf("config %s: %w", i.ConfigDigest(), err)
		}
		names = configRefs
	}
	for _, id := range i.layerIDs() {
		stream, ok := find(names, string(id))
		if !ok {
			return fmt.Errorf("layer %s: no stream is named for it", id)
		}
		i.Layers = append(i.Layers, stream)
	}
	for _, ref := range configRefs {
		if l, ok := parseKey(ref.Name, ref.Stream); ok {
			i.Linked = append(i.Linked, l)
		}
	}
	slices.SortFunc(i.Linked, LinkedImage.compare)
	return nil
}

func find(refs []splitstream.NamedRef, name string) (fsverity.Digest, bool) {
	for _, ref := range refs {
		if ref.Name == name {
			return ref.Stream, true
		}
	}
	return fsverity.Digest{}, false
}

// readExternal reads a stream whose whole content is one object, and checks the content's digest.
func readExternal(r *repo.Repo, stream fsverity.Digest, contentType uint64, want Digest) ([]byte, []splitstream.NamedRef, error) {
	s, err := r.OpenStream(stream, contentType)
	if err != nil {
		return nil, nil, err
	}
	defer s.Close()
	if s.Size > maxJSON {
		return nil, nil, fmt.Errorf("%d bytes: at most %d are read", s.Size, maxJSON)
	}
	var b bytes.Buffer
	if err := s.WriteTo(&b, r); err != nil {
		return nil, nil, err
	}
	return b.Bytes(), s.Named, want.verify(b.Bytes())
}

// writeExternal stores a content as an object of its own, which can be signed, and the stream that refers to it.
func writeExternal(i *repo.Import, contentType uint64, content []byte, refs []splitstream.NamedRef) (fsverity.Digest, error) {
	object, err := i.PutAll([][]byte{content})
	if err != nil {
		return fsverity.Digest{}, err
	}
	w := splitstream.NewWriter(i.Algorithm(), contentType)
	for _, ref := range refs {
		if err := w.Name(ref.Name, ref.Stream); err != nil {
			return fsverity.Digest{}, err
		}
	}
	if err := w.Object(object[0], uint64(len(content))); err != nil {
		return fsverity.Digest{}, err
	}
	d, _, err := i.PutStream(w)
	return d, err
}

// ErrNotImage tells that an artifact is no container image, of which a tree could be made.
var ErrNotImage = errors.New("not a container image, but another artifact")

// Tree makes the tree of an image from its layers, as they are in the repository: nothing is transformed, see
// fstree.Tree.MakeContainerRoot. The sink takes the contents of files that are not in the layers as such, those with holes.
func (i *Image) Tree(ctx context.Context, r *repo.Repo, sink fstree.Sink, l Limits) (*fstree.Tree, error) {
	if !i.Manifest.IsImage() {
		return nil, ErrNotImage
	}
	return treeOf(ctx, r, i.Config.RootFS.DiffIDs, i.Layers, sink, l)
}

// TreeOf makes a tree of layers that are in the repository, whether they belong to an image or not, see Image.Tree.
func TreeOf(ctx context.Context, r *repo.Repo, diffIDs []Digest, sink fstree.Sink, l Limits) (*fstree.Tree, error) {
	streams := make([]fsverity.Digest, len(diffIDs))
	for k, id := range diffIDs {
		var err error
		if streams[k], err = r.StreamObject(layerStream + string(id)); err != nil {
			return nil, err
		}
	}
	return treeOf(ctx, r, diffIDs, streams, sink, l)
}

func treeOf(ctx context.Context, r *repo.Repo, diffIDs []Digest, streams []fsverity.Digest, sink fstree.Sink, l Limits) (*fstree.Tree, error) {
	m := newMerged()
	for k, d := range streams {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := m.stream(r, d, sink, l); err != nil {
			return nil, fmt.Errorf("layer %s: %w", diffIDs[k], err)
		}
	}
	return m.tree(), nil
}

func (m *merged) stream(o objects, d fsverity.Digest, sink fstree.Sink, l Limits) error {
	s, err := o.OpenStream(d, LayerContent)
	if err != nil {
		return err
	}
	defer s.Close()
	a, err := newArchive(s.Reader, o, sink, l.orDefault())
	if err != nil {
		return err
	}
	defer a.close()
	return m.layer(a.next)
}

// Files opens the contents of a tree that Tree has made.
func Files(r *repo.Repo) fstree.Open {
	return func(name string, inode *fstree.Inode) (io.ReadCloser, error) {
		switch c := inode.Content.(type) {
		case fstree.Inline:
			return io.NopCloser(bytes.NewReader(c)), nil
		case *fstree.Object:
			return r.OpenVerified(c.Digest)
		}
		return nil, fmt.Errorf("%s: not a regular file", name)
	}
}
