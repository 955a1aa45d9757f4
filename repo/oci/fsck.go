package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// Kind says what is wrong with an image.
type Kind string

// The kinds of findings, in the words of cfsctl.
const (
	RefResolveFailed     Kind = "ref-resolve-failed" // there is no such tag
	InvalidRefName       Kind = "invalid-ref-name"
	ManifestReadFailed   Kind = "manifest-read-failed"
	ManifestParseFailed  Kind = "manifest-parse-failed"
	ConfigRefMissing     Kind = "config-ref-missing" // the manifest's stream does not lead to the config
	ConfigReadFailed     Kind = "config-read-failed"
	ConfigParseFailed    Kind = "config-parse-failed"
	LayerRefMissing      Kind = "layer-ref-missing"    // the config's stream does not lead to the layer
	LayerStreamMissing   Kind = "layer-stream-missing" // the layer has no name
	LayerCheckFailed     Kind = "layer-check-failed"   // it cannot be read, or is another one
	ErofsImageMissing    Kind = "erofs-image-missing"  // a composefs image of it is not there
	ArtifactLayerMissing Kind = "artifact-layer-ref-missing"
	ArtifactLayerFailed  Kind = "artifact-layer-object-missing"
	// Of what cfsctl does not know:
	BlobCheckFailed Kind = "blob-check-failed" // a layer as it came
	MemberMissing   Kind = "member-missing"    // a manifest of an index is not there, or not kept
)

