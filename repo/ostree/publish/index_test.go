package publish_test

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/publish"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// Each architecture has its subsummary; a reader who has had one fetches the difference; what has not changed is not written again.
func TestIndex(t *testing.T) {
	r, target := newRepo(t, fsverity.SHA256), newTarget(t, ostree.Archive)
	dir := tree(t, "files")
	refs := []string{"os/x86_64/stable", "os/aarch64/stable", "config", "app/org.example.App/odd/stable"}
	release := func(now int64) *ostree.Stored {
		c := commit(t, r, dir, ostree.Description{Time: uint64(now), Metadata: []ostree.MetadataEntry{{Key: "xa.metadata", Value: text("[Application]")}}}, "")
		if _, err := target.Export(ctx, r, []publish.Item{{Commit: c, Refs: refs}}, publish.Options{AnyRef: true}); err != nil {
			t.Fatal(err)
		}
		return c
	}
	write := func(now int64, signers ...sign.Signer) *summary.Index {
		t.Helper()
		s, err := target.Summarize(ctx, time.Unix(now, 0))
		if err == nil {
			err = target.WriteSummary(s, signers...)
		}
		if err != nil {
			t.Fatal(err)
		}
		x, err := target.WriteIndex(s, signers...)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		asked = append(asked, q.URL.Path)
		if q.URL.Path == "/summary" || strings.HasPrefix(q.URL.Path, "/refs/") {
			http.NotFound(w, q)
			return
		}
		http.ServeFile(w, q, filepath.Join(target.Path, q.URL.Path))
	}))
	defer server.Close()
	cache := t.TempDir()
	read := func(want *ostree.Stored) {
		t.Helper()
		asked = nil
		o := remote.Options{Trust: remote.Trust{Waived: true}, Cache: cache}
		from, err := remote.Open(ctx, remote.Anonymous(server.URL, nil), o)
		if err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		got, err := from.Refs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, ref := range got {
			names = append(names, ref.Name)
			if ref.Commit != want.Checksum {
				t.Errorf("%s leads to %v", ref.Name, ref.Commit)
			}
		}
		if slices.Sort(names); !slices.Equal(names, slices.Sorted(slices.Values(refs))) {
			t.Errorf("refs %v", names)
		}
	}

	first := release(1)
	x := write(10)
	for _, name := range []string{"x86_64", "aarch64", "odd"} {
		if _, ok := x.Subsummaries[name]; !ok || len(x.Subsummaries) != 3 {
			t.Errorf("subsummaries %v", x.Subsummaries)
		}
	}
	read(first)
	index := filepath.Join(target.Path, "summary.idx")
	before, err := os.Stat(index)
	if err != nil {
		t.Fatal(err)
	}
	write(11)
	if info, err := os.Stat(index); err != nil || !os.SameFile(info, before) {
		t.Errorf("an index that says nothing new is written again: %v", err)
	}

	second := release(2)
	x = write(12)
	if p := x.Subsummaries["x86_64"].Previous; len(p) != 1 {
		t.Errorf("previous subsummaries %x", p)
	}
	read(second)
	for _, path := range asked {
		if strings.HasSuffix(path, ".gz") {
			t.Errorf("all of a subsummary is fetched again: %v", asked)
		}
	}
	// The subsummary has what flatpak looks for.
	odd := x.Subsummaries["odd"]
	gz, err := os.ReadFile(filepath.Join(target.Path, odd.Path()))
	if err != nil {
		t.Fatal(err)
	}
	b, err := odd.Decompress(gz)
	if err != nil {
		t.Fatal(err)
	}
	s, err := summary.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	app, _ := s.Lookup("", "app/org.example.App/odd/stable")
	if app.Timestamp.Unix() != 2 || app.Other["xa.data"].Type() != "(tts)" || s.Other["xa.summary-version"].Type() != "u" || !s.LastModified.IsZero() {
		t.Errorf("%+v in %+v", app, s)
	}
	if _, ok := s.Lookup("", "config"); !ok {
		t.Error("a ref for all is missing")
	}

	// Of many versions, the last ones are kept.
	for now := range int64(20) {
		release(3 + now)
		x = write(20 + now)
	}
	if n := len(x.Subsummaries["x86_64"].Previous); n != 16 {
		t.Errorf("%d previous subsummaries", n)
	}
	for pattern, want := range map[string]int{"*.gz": 3 * 17, "*.delta": 3 * 16} {
		if files, _ := filepath.Glob(filepath.Join(target.Path, "summaries", pattern)); len(files) != want {
			t.Errorf("%d files %s, want %d", len(files), pattern, want)
		}
	}
}

// Refs that name no architecture are in one subsummary; signatures are where flatpak and ostree look for them.
func TestSignedIndex(t *testing.T) {
	r, target := newRepo(t, fsverity.SHA256), newTarget(t, ostree.Archive)
	c := commit(t, r, tree(t, "files"), ostree.Description{Time: 1}, "")
	if _, err := target.Export(ctx, r, []publish.Item{{Commit: c, Refs: []string{"stable"}}}, publish.Options{AnyRef: true}); err != nil {
		t.Fatal(err)
	}
	s, err := target.Summarize(ctx, time.Unix(5, 0))
	if err != nil {
		t.Fatal(err)
	}
	signer, ring := newKey(t)
	keys := sign.NewGPG()
	if err := keys.Load(ring); err != nil {
		t.Fatal(err)
	}
	x, err := target.WriteIndex(s, signer)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := x.Subsummaries["noarch"]; !ok {
		t.Errorf("%v", x.Subsummaries)
	}
	b, err := os.ReadFile(filepath.Join(target.Path, "summary.idx"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"summary.idx.sig", summary.IndexSignaturePath(b)} {
		dictionary, err := os.ReadFile(filepath.Join(target.Path, name))
		if err != nil {
			t.Fatal(err)
		}
		signatures, err := sign.Parse(dictionary)
		if err == nil {
			_, err = sign.Policy{{keys}}.Verify(b, signatures)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := target.WriteIndex(s); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"summary.idx.sig", summary.IndexSignaturePath(b)} {
		if _, err := os.Stat(filepath.Join(target.Path, name)); err == nil {
			t.Errorf("%s stays, which nobody has made now", name)
		}
	}
}
