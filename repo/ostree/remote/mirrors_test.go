package remote_test

import (
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

// A repository on this machine, of any mode, is verified as one on a server.
func TestFileURL(t *testing.T) {
	for _, mode := range []string{"archive", "bare", "bare-user"} {
		dir := filepath.Join(golden.Extract(t, "ostree/"+mode+".tar.gz"), mode)
		url := (&url.URL{Scheme: "file", Path: dir}).String()
		r := newRepo(t)
		result := mustPull(t, open(t, configured(t, url, ""), remote.Options{}), r, remote.PullOptions{}, vectorRef)
		check(t, r, result.Commits[0])
		if len(result.Commits[0].Signers) != 1 {
			t.Errorf("%s: signed by %v", mode, result.Commits[0].Signers)
		}
		// Another one's commit.
		if err := os.Remove(filepath.Join(dir, "objects", second[:2], second[2:]+".commitmeta")); err != nil {
			t.Fatal(err)
		}
		_, err := open(t, configured(t, url, ""), remote.Options{}).Pull(t.Context(), newRepo(t), []string{vectorRef}, remote.PullOptions{})
		if !errors.Is(err, sign.ErrUnsigned) {
			t.Errorf("%s: %v", mode, err)
		}
		_, err = open(t, configured(t, url, ""), remote.Options{}).Pull(t.Context(), newRepo(t), []string{"vec/other"}, remote.PullOptions{})
		if !errors.Is(err, ostree.ErrNotFound) {
			t.Errorf("%s: %v", mode, err)
		}
	}
	for _, url := range []string{"file://host/srv/repo", "file:relative", "file:///nowhere/at/all"} {
		if _, err := remote.Open(t.Context(), remote.Anonymous(url, nil), remote.Options{Trust: remote.Trust{Waived: true}}); err == nil {
			t.Errorf("%s is opened", url)
		}
	}
}

// No server has files of this machine read.
func TestNoFilesByServers(t *testing.T) {
	dir := filepath.Join(golden.Extract(t, "ostree/archive.tar.gz"), "archive")
	for name, h := range map[string]http.HandlerFunc{
		"redirected to file": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "file://"+dir+r.URL.Path)
			w.WriteHeader(http.StatusFound)
		},
		"no URL of http or https": func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "file://%s\n", dir) },
	} {
		s := httptest.NewServer(h)
		defer s.Close()
		where := s.URL
		if strings.HasPrefix(name, "no") {
			where = "mirrorlist=" + s.URL
		}
		from, err := remote.Open(t.Context(), remote.Anonymous(where, nil), remote.Options{Trust: remote.Trust{Waived: true}, Retry: quick})
		if err == nil {
			_, err = from.Ref(t.Context(), vectorRef)
			from.Close()
		}
		if err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v, want %s", err, name)
		}
	}
}