// Finding is one thing that is wrong with an image.
type Finding struct {
	Kind   Kind   `json:"kind"`
	Image  string `json:"image"` // its tag, and "(referrer DIGEST)" if it is about an artifact that refers to it
	Digest string `json:"digest,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// String is the line that cfsctl prints.
func (f Finding) String() string {
	s := fmt.Sprintf("fsck: %s: %s", f.Kind, f.Image)
	for _, part := range []string{f.Digest, f.Detail} {
		if part != "" {
			s += ": " + part
		}
	}
	return s
}

// FsckReport is what is wrong with images.
type FsckReport struct {
	Images, Bad int
	Findings    []Finding
}

// FsckOptions says what is checked.
type FsckOptions struct {
	Image        string // only the one with this tag, if it is not ""
	MetadataOnly bool   // not that the layers have their digests
	Lock         repo.LockOptions
}

// Fsck checks that all tagged images have what they need: manifest and config with their digests, every layer with its diff ID, the
// composefs images, and the artifacts that refer to the image. Whether the objects of those are sound is for repo.Fsck.
func Fsck(ctx context.Context, r *repo.Repo, o FsckOptions) (FsckReport, error) {
	var report FsckReport
	release, err := r.LockShared(ctx, o.Lock)
	if err != nil {
		return report, err
	}
	defer release()
	tags, err := Tags(r)
	if err != nil {
		return report, err
	}
	c := &checker{r: r, o: o, layers: map[Digest]string{}}
	found := o.Image == ""
	for _, t := range tags {
		if o.Image != "" && t.Name != o.Image {
			continue
		}
		found = true
		before := len(c.findings)
		c.name = t.Name
		if strings.HasPrefix(t.Name, "@") {
			c.add(InvalidRefName, "", "leading '@' is reserved for digest references")
		} else if err := c.withReferrers(ctx, t.Image); err != nil {
			return report, err
		}
		report.Images++
		if len(c.findings) > before {
			report.Bad++
		}
	}
	if !found {
		c.name = o.Image
		c.add(RefResolveFailed, "", "OCI reference not found: "+o.Image)
		report.Images, report.Bad = 1, 1
	}
	report.Findings = c.findings
	return report, nil
}

type checker struct {
	r        *repo.Repo
	o        FsckOptions
	name     string
	layers   map[Digest]string // what is wrong with those that have been read; "" for nothing
	findings []Finding
}

func (c *checker) add(k Kind, digest, detail string) {
	c.findings = append(c.findings, Finding{k, c.name, digest, detail})
}

// withReferrers checks an image and the artifacts that refer to it.
func (c *checker) withReferrers(ctx context.Context, d Digest) error {
	if err := c.image(ctx, d); err != nil {
		return err
	}
	artifacts, err := allReferrers(c.r, d)
	for _, a := range artifacts {
		if err := c.referrer(ctx, a); err != nil {
			return err
		}
	}
	return err
}

// referrer checks an artifact that refers to the image of the name.
func (c *checker) referrer(ctx context.Context, d Digest) error {
	name := c.name
	defer func() { c.name = name }()
	c.name += " (referrer " + string(d) + ")"
	return c.image(ctx, d)
}

// image checks one image. The error is that of the context.
func (c *checker) image(ctx context.Context, d Digest) error {
	stream, err := c.r.StreamObject(manifestStream + string(d))
	var content []byte
	var refs, configRefs []splitstream.NamedRef
	if err == nil {
		content, refs, err = readExternal(c.r, stream, ManifestContent, d)
	}
	if x, wrong := OpenIndex(c.r, d); err != nil && wrong == nil {
		for _, m := range x.lacks(c.r) {
			c.add(MemberMissing, string(m), "it is in an index")
		}
		return nil
	}
	if err != nil {
		c.add(ManifestReadFailed, "", err.Error())
		return nil
	}
	i := &Image{Digest: d}
	if i.Manifest, err = parseManifest(content); err != nil {
		c.add(ManifestParseFailed, "", err.Error())
		return nil
	}
	config := i.ConfigDigest()
	at, ok := find(refs, "config:"+string(config))
	if !ok {
		c.add(ConfigRefMissing, string(config), "")
		return nil
	}
	if content, configRefs, err = readExternal(c.r, at, ConfigContent, config); err != nil {
		c.add(ConfigReadFailed, "", err.Error())
		return nil
	}
	if _, err := c.r.StreamObject(configStream + string(config)); err != nil {
		// Garbage collection goes from name to name: it would not find the images.
		c.add(ConfigReadFailed, "", err.Error())
	}
	manifestRefs := refs
	missing, broken := ArtifactLayerMissing, ArtifactLayerFailed
	if i.Manifest.IsImage() {
		if i.Config, err = parseConfig(content, len(i.Manifest.Layers)); err != nil {
			c.add(ConfigParseFailed, "", err.Error())
			return nil
		}
		missing, broken, refs = LayerRefMissing, LayerCheckFailed, configRefs
	}
	for _, id := range i.layerIDs() {
		if err := ctx.Err(); err != nil {
			return err
		}
		at, ok := find(refs, string(id))
		if !ok {
			c.add(missing, string(id), "")
			continue
		}
		if _, err := c.r.StreamObject(layerStream + string(id)); errors.Is(err, repo.ErrNotFound) && i.Manifest.IsImage() {
			c.add(LayerStreamMissing, string(id), "")
		}
		if detail := c.layer(at, id, i.layerContent()); detail != "" {
			c.add(broken, string(id), detail)
		}
	}
	for _, l := range i.Manifest.Layers {
		if at, ok := find(manifestRefs, blobKey+string(l.Digest)); ok {
			if err := c.blob(at, l.Digest); err != nil {
				c.add(BlobCheckFailed, string(l.Digest), err.Error())
			}
		}
	}
	for _, ref := range configRefs {
		if l, ok := parseKey(ref.Name, ref.Stream); ok {
			if f, _, err := c.r.OpenImage(l.Digest.String()); err != nil {
				c.add(ErofsImageMissing, l.Digest.String(), err.Error())
			} else {
				f.Close()
			}
		}
	}
	return nil
}

// layer tells what is wrong with a layer, once.
func (c *checker) layer(d fsverity.Digest, id Digest, contentType uint64) string {
	if detail, ok := c.layers[id]; ok {
		return detail
	}
	s, err := c.r.OpenStream(d, contentType)
	if err == nil {
		if !c.o.MetadataOnly {
			h := id.newHash()
			if err = s.WriteTo(io.Writer(h), c.r); err == nil {
				err = id.check(h)
			}
		}
		s.Close()
	}
	c.layers[id] = ""
	if err != nil {
		c.layers[id] = err.Error()
	}
	return c.layers[id]
}

// VerifyLayers checks that the layers have their diff IDs. What the config's stream says of them does not prove it.
func (i *Image) VerifyLayers(ctx context.Context, r *repo.Repo) error {
	c := &checker{r: r, layers: map[Digest]string{}}
	for k, id := range i.layerIDs() {
		if err := ctx.Err(); err != nil {
			return err
		}
		if detail := c.layer(i.Layers[k], id, i.layerContent()); detail != "" {
			return fmt.Errorf("layer %s: %s", id, detail)
		}
	}
	return nil
}
