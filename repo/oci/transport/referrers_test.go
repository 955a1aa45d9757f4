package transport_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"golang.org/x/crypto/bcrypt"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// artifact is a manifest of some type that refers to another one. Its config is the empty object.
func artifact(kind string, subject oci.Digest) string {
	return fmt.Sprintf(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":%q,"config":{"mediaType":`+
		`"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[],"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json",`+
		`"digest":%q,"size":1},"annotations":{"made":"by %s"}}`, kind, oci.DigestOf([]byte("{}")), subject, kind)
}

// artifactIndex is an index of manifests that refers to another manifest.
func artifactIndex(kind string, subject oci.Digest, manifests ...string) string {
	var index map[string]any
	json.Unmarshal(indexOf(manifests...), &index)
	index["artifactType"] = kind
	index["subject"] = map[string]any{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": subject, "size": 1}
	b, _ := json.Marshal(index)
	return string(b)
}

// withReferrers starts the registry of go-containerregistry with the referrers API.
func withReferrers(t testing.TB) string {
	s := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// What refers to an image goes to a registry and comes back, whether that has the API for it or not.
func TestReferrers(t *testing.T) {
	o := transport.Options{SkipVerify: plain, Retry: quick}
	from := google(t)
	push(t, from+"/os:1", imageOf(t, "amd64", layer(1, 3)))
	for registryName, c := range map[string]struct {
		address string
		tag     bool // there is no API
	}{
		"distribution": {debian(t, ""), true}, "go-containerregistry": {google(t), true}, "go-containerregistry-api": {withReferrers(t), false},
	} {
		r := newRepo(t)
		pulled, err := pull(t, r, "docker://"+from+"/os:1", o, oci.PullOptions{Tag: "os"})
		if err != nil {
			t.Fatal(err)
		}
		image := pulled.Image.Digest
		texts := []string{artifact("test/a", image), artifact("test/b", image)}
		texts = append(texts, artifact("test/a", oci.DigestOf([]byte(texts[0])))) // signs the first one
		var all []oci.Digest
		for _, text := range texts {
			all = append(all, oci.DigestOf([]byte(text)))
			if _, err := oci.Pull(ctx, r, single{text}, oci.PullOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		// An index of two more, one of which has been here already.
		member := artifact("test/member", oci.DigestOf([]byte("something that nobody has")))
		bundle := artifactIndex("test/a", image, member, texts[1])
		all = append(all, oci.DigestOf([]byte(bundle)))
		if list, err := oci.PullReferrers(ctx, r, listing{image: bundle, "": member, oci.DigestOf([]byte(texts[1])): texts[1]}, image, "", oci.PullOptions{}); err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		to := "docker://" + c.address + "/to/os:1"
		for range 2 {
			target, err := transport.OpenTarget(ctx, to, o)
			if err != nil {
				t.Fatal(err)
			}
			if result, err := oci.Push(ctx, r, pulled.Image, target, oci.PushOptions{}); err != nil || len(result.Referrers) != 4 {
				t.Fatalf("%s: %+v, %v", registryName, result, err)
			}
			target.Close()
		}
		// The tag is as the specification wants it, each artifact once.
		tag, err := name.NewTag(c.address+"/to/os:"+strings.Replace(string(image), ":", "-", 1), name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		index, err := remote.Index(tag)
		if (err == nil) != c.tag {
			t.Errorf("%s: tag: %v", registryName, err)
		}
		if err == nil {
			list, err := index.IndexManifest()
			if err != nil || len(list.Manifests) != 3 || list.Manifests[0].ArtifactType == "" ||
				list.Manifests[0].Annotations["made"] != "by "+list.Manifests[0].ArtifactType {
				t.Errorf("%s: %+v, %v", registryName, list, err)
			}
		}
		for kind, want := range map[string][]oci.Digest{"": all, "test/a": {all[0], all[2], all[3]}, "test/b": all[1:2], "test/c": nil} {
			back := newRepo(t)
			got, err := pullWithReferrers(t, back, to, o, kind)
			slices.Sort(got)
			want = slices.Sorted(slices.Values(want))
			if err != nil || !slices.Equal(got, want) {
				t.Errorf("%s: type %q: %v, want %v, %v", registryName, kind, got, want, err)
			}
			if slices.Contains(want, all[3]) {
				want = append(want, oci.DigestOf([]byte(member)))
			}
			// A tag keeps them all, and lets them go.
			for _, tagged := range []bool{true, false} {
				if !tagged {
					if err := oci.Untag(ctx, back, "os", repo.LockOptions{}); err != nil {
						t.Fatal(err)
					}
				}
				for range 2 {
					if _, err := back.GC(ctx, repo.GCOptions{Follows: oci.Follows}); err != nil {
						t.Fatal(err)
					}
				}
				for _, d := range want {
					_, err := oci.Open(back, "@"+string(d))
					if d == all[3] {
						_, err = oci.OpenIndex(back, d)
					}
					if (err == nil) != tagged {
						t.Errorf("%s: tagged %v: %s: %v", registryName, tagged, d, err)
					}
				}
			}
			if objects, _ := filepath.Glob(filepath.Join(back.Path(), "objects/*/*")); len(objects) > 0 {
				t.Errorf("%s: %d objects are left", registryName, len(objects))
			}
			if refs, _ := filepath.Glob(filepath.Join(back.Path(), "streams/refs/oci-[rm]*/*")); len(refs) > 0 {
				t.Errorf("%s: %v are left", registryName, refs)
			}
		}
	}
}

// listing is a source of manifests by what they refer to, and by their digests.
type listing map[oci.Digest]string

func (l listing) Referrers(_ context.Context, subject oci.Digest, _ string) ([]oci.Descriptor, error) {
	if text, ok := l[subject]; ok && len(subject) > 0 && oci.DigestOf([]byte(text)) != subject {
		return []oci.Descriptor{{Digest: oci.DigestOf([]byte(text))}}, nil
	}
	return nil, nil
}

func (l listing) Manifest(_ context.Context, d oci.Digest) ([]byte, error) {
	for _, text := range l {
		if oci.DigestOf([]byte(text)) == d {
			return []byte(text), nil
		}
	}
	return nil, oci.ErrPermanent
}

func (listing) Blob(ctx context.Context, d oci.Descriptor, offset int64) (io.ReadCloser, int64, error) {
	return single{}.Blob(ctx, d, offset)
}

// pullWithReferrers pulls an image as "os", and what refers to it.
func pullWithReferrers(t testing.TB, r *repo.Repo, image string, o transport.Options, kind string) ([]oci.Digest, error) {
	t.Helper()
	source, err := transport.Open(ctx, image, o)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	p := oci.PullOptions{Tag: "os", Resume: source.Remote(), Retry: o.Retry, Platform: oci.Platform{OS: "linux", Architecture: "amd64"}}
	pulled, err := oci.Pull(ctx, r, source, p)
	if err != nil {
		return nil, err
	}
	list, err := oci.PullReferrers(ctx, r, source, pulled.Image.Digest, kind, p)
	if report, err := oci.Fsck(ctx, r, oci.FsckOptions{}); err != nil || len(report.Findings) > 0 {
		t.Error(report.Findings, err)
	}
	return list, err
}

// front is a registry whose answers to questions for referrers are those of list; everything else is passed on.
func front(t testing.TB, address string, list http.HandlerFunc) string {
	u, err := url.Parse("http://" + address)
	if err != nil {
		t.Fatal(err)
	}
	pass := httputil.NewSingleHostReverseProxy(u)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/referrers/") {
			w.Header().Set("Content-Type", "application/vnd.oci.image.index.v1+json")
			list(w, r)
			return
		}
		pass.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// indexOf is a list of artifacts.
func indexOf(manifests ...string) []byte {
	var list []oci.Descriptor
	for _, m := range manifests {
		list = append(list, oci.Descriptor{MediaType: "application/vnd.oci.image.manifest.v1+json", Digest: oci.DigestOf([]byte(m)), Size: int64(len(m)), ArtifactType: "test"})
	}
	b, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": list})
	return b
}

// putManifest stores a manifest by its digest.
func putManifest(t testing.TB, address, text string) {
	t.Helper()
	put(t, address, text, "application/vnd.oci.image.manifest.v1+json")
}

func putIndex(t testing.TB, address, text string) {
	t.Helper()
	put(t, address, text, "application/vnd.oci.image.index.v1+json")
}

func put(t testing.TB, address, text, mediaType string) {
	t.Helper()
	request, err := http.NewRequest(http.MethodPut, "http://"+address+"/v2/os/manifests/"+string(oci.DigestOf([]byte(text))), strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", mediaType)
	response, err := http.DefaultClient.Do(request)
	if err != nil || response.StatusCode != http.StatusCreated {
		t.Fatal(response, err)
	}
	response.Body.Close()
}

// Pages follow each other; what a registry makes up is refused, or left.
func TestReferrersOfHostileRegistries(t *testing.T) {
	address := google(t)
	image := imageOf(t, "amd64", layer(51, 2))
	push(t, address+"/os:1", image)
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for k := range 5 {
		texts = append(texts, artifact(fmt.Sprint(k), oci.Digest(digest.String())))
		putManifest(t, address, texts[k])
	}
	ref, err := name.NewRepository(address+"/os", name.Insecure)
	if err == nil {
		err = remote.WriteLayer(ref, static.NewLayer([]byte("{}"), "application/vnd.oci.empty.v1+json"))
	}
	if err != nil {
		t.Fatal(err)
	}
	stranger := artifact("stranger", oci.DigestOf([]byte("something else")))
	putManifest(t, address, stranger)
	var pages atomic.Int64
	next := func(w http.ResponseWriter, to string) { w.Header().Set("Link", "<"+to+`>; rel="next"`) }
	for what, c := range map[string]struct {
		list http.HandlerFunc
		n    int
		err  string
	}{
		"pages": {func(w http.ResponseWriter, r *http.Request) {
			switch at := r.URL.Query().Get("at"); {
			case strings.Count(r.URL.Path, "/") == 4 && !strings.HasSuffix(r.URL.Path, digest.String()):
				w.Write(indexOf()) // nothing refers to the artifacts
			case at == "":
				next(w, r.URL.Path+"?at=2")
				w.Write(indexOf(texts[:2]...))
			case at == "2":
				w.Header().Set("Link", `</other>; rel="prev", <?at=4>; rel=next`)
				w.Write(indexOf(texts[2:4]...))
			default:
				w.Write(indexOf(texts[4]))
			}
		}, 5, ""},
		"same-twice":    {func(w http.ResponseWriter, _ *http.Request) { w.Write(indexOf(append(texts, texts...)...)) }, 5, ""},
		"other-subject": {func(w http.ResponseWriter, _ *http.Request) { w.Write(indexOf(texts[0], stranger)) }, 1, ""},
		"endless": {func(w http.ResponseWriter, r *http.Request) {
			next(w, fmt.Sprint(r.URL.Path, "?at=", pages.Add(1)))
			w.Write(indexOf())
		}, 0, "more than 10000 artifacts"},
		"other-host": {func(w http.ResponseWriter, _ *http.Request) {
			next(w, "http://other.invalid/v2/")
			w.Write(indexOf())
		}, 0, "of another registry, http://other.invalid"},
		"html": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			io.WriteString(w, "<html>")
		}, 0, ""},
		"no-index": {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") }, 0, "not an index"},
		"no-json":  {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<") }, 0, "not an index"},
		"bad-digest": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, strings.Replace(string(indexOf(texts[0])), "sha256:", "sha256:../", 1))
		}, 0, "not a digest"},
		"no-digest": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, strings.Replace(string(indexOf(texts[0])), "digest", "digests", 1))
		}, 0, "without a digest"},
		"nothing-there": {func(w http.ResponseWriter, _ *http.Request) { w.Write(indexOf("nothing")) }, 0, "unknown"},
		"large":         {func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 17<<20)) }, 0, "more than 16777216 bytes"},
		"forbidden":     {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }, 0, "HTTP status 403"},
		"busy": {func(w http.ResponseWriter, _ *http.Request) {
			if pages.Add(1)%3 != 0 {
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			}
			w.Write(indexOf(texts...))
		}, 5, ""},
	} {
		got, err := pullWithReferrers(t, newRepo(t), "docker://"+front(t, address, c.list)+"/os:1", transport.Options{SkipVerify: plain, Retry: quick}, "")
		if (err == nil) != (c.err == "") || err != nil && !contains(err, c.err) || err == nil && len(got) != c.n {
			t.Errorf("%s: %d artifacts, %v", what, len(got), err)
		}
	}
}

