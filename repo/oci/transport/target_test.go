package transport_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// An image goes to a registry with the digest that it had, and what refers to it goes along; the second time, nothing is given again.
func TestPush(t *testing.T) {
	o := transport.Options{SkipVerify: plain, Retry: quick}
	image := imageOf(t, "amd64", layer(1, 10), layer(2, 10))
	from := google(t)
	push(t, from+"/os:1", image)
	for registryName, start := range map[string]func() string{"distribution": func() string { return debian(t, "") },
		"go-containerregistry": func() string { return google(t) }} {
		for _, keep := range []bool{false, true} {
			address := start()
			r := newRepo(t)
			pulled, err := pull(t, r, "docker://"+from+"/os:1", o, oci.PullOptions{Tag: "os", KeepBlobs: keep})
			if err != nil {
				t.Fatal(err)
			}
			artifact := fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"a/b","config":{"mediaType":`+
				`"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[],"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
				`"digest":%q,"size":%d}}`, oci.DigestOf([]byte("{}")), pulled.Image.Digest, len(pulled.Image.ManifestJSON))
			if _, err := oci.Pull(ctx, r, single{artifact}, oci.PullOptions{}); err != nil {
				t.Fatal(err)
			}
			to := "docker://" + address + "/to/os:1"
			for round := range 2 {
				target, err := transport.OpenTarget(ctx, to, o)
				if err != nil {
					t.Fatal(err)
				}
				result, err := oci.Push(ctx, r, pulled.Image, target, oci.PushOptions{Exact: true})
				target.Close()
				if err != nil || len(result.Referrers) != 1 || result.Digest != pulled.Image.Digest {
					t.Fatalf("%s: %+v, %v", registryName, result, err)
				}
				how := "gzip of Go, level 1"
				if keep {
					how = oci.HowKept
				}
				if round == 1 {
					how = oci.HowPresent
				}
				if result.Layers[0].How != how || round == 1 && result.Bytes > int64(len(pulled.Image.ManifestJSON)+len(artifact)) {
					t.Errorf("%s: %+v, want %s", registryName, result, how)
				}
			}
			back, err := pull(t, newRepo(t), to, o, oci.PullOptions{})
			if err != nil || back.Image.Digest != pulled.Image.Digest {
				t.Errorf("%s: %v", registryName, err)
			}
			ref, err := name.NewDigest(strings.TrimPrefix(strings.TrimSuffix(to, ":1"), "docker://")+"@"+string(oci.DigestOf([]byte(artifact))), name.Insecure)
			if err == nil {
				_, err = remote.Head(ref)
			}
			if err != nil {
				t.Errorf("%s: referrer: %v", registryName, err)
			}
		}
	}
	for _, to := range []string{"dir:x", "os", "docker://UPPER"} {
		if _, err := transport.OpenTarget(ctx, to, o); err == nil {
			t.Errorf("%s: no error", to)
		}
	}
}

// A blob whose upload breaks off comes again, wherever it breaks; what a registry refuses does not.
func TestPushFaults(t *testing.T) {
	from := google(t)
	push(t, from+"/os:1", imageOf(t, "amd64", layer(61, 40), layer(62, 40)))
	o := transport.Options{SkipVerify: plain, Retry: quick}
	r := newRepo(t)
	pulled, err := pull(t, r, "docker://"+from+"/os:1", o, oci.PullOptions{Tag: "os", KeepBlobs: true})
	if err != nil {
		t.Fatal(err)
	}
	answer := func(w http.ResponseWriter, status int, code string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		fmt.Fprintf(w, `{"errors": [{"code": %q, "message": "test"}]}`, code)
	}
	cut := func(most int64) func(http.ResponseWriter, *http.Request) {
		return func(_ http.ResponseWriter, r *http.Request) {
			io.CopyN(io.Discard, r.Body, rand.Int64N(most))
			panic(http.ErrAbortHandler)
		}
	}
	for what, c := range map[string]struct {
		method string
		times  int64 // of failures
		fault  func(w http.ResponseWriter, r *http.Request)
		err    string
	}{
		"cut":            {http.MethodPatch, 5, cut(1 << 20), ""},
		"cut-at-once":    {http.MethodPatch, 3, cut(1), ""},
		"unavailable":    {http.MethodPost, 3, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, ""},
		"too-many":       {http.MethodPatch, 3, func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusTooManyRequests, "TOOMANYREQUESTS") }, ""},
		"upload-unknown": {http.MethodPatch, 3, func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN") }, ""},
		"digest-invalid": {http.MethodPut, 3, func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusBadRequest, "DIGEST_INVALID") }, ""},
		"cut-at-the-end": {http.MethodPut, 3, cut(1), ""},
		"denied":         {http.MethodPost, 3, func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusForbidden, "DENIED") }, "denied"},
		"never":          {http.MethodPatch, 1000, cut(1), "Patch"},
	} {
		for _, start := range []func() string{func() string { return debian(t, "") }, func() string { return google(t) }} {
			var failures, after atomic.Int64
			address := newFaulty(t, start(), &faulty{fault: func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != c.method || !isBlob(r) {
					return false
				}
				if failures.Add(1) > c.times {
					after.Add(1)
					return false
				}
				c.fault(w, r)
				return true
			}})
			target, err := transport.OpenTarget(ctx, "docker://"+address+"/to/os:1", o)
			if err != nil {
				t.Fatal(err)
			}
			progress := &oci.Progress{}
			result, err := oci.Push(ctx, r, pulled.Image, target, oci.PushOptions{Exact: true, Retry: quick, Progress: progress})
			target.Close()
			if (err == nil) != (c.err == "") || err != nil && !contains(err, c.err) {
				t.Errorf("%s: %v", what, err)
			}
			if err == nil && (progress.Bytes.Load() > result.Bytes || after.Load() == 0) {
				t.Errorf("%s: %d bytes of %d, %d requests after the failures", what, progress.Bytes.Load(), result.Bytes, after.Load())
			}
			if what == "denied" && failures.Load() > 1 {
				t.Errorf("%d attempts though it is refused", failures.Load())
			}
			if err == nil {
				if _, err := pull(t, newRepo(t), "docker://"+address+"/to/os:1", o, oci.PullOptions{}); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
		}
	}
}

// single is a source of an artifact without content.
type single struct{ manifest string }

func (s single) Manifest(context.Context, oci.Digest) ([]byte, error) { return []byte(s.manifest), nil }

func (s single) Blob(context.Context, oci.Descriptor, int64) (io.ReadCloser, int64, error) {
	return io.NopCloser(strings.NewReader("{}")), 2, nil
}
