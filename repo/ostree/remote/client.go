package remote

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// Retry says how often something is asked for again after a failure. The zero value gives up at once.
type Retry struct {
	Attempts int           // that fail in sequence, without a single byte, besides the first; that one is followed by another at once
	Wait     time.Duration // before the second one; doubled for each that follows
	Idle     time.Duration // a connection that has brought nothing for so long has failed; 0: never
}

// DefaultRetry gives up after half a minute.
var DefaultRetry = Retry{Attempts: 6, Wait: time.Second, Idle: time.Minute}

// maxRetryAfter limits how long a server can make us wait.
const maxRetryAfter = 2 * time.Minute

// inFlight is how many objects are on their way at once. Without HTTP/2 each has a connection. With 5 ms to the server and back, more
// are not faster: the processor is busy then.
const inFlight = 48

// Counters say what has been fetched. Other goroutines may look at them meanwhile.
type Counters struct {
	Bytes    atomic.Int64 // of bodies, as they came
	Requests atomic.Int64 // that were answered
	Retries  atomic.Int64
}

// client fetches files of a repository by HTTP, from the first mirror that gives them.
type client struct {
	http          *http.Client
	header        http.Header
	retry         Retry
	counters      *Counters
	meta, content *mirrors
	large         sync.Mutex   // see usual
	pause         atomic.Int64 // until when the server wants to be left alone, in nanoseconds since 1970
}

func newClient(c *Config, o Options) (*client, error) {
	t := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:    30 * time.Second,
		ForceAttemptHTTP2:      !c.NoHTTP2,
		MaxIdleConnsPerHost:    inFlight,
		MaxConnsPerHost:        inFlight,
		IdleConnTimeout:        90 * time.Second,
		DisableCompression:     true, // files are compressed already
		ReadBufferSize:         16 << 10,
		MaxResponseHeaderBytes: 256 << 10,
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: c.TLSPermissive},
	}
	if c.NoHTTP2 {
		t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	if c.Proxy != "" {
		u, err := url.Parse(c.Proxy)
		if err != nil || u.Host == "" {
			return nil, fmt.Errorf("proxy %q: not a URL", c.Proxy)
		}
		t.Proxy = http.ProxyURL(u)
	}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, err
		}
		t.TLSClientConfig.RootCAs = x509.NewCertPool()
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: no certificate in it", c.CA)
		}
	}
	if c.ClientCert != "" {
		pair, err := tls.LoadX509KeyPair(c.ClientCert, c.ClientKey)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		t.TLSClientConfig.Certificates = []tls.Certificate{pair}
	}
	// A repository on this machine is read as from a server, in the same ways.
	t.RegisterProtocol("file", http.NewFileTransport(http.Dir("/")))
	jar, err := readCookies(c.cookies())
	if err != nil {
		return nil, err
	}
	h := http.Header{}
	for _, line := range o.Headers {
		key, value, ok := strings.Cut(line, "=")
		if !ok || strings.ContainsAny(line, "\r\n") {
			return nil, fmt.Errorf("header %q: want NAME=VALUE", line)
		}
		h.Set(key, value)
	}
	if h.Get("User-Agent") == "" {
		h.Set("User-Agent", "composefs-boot")
	}
	counters := o.Counters
	if counters == nil {
		counters = &Counters{}
	}
	return &client{http: &http.Client{Transport: t, CheckRedirect: redirect, Jar: jar}, header: h, retry: o.Retry, counters: counters}, nil
}

var errRedirect = errors.New("redirected")

// redirect follows to another place, but not out of HTTPS.
func redirect(r *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return fmt.Errorf("%w 10 times", errRedirect)
	}
	if via[0].URL.Scheme == "https" && r.URL.Scheme != "https" {
		return fmt.Errorf("%w from HTTPS to %s", errRedirect, r.URL.Redacted())
	}
	if r.URL.Scheme != "http" && r.URL.Scheme != "https" { // a server has no say in which files of this machine are read
		return fmt.Errorf("%w to %s", errRedirect, r.URL.Redacted())
	}
	return nil
}

// permanent is an error that another attempt does not help against.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// after is an error of a server that says when to come again.
type after struct {
	error
	wait time.Duration
}

func (a after) Unwrap() error { return a.error }

func classify(err error) error {
	var certificate *tls.CertificateVerificationError
	var host *net.DNSError
	switch {
	case errors.As(err, &certificate):
		return permanent{fmt.Errorf("%w (tls-ca-path in the configuration names a file with its authority)", err)}
	case errors.As(err, &host) && host.IsNotFound, errors.Is(err, http.ErrSchemeMismatch), errors.Is(err, errRedirect):
		return permanent{err}
	}
	return err
}

