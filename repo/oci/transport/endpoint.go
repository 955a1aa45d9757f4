package transport

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/distribution/registry/client/auth/challenge"
	"go.podman.io/image/v5/pkg/docker/config"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/pkg/tlsclientconfig"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage/pkg/configfile"
	"go.podman.io/storage/pkg/unshare"

	"github.com/composefs-boot/composefs-boot/repo/oci"
)

// endpoint is a repository of a registry, to ask for what the containers libraries cannot ask for. Where it is, whom it trusts and who is
// to be told to it is the same as there.
type endpoint struct {
	base        *url.URL // HOST/v2/NAME
	insecure    bool     // any certificate, or HTTP
	client      *http.Client
	credentials types.DockerAuthConfig
	scope       string
	login       string        // the header Authorization, "" if none was wanted yet
	idle        time.Duration // see oci.Retry
}

// endpoints returns where an image may be, the mirrors of registries.conf first.
func (i *Image) endpoints() ([]*endpoint, error) {
	named := i.ref.DockerReference()
	found, err := sysregistriesv2.FindRegistry(i.sys, named.Name())
	if err != nil {
		return nil, fmt.Errorf("registries.conf: %w", err)
	}
	sources := []sysregistriesv2.PullSource{{Reference: named}}
	if found != nil {
		if sources, err = found.PullSourcesFromReference(named); err != nil {
			return nil, fmt.Errorf("registries.conf: %w", err)
		}
	}
	var list []*endpoint
	for _, s := range sources {
		e, err := i.endpoint(s)
		if err != nil {
			return nil, fmt.Errorf("registry %s: %w", reference.Domain(s.Reference), err)
		}
		list = append(list, e)
	}
	return list, nil
}

// home returns where an image is given to: to the registry that it is named after, whatever registries.conf has in its place.
func (i *Image) home() (*endpoint, error) {
	s := sysregistriesv2.PullSource{Reference: i.ref.DockerReference()}
	found, err := sysregistriesv2.FindRegistry(i.sys, s.Reference.Name())
	if err != nil {
		return nil, fmt.Errorf("registries.conf: %w", err)
	}
	if found != nil {
		s.Endpoint.Insecure = found.Insecure
	}
	return i.endpoint(s)
}

func (i *Image) endpoint(s sysregistriesv2.PullSource) (*endpoint, error) {
	host := reference.Domain(s.Reference)
	trust := &tls.Config{InsecureSkipVerify: s.Endpoint.Insecure}
	if i.sys.DockerInsecureSkipTLSVerify != types.OptionalBoolUndefined {
		trust.InsecureSkipVerify = i.sys.DockerInsecureSkipTLSVerify == types.OptionalBoolTrue
	}
	dir, err := certDir(i.sys, host)
	if err == nil && dir != "" {
		err = tlsclientconfig.SetupCertificates(dir, trust)
	}
	if err != nil {
		return nil, err
	}
	credentials, err := config.GetCredentialsForRef(i.sys, s.Reference)
	if err != nil {
		return nil, err
	}
	t := tlsclientconfig.NewTransport()
	t.TLSClientConfig = trust
	if host == "docker.io" {
		host = "registry-1.docker.io"
	}
	name := reference.Path(s.Reference)
	return &endpoint{
		base:     &url.URL{Scheme: "https", Host: host, Path: path.Join("/v2", name)},
		insecure: trust.InsecureSkipVerify, client: &http.Client{Transport: t}, credentials: credentials,
		scope: "repository:" + name + ":pull", idle: i.retry.Idle,
	}, nil
}

// certDir returns the directory of certs.d(5) for a registry, "" if there is none.
func certDir(sys *types.SystemContext, host string) (string, error) {
	if sys.DockerCertPath != "" {
		return sys.DockerCertPath, nil
	}
	paths, err := configfile.GetSearchPaths(&configfile.File{Name: "certs", Extension: "d", DoNotUseExtensionForConfigName: true,
		UserId: unshare.GetRootlessUID()})
	if err != nil {
		return "", err
	}
	for _, dir := range append(paths.DropInDirectories, "/etc/docker/certs.d") {
		dir = filepath.Join(dir, host)
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
			return "", err
		}
	}
	return "", nil
}

// maxPage is how much of an answer is read, in bytes.
const maxPage = 16 << 20

// answer is what a registry has answered.
type answer struct {
	url    *url.URL
	status int
	header http.Header
	body   []byte
}

// get asks for what is at a path below the repository, or for the page of an earlier answer.
func (e *endpoint) get(ctx context.Context, where string) (answer, error) {
	a, err := e.try(ctx, where)
	// Who accepts everything accepts HTTP as well, if nobody speaks HTTPS there.
	if err != nil && e.insecure && e.base.Scheme == "https" && ctx.Err() == nil {
		e.base.Scheme = "http"
		if a, err = e.try(ctx, where); err != nil {
			e.base.Scheme = "https"
		}
	}
	if err != nil || a.status != http.StatusUnauthorized {
		return a, err
	}
	if err := e.authorize(ctx, a); err != nil {
		return a, fmt.Errorf("registry %s: login: %w", e.base.Host, err)
	}
	return e.try(ctx, where)
}

