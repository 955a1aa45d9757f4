package transport_test

import (
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"golang.org/x/crypto/bcrypt"

	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

func write(t testing.TB, path, content string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// Credentials come from a file, or from a helper program that the file names.
func TestAuthentication(t *testing.T) {
	dir := t.TempDir()
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	htpasswd := write(t, filepath.Join(dir, "htpasswd"), "user:"+string(hash)+"\n", 0o644)
	address := debian(t, fmt.Sprintf("auth: {htpasswd: {realm: test, path: %s}}\n", htpasswd))
	push(t, address+"/os:1", imageOf(t, "amd64", layer(31, 3)), remote.WithAuth(&authn.Basic{Username: "user", Password: "secret"}))

	auth := func(name, user string) string {
		return write(t, filepath.Join(dir, name), fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, address, base64.StdEncoding.EncodeToString([]byte(user))), 0o600)
	}
	write(t, filepath.Join(dir, "docker-credential-test"), "#!/bin/sh\necho '{\"Username\": \"user\", \"Secret\": \"secret\"}'\n", 0o755)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	helper := write(t, filepath.Join(dir, "helper"), fmt.Sprintf(`{"credHelpers": {%q: "test"}}`, address), 0o600)
	for name, c := range map[string]struct{ file, err string }{
		"none":   {"", "--authfile"},
		"wrong":  {auth("wrong", "user:wrong"), "--authfile"},
		"right":  {auth("right", "user:secret"), ""},
		"helper": {helper, ""},
	} {
		_, err := pull(t, newRepo(t), "docker://"+address+"/os:1", transport.Options{SkipVerify: plain, AuthFile: c.file, Retry: quick}, oci.PullOptions{})
		if (err == nil) != (c.err == "") || err != nil && !contains(err, c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A certificate that is not trusted is refused, unless its authority is named, or everything is to be accepted.
func TestTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	defer s.Close()
	address := s.Listener.Addr().String()
	push(t, address+"/os:1", imageOf(t, "amd64", layer(32, 3)), remote.WithTransport(s.Client().Transport))
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ca.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})), 0o644)
	for name, c := range map[string]struct {
		o   transport.Options
		err string
	}{
		"unknown authority": {transport.Options{}, "certificate signed by unknown authority (--cert-dir"},
		"authority":         {transport.Options{CertDir: dir}, ""},
		"anything":          {transport.Options{SkipVerify: plain}, ""},
		"wanted":            {transport.Options{SkipVerify: new(false)}, "unknown authority"},
	} {
		c.o.Retry = quick
		_, err := pull(t, newRepo(t), "docker://"+address+"/os:1", c.o, oci.PullOptions{})
		if (err == nil) != (c.err == "") || err != nil && !contains(err, c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The certificate is for 127.0.0.1, and not for this name.
	other := strings.Replace(address, "127.0.0.1", "localhost", 1)
	if _, err := pull(t, newRepo(t), "docker://"+other+"/os:1", transport.Options{CertDir: dir}, oci.PullOptions{}); !contains(err, "not localhost") {
		t.Error(err)
	}
	// HTTP is for those who ask for it.
	httpOnly := google(t)
	if _, err := pull(t, newRepo(t), "docker://"+httpOnly+"/os:1", transport.Options{}, oci.PullOptions{}); !contains(err, "--tls-verify=false") {
		t.Error(err)
	}
}

// registries.conf names mirrors, and blocks registries.
func TestMirror(t *testing.T) {
	address := google(t)
	push(t, address+"/copies/os:1", imageOf(t, "amd64", layer(33, 3)))
	t.Setenv("CONTAINERS_REGISTRIES_CONF", write(t, filepath.Join(t.TempDir(), "registries.conf"), fmt.Sprintf(`
[[registry]]
location = "registry.invalid"
[[registry.mirror]]
location = %q
insecure = true
[[registry]]
location = "blocked.invalid"
blocked = true
`, address+"/copies"), 0o644))
	sysregistriesv2.InvalidateCache()
	defer sysregistriesv2.InvalidateCache()
	if _, err := pull(t, newRepo(t), "docker://registry.invalid/os:1", transport.Options{Retry: quick}, oci.PullOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := pull(t, newRepo(t), "docker://nothing.invalid/os:1", transport.Options{}, oci.PullOptions{}); !errors.Is(err, oci.ErrPermanent) {
		t.Error(err)
	}
	if _, err := pull(t, newRepo(t), "docker://blocked.invalid/os:1", transport.Options{}, oci.PullOptions{}); !contains(err, "blocked") {
		t.Error(err)
	}
}

// The proxy of the environment is used.
func TestProxy(t *testing.T) {
	address := google(t)
	push(t, address+"/os:1", imageOf(t, "amd64", layer(34, 3)))
	u, err := url.Parse("http://" + address)
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int64
	forward := httputil.NewSingleHostReverseProxy(u)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		if r.Method == http.MethodConnect || r.URL.Host != "registry.invalid" {
			http.Error(w, "HTTP only", http.StatusForbidden)
			return
		}
		forward.ServeHTTP(w, r)
	}))
	defer proxy.Close()
	out, err := alone("docker://registry.invalid/os:1", newRepo(t), "http_proxy="+proxy.URL, "https_proxy="+proxy.URL, "no_proxy=").CombinedOutput()
	if err != nil || asked.Load() == 0 {
		t.Errorf("%v: %s", err, out)
	}
}
