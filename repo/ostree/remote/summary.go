package remote

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// cached is a file of the remote that is kept, so that the server need not send it again if it is the same.
type cached struct {
	ETag         string
	LastModified string
	SHA256       string // of the content, in a file beside
	content      []byte
}

// Cache returns the directory for what is kept of the remote's summary. It is that of the URL: what one server said counts for no other.
// It is "" without a repository.
func (s *Store) Cache(c *Config) string {
	if s.repository == "" {
		return ""
	}
	return filepath.Join(s.repository, "ostree/cache", fmt.Sprintf("%x", sha256.Sum256([]byte(c.URL))))
}

// loadCached returns what is kept of a file, nothing if that is not sound.
func (r *Remote) loadCached(name string) cached {
	var k cached
	if r.o.Cache == "" {
		return k
	}
	path := filepath.Join(r.o.Cache, name)
	text, err := os.ReadFile(path + ".json")
	if err != nil || json.Unmarshal(text, &k) != nil {
		return cached{}
	}
	if k.content, err = os.ReadFile(path); err != nil || fmt.Sprintf("%x", sha256.Sum256(k.content)) != k.SHA256 {
		return cached{}
	}
	return k
}

// saveCached keeps a file. If it cannot, it comes again the next time.
func (r *Remote) saveCached(name string, k cached) {
	if r.o.Cache == "" || os.MkdirAll(r.o.Cache, 0o755) != nil {
		return
	}
	k.SHA256 = fmt.Sprintf("%x", sha256.Sum256(k.content))
	text, err := json.Marshal(k)
	path := filepath.Join(r.o.Cache, name)
	if err == nil && replace(path, k.content) == nil {
		replace(path+".json", text)
	}
}