// Credentials are for whom the registry names, and mirrors are asked.
func TestReferrersAccess(t *testing.T) {
	image := imageOf(t, "amd64", layer(52, 2))
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	text := artifact("test", oci.Digest(digest.String()))
	dir := t.TempDir()
	auth := func(name, address, user string) string {
		return write(t, filepath.Join(dir, name), fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, address, base64.StdEncoding.EncodeToString([]byte(user))), 0o600)
	}

	// By a token, which a service of its own gives for user and password.
	open := withReferrers(t)
	push(t, open+"/os:1", image)
	putManifest(t, open, text)
	ref, err := name.NewRepository(open+"/os", name.Insecure)
	if err == nil {
		err = remote.WriteLayer(ref, static.NewLayer([]byte("{}"), "application/vnd.oci.empty.v1+json"))
	}
	if err != nil {
		t.Fatal(err)
	}
	var tokens atomic.Int64
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "user" || password != "secret" || r.FormValue("service") != "test" || r.FormValue("scope") != "repository:os:pull" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprintf(w, `{"token": "t%d"}`, tokens.Add(1))
	}))
	defer service.Close()
	u, err := url.Parse("http://" + open)
	if err != nil {
		t.Fatal(err)
	}
	pass := httputil.NewSingleHostReverseProxy(u)
	guarded := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer t") {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+service.URL+`/token",service="test"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		pass.ServeHTTP(w, r)
	}))
	defer guarded.Close()
	address := guarded.Listener.Addr().String()
	for file, want := range map[string]string{auth("token", address, "user:secret"): "", auth("wrong", address, "user:wrong"): "--authfile"} {
		got, err := pullWithReferrers(t, newRepo(t), "docker://"+address+"/os:1", transport.Options{SkipVerify: plain, AuthFile: file, Retry: quick}, "")
		if (err == nil) != (want == "") || err != nil && !contains(err, want) || err == nil && len(got) != 1 {
			t.Errorf("%s: %v, %v", file, got, err)
		}
	}

	// By user and password.
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	htpasswd := write(t, filepath.Join(dir, "htpasswd"), "user:"+string(hash)+"\n", 0o644)
	closed := debian(t, fmt.Sprintf("auth: {htpasswd: {realm: test, path: %s}}\n", htpasswd))
	push(t, closed+"/os:1", image, remote.WithAuth(&authn.Basic{Username: "user", Password: "secret"}))
	o := transport.Options{SkipVerify: plain, AuthFile: auth("basic", closed, "user:secret"), Retry: quick}
	r := newRepo(t)
	if _, err := oci.Pull(ctx, r, single{text}, oci.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	pulled, err := pull(t, r, "docker://"+closed+"/os:1", o, oci.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	target, err := transport.OpenTarget(ctx, "docker://"+closed+"/os:1", o)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	if _, err := oci.Push(ctx, r, pulled.Image, target, oci.PushOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, err := pullWithReferrers(t, newRepo(t), "docker://"+closed+"/os:1", o, ""); err != nil || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}

	// By a mirror; another one is not there.
	t.Setenv("CONTAINERS_REGISTRIES_CONF", write(t, filepath.Join(t.TempDir(), "registries.conf"), fmt.Sprintf(`
[[registry]]
location = "registry.invalid"
[[registry.mirror]]
location = "127.0.0.1:1"
[[registry.mirror]]
location = %q
insecure = true
`, open), 0o644))
	sysregistriesv2.InvalidateCache()
	defer sysregistriesv2.InvalidateCache()
	few := oci.Retry{Attempts: 1}
	if got, err := pullWithReferrers(t, newRepo(t), "docker://registry.invalid/os:1", transport.Options{Retry: few}, ""); err != nil || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}
}