// status makes an error of an answer that is not the file.
func status(r *http.Response) error {
	err := fmt.Errorf("%s answers %s", r.Request.URL.Redacted(), r.Status)
	switch r.StatusCode {
	case http.StatusForbidden, http.StatusNotFound, http.StatusGone: // some stores say 403 of what they do not have
		return permanent{fmt.Errorf("%w: %w", ostree.ErrNotFound, err)}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return after{err, retryAfter(r.Header.Get("Retry-After"))}
	case http.StatusRequestTimeout:
		return err
	case http.StatusRequestedRangeNotSatisfiable:
		return permanent{fmt.Errorf("%w: %w", errRange, err)}
	case http.StatusUnauthorized:
		return permanent{fmt.Errorf("%w (--http-header Authorization=... or a client certificate)", err)}
	}
	if r.StatusCode < 500 {
		return permanent{err}
	}
	return err
}

func retryAfter(s string) time.Duration {
	wait := time.Duration(0)
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		wait = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(s); err == nil {
		wait = time.Until(t)
	}
	return min(max(wait, 0), maxRetryAfter)
}

// request is one file that is asked for.
type request struct {
	from   *mirrors
	path   string
	offset int64
	header map[string]string
}

// do asks for a file until there is an answer that is good: 200, 206, or 304 if the request has conditions. Failures before it are
// counted, and those that have been already.
func (c *client) do(ctx context.Context, q request, failed *int) (*http.Response, error) {
	for {
		r, err := c.tryMirrors(ctx, q)
		if err == nil {
			return r, nil
		}
		if *failed++; ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := c.again(ctx, *failed, err); err != nil {
			return nil, err
		}
	}
}

// again waits before the next attempt. It returns an error if there is to be none.
func (c *client) again(ctx context.Context, failed int, err error) error {
	var p permanent
	if failed > c.retry.Attempts || errors.As(err, &p) || ctx.Err() != nil {
		return err
	}
	c.counters.Retries.Add(1)
	var wait time.Duration
	if failed > 1 {
		wait = c.retry.Wait << min(failed-2, 16)
		wait += rand.N(wait/8 + 1) // many machines that fail at the same time do not come back at the same time
	}
	var a after
	if errors.As(err, &a) {
		wait = max(wait, a.wait)
		c.pauseUntil(time.Now().Add(a.wait))
	}
	return sleep(ctx, wait)
}