func (e *endpoint) try(ctx context.Context, where string) (answer, error) {
	u, err := url.Parse(where)
	if err == nil && !u.IsAbs() {
		u, err = url.Parse(e.base.String() + "/" + where)
	}
	if err != nil {
		return answer{}, oci.Permanent(err)
	}
	header := http.Header{"Accept": {typeIndex}}
	if e.login != "" {
		header.Set("Authorization", e.login)
	}
	return e.do(ctx, http.MethodGet, u, header, nil)
}

// do reads an answer that has a limit, within the time that a connection may bring nothing.
func (e *endpoint) do(ctx context.Context, method string, u *url.URL, header http.Header, content io.Reader) (answer, error) {
	if e.idle > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeoutCause(ctx, e.idle, errors.New("the registry does not answer"))
		defer stop()
	}
	request, err := http.NewRequestWithContext(ctx, method, u.String(), content)
	if err != nil {
		return answer{}, oci.Permanent(err)
	}
	request.Header = header
	request.Header.Set("User-Agent", "composefs-boot")
	response, err := e.client.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxPage+1))
	if err == nil && len(body) > maxPage {
		err = oci.Permanent(fmt.Errorf("%s: more than %d bytes", u.Redacted(), maxPage))
	}
	return answer{u, response.StatusCode, response.Header, body}, err
}

// authorize makes the header that a registry wants: by user and password, or a token of the service that it names.
func (e *endpoint) authorize(ctx context.Context, refused answer) error {
	user := "Basic " + base64.StdEncoding.EncodeToString([]byte(e.credentials.Username+":"+e.credentials.Password))
	for _, c := range challenge.ResponseChallenges(&http.Response{StatusCode: refused.status, Header: refused.header}) {
		switch c.Scheme {
		case "basic":
			if e.credentials.Username == "" {
				return refused.err()
			}
			e.login = user
			return nil
		case "bearer":
			token, err := e.token(ctx, c.Parameters, user)
			e.login = "Bearer " + token
			return err
		}
	}
	return refused.err()
}

// token asks for a token, as https://distribution.github.io/distribution/spec/auth/ describes it.
func (e *endpoint) token(ctx context.Context, parameters map[string]string, user string) (string, error) {
	realm, err := url.Parse(parameters["realm"])
	if err != nil || realm.Host == "" {
		return "", oci.Permanent(fmt.Errorf("realm %q: not a URL", parameters["realm"]))
	}
	if realm.Scheme != "https" && !e.insecure {
		return "", oci.Permanent(fmt.Errorf("realm %s: credentials are not sent without TLS", realm.Redacted()))
	}
	form := realm.Query()
	form.Set("scope", e.scope)
	if service := parameters["service"]; service != "" {
		form.Set("service", service)
	}
	method, header := http.MethodGet, http.Header{}
	var content io.Reader
	if e.credentials.IdentityToken != "" {
		form.Set("grant_type", "refresh_token")
		form.Set("refresh_token", e.credentials.IdentityToken)
		form.Set("client_id", "composefs-boot")
		method, content = http.MethodPost, strings.NewReader(form.Encode())
		header.Set("Content-Type", "application/x-www-form-urlencoded")
	} else {
		realm.RawQuery = form.Encode()
		if e.credentials.Username != "" {
			header.Set("Authorization", user)
		}
	}
	a, err := e.do(ctx, method, realm, header, content)
	if err == nil {
		err = a.err()
	}
	var answered struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if err == nil {
		err = json.Unmarshal(a.body, &answered)
	}
	if err == nil && answered.Token == "" {
		answered.Token = answered.AccessToken
	}
	if err == nil && answered.Token == "" {
		err = errors.New("there is no token in the answer")
	}
	return answered.Token, err
}

func (a answer) err() error {
	if a.status == http.StatusOK {
		return nil
	}
	err := fmt.Errorf("%s: HTTP status %d", a.url, a.status)
	switch {
	case a.status == http.StatusUnauthorized:
		return oci.Permanent(fmt.Errorf("%w (--authfile names a file with credentials, as podman login --authfile writes it)", err))
	case a.status < 500 && a.status != http.StatusTooManyRequests && a.status != http.StatusRequestTimeout:
		return oci.Permanent(err)
	}
	return err
}

// next is where the next page is, "" if there is none. It has to be of the same registry, which alone may see the credentials.
func (a answer) next() (string, error) {
	for _, link := range strings.Split(strings.Join(a.header.Values("Link"), ","), ",") {
		target, params, _ := strings.Cut(strings.TrimSpace(link), ";")
		if !strings.Contains(strings.ReplaceAll(params, `"`, ""), "rel=next") {
			continue
		}
		to, err := a.url.Parse(strings.Trim(strings.TrimSpace(target), "<>"))
		if err != nil {
			return "", fmt.Errorf("%s: next page: %w", a.url, err)
		}
		if to.Scheme != a.url.Scheme || to.Host != a.url.Host {
			return "", fmt.Errorf("%s: the next page is of another registry, %s", a.url, to.Redacted())
		}
		return to.String(), nil
	}
	return "", nil
}
