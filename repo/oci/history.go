package oci

import (
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo"
)

// Step is one step by which an image was made, as its config tells it. Nobody checks what it says of itself.
type Step struct {
	Created   string `json:"created,omitempty"`
	CreatedBy string `json:"created_by,omitempty"`
	Author    string `json:"author,omitempty"`
	Comment   string `json:"comment,omitempty"`
	Empty     bool   `json:"empty_layer,omitempty"`

	Layer *StepLayer `json:"layer,omitempty"` // that it added; nil if Empty
}

// StepLayer is a layer with its sizes in bytes.
type StepLayer struct {
	DiffID Digest `json:"diff_id"`
	Digest Digest `json:"digest"`
	Blob   int64  `json:"size_compressed"`
	Size   int64  `json:"size"`
}

// History returns the steps by which an image was made, the oldest first. Layers that the config tells nothing of have steps of their
// own at the end.
func (i *Image) History(r *repo.Repo) ([]Step, error) {
	if !i.Manifest.IsImage() {
		return nil, ErrNotImage
	}
	var config struct {
		History []Step `json:"history"`
	}
	if err := unmarshal(i.ConfigJSON, &config); err != nil {
		return nil, fmt.Errorf("config %s: %w", i.ConfigDigest(), err)
	}
	steps := config.History
	at := 0
	for k, id := range i.Config.RootFS.DiffIDs {
		for ; at < len(steps) && steps[at].Empty; at++ {
		}
		if at == len(steps) {
			steps = append(steps, Step{})
		}
		s, err := r.OpenStream(i.Layers[k], LayerContent)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", id, err)
		}
		blob := i.Manifest.Layers[k]
		steps[at].Layer = &StepLayer{id, blob.Digest, blob.Size, int64(s.Size)}
		s.Close()
		at++
	}
	return steps, nil
}

// Download is what has to be downloaded to have an image where another one is. Sizes are in bytes, of the blobs.
type Download struct {
	Bytes  int64        `json:"bytes"`
	Total  int64        `json:"bytes_total"`
	Layers int          `json:"layers"`
	Of     int          `json:"layers_total"`
	Blobs  []Descriptor `json:"blobs"` // that have to be downloaded
}

// DownloadFrom returns what a pull of the image downloads where the other one has been pulled: layers with other diff IDs, and config
// and manifest if they are other ones.
func (i *Image) DownloadFrom(other *Image) Download {
	have := map[Digest]bool{other.Digest: true, other.ConfigDigest(): true}
	for _, id := range other.layerIDs() {
		have[id] = true
	}
	return i.download(have)
}

// download is what is to be downloaded by who has these layers, by diff ID, and this config and manifest.
func (i *Image) download(have map[Digest]bool) Download {
	d := Download{Blobs: []Descriptor{}, Of: len(i.Manifest.Layers)}
	add := func(id Digest, blob Descriptor, layer bool) {
		d.Total += blob.Size
		if have[id] {
			return
		}
		have[id] = true
		d.Bytes += blob.Size
		d.Blobs = append(d.Blobs, blob)
		if layer {
			d.Layers++
		}
	}
	add(i.Digest, Descriptor{MediaType: i.Manifest.mediaType(), Digest: i.Digest, Size: int64(len(i.ManifestJSON))}, false)
	add(i.ConfigDigest(), i.Manifest.Config, false)
	for k, id := range i.layerIDs() {
		add(id, i.Manifest.Layers[k], true)
	}
	return d
}
