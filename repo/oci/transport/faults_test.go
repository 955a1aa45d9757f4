package transport_test

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// faulty stands between a client and a registry.
type faulty struct {
	registry http.Handler
	// fault may answer a request instead of the registry, and returns whether it has.
	fault func(w http.ResponseWriter, r *http.Request) bool
	// cut says after how many bytes of a body the connection breaks; negative: not at all.
	cut func() int
	// pause is made after each piece of 16 KiB.
	pause time.Duration

	sent atomic.Int64 // bytes of bodies
	cuts atomic.Int64
}

// newFaulty starts one, and returns the address.
func newFaulty(t testing.TB, registry string, f *faulty) string {
	u, err := url.Parse("http://" + registry)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(u)
	proxy.FlushInterval, proxy.ErrorLog = -1, log.New(io.Discard, "", 0)
	f.registry = proxy
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func (f *faulty) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if f.fault != nil && f.fault(w, r) {
		return
	}
	left := -1
	if f.cut != nil && isBlob(r) {
		left = f.cut()
	}
	f.registry.ServeHTTP(&cutWriter{w, f, left}, r)
}

func isBlob(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }

type cutWriter struct {
	http.ResponseWriter
	f    *faulty
	left int
}

func (c *cutWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *cutWriter) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		if c.left == 0 {
			c.f.cuts.Add(1)
			panic(http.ErrAbortHandler)
		}
		piece := b[done:min(len(b), done+16<<10)]
		if c.left > 0 {
			piece = piece[:min(len(piece), c.left)]
			c.left -= len(piece)
		}
		n, err := c.ResponseWriter.Write(piece)
		http.NewResponseController(c.ResponseWriter).Flush()
		c.f.sent.Add(int64(n))
		if done += n; err != nil {
			return done, err
		}
		time.Sleep(c.f.pause)
	}
	return done, nil
}

const largestObject = 300_000 // see layer

// cutter cuts at random positions, a number of times.
func cutter(seed uint64, times, most int) func() int {
	random, mu := rand.New(rand.NewPCG(seed, 2)), sync.Mutex{}
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		if times--; times < 0 {
			return -1
		}
		return random.IntN(most)
	}
}

