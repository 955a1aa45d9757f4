package oci

import (
	"context"

	"github.com/composefs-boot/composefs-boot/repo"
)

// Look reads the manifest and the config of an image, and returns what a pull with these options downloads: layers that the repository
// does not have, and config and manifest if it does not have those. Nothing is stored. Of a layer that an interrupted pull has brought
// in part, all is counted.
func Look(ctx context.Context, r *repo.Repo, source Source, o PullOptions) (*Image, Download, error) {
	if o.Platform == (Platform{}) {
		o.Platform = ThisPlatform()
	}
	if o.Progress == nil {
		o.Progress = &Progress{}
	}
	i, err := (&pull{r: r, source: source, o: o}).describe(ctx)
	if err != nil {
		return nil, Download{}, err
	}
	have := map[Digest]bool{}
	_, err = open(r, i.Digest)
	have[i.Digest] = err == nil
	if err != nil && !lost(err) {
		return nil, Download{}, err
	}
	if _, err = OpenConfig(r, i.ConfigDigest()); err != nil && !lost(err) {
		return nil, Download{}, err
	}
	have[i.ConfigDigest()] = err == nil
	for _, id := range i.layerIDs() {
		stream, err := present(r, id, i.layerContent())
		if err != nil {
			return nil, Download{}, err
		}
		have[id] = !stream.IsZero()
	}
	return i, i.download(have), nil
}
