package transport

import (
	"context"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// What refers to an image is listed by the referrers API of the OCI distribution specification 1.1, in pages. Registries that do not have
// it keep the list under a tag, the digest of the image with a dash in it, where clients write it: the "referrers tag schema" there.

const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	maxReferrers = 10_000 // of one manifest
	maxPages     = 1000
)

// Referrers returns the artifacts that refer to an image in an OCI layout or a registry; see oci.Referring. From then on the policy wants
// no signatures of them, unless one is a container image.
func (i *Image) Referrers(ctx context.Context, subject oci.Digest, artifactType string) ([]oci.Descriptor, error) {
	if i.layout == nil && !i.Remote() {
		return nil, nil
	}
	var list []oci.Descriptor
	var err error
	if i.layout != nil {
		list, err = i.layout.Referrers(ctx, subject, artifactType)
	} else {
		list, err = i.registryReferrers(ctx, subject, artifactType)
	}
	i.listed(list)
	return list, err
}

// registryReferrers asks the places that the image may come from, mirrors first, until one knows of any.
func (i *Image) registryReferrers(ctx context.Context, subject oci.Digest, artifactType string) ([]oci.Descriptor, error) {
	places, err := i.endpoints()
	if err != nil {
		return nil, err
	}
	answered := false
	for _, e := range places {
		var list referrerList
		err = i.retry.Do(ctx, func() (err error) {
			list, err = e.referrers(ctx, subject, artifactType)
			return i.explain(err)
		})
		answered = answered || err == nil
		if len(list.known) > 0 {
			return list.known, nil
		}
	}
	if answered {
		return nil, nil
	}
	return nil, err
}

// referrerList is what a registry says.
type referrerList struct {
	known []oci.Descriptor
	raw   []json.RawMessage // the same, with all that others have put there
	tag   bool              // there is no API
}

// referrersTag is where a registry without the API has the list.
func referrersTag(subject oci.Digest) string {
	algorithm, digits, _ := strings.Cut(string(subject), ":")
	return fmt.Sprintf("%.32s-%.64s", algorithm, digits)
}

func (e *endpoint) referrers(ctx context.Context, subject oci.Digest, artifactType string) (referrerList, error) {
	var list referrerList
	query := ""
	if artifactType != "" {
		query = "?" + url.Values{"artifactType": {artifactType}}.Encode()
	}
	next := "referrers/" + string(subject) + query
	for page := 0; next != ""; page++ {
		r, err := e.get(ctx, next)
		if err != nil {
			return list, err
		}
		if page == 0 && r.isMissing() {
			list.tag = true
			break
		}
		if err := list.add(r); err != nil {
			return list, err
		}
		if next, err = r.next(); err == nil && (page > maxPages || len(list.known) > maxReferrers) {
			err = fmt.Errorf("more than %d artifacts, or %d pages", maxReferrers, maxPages)
		}
		if err != nil {
			return list, oci.Permanent(err)
		}
	}
	if !list.tag {
		return list, nil
	}
	r, err := e.get(ctx, "manifests/"+referrersTag(subject))
	if err != nil || r.status == http.StatusNotFound {
		return list, err
	}
	return list, list.add(r)
}

// add takes what an answer lists.
func (l *referrerList) add(r answer) error {
	if err := r.err(); err != nil {
		return err
	}
	if is, err := oci.IsIndex(r.body); err != nil || !is {
		return oci.Permanent(fmt.Errorf("%s: not an index of artifacts: %v", r.url, err))
	}
	var index struct {
		Manifests []json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(r.body, &index); err != nil {
		return oci.Permanent(fmt.Errorf("%s: %w", r.url, err))
	}
	for _, raw := range index.Manifests {
		var d oci.Descriptor
		if err := json.Unmarshal(raw, &d); err != nil {
			return oci.Permanent(fmt.Errorf("%s: %w", r.url, err))
		}
		if d.Digest == "" {
			return oci.Permanent(fmt.Errorf("%s: an artifact without a digest", r.url))
		}
		l.known, l.raw = append(l.known, d), append(l.raw, raw)
	}
	return nil
}

// isMissing reports whether the API is not there. Other programs than registries have other pages for that.
func (a answer) isMissing() bool {
	kind, _, _ := mime.ParseMediaType(a.header.Get("Content-Type"))
	return slices.Contains([]int{http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusNotImplemented}, a.status) ||
		a.status == http.StatusOK && kind == "text/html"
}

// refer adds an artifact to the list under the tag of its subject, if the registry has no API. Several clients may do so at the same time,
// and registries do not compare what was there before: whoever finds his own artifact missing afterwards adds it again.
func (r *registryTarget) refer(ctx context.Context, subject oci.Digest, d oci.Descriptor) error {
	if r.lists {
		return nil
	}
	e, err := r.image.home()
	if err != nil {
		return err
	}
	for attempt := 0; ; attempt++ {
		var list referrerList
		err := r.retry.Do(ctx, func() (err error) {
			list, err = e.referrers(ctx, subject, "")
			return r.image.explain(err)
		})
		if err != nil {
			return err
		}
		r.lists = !list.tag
		if r.lists || slices.ContainsFunc(list.known, func(have oci.Descriptor) bool { return have.Digest == d.Digest }) {
			return nil
		}
		if attempt == 5 {
			return fmt.Errorf("tag %s: others write it all the time, and leave this artifact out", referrersTag(subject))
		}
		entry, err := json.Marshal(d)
		if err != nil {
			return err
		}
		index, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": append(list.raw, entry)})
		if err == nil {
			err = r.putTag(ctx, referrersTag(subject), index)
		}
		if err != nil {
			return fmt.Errorf("tag %s: %w", referrersTag(subject), err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Duration(attempt) * 100 * time.Millisecond):
		}
	}
}
