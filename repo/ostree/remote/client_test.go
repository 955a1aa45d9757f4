package remote

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

var quick = Retry{Attempts: 6, Wait: time.Millisecond, Idle: 10 * time.Second}

// connect returns a client of servers that have the same files.
func connect(t testing.TB, c Config, o Options, servers ...string) *client {
	t.Helper()
	client, err := newClient(&c, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.http.CloseIdleConnections)
	client.meta = &mirrors{}
	for _, s := range servers {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		client.meta.urls = append(client.meta.urls, u)
	}
	client.content = client.meta
	return client
}

func server(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

func content(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(uint64(n), 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// serve answers as a web server does, ranges included.
func serve(w http.ResponseWriter, r *http.Request, b []byte) {
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

// cut breaks the connection after n bytes of the body.
func cut(w http.ResponseWriter, r *http.Request, b []byte, n int) {
	serve(&cutter{w, n}, r, b)
}

type cutter struct {
	http.ResponseWriter
	left int
}

func (c *cutter) Write(b []byte) (int, error) {
	if len(b) >= c.left {
		c.ResponseWriter.Write(b[:c.left])
		http.NewResponseController(c.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= len(b)
	return c.ResponseWriter.Write(b)
}

// Cut 200 times at random places, a file comes whole, and no byte of it comes twice but what was lost on its way.
func TestBodyResumes(t *testing.T) {
	want := content(3 << 20)
	random := rand.New(rand.NewPCG(1, 2))
	cuts, sent := 0, 0
	at := server(t, func(w http.ResponseWriter, r *http.Request) {
		if cuts < 200 {
			cuts++
			n := 1 + random.IntN(20_000)
			sent += n
			cut(w, r, want, n)
		}
		sent += len(want)
		serve(w, r, want)
	})
	c := connect(t, Config{}, Options{Retry: quick}, at)
	got, err := c.get(t.Context(), c.meta, "file", 4<<20)
	if err != nil || !bytes.Equal(got, want) || cuts != 200 {
		t.Fatalf("%d bytes, %v, %d cuts", len(got), err, cuts)
	}
	if n := c.counters.Bytes.Load(); n != int64(len(want)) {
		t.Errorf("%d bytes came, of %d", n, len(want))
	}
}

func TestFaults(t *testing.T) {
	want := content(50_000)
	const always = 1 << 30
	first := func(times int, f func(w http.ResponseWriter, r *http.Request)) http.HandlerFunc {
		var n atomic.Int64
		return func(w http.ResponseWriter, r *http.Request) {
			if n.Add(1) <= int64(times) {
				f(w, r)
				return
			}
			serve(w, r, want)
		}
	}
	status := func(code int, header ...string) func(w http.ResponseWriter, r *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
		}
	}
	hang := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	hangInside := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(want)))
		w.Write(want[:100])
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
	noRanges := func(f http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			r.Header.Del("Range")
			f(w, r)
		}
	}
	impatient := Retry{Attempts: 2, Wait: time.Millisecond, Idle: 100 * time.Millisecond}
	for _, c := range []struct {
		name    string
		handler http.HandlerFunc
		retry   Retry
		err     string // "": it goes well
		is      error
	}{
		{"nothing wrong", first(0, nil), Retry{}, "", nil},
		{"5xx", first(4, status(502)), quick, "", nil},
		{"5xx for ever", first(always, status(500)), quick, "answers 500", nil},
		{"no attempts", first(1, status(500)), Retry{}, "answers 500", nil},
		{"too many requests", first(3, status(429, "Retry-After", "0")), quick, "", nil},
		{"come back soon", first(1, status(503, "Retry-After", time.Now().Add(time.Second).UTC().Format(http.TimeFormat))), quick, "", nil},
		{"timeout of the server", first(2, status(408)), quick, "", nil},
		{"not there", first(always, status(404)), quick, "answers 404", ostree.ErrNotFound},
		{"gone", first(always, status(410)), quick, "answers 410", ostree.ErrNotFound},
		{"denied", first(always, status(401)), quick, "--http-header", nil},
		{"a strange answer", first(always, status(204)), quick, "answers 204", nil},
		{"teapot", first(always, status(418)), quick, "answers 418", nil},
		{"silent", first(1, hang), impatient, "", nil},
		{"silent for ever", first(always, hang), impatient, "brings nothing more", nil},
		{"silent inside", first(1, hangInside), impatient, "", nil},
		{"cut at once", first(2, func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }), quick, "", nil},
		{"cut inside", first(3, func(w http.ResponseWriter, r *http.Request) { cut(w, r, want, 1000) }), quick, "", nil},
		{"cut inside, no ranges", noRanges(first(3, func(w http.ResponseWriter, r *http.Request) { cut(w, r, want, 1000) })), quick, "", nil},
		{"cut without end", func(w http.ResponseWriter, r *http.Request) { cut(w, noRange(r), want, 1000) }, quick, "unexpected EOF", nil},
		{"another size", func() http.HandlerFunc {
			var n atomic.Int64
			return func(w http.ResponseWriter, r *http.Request) {
				if n.Add(1) == 1 {
					cut(w, r, want, 1000)
				}
				serve(w, r, want[:40_000])
			}
		}(), quick, "has 40000 now", nil},
		{"another range", func() http.HandlerFunc {
			var n atomic.Int64
			return func(w http.ResponseWriter, r *http.Request) {
				if n.Add(1) == 1 {
					cut(w, r, want, 1000)
				}
				w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(want)-1, len(want)))
				w.WriteHeader(206)
				w.Write(want)
			}
		}(), quick, "Content-Range", nil},
		{"a range that nobody wants", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 5-9/10")
			w.WriteHeader(206)
			w.Write(want[5:10])
		}, quick, "Content-Range", nil},
		{"endless", func(w http.ResponseWriter, r *http.Request) {
			for {
				if _, err := w.Write(want); err != nil {
					return
				}
			}
		}, quick, "more than", nil},
		{"larger than it may be", func(w http.ResponseWriter, r *http.Request) { w.Header().Set("Content-Length", "1000000000") }, quick, "more than", nil},
		{"redirected", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/x" {
				serve(w, r, want)
				return
			}
			http.Redirect(w, r, "/x", http.StatusFound)
		}, quick, "", nil},
		{"redirected in a circle", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/y", http.StatusFound) }, quick, "redirected 10 times", nil},
	} {
		client := connect(t, Config{}, Options{Retry: c.retry}, server(t, c.handler))
		got, err := client.get(t.Context(), client.meta, "objects/file", 200_000)
		switch {
		case c.err == "" && (err != nil || !bytes.Equal(got, want)):
			t.Errorf("%s: %d bytes, %v", c.name, len(got), err)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), "objects/file")):
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
		case c.is != nil && !errors.Is(err, c.is), c.is == nil && errors.Is(err, ostree.ErrNotFound):
			t.Errorf("%s: %v is of the wrong kind", c.name, err)
		}
	}
}

