package remote_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

const (
	vectorRef = "vec/x86_64/one" // its commit is the second one
	first     = "6b4bf01eeb87e0073796f7e68e2ecb95407ee8f443360d06ac0792f04f1e0a94"
	second    = "2828e5bbdf3f2082a488f64daf230e4cebc05ff3ca3f98f74519bd67ab7d474e"
)

var quick = remote.Retry{Attempts: 6, Wait: time.Millisecond, Idle: 10 * time.Second}

// web is a web server with the files of a directory.
type web struct {
	dir string
	// fault may answer a request instead.
	fault func(w http.ResponseWriter, r *http.Request) bool
	// cut says after how many bytes of a body, of a file of this size, the connection breaks; negative: not at all.
	cut   func(path string, size int) int
	delay time.Duration // before each answer

	mu     sync.Mutex
	asked  map[string]int // paths, and how often they were answered whole
	until  int            // so many answers, then this process is killed
	victim *os.Process
	sent   atomic.Int64 // bytes of bodies
	cuts   atomic.Int64
}

func (s *web) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	time.Sleep(s.delay)
	if s.fault != nil && s.fault(w, r) {
		return
	}
	left := -1
	if s.cut != nil {
		if info, err := os.Stat(filepath.Join(s.dir, r.URL.Path)); err == nil {
			left = s.cut(r.URL.Path, int(info.Size()))
		}
	}
	http.FileServer(http.Dir(s.dir)).ServeHTTP(&cutWriter{w, s, left}, r)
	s.mu.Lock()
	s.asked[r.URL.Path]++
	if s.until--; s.until == 0 && s.victim != nil {
		s.victim.Kill()
	}
	s.mu.Unlock()
}

// count returns how many requests for such paths were answered whole, and for how many different ones.
func (s *web) count(pattern string) (requests, paths int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path, n := range s.asked {
		if regexp.MustCompile(pattern).MatchString(path) {
			requests, paths = requests+n, paths+1
		}
	}
	return requests, paths
}

type cutWriter struct {
	http.ResponseWriter
	s    *web
	left int
}

func (c *cutWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *cutWriter) Write(b []byte) (int, error) {
	if c.left >= 0 && len(b) >= c.left {
		n, _ := c.ResponseWriter.Write(b[:c.left])
		http.NewResponseController(c.ResponseWriter).Flush()
		c.s.sent.Add(int64(n))
		c.s.cuts.Add(1)
		panic(http.ErrAbortHandler)
	}
	n, err := c.ResponseWriter.Write(b)
	c.s.sent.Add(int64(n))
	c.left -= n
	return n, err
}

func (s *web) start(t testing.TB) string {
	t.Helper()
	s.asked = map[string]int{}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	return h.URL
}

// vectors starts a server with the archive of the vectors.
func vectors(t testing.TB) (*web, string) {
	t.Helper()
	s := &web{dir: filepath.Join(golden.Extract(t, "ostree/archive.tar.gz"), "archive")}
	return s, s.start(t)
}

func newRepo(t testing.TB) *repo.Repo {
	t.Helper()
	path := filepath.Join(t.TempDir(), "repo")
	if _, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA256, Format: erofs.V1, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	return openRepo(t, path)
}

func openRepo(t testing.TB, path string) *repo.Repo {
	t.Helper()
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// configured returns a remote that is configured with these settings, and the key of the vectors.
func configured(t testing.TB, url, settings string) *remote.Config {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "origin.conf"), "[remote \"origin\"]\nurl="+url+"\n"+settings)
	write(t, filepath.Join(dir, "origin.trustedkeys.gpg"), string(vectorKey(t)))
	list, err := remote.ParseConfigs(filepath.Join(dir, "origin.conf"))
	if err != nil {
		t.Fatal(err)
	}
	return list[0]
}