// The connection is cut at 200 random positions: in one pull, that goes on, or in one pull for each cut.
func TestCuts(t *testing.T) {
	address := google(t)
	image := imageOf(t, "amd64", layer(11, 150), layer(12, 150), layer(13, 150))
	push(t, address+"/os:1", image)
	whole, err := pull(t, newRepo(t), "docker://"+address+"/os:1", transport.Options{SkipVerify: plain}, oci.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		retry oci.Retry
		cuts  int64   // at least
		most  float64 // of the image's bytes, which is less than one object a cut
	}{
		"one pull":   {quick, 190, 1.02},
		"many pulls": {oci.Retry{}, 50, 1.10}, // with what was on its way to the other layers when one was cut
	} {
		f := &faulty{cut: cutter(3, 200, 100_000)}
		ref := "docker://" + newFaulty(t, address, f) + "/os:1"
		r := newRepo(t)
		pulls := 0
		var result oci.PullResult
		for {
			pulls++
			result, err = pullTo(r, ref, transport.Options{SkipVerify: plain, Retry: c.retry}, oci.PullOptions{Tag: "os"})
			if err == nil || pulls > 1000 {
				break
			}
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		part := float64(f.sent.Load()) / float64(sizeOf(t, image))
		t.Logf("%s: %d cuts, %d pulls, %.3fx the bytes of the image", name, f.cuts.Load(), pulls, part)
		if digestOf(t, result) != digestOf(t, whole) || f.cuts.Load() < c.cuts || part > c.most {
			t.Errorf("%s: %d cuts, %.3fx the bytes", name, f.cuts.Load(), part)
		}
		report, err := r.Fsck(ctx, repo.FsckOptions{})
		if err != nil || !report.OK() {
			t.Errorf("%v, %v", report.Findings, err)
		}
	}
}

// Killed at any moment, a pull leaves a repository without fault and no tag; the next one goes on where it was.
func TestKills(t *testing.T) {
	kills := 30
	if n := os.Getenv("KILLS"); n != "" {
		fmt.Sscan(n, &kills)
	}
	address := google(t)
	image := imageOf(t, "amd64", layer(14, 60), layer(15, 60))
	push(t, address+"/os:1", image)
	size := sizeOf(t, image)
	random := rand.New(rand.NewPCG(5, 6))
	for killed := 0; killed < kills; {
		f := &faulty{pause: 5 * time.Millisecond}
		ref := "docker://" + newFaulty(t, address, f) + "/os:1"
		r := newRepo(t)
		mine := 0
		for {
			cmd := alone(ref, r)
			var errs bytes.Buffer
			cmd.Stderr = &errs
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			timer := time.AfterFunc(time.Duration(50+random.IntN(400))*time.Millisecond, func() { cmd.Process.Kill() })
			err := cmd.Wait()
			timer.Stop()
			if errs.Len() > 0 {
				t.Fatal(errs.String())
			}
			report, fsckErr := r.Fsck(ctx, repo.FsckOptions{})
			tags, tagErr := oci.Tags(r)
			if fsckErr != nil || !report.OK() || tagErr != nil || err == nil && len(tags) != 1 {
				t.Fatalf("after %d kills: %v, %v, %v, %v", killed, report.Findings, tags, fsckErr, tagErr)
			}
			images, ociErr := oci.Fsck(ctx, r, oci.FsckOptions{})
			if ociErr != nil || len(images.Findings) > 0 {
				t.Fatalf("after %d kills: %v, %v", killed, images.Findings, ociErr)
			}
			if err == nil {
				break
			}
			killed, mine = killed+1, mine+1
		}
		// What has been sent and not been read when the process ends is lost.
		const inSockets = 1 << 20
		if most := size*102/100 + int64(mine+1)*(largestObject+inSockets); f.sent.Load() > most {
			t.Errorf("%d kills: %d bytes were sent for an image of %d", mine, f.sent.Load(), size)
		}
		t.Logf("%d kills: %.3fx the bytes of the image", mine, float64(f.sent.Load())/float64(size))
		if left, _ := filepath.Glob(filepath.Join(r.Path(), "tmp/*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
}

// Where there is no room to keep what comes, the image comes all the same.
func TestNoRoomToKeep(t *testing.T) {
	address := google(t)
	image := imageOf(t, "amd64", layer(18, 60))
	push(t, address+"/os:1", image)
	const most = 1 << 20
	if sizeOf(t, image) < 2*most {
		t.Fatal("the layer is too small for this")
	}
	r := newRepo(t)
	if out, err := alone("docker://"+address+"/os:1", r, fmt.Sprint("TEST_PULL_FILE_SIZE=", most)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if left, _ := filepath.Glob(filepath.Join(r.Path(), "tmp/*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// What registries do on bad days.
func TestFaults(t *testing.T) {
	address := google(t)
	layers := [][]byte{layer(16, 20), layer(17, 20)}
	image := imageOf(t, "amd64", layers...)
	push(t, address+"/os:1", image)
	var want fsverity.Digest
	blobs := blobsOf(t, image)
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the blob store gets credentials")
		}
		for _, l := range blobs {
			if r.URL.Path == "/"+l.digest {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(l.content))
				return
			}
		}
		http.NotFound(w, r)
	}))
	defer store.Close()
	answer := func(times int64, blobs bool, f func(w http.ResponseWriter, r *http.Request)) func(http.ResponseWriter, *http.Request) bool {
		var done atomic.Int64
		return func(w http.ResponseWriter, r *http.Request) bool {
			if blobs && !isBlob(r) || done.Add(1) > times {
				return false
			}
			f(w, r)
			return true
		}
	}
	status := func(code int) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(code)
		}
	}
	const always = 1 << 30
	for _, c := range []struct {
		name  string
		f     *faulty
		retry oci.Retry
		err   string // "": it goes well
	}{
		{"nothing wrong", &faulty{}, oci.Retry{}, ""},
		{"rate limit", &faulty{fault: answer(2, true, status(429))}, quick, ""},
		{"rate limit at the beginning", &faulty{fault: answer(1, false, status(429))}, quick, ""},
		{"5xx burst at the beginning", &faulty{fault: answer(6, false, status(503))}, quick, ""},
		{"5xx burst", &faulty{fault: answer(6, true, status(500))}, quick, ""},
		{"5xx for ever", &faulty{fault: answer(always, true, status(502))}, quick, "502"},
		{"denied", &faulty{fault: answer(always, true, status(403))}, quick, "403"},
		{"slow", &faulty{pause: 3 * time.Millisecond}, oci.Retry{Idle: time.Second}, ""},
		{"silent", &faulty{fault: answer(2, true, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })},
			oci.Retry{Attempts: 3, Idle: 500 * time.Millisecond}, ""},
		{"silent for ever", &faulty{fault: answer(always, true, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })},
			oci.Retry{Attempts: 2, Idle: 50 * time.Millisecond}, "brings nothing more"},
		{"truncated", &faulty{cut: cutter(7, 10, 50_000)}, quick, ""},
		{"truncated for ever", &faulty{cut: func() int { return 0 }}, oci.Retry{Attempts: 2}, "after 0 bytes"},
		{"no ranges", &faulty{cut: cutter(7, 4, 50_000), fault: func(w http.ResponseWriter, r *http.Request) bool {
			r.Header.Del("Range")
			return false
		}}, quick, ""},
		{"another blob", &faulty{fault: answer(always, true, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("{}")) })}, quick, "bytes are expected"},
		{"blob store", &faulty{fault: func(w http.ResponseWriter, r *http.Request) bool {
			at := strings.LastIndex(r.URL.Path, "/")
			if isBlob(r) {
				http.Redirect(w, r, store.URL+r.URL.Path[at:], http.StatusTemporaryRedirect)
			}
			return isBlob(r)
		}}, quick, ""},
		{"blob store that is gone", &faulty{fault: answer(always, true, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/blob", http.StatusTemporaryRedirect)
		})}, quick, "connection refused"},
		{"redirects in a circle", &faulty{fault: answer(always, true, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
		})}, quick, "redirects"},
	} {
		ref := "docker://" + newFaulty(t, address, c.f) + "/os:1"
		result, err := pull(t, newRepo(t), ref, transport.Options{SkipVerify: plain, Retry: c.retry}, oci.PullOptions{Tag: "os"})
		if c.err != "" {
			if !contains(err, c.err) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if want.IsZero() {
			want = digestOf(t, result)
		}
		if digestOf(t, result) != want {
			t.Errorf("%s: another image", c.name)
		}
	}
}