// pauseUntil makes everybody wait who wants something of a server that is overloaded.
func (c *client) pauseUntil(t time.Time) {
	for {
		old := c.pause.Load()
		if old >= t.UnixNano() || c.pause.CompareAndSwap(old, t.UnixNano()) {
			return
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// tryMirrors asks each mirror once, the one first that has worked until now. The error is ErrNotFound only if none has the file.
func (c *client) tryMirrors(ctx context.Context, q request) (*http.Response, error) {
	if until := c.pause.Load(); until > 0 {
		if err := sleep(ctx, time.Until(time.Unix(0, until))); err != nil {
			return nil, err
		}
	}
	best, n := int(q.from.best.Load()), len(q.from.urls)
	var failed, missing error
	for k := range n {
		i := (best + k) % n
		r, err := c.try(ctx, q.from.urls[i], q)
		switch {
		case err == nil:
			if k > 0 && failed != nil {
				q.from.best.Store(int32(i))
			}
			return r, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.Is(err, ostree.ErrNotFound):
			missing = err
		default:
			failed = err
		}
	}
	if failed == nil {
		return nil, missing
	}
	return nil, failed
}

// try asks one mirror. The connection ends with the body, or if the answer does not begin in time.
func (c *client) try(ctx context.Context, base *url.URL, q request) (*http.Response, error) {
	ctx, end := context.WithCancelCause(ctx)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath(q.path).String(), nil)
	if err != nil {
		end(nil)
		return nil, permanent{err}
	}
	r.Header = c.header.Clone()
	for k, v := range q.header {
		r.Header.Set(k, v)
	}
	if q.offset > 0 {
		r.Header.Set("Range", fmt.Sprintf("bytes=%d-", q.offset))
	}
	var timer *time.Timer
	if c.retry.Idle > 0 {
		timer = time.AfterFunc(c.retry.Idle, func() { end(errIdle) })
	}
	resp, err := c.http.Do(r)
	if timer != nil {
		timer.Stop()
	}
	if err != nil {
		if errors.Is(context.Cause(ctx), errIdle) {
			err = fmt.Errorf("%s: %w", r.URL.Redacted(), errIdle)
		}
		end(nil)
		return nil, classify(err)
	}
	c.counters.Requests.Add(1)
	resp.Body = &watched{ReadCloser: resp.Body, ctx: ctx, end: end, idle: c.retry.Idle, timer: timer, counters: c.counters}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent, http.StatusNotModified:
		return resp, nil
	}
	// A short body is read, so that the connection can be used again.
	io.CopyN(io.Discard, resp.Body, 4<<10)
	resp.Body.Close()
	return nil, status(resp)
}

var errIdle = errors.New("the connection brings nothing more")

// watched is a body that fails if nothing comes.
type watched struct {
	io.ReadCloser
	ctx      context.Context
	end      context.CancelCauseFunc
	idle     time.Duration
	timer    *time.Timer
	counters *Counters
}

func (w *watched) Read(p []byte) (int, error) {
	if w.timer != nil {
		w.timer.Reset(w.idle)
	}
	n, err := w.ReadCloser.Read(p)
	if w.timer != nil {
		w.timer.Stop()
	}
	w.counters.Bytes.Add(int64(n))
	if err != nil && err != io.EOF && errors.Is(context.Cause(w.ctx), errIdle) {
		err = errIdle
	}
	return n, err
}

func (w *watched) Close() error {
	w.end(nil)
	return w.ReadCloser.Close()
}

// errRange tells that a file has not as many bytes as are there already.
var errRange = errors.New("there are not as many bytes")

// open opens a file from an offset on. A connection that breaks is opened again where it broke.
func (c *client) open(ctx context.Context, from *mirrors, path string, offset int64) (*body, error) {
	b := &body{c: c, ctx: ctx, q: request{from: from, path: path}, at: offset, size: -1}
	if err := b.connect(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// get reads a whole file of at most limit bytes.
func (c *client) get(ctx context.Context, from *mirrors, path string, limit int64) ([]byte, error) {
	b, err := c.open(ctx, from, path, 0)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	if b.size > limit {
		return nil, fmt.Errorf("%s: %d bytes, more than %d", path, b.size, limit)
	}
	content, err := c.readLimited(b, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return content, nil
}

// usual is what metadata has at most in bytes, as a rule. Of what is larger, one at a time is read: together, those of a server that
// sends without an end would not fit in memory.
const usual = 1 << 20

func (c *client) readLimited(b *body, limit int64) ([]byte, error) {
	content := make([]byte, 0, min(max(b.size, 0), usual)+1)
	for {
		if len(content) == cap(content) {
			content = append(content, 0)[:len(content)]
		}
		n, err := b.Read(content[len(content):cap(content)])
		before := len(content)
		content = content[:before+n]
		if int64(len(content)) > limit {
			return nil, fmt.Errorf("more than %d bytes", limit)
		}
		if before <= usual && len(content) > usual {
			c.large.Lock()
			defer c.large.Unlock()
		}
		if err == io.EOF {
			return content, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// body is a file that is read, perhaps from several connections one after the other.
type body struct {
	c      *client
	ctx    context.Context
	q      request
	r      io.ReadCloser
	at     int64
	size   int64 // of the file; -1: it is not known
	failed int   // attempts in sequence
	broken error // it has given up
}

func (b *body) connect() error {
	q := b.q
	q.offset = b.at
	r, err := b.c.do(b.ctx, q, &b.failed)
	if err != nil {
		return err
	}
	if err := b.accept(r); err != nil {
		r.Body.Close()
		b.failed++
		return err
	}
	b.r = r.Body
	return nil
}

// accept looks whether the answer is what was asked for: the file from an offset on, or all of it, of a server that knows no ranges.
func (b *body) accept(r *http.Response) error {
	size, start := r.ContentLength, int64(0)
	if r.StatusCode == http.StatusPartialContent {
		var err error
		if start, size, err = contentRange(r.Header.Get("Content-Range")); err != nil || start != b.at {
			return fmt.Errorf("bytes from %d on are asked for, and Content-Range is %q", b.at, r.Header.Get("Content-Range"))
		}
	}
	if b.size < 0 {
		b.size = size
	}
	if size >= 0 && size != b.size {
		return permanent{fmt.Errorf("it had %d bytes, and has %d now", b.size, size)}
	}
	_, err := io.CopyN(io.Discard, r.Body, b.at-start)
	if err == io.EOF {
		err = errRange
	}
	return err
}

// contentRange reads "bytes 100-199/200", or "bytes 100-199/*".
func contentRange(s string) (start, size int64, err error) {
	var end int64
	var total string
	if _, err := fmt.Sscanf(s, "bytes %d-%d/%s", &start, &end, &total); err != nil {
		return 0, 0, err
	}
	if total == "*" {
		return start, -1, nil
	}
	size, err = strconv.ParseInt(total, 10, 64)
	if err == nil && (start < 0 || end < start || end != size-1) {
		err = errors.New("not to the end")
	}
	return start, size, err
}

func (b *body) Read(p []byte) (int, error) {
	if b.broken != nil {
		return 0, b.broken
	}
	for {
		var n int
		var err error
		if b.r == nil {
			err = b.connect()
		}
		if b.r != nil {
			n, err = b.r.Read(p)
			b.at += int64(n)
			if n > 0 {
				b.failed = 0
				return n, nil // an error comes again
			}
			if err == nil {
				continue
			}
			if err == io.EOF && (b.size < 0 || b.at == b.size) {
				return 0, io.EOF
			}
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			b.Close()
			b.failed++
		}
		if b.ctx.Err() != nil {
			b.broken = context.Cause(b.ctx)
			return 0, b.broken
		}
		if err := b.c.again(b.ctx, b.failed, err); err != nil {
			b.broken = fmt.Errorf("after %d bytes: %w", b.at, err)
			return 0, b.broken
		}
	}
}

func (b *body) Close() error {
	if b.r == nil {
		return nil
	}
	r := b.r
	b.r = nil
	return r.Close()
}