func open(t testing.TB, c *remote.Config, o remote.Options) *remote.Remote {
	t.Helper()
	var err error
	if o.Trust.Commits == nil && !o.Trust.Waived {
		if o.Trust, err = c.Trust(remote.System{}); err != nil {
			t.Fatal(err)
		}
	}
	if o.Retry == (remote.Retry{}) {
		o.Retry = quick
	}
	r, err := remote.Open(context.Background(), c, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

var never = remote.PullOptions{Deltas: remote.DeltasNever}

func mustPull(t testing.TB, rem *remote.Remote, r *repo.Repo, o remote.PullOptions, names ...string) remote.PullResult {
	t.Helper()
	result, err := rem.Pull(t.Context(), r, names, o)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// wanted is the digest of the vectors' image.
func wanted(t testing.TB) string {
	t.Helper()
	var v struct{ Digests map[string]map[string]string }
	if err := json.Unmarshal(golden.Read(t, "ostree/digests.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v.Digests["archive"]["sha256 v1"]
}

func check(t testing.TB, r *repo.Repo, p remote.Pulled) {
	t.Helper()
	if d, ok := p.Image(); !ok || d.String() != wanted(t) {
		t.Errorf("image %v, want %s", d, wanted(t))
	}
	clean(t, r)
}

func clean(t testing.TB, r *repo.Repo) {
	t.Helper()
	report, err := r.Fsck(t.Context(), repo.FsckOptions{})
	if err != nil || !report.OK() {
		t.Errorf("%v, %v", report.Findings, err)
	}
	if left, _ := filepath.Glob(filepath.Join(r.Path(), "tmp/*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestPull(t *testing.T) {
	s, url := vectors(t)
	config := configured(t, url, "gpg-verify-summary=true\ncollection-id=org.example.Vec\nbranches="+vectorRef+"\n")
	r := newRepo(t)
	rem := open(t, config, remote.Options{})
	result := mustPull(t, rem, r, never)
	p := result.Commits[0]
	check(t, r, p)
	if p.Checksum.String() != second || p.Ref != vectorRef || len(p.Signers) != 1 || p.Delta != "" || p.Stats.Files == 0 {
		t.Errorf("%+v", p)
	}
	if requests, paths := s.count(`^/objects/`); requests != paths || requests == 0 {
		t.Errorf("%d requests for %d objects", requests, paths)
	}
	if result.Bytes != s.sent.Load() {
		t.Errorf("%d bytes, the server has sent %d", result.Bytes, s.sent.Load())
	}
	refs, err := rem.Refs(t.Context())
	if err != nil || len(refs) != 2 || refs[1].Name != vectorRef || refs[1].Commit.String() != second {
		t.Errorf("%v, %v", refs, err)
	}
	// Again: the summary and the commit come, to be verified, and nothing else.
	s.asked = map[string]int{}
	mustPull(t, open(t, config, remote.Options{}), r, never)
	if requests, _ := s.count(`.`); requests != 4 {
		t.Errorf("%v", s.asked)
	}
	// The commit before it.
	p = mustPull(t, open(t, config, remote.Options{}), r, remote.PullOptions{Deltas: remote.DeltasNever, PullOptions: ostree.PullOptions{Depth: -1}}).Commits[0]
	if len(p.Parents) != 1 || p.Parents[0].String() != first {
		t.Errorf("%v", p.Parents)
	}
	clean(t, r)
}

// The same image comes by objects, by a delta from nothing, and by one from the first commit.
func TestPullDeltas(t *testing.T) {
	s, url := vectors(t)
	config := configured(t, url, "")
	always := remote.PullOptions{Deltas: remote.DeltasAlways}
	r := newRepo(t)
	p := mustPull(t, open(t, config, remote.Options{}), r, always, first).Commits[0]
	if p.Delta != first || p.Checksum.String() != first {
		t.Errorf("%+v", p)
	}
	if requests, _ := s.count(`\.(filez|dirtree|dirmeta)$`); requests > 0 {
		t.Errorf("%d requests for objects: %v", requests, s.asked)
	}
	s.asked = map[string]int{}
	p = mustPull(t, open(t, config, remote.Options{}), r, always, vectorRef).Commits[0]
	check(t, r, p)
	if p.Delta != first+"-"+second {
		t.Errorf("%+v", p)
	}
	if requests, _ := s.count(`\.(filez|dirtree|dirmeta)$`); requests > 0 {
		t.Errorf("%d requests for objects: %v", requests, s.asked)
	}
	// Left to itself, the cheaper way is taken: it brings no more bytes than either.
	bytesOf := func(d remote.Deltas) int64 {
		r := newRepo(t)
		mustPull(t, open(t, config, remote.Options{}), r, never, first)
		before := s.sent.Load()
		check(t, r, mustPull(t, open(t, config, remote.Options{}), r, remote.PullOptions{Deltas: d}, vectorRef).Commits[0])
		return s.sent.Load() - before
	}
	cheaper, objects, delta := bytesOf(remote.DeltasIfCheaper), bytesOf(remote.DeltasNever), bytesOf(remote.DeltasAlways)
	t.Logf("%d bytes; by objects %d, by a delta %d", cheaper, objects, delta)
	if cheaper > objects && cheaper > delta {
		t.Error("it is neither")
	}
	// There is none from nothing to the second one.
	if _, err := open(t, config, remote.Options{}).Pull(t.Context(), newRepo(t), []string{vectorRef}, always); !errors.Is(err, remote.ErrNoDelta) {
		t.Error(err)
	}
	check(t, r, mustPull(t, open(t, config, remote.Options{}), newRepo(t), remote.PullOptions{}, vectorRef).Commits[0])
}

// spoil changes a file of a server: one byte in the middle.
func spoil(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)/2] ^= 1
	return b
}

// Every lie ends in an error that names what was asked for.
func TestLies(t *testing.T) {
	replace := func(pattern string, f func(b []byte) []byte) func(t *testing.T, s *web) string {
		return func(t *testing.T, s *web) string {
			matches := regexp.MustCompile(pattern)
			s.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if !matches.MatchString(r.URL.Path) {
					return false
				}
				b, err := os.ReadFile(filepath.Join(s.dir, r.URL.Path))
				if err == nil {
					w.Write(f(b))
				}
				return err == nil
			}
			return ""
		}
	}
	nothing := func([]byte) []byte { return nil }
	more := func(b []byte) []byte { return append(b, 0) }
	name := func(checksum, kind string) string {
		return `/objects/` + checksum[:2] + `/` + checksum[2:] + `\.` + kind + `$`
	}
	anObject := `object [0-9a-f]{64}\.`
	for _, c := range []struct {
		name     string
		lie      func(t *testing.T, s *web) string
		settings string
		err      string
		is       error
	}{
		{"another commit", replace(name(second, "commit"), spoil), "", second + `\.commit`, ostree.ErrChecksum},
		{"no commit", replace(name(second, "commit"), nothing), "", second, ostree.ErrChecksum},
		{"signatures of another commit", replace(name(second, "commitmeta"), spoil), "", second, nil},
		{"no signatures", replace(name(second, "commitmeta"), nothing), "", second, sign.ErrUnsigned},
		{"other dirtrees", replace(`\.dirtree$`, spoil), "", anObject + `dirtree`, ostree.ErrChecksum},
		{"longer dirtrees", replace(`\.dirtree$`, more), "", anObject + `dirtree`, ostree.ErrChecksum},
		{"other dirmetas", replace(`\.dirmeta$`, spoil), "", anObject + `dirmeta`, ostree.ErrChecksum},
		{"other files", replace(`\.filez$`, spoil), "", anObject + `file`, nil},
		{"empty files", replace(`\.filez$`, nothing), "", anObject + `file`, nil},
		{"files cut short", replace(`\.filez$`, func(b []byte) []byte { return b[:len(b)-3] }), "", anObject + `file`, nil},
		{"files that claim to be huge", replace(`\.filez$`, func(b []byte) []byte {
			b = bytes.Clone(b)
			copy(b[8:16], "\x3f\xff\xff\xff\xff\xff\xff\xff")
			return b
		}), "", anObject + `file`, nil},
		{"summary of somebody else", replace(`/summary$`, spoil), "gpg-verify-summary=true\n", "summary", sign.ErrUntrusted},
		{"summary that is not signed", replace(`/summary\.sig$`, nothing), "gpg-verify-summary=true\n", "summary", sign.ErrUnsigned},
		{"summary that is garbage", replace(`/summary$`, func([]byte) []byte { return []byte("garbage") }), "", "summary", nil},
		{"another collection", func(*testing.T, *web) string { return "" }, "collection-id=org.example.Other\n", "collection", nil},
		{"objects that are not there", func(t *testing.T, s *web) string {
			s.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if strings.HasSuffix(r.URL.Path, ".filez") {
					http.NotFound(w, r)
					return true
				}
				return false
			}
			return ""
		}, "", anObject + `file`, ostree.ErrNotFound},
		{"endless files", func(t *testing.T, s *web) string {
			s.fault = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, ".filez") {
					return false
				}
				b, err := os.ReadFile(filepath.Join(s.dir, r.URL.Path))
				for err == nil {
					_, err = w.Write(b)
				}
				return true
			}
			return ""
		}, "", "", nil},
		{"ref that is a path", func(*testing.T, *web) string { return "../../etc/passwd" }, "", "etc/passwd", nil},
		{"ref that is not there", func(*testing.T, *web) string { return "nowhere" }, "", "nowhere", ostree.ErrNotFound},
		{"ref that is not in the signed summary", func(*testing.T, *web) string { return "nowhere" }, "gpg-verify-summary=true\n", "not in the summary", ostree.ErrNotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, url := vectors(t)
			ref := c.lie(t, s)
			if ref == "" {
				ref = vectorRef
			}
			r := newRepo(t)
			rem := open(t, configured(t, url, c.settings), remote.Options{Retry: remote.Retry{Attempts: 1, Wait: time.Millisecond, Idle: 5 * time.Second}})
			_, err := rem.Pull(t.Context(), r, []string{ref}, never)
			if c.err == "" && err == nil {
				return // what stands behind a file does no harm
			}
			if err == nil || !regexp.MustCompile(c.err).MatchString(err.Error()) || c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("%v, want %q, %v", err, c.err, c.is)
			}
			if strings.Contains(fmt.Sprint(err), "\n") {
				t.Errorf("more than a line: %v", err)
			}
			if tags, err := ostree.Tags(r); err != nil || len(tags) > 0 {
				t.Errorf("it has a name: %v, %v", tags, err)
			}
			report, err := r.Fsck(t.Context(), repo.FsckOptions{})
			if err != nil || !report.OK() {
				t.Errorf("%v, %v", report.Findings, err)
			}
		})
	}
}