func noRange(r *http.Request) *http.Request {
	r.Header.Del("Range")
	return r
}

// A server that wants to be left alone is left alone by everybody.
func TestRetryAfterHoldsBackAll(t *testing.T) {
	var limited, early atomic.Int64
	var until atomic.Int64
	at := server(t, func(w http.ResponseWriter, r *http.Request) {
		if limited.Add(1) == 1 {
			until.Store(time.Now().Add(900 * time.Millisecond).UnixNano())
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		if time.Now().UnixNano() < until.Load() {
			early.Add(1)
		}
	})
	c := connect(t, Config{}, Options{Retry: quick}, at)
	if _, err := c.get(t.Context(), c.meta, "first", 1); err != nil {
		t.Fatal(err)
	}
	limited.Store(0)
	var all sync.WaitGroup
	all.Go(func() { c.get(t.Context(), c.meta, "limited", 1) })
	for limited.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(50 * time.Millisecond) // the answer has come
	for range 5 {
		all.Go(func() { c.get(t.Context(), c.meta, "others", 1) })
	}
	all.Wait()
	if n := early.Load(); n > 0 {
		t.Errorf("%d requests came too early", n)
	}
}

func TestMirrors(t *testing.T) {
	want := content(1000)
	var asked [3]atomic.Int64
	mirror := func(k int, f http.HandlerFunc) string {
		return server(t, func(w http.ResponseWriter, r *http.Request) { asked[k].Add(1); f(w, r) })
	}
	broken := mirror(0, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(500) })
	empty := mirror(1, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(404) })
	good := mirror(2, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "nowhere") {
			w.WriteHeader(404)
			return
		}
		serve(w, r, want)
	})
	c := connect(t, Config{}, Options{Retry: quick}, broken, empty, good)
	for range 3 {
		if got, err := c.get(t.Context(), c.meta, "file", 2000); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	if asked[0].Load() != 1 || asked[1].Load() != 1 || asked[2].Load() != 3 {
		t.Errorf("asked %d, %d, %d times", asked[0].Load(), asked[1].Load(), asked[2].Load())
	}
	// What is nowhere is not there, but as long as a mirror is broken nobody knows.
	if _, err := c.get(t.Context(), c.meta, "nowhere", 2000); errors.Is(err, ostree.ErrNotFound) {
		t.Error(err)
	}
	c = connect(t, Config{}, Options{Retry: quick}, empty, good)
	if _, err := c.get(t.Context(), c.meta, "nowhere", 2000); !errors.Is(err, ostree.ErrNotFound) {
		t.Error(err)
	}
	list := server(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "# mirrors\n\nfile:///etc\n%s/\nnot a url\n%s/sub\n", empty, good)
	})
	m, err := c.resolveMirrors(t.Context(), "mirrorlist="+list+"/mirrors")
	if err != nil || len(m.urls) != 2 || m.urls[1].Path != "/sub" {
		t.Errorf("%v, %v", m, err)
	}
	for _, text := range []string{"", "file://host/x", "ftp:///x", "http://", "mirrorlist=", "mirrorlist=" + empty, "mirrorlist=ftp://x/", "metalink=" + good} {
		if m, err := c.resolveMirrors(t.Context(), text); err == nil {
			t.Errorf("%s: %v", text, m.urls)
		}
	}
}