// A metalink names mirrors, and what the summary is: one that has another summary is passed over.
func TestMetalink(t *testing.T) {
	s, good := vectors(t)
	content, err := os.ReadFile(filepath.Join(s.dir, "summary"))
	if err != nil {
		t.Fatal(err)
	}
	stale := &web{dir: filepath.Join(golden.Extract(t, "ostree/archive.tar.gz"), "archive")}
	write(t, filepath.Join(stale.dir, "summary"), string(content[:len(content)-1]))
	old := stale.start(t)
	var doc string
	lists := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, doc) }))
	defer lists.Close()
	file := func(name, hash string) string {
		return fmt.Sprintf(`<file name="%s"><size>%d</size><verification>%s</verification><resources>
			<url protocol="http" type="http" preference="10">%s/summary</url>
			<url protocol="rsync" type="rsync" preference="100">rsync://mirror.example/summary</url>
			<url protocol="http" type="http" preference="90">%s/summary</url></resources></file>`, name, len(content), hash, good, old)
	}
	wrap := func(files ...string) string {
		return `<?xml version="1.0" encoding="utf-8"?><metalink version="3.0" xmlns="http://www.metalinker.org/"><files>` + strings.Join(files, "") + `</files></metalink>`
	}
	sha256sum := fmt.Sprintf(`<hash type="sha256">%x</hash>`, sha256.Sum256(content))
	sha512sum := fmt.Sprintf(`<hash type="md5">00</hash> <hash type="sha512"> %x </hash>`, sha512.Sum512(content))
	cache := t.TempDir()
	for k, hash := range []string{sha256sum, sha512sum} {
		doc = wrap(file("other", ""), file("summary", hash))
		r := newRepo(t)
		from := open(t, configured(t, "metalink="+lists.URL, ""), remote.Options{Cache: cache})
		check(t, r, mustPull(t, from, r, never, vectorRef).Commits[0])
		if n, _ := stale.count("^/objects/"); k == 0 && n != 0 {
			t.Errorf("%d objects come from the stale mirror", n)
		}
	}
	if n, _ := s.count("^/summary$"); n != 1 {
		t.Errorf("the summary comes %d times", n)
	}
	for want, d := range map[string]string{
		"not what the metalink says": wrap(file("summary", fmt.Sprintf(`<hash type="sha256">%x</hash>`, sha256.Sum256(nil)))),
		"no sha256 or sha512":        wrap(file("summary", `<hash type="sha256">00</hash>`)),
		"no file summary":            wrap(),
		"EOF":                        "<metalink>",
		"no URL of http or https":    strings.ReplaceAll(doc, "http://1", "ftp://1"),
	} {
		doc = d
		from, err := remote.Open(t.Context(), remote.Anonymous("metalink="+lists.URL, nil), remote.Options{Trust: remote.Trust{Waived: true}, Retry: quick})
		if err == nil {
			_, err = from.Ref(t.Context(), vectorRef)
			from.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	// In a configuration it is as ostree has it.
	c := configured(t, "", "metalink=https://mirrors.example/list\n")
	if c.URL != "metalink=https://mirrors.example/list" || c.Usable() != nil {
		t.Errorf("%+v", c)
	}
	store := remote.NewStore(t.TempDir(), remote.System{})
	if err := store.Add("m", c.URL, remote.AddOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, err := store.Get("m"); err != nil || got.URL != c.URL {
		t.Errorf("%+v, %v", got, err)
	}
}

// Cookies beside the configuration are sent to the hosts that they are for, as long as they last.
func TestCookies(t *testing.T) {
	var got string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Get("Cookie")
		http.NotFound(w, r)
	}))
	defer s.Close()
	c := configured(t, s.URL+"/repo", "")
	file := strings.TrimSuffix(c.Keyring(), "trustedkeys.gpg") + "cookies.txt"
	later := time.Now().Add(time.Hour).Unix()
	write(t, file, fmt.Sprintf("# Netscape HTTP Cookie File\n\n127.0.0.1\tFALSE\t/\tFALSE\t%d\tone\t1\n#HttpOnly_127.0.0.1\tFALSE\t/repo\tFALSE\t0\ttwo\t2\n"+
		"127.0.0.1\tFALSE\t/\tFALSE\t1000\told\t3\n127.0.0.1\tFALSE\t/elsewhere\tFALSE\t0\tpath\t4\n"+
		".example.com\tTRUE\t/\tFALSE\t0\thost\t6\n", later))
	open(t, c, remote.Options{}).Ref(t.Context(), vectorRef)
	if got != "two=2; one=1" {
		t.Errorf("%q is sent", got)
	}
	for text, want := range map[string]string{"127.0.0.1 FALSE\n": "cookies.txt:1: 1 fields", "\na\tb\tc\td\te\tf\tg": `cookies.txt:2: time "e"`} {
		write(t, file, text)
		if _, err := remote.Open(t.Context(), c, remote.Options{Trust: remote.Trust{Waived: true}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}