// What the parts of a delta and its superblock are is checked as well.
func TestLyingDeltas(t *testing.T) {
	for _, part := range []string{"superblock", "0"} {
		s, url := vectors(t)
		s.fault = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.HasPrefix(r.URL.Path, "/deltas/") || !strings.HasSuffix(r.URL.Path, "/"+part) {
				return false
			}
			b, err := os.ReadFile(filepath.Join(s.dir, r.URL.Path))
			if err != nil {
				t.Error(err)
			}
			w.Write(spoil(b))
			return true
		}
		_, err := open(t, configured(t, url, ""), remote.Options{}).Pull(t.Context(), newRepo(t), []string{first}, remote.PullOptions{Deltas: remote.DeltasAlways})
		if err == nil || !strings.Contains(err.Error(), first) || !strings.Contains(err.Error(), "--no-delta") {
			t.Errorf("%s: %v", part, err)
		}
	}
}

// A commit that is meant for another ref is refused, and so is one that is older than what is there.
func TestBindingsAndTime(t *testing.T) {
	s, url := vectors(t)
	write(t, filepath.Join(s.dir, "refs/heads/other"), second+"\n")
	config := configured(t, url, "")
	if _, err := open(t, config, remote.Options{}).Pull(t.Context(), newRepo(t), []string{"other"}, never); err == nil || !strings.Contains(err.Error(), `not for the ref "other"`) {
		t.Error(err)
	}
	check(t, newRepo(t), mustPull(t, open(t, config, remote.Options{NoBindings: true}), newRepo(t), never, "other").Commits[0])

	r := newRepo(t)
	timed := remote.PullOptions{Deltas: remote.DeltasNever, TimestampCheck: true}
	mustPull(t, open(t, config, remote.Options{}), r, timed, vectorRef)
	mustPull(t, open(t, config, remote.Options{}), r, timed, vectorRef) // the same again
	c, err := open(t, config, remote.Options{}).Commit(t.Context(), mustSum(t, second))
	if err != nil {
		t.Fatal(err)
	}
	made := time.Unix(int64(c.Time), 0)
	if err := remote.NotBefore(c, made.Add(time.Second)); !errors.Is(err, remote.ErrOlder) || remote.NotBefore(c, made) != nil {
		t.Error(err)
	}
}