// Certificates of the server and of the client are asked for and checked; HTTP/2 is used.
func TestTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/down" {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
			return
		}
		fmt.Fprintf(w, "%s %d", r.Proto, len(r.TLS.PeerCertificates))
	}))
	s.EnableHTTP2 = true
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	s.Config.ErrorLog = nil
	s.StartTLS()
	defer s.Close()
	dir := t.TempDir()
	ca, key := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "key.pem")
	certificate := s.TLS.Certificates[0]
	der, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for path, block := range map[string]*pem.Block{ca: {Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}, key: {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		config Config
		want   string
		err    string
	}{
		{"unknown authority", Config{}, "", "tls-ca-path"},
		{"its authority", Config{CA: ca}, "HTTP/2.0 0", ""},
		{"any", Config{TLSPermissive: true}, "HTTP/2.0 0", ""},
		{"without HTTP/2", Config{CA: ca, NoHTTP2: true}, "HTTP/1.1 0", ""},
		{"client certificate", Config{CA: ca, ClientCert: ca, ClientKey: key}, "HTTP/2.0 1", ""},
	} {
		client := connect(t, c.config, Options{Retry: quick}, s.URL)
		got, err := client.get(t.Context(), client.meta, "x", 100)
		if string(got) != c.want || c.err == "" != (err == nil) || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %q, %v", c.name, got, err)
		}
	}
	client := connect(t, Config{CA: ca}, Options{Retry: quick}, s.URL)
	if _, err := client.get(t.Context(), client.meta, "down", 100); err == nil || !strings.Contains(err.Error(), "from HTTPS") {
		t.Error(err)
	}
	for name, config := range map[string]Config{"no CA": {CA: key}, "no certificate": {ClientCert: key, ClientKey: key}, "no proxy": {Proxy: "::"}} {
		if _, err := newClient(&config, Options{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestHeadersAndProxy(t *testing.T) {
	var seen atomic.Value
	proxy := server(t, func(w http.ResponseWriter, r *http.Request) {
		seen.Store(r.URL.String() + " " + r.Header.Get("Authorization") + " " + r.UserAgent())
	})
	c := connect(t, Config{Proxy: proxy}, Options{Retry: quick, Headers: []string{"Authorization=Bearer x=y"}}, "http://far.example/repo")
	if _, err := c.get(t.Context(), c.meta, "summary", 1); err != nil {
		t.Fatal(err)
	}
	if got := seen.Load(); got != "http://far.example/repo/summary Bearer x=y composefs-boot" {
		t.Errorf("%q", got)
	}
	for _, h := range []string{"no value", "a=b\nc"} {
		if _, err := newClient(&Config{}, Options{Headers: []string{h}}); err == nil {
			t.Errorf("%q is a header", h)
		}
	}
}

// Who gives up is not held up by waits.
func TestCancel(t *testing.T) {
	at := server(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Retry-After", "100")
		w.WriteHeader(503)
	})
	c := connect(t, Config{}, Options{Retry: Retry{Attempts: 100, Wait: time.Hour}}, at)
	enough := errors.New("enough")
	ctx, stop := context.WithCancelCause(t.Context())
	time.AfterFunc(100*time.Millisecond, func() { stop(enough) })
	if _, err := c.get(ctx, c.meta, "x", 1); !errors.Is(err, enough) {
		t.Error(err)
	}
}
