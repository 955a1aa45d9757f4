package remote_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// A repository of flatpak's kind has no summary, but an index of several. A later version of one is made of the one that is kept.
func TestIndexedSummary(t *testing.T) {
	s, url := vectors(t)
	old, err := os.ReadFile(filepath.Join(s.dir, "summary"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"summary", "summary.sig"} {
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	parsed, err := summary.Parse(old)
	if err != nil {
		t.Fatal(err)
	}
	parsed.Refs = append(parsed.Refs, summary.Ref{Name: "vec/x86_64/two", Commit: parsed.Refs[1].Commit})
	now, err := parsed.Encode()
	if err != nil {
		t.Fatal(err)
	}
	publish := func(b []byte, previous ...[]byte) {
		t.Helper()
		sum := sha256.Sum256(b)
		list := gvariant.List{}
		for _, p := range previous {
			sum := sha256.Sum256(p)
			list = append(list, sum[:])
		}
		index, err := gvariant.Encode("(a{s(ayaaya{sv})}a{sv})", gvariant.Tuple{
			gvariant.List{gvariant.Tuple{"x86_64", gvariant.Tuple{sum[:], list, gvariant.List{}}}}, gvariant.List{}})
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(s.dir, "summary.idx"), string(index.Bytes()))
		// The index may be older than a second.
		if err := os.Chtimes(filepath.Join(s.dir, "summary.idx"), time.Time{}, time.Now().Add(-time.Duration(2-len(previous))*time.Hour)); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(s.dir, fmt.Sprintf("summaries/%x.gz", sum)), zip(t, b))
	}
	publish(old)
	o := remote.Options{Cache: t.TempDir()}
	names := func() string {
		t.Helper()
		refs, err := open(t, configured(t, url, ""), o).Refs(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, r := range refs {
			all = append(all, r.Name)
		}
		return strings.Join(all, " ")
	}
	if got := names(); got != "ostree-metadata vec/x86_64/one" {
		t.Error(got)
	}
	names()
	if requests, paths := s.count(`^/summaries/`); requests != 1 || paths != 1 {
		t.Errorf("the subsummary comes again: %v", s.asked)
	}
	publish(now, old)
	diff := append([]byte("xadf\x02\x00\x00\x00"), binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, 1<<28|uint32(len(old))), 2<<28|uint32(len(now)))...)
	write(t, filepath.Join(s.dir, fmt.Sprintf("summaries/%x-%x.delta", sha256.Sum256(old), sha256.Sum256(now))), zip(t, append(diff, now...)))
	if got := names(); got != "ostree-metadata vec/x86_64/one vec/x86_64/two" {
		t.Error(got)
	}
	if requests, _ := s.count(`^/summaries/.*\.gz$`); requests != 1 {
		t.Errorf("the subsummary comes again: %v", s.asked)
	}
	check(t, newRepo(t), mustPull(t, open(t, configured(t, url, ""), o), newRepo(t), never, vectorRef).Commits[0])
	// Nobody has signed it.
	if _, err := open(t, configured(t, url, "gpg-verify-summary=true\n"), o).Refs(t.Context()); err == nil || !strings.Contains(err.Error(), "not signed") {
		t.Error(err)
	}
}

func zip(t testing.TB, b []byte) string {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}