func mustSum(t testing.TB, s string) ostree.Checksum {
	t.Helper()
	c, err := ostree.ParseChecksum(s)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The summary comes again only if it has changed.
func TestSummaryCache(t *testing.T) {
	s, url := vectors(t)
	config := configured(t, url, "gpg-verify-summary=true\n")
	cache := filepath.Join(t.TempDir(), "cache")
	if err := os.Chtimes(filepath.Join(s.dir, "summary"), time.Now(), time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	notModified := 0
	s.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path == "/summary" && r.Header.Get("If-Modified-Since")+r.Header.Get("If-None-Match") != "" {
			notModified++
		}
		return false
	}
	refs := func() int64 {
		before := s.sent.Load()
		if refs, err := open(t, config, remote.Options{Cache: cache}).Refs(t.Context()); err != nil || len(refs) != 2 {
			t.Errorf("%v, %v", refs, err)
		}
		return s.sent.Load() - before
	}
	whole := refs()
	if again := refs(); again >= whole || notModified != 1 {
		t.Errorf("%d bytes, and %d again; %d conditions", whole, again, notModified)
	}
	// One that is damaged comes again.
	write(t, filepath.Join(cache, "summary"), "damaged")
	if again := refs(); again != whole {
		t.Errorf("%d bytes, and %d again", whole, again)
	}
}
