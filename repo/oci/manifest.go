package oci

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
)

const (
	// maxJSON limits manifests, indexes and configs, in bytes. The OCI specification wants registries to take 4 MiB.
	maxJSON = 16 << 20
	// maxLayers limits the layers of an image.
	maxLayers = 1000
	maxNested = 100
)

// Media types.
const (
	typeOCIIndex    = "application/vnd.oci.image.index.v1+json"
	typeOCIManifest = "application/vnd.oci.image.manifest.v1+json"
	typeOCIConfig   = "application/vnd.oci.image.config.v1+json"
	typeDockerList  = "application/vnd.docker.distribution.manifest.list.v2+json"
	typeDockerImage = "application/vnd.docker.distribution.manifest.v2+json"
	typeDocker      = "application/vnd.docker.container.image.v1+json"
)

// Descriptor names a blob: its digest, its size in bytes as it is kept, and what it is.
type Descriptor struct {
	MediaType    string            `json:"mediaType"`
	Digest       Digest            `json:"digest"`
	Size         int64             `json:"size"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	Platform     *Platform         `json:"platform,omitempty"`     // in an index
	ArtifactType string            `json:"artifactType,omitempty"` // in an index, of an artifact
}

// Platform is what an image is made for, in Go's words.
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant,omitempty"`
}

// ThisPlatform is Linux on the processor that the program runs on.
func ThisPlatform() Platform { return Platform{OS: "linux", Architecture: runtime.GOARCH} }

// ParsePlatform reads "os/architecture" or "os/architecture/variant".
func ParsePlatform(s string) (Platform, error) {
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return Platform{}, fmt.Errorf("platform %q: want OS/ARCHITECTURE, such as linux/arm64", s)
	}
	return Platform{parts[0], parts[1], strings.Join(parts[2:], "")}, nil
}

func (p Platform) String() string {
	return strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")
}

// matches reports whether something made for p is what is asked for. A variant counts only if it is asked for.
func (p Platform) matches(want Platform) bool {
	return p.OS == want.OS && p.Architecture == want.Architecture && (want.Variant == "" || p.Variant == want.Variant)
}

// Manifest is what an image or artifact consists of.
type Manifest struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType"`
	Config       Descriptor        `json:"config"`
	Layers       []Descriptor      `json:"layers"`
	Subject      *Descriptor       `json:"subject"`
	Annotations  map[string]string `json:"annotations"`
}

// IsImage reports whether it is a container image, whose layers are archives, and no other artifact.
func (m Manifest) IsImage() bool {
	return m.Config.MediaType == typeOCIConfig || m.Config.MediaType == typeDocker
}

// kind is the type of an artifact, as indexes have it.
func (m Manifest) kind() string { return cmp.Or(m.ArtifactType, m.Config.MediaType) }

// Config is what an image's configuration says that matters here.
type Config struct {
	Platform
	Created string `json:"created"`
	RootFS  struct {
		DiffIDs []Digest `json:"diff_ids"`
	} `json:"rootfs"`
	Config struct {
		Labels map[string]string `json:"Labels"`
	} `json:"config"`
}

type index struct {
	MediaType    string       `json:"mediaType"`
	ArtifactType string       `json:"artifactType"`
	Manifests    []Descriptor `json:"manifests"`
	Subject      *Descriptor  `json:"subject"`
}

// parseManifest reads a manifest that is known not to be an index.
func parseManifest(b []byte) (Manifest, error) {
	var m Manifest
	if err := unmarshal(b, &m); err != nil {
		return m, err
	}
	if m.Config.Digest == "" {
		return m, errors.New("it names no config")
	}
	if len(m.Layers) > maxLayers {
		return m, fmt.Errorf("%d layers: at most %d are taken", len(m.Layers), maxLayers)
	}
	for k, l := range m.Layers {
		if l.Digest == "" || l.Size < 0 {
			return m, fmt.Errorf("layer %d: no digest, or a negative size", k)
		}
	}
	return m, nil
}

// parseConfig reads the configuration of an image with the layers that the manifest names.
func parseConfig(b []byte, layers int) (Config, error) {
	var c Config
	if err := unmarshal(b, &c); err != nil {
		return c, err
	}
	if len(c.RootFS.DiffIDs) != layers {
		return c, fmt.Errorf("%d diff IDs, but the manifest has %d layers", len(c.RootFS.DiffIDs), layers)
	}
	return c, nil
}

// IsIndex reports whether the bytes are those of an index of images rather than of a manifest, as Pull takes them.
func IsIndex(b []byte) (bool, error) {
	_, is, err := isIndex(b)
	return is, err
}

// IsImage reports whether the bytes are those of a container image's manifest, as Pull takes them.
func IsImage(b []byte) (bool, error) {
	m, err := parseManifest(b)
	return m.IsImage(), err
}

// isIndex reports whether it is an index of images rather than a manifest.
func isIndex(b []byte) (index, bool, error) {
	var i index
	if err := unmarshal(b, &i); err != nil {
		return i, false, err
	}
	return i, i.MediaType == typeOCIIndex || i.MediaType == typeDockerList || i.MediaType == "" && i.Manifests != nil, nil
}

// choose returns the image of an index that is for a platform. One that does not say what it is for is taken if there is no other.
func (i index) choose(want Platform) (Descriptor, error) {
	var have []string
	for _, d := range i.Manifests {
		if d.Platform != nil && d.Platform.matches(want) {
			return d, nil
		}
		if d.Platform != nil {
			have = append(have, d.Platform.String())
		}
	}
	if len(i.Manifests) == 1 && i.Manifests[0].Platform == nil {
		return i.Manifests[0], nil
	}
	return Descriptor{}, fmt.Errorf("no image for %v in the index: there are %s (choose with --platform)", want, strings.Join(have, ", "))
}

// unmarshal reads JSON that other programs read in the same way: Go takes the last of several keys and does not mind their case,
// so that two programs could see two different images under one digest.
func unmarshal(b []byte, to any) error {
	if len(b) > maxJSON {
		return fmt.Errorf("%d bytes: at most %d are read", len(b), maxJSON)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if err := checkKeys(d, 0, false); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows the JSON value")
	}
	return json.Unmarshal(b, to)
}

// checkKeys reads one value and looks for keys that are there twice, in any case, except that labels are free to differ in it.
func checkKeys(d *json.Decoder, depth int, free bool) error {
	t, err := d.Token()
	if err != nil {
		return err
	}
	open, ok := t.(json.Delim)
	if !ok {
		return nil
	}
	if depth > maxNested {
		return fmt.Errorf("JSON nested more than %d deep", maxNested)
	}
	seen := map[string]bool{}
	for d.More() {
		below := free
		if open == '{' {
			t, err := d.Token()
			if err != nil {
				return err
			}
			key := t.(string)
			folded := strings.ToLower(key)
			if !free {
				below, key = folded == "labels" || folded == "annotations", folded
			}
			if seen[key] {
				return fmt.Errorf("JSON key %.60q is there twice", t)
			}
			seen[key] = true
		}
		if err := checkKeys(d, depth+1, below); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}