// fetchCached returns a file at the top of the repository, which the server need not send if it is kept here. The error is ErrNotFound
// if it is not there. Again says that what is kept is no good.
func (r *Remote) fetchCached(ctx context.Context, path string, again bool) ([]byte, error) {
	var k cached
	if !again {
		k = r.loadCached(path)
	}
	q := request{from: r.c.meta, path: path, header: map[string]string{"Accept-Encoding": "gzip"}}
	if k.content != nil {
		if k.ETag != "" {
			q.header["If-None-Match"] = k.ETag
		} else if k.LastModified != "" {
			q.header["If-Modified-Since"] = k.LastModified
		}
	}
	for failed := 0; ; {
		resp, err := r.c.do(ctx, q, &failed)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if resp.StatusCode == http.StatusNotModified {
			resp.Body.Close()
			if k.content == nil {
				return nil, fmt.Errorf("%s: the server says that it has not changed, which nobody asked", path)
			}
			return k.content, nil
		}
		content, err := r.c.readWhole(resp)
		if err == nil {
			r.saveCached(path, cached{ETag: resp.Header.Get("ETag"), LastModified: resp.Header.Get("Last-Modified"), content: content})
			return content, nil
		}
		failed++
		if err := r.c.again(ctx, failed, err); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
}

// Summary returns the summary of the remote, whose signatures have been verified if they must be. It is nil if there is none, and need
// not be one.
func (r *Remote) Summary(ctx context.Context) (*summary.Summary, error) {
	r.summaryOnce.Do(func() { r.summary, r.summaryErr = r.fetchSummary(ctx) })
	return r.summary, r.summaryErr
}

func (r *Remote) fetchSummary(ctx context.Context) (*summary.Summary, error) {
	if r.c.meta.summary != nil {
		return r.fetchPinned(ctx)
	}
	b, err := r.signed(ctx, "summary", func([]byte) []string { return []string{"summary.sig"} })
	if errors.Is(err, ostree.ErrNotFound) {
		s, indexed := r.fetchIndexed(ctx)
		if !errors.Is(indexed, ostree.ErrNotFound) {
			return s, indexed
		}
		if len(r.o.Trust.Summary) == 0 {
			return nil, nil
		}
		return nil, fmt.Errorf("its summary must be signed, and there is none: %w", err)
	}
	if err != nil {
		return nil, err
	}
	return summary.Parse(b)
}

// fetchPinned returns the summary that the metalink says, of the first mirror that has it. That one is asked first from then on: it is up
// to date.
func (r *Remote) fetchPinned(ctx context.Context) (*summary.Summary, error) {
	m := r.c.meta
	kept := r.loadCached("summary").content
	if kept != nil && m.summary.check(kept) == nil {
		return r.parsePinned(ctx, kept)
	}
	var failed error
	for i, u := range m.urls {
		b, err := r.c.get(ctx, &mirrors{urls: []*url.URL{u}}, "summary", summary.MaxSize)
		if err == nil {
			err = m.summary.check(b)
		}
		if err == nil {
			m.best.Store(int32(i))
			r.saveCached("summary", cached{content: b})
			return r.parsePinned(ctx, b)
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		failed = fmt.Errorf("%s/summary: %w", u.Redacted(), err)
	}
	return nil, failed
}

func (r *Remote) parsePinned(ctx context.Context, b []byte) (*summary.Summary, error) {
	if len(r.o.Trust.Summary) > 0 {
		if err := r.verifySummary(ctx, "summary", b, []string{"summary.sig"}); err != nil {
			return nil, fmt.Errorf("summary: %w", err)
		}
	}
	return summary.Parse(b)
}

// signed returns a file whose signatures are good, if there must be any. A publisher replaces the file and its signatures one after the
// other: who sees the new one of one and the old one of the other asks again.
func (r *Remote) signed(ctx context.Context, path string, signatures func(content []byte) []string) ([]byte, error) {
	for attempt := 0; ; attempt++ {
		b, err := r.fetchCached(ctx, path, attempt > 0)
		if err != nil || len(r.o.Trust.Summary) == 0 {
			return b, err
		}
		if err = r.verifySummary(ctx, path, b, signatures(b)); err == nil {
			return b, nil
		}
		if attempt == 2 || !errors.Is(err, sign.ErrUntrusted) {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if err := sleep(ctx, r.o.Retry.Wait/2); err != nil {
			return nil, err
		}
	}
}

func (r *Remote) verifySummary(ctx context.Context, path string, content []byte, places []string) error {
	var dictionary []byte
	err := ostree.ErrNotFound
	for _, place := range places {
		if dictionary, err = r.c.get(ctx, r.c.meta, place, maxSignatures); !errors.Is(err, ostree.ErrNotFound) {
			break
		}
	}
	if errors.Is(err, ostree.ErrNotFound) {
		return fmt.Errorf("%w: %v", sign.ErrUnsigned, err) // that the file itself is not there is something else
	}
	if err != nil {
		return err
	}
	s, err := sign.Parse(dictionary)
	if err != nil {
		return err
	}
	_, err = r.o.Trust.Summary.Verify(content, s)
	return err
}

// maxSignatures limits signatures, in bytes.
const maxSignatures = 1 << 20

// fetchIndexed reads the subsummaries that there are, which together are a summary. Each is kept; a later version is made of an
// earlier one, if there is a diff.
func (r *Remote) fetchIndexed(ctx context.Context) (*summary.Summary, error) {
	b, err := r.signed(ctx, "summary.idx", func(b []byte) []string { return []string{summary.IndexSignaturePath(b), "summary.idx.sig"} })
	if err != nil {
		return nil, err
	}
	index, err := summary.ParseIndex(b)
	if err != nil {
		return nil, err
	}
	all := &index.About
	for _, name := range slices.Sorted(maps.Keys(index.Subsummaries)) {
		b, err := r.subsummary(ctx, name, index.Subsummaries[name])
		if err != nil {
			return nil, err
		}
		s, err := summary.Parse(b)
		if err != nil {
			return nil, fmt.Errorf("subsummary %q: %w", name, err)
		}
		all.Collection = cmp.Or(all.Collection, s.Collection)
		all.IndexedDeltas = all.IndexedDeltas || s.IndexedDeltas
		all.Refs = append(all.Refs, s.Refs...)
	}
	slices.SortStableFunc(all.Refs, func(a, b summary.Ref) int { return strings.Compare(a.Name, b.Name) })
	all.Refs = slices.CompactFunc(all.Refs, func(a, b summary.Ref) bool { return a.Name == b.Name && a.Commit == b.Commit })
	for i := 1; i < len(all.Refs); i++ {
		if all.Refs[i].Name == all.Refs[i-1].Name {
			return nil, fmt.Errorf("ref %q: subsummaries differ about it", all.Refs[i].Name)
		}
	}
	return all, nil
}

func (r *Remote) subsummary(ctx context.Context, name string, s summary.Subsummary) ([]byte, error) {
	file := fmt.Sprintf("sub-%x", sha256.Sum256([]byte(name)))
	k := r.loadCached(file)
	if k.content != nil {
		have := sha256.Sum256(k.content)
		if have == s.Sum {
			return k.content, nil
		}
		if slices.Contains(s.Previous, have) {
			if diff, err := r.c.get(ctx, r.c.meta, s.DiffPath(have), summary.MaxSize); err == nil {
				if b, err := s.ApplyDiff(k.content, diff); err == nil {
					r.saveCached(file, cached{content: b})
					return b, nil
				}
			}
		}
	}
	gz, err := r.c.get(ctx, r.c.meta, s.Path(), summary.MaxSize)
	if err != nil {
		return nil, err
	}
	b, err := s.Decompress(gz)
	if err != nil {
		return nil, err
	}
	r.saveCached(file, cached{content: b})
	return b, nil
}

// Refs returns the refs of the remote, sorted by name: those of its summary. Those of other collections have the collection and a
// colon before them.
func (r *Remote) Refs(ctx context.Context) ([]ostree.Ref, error) {
	s, err := r.Summary(ctx)
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, fmt.Errorf("%s: no summary says which refs there are: %w", r.c.meta.urls[0].Redacted(), ostree.ErrNotFound)
	}
	var refs []ostree.Ref
	for _, ref := range s.Refs {
		refs = append(refs, ostree.Ref{Name: ref.Name, Commit: ref.Commit})
	}
	for collection, list := range s.Collections {
		for _, ref := range list {
			refs = append(refs, ostree.Ref{Name: collection + ":" + ref.Name, Commit: ref.Commit})
		}
	}
	slices.SortFunc(refs, func(a, b ostree.Ref) int { return strings.Compare(a.Name, b.Name) })
	return refs, nil
}

// readWhole reads the body of an answer, which may be compressed.
func (c *client) readWhole(resp *http.Response) ([]byte, error) {
	defer resp.Body.Close()
	var in io.Reader = resp.Body
	if strings.EqualFold(resp.Header.Get("Content-Encoding"), "gzip") {
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, err
		}
		in = z
	}
	b, err := io.ReadAll(io.LimitReader(in, summary.MaxSize+1))
	if err == nil && len(b) > summary.MaxSize {
		err = permanent{fmt.Errorf("more than %d bytes", summary.MaxSize)}
	}
	return b, err
}
