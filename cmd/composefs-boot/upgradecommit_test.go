package main

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

// publisher is an OSTree repository on a web server, whose commits are signed, and that counts what it is asked for.
type publisher struct {
	t      *testing.T
	dir    string // of the repository
	server *httptest.Server

	mu    sync.Mutex
	asked []string // paths that are there, since the last look
}

func newPublisher(t *testing.T, dir string) *publisher {
	p := &publisher{t: t, dir: dir}
	p.ostree("init", "--mode=archive")
	p.server = httptest.NewServer(p)
	t.Cleanup(p.server.Close)
	return p
}

func (p *publisher) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/repo/")
	if info, err := os.Stat(filepath.Join(p.dir, path)); err == nil {
		w.Header().Set("ETag", fmt.Sprintf(`"%d"`, info.ModTime().UnixNano())) // two commits may be of the same second
		p.mu.Lock()
		p.asked = append(p.asked, path)
		p.mu.Unlock()
	}
	http.StripPrefix("/repo/", http.FileServer(http.Dir(p.dir))).ServeHTTP(w, r)
}

// url returns the URL of the repository.
func (p *publisher) url() string { return p.server.URL + "/repo" }

// remote returns the name under which a machine knows the repository.
func (p *publisher) remote() string {
	return strings.NewReplacer("http://", "", ":", "-").Replace(p.server.URL)
}

// requests returns what was asked for since the last time, of files whose names end in this.
func (p *publisher) requests(suffix string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := slices.DeleteFunc(p.asked, func(path string) bool { return !strings.HasSuffix(path, suffix) })
	p.asked = nil
	return list
}

func (p *publisher) ostree(args ...string) string {
	p.t.Helper()
	out, err := vm.Ostree(p.t, append([]string{"--repo=" + p.dir}, args...)...).CombinedOutput()
	if err != nil {
		p.t.Fatalf("ostree %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit commits trees that lie over each other to os/stable, with a time of its own, signs that unless the key is nil, and updates the
// summary.
func (p *publisher) commit(minute int, key sign.Signer, trees ...string) (checksum string) {
	p.t.Helper()
	when := time.Unix(1_700_000_000, 0).Add(time.Duration(minute) * time.Minute).UTC()
	args := []string{"commit", "--branch=os/stable", "--generate-sizes", "--timestamp=" + when.Format(time.RFC3339)}
	for _, tree := range trees {
		args = append(args, "--tree="+tree)
	}
	sum := p.ostree(args...)
	c, err := ostree.ParseChecksum(sum)
	if err != nil {
		p.t.Fatal(err)
	}
	if key != nil {
		data, err := os.ReadFile(filepath.Join(p.dir, ostree.ObjectName{Checksum: c, Kind: ostree.KindCommit}.Path(true)))
		var signatures []byte
		if err == nil {
			signatures, err = sign.Add(nil, data, key)
		}
		if err == nil {
			path := filepath.Join(p.dir, ostree.ObjectName{Checksum: c, Kind: ostree.KindCommitMeta}.Path(true))
			err = os.WriteFile(path, signatures, 0o644)
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
	p.ostree("summary", "--update")
	return sum
}

// objects returns the paths of all files of contents.
func (p *publisher) objects() []string {
	list, err := filepath.Glob(filepath.Join(p.dir, "objects/*/*.filez"))
	if err != nil {
		p.t.Fatal(err)
	}
	return list
}

// newKey makes an OpenPGP key, whose public half is in the file.
func newKey(t *testing.T, file string) sign.Signer {
	t.Helper()
	e, err := openpgp.NewEntity("one", "", "one@example.org", nil)
	if err != nil {
		t.Fatal(err)
	}
	var public, secret bytes.Buffer
	if err := e.SerializePrivate(&secret, nil); err != nil {
		t.Fatal(err)
	}
	if err := e.Serialize(&public); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, public.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	key, err := sign.GPGSigner(&secret, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// refused runs a command that has to fail with this text.
func refused(t *testing.T, want string, args ...string) {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(t.Context(), append([]string{"composefs-boot", "--quiet"}, args...), nil, &out, &errs)
	if code == 0 || !strings.Contains(errs.String(), want) {
		t.Errorf("%s: %d: %s: want %q", strings.Join(args, " "), code, errs.String(), want)
	}
}

// smallSystem makes a tree to install that OSTree takes, with some files.
func smallSystem(t *testing.T, tree string) {
	t.Helper()
	for k := range 40 {
		putFile(t, filepath.Join(tree, fmt.Sprintf("usr/share/%d", k)), strings.Repeat(fmt.Sprintf("content of %d ", k), 100))
	}
	for _, name := range []string{"systemd/boot/efi/systemd-bootx64.efi", "modules/6.0/vmlinuz", "modules/6.0/initramfs.img"} {
		putFile(t, filepath.Join(tree, "usr/lib", name), name)
	}
	putFile(t, filepath.Join(tree, "usr/lib/os-release"), "ID=test\nVERSION_ID=1\n")
	putFile(t, filepath.Join(tree, "usr/etc/file"), "kept")
}

func putFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// A machine that was installed from a web server with signed commits asks for the summary alone to see that it is up to date, fetches the
// objects alone that have changed, and takes neither what others have signed nor what is older.
func TestUpgradesCommits(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	put := func(name, content string) { putFile(t, in(name), content) }
	smallSystem(t, in("tree"))
	p := newPublisher(t, in("ostree"))
	key, other := newKey(t, in("key.gpg")), newKey(t, in("other.gpg"))
	one := p.commit(1, key, "dir="+in("tree"))
	name := "ostree:" + p.url() + ":os/stable"
	machine := []string{"--root", in("root"), "--esp", in("esp")}
	for _, d := range []string{"root", "esp"} {
		if err := os.Mkdir(in(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}

	install := slices.Concat([]string{"install", name, "--arch", "amd64", "--insecure", "--root-arg", "root=LABEL=x"}, machine)
	refused(t, "no keys say whom to trust: say --gpg-key FILE, or --no-verify", install...)
	refused(t, "is not known", append(install, "--gpg-key", in("other.gpg"))...)
	refused(t, "want ostree:PATH:REF, ostree:URL:REF or ostree:REMOTE:REF", "--no-repo", "compute-id", "ostree:"+p.url())
	var id imageResult
	runJSON(t, &id, "--no-repo", "compute-id", "--bootable", "--gpg-key", in("key.gpg"), name)
	var installed installResult
	runJSON(t, &installed, append(install, "--gpg-key", in("key.gpg"))...)
	if installed.Digest != id.Digest || installed.Upgrade != "ostree:"+p.remote()+":os/stable" {
		t.Errorf("%+v, want the digest %s", installed, id.Digest)
	}
	// A directory of the same name is another thing than the remote.
	if err := os.Mkdir(in(p.remote()), 0o755); err != nil {
		t.Fatal(err)
	}

	home, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	upgrade := func(args ...string) (r upgradeResult) {
		t.Helper()
		t.Chdir(dir)
		defer t.Chdir(home)
		runJSON(t, &r, slices.Concat(args, machine)...)
		return r
	}
	p.requests("")
	if r := upgrade("upgrade"); !r.Same || r.Commit.Checksum != one {
		t.Errorf("%+v: not up to date", r)
	}
	if got := p.requests(""); !slices.Equal(got, []string{"summary"}) {
		t.Errorf("asked for %q", got)
	}

	before := len(p.objects())
	put("tree/usr/share/1", strings.Repeat("changed ", 100))
	put("tree/usr/share/2", strings.Repeat("changed, too ", 100))
	put("tree/usr/share/new/1", "new")
	two := p.commit(2, key, "dir="+in("tree"))
	changed := len(p.objects()) - before // and the commit, and the dirtrees of /, /usr, /usr/share, /usr/share/new
	r := upgrade("upgrade", "--check")
	if d := r.Commit.Download; r.Commit.Checksum != two || len(r.Commit.Signers) != 1 || !d.Known || d.Objects != changed+5 || d.Bytes < 100 {
		t.Errorf("%+v, %+v", r.Commit, d)
	}
	if got := p.requests(".filez"); len(got) > 0 {
		t.Errorf("asked for %q to look for an upgrade", got)
	}
	// What a dry run has brought, is there.
	if r = upgrade("upgrade", "--dry-run"); r.Commit.Pulled.Files != changed || r.Commit.Pulled.Metadata != 5 {
		t.Errorf("%+v in a dry run, want %d files", r.Commit.Pulled, changed)
	}
	if got := p.requests(".filez"); len(got) != changed {
		t.Errorf("asked for %q, want %d", got, changed)
	}
	if r = upgrade("upgrade"); r.Commit.Checksum != two || r.Commit.Pulled.Files != 0 || r.Install.Digest == installed.Digest {
		t.Errorf("%+v, %+v", r.Commit, r.Install)
	}
	if r = upgrade("upgrade"); !r.Same {
		t.Errorf("%+v: not up to date", r.Commit)
	}
	var status statusResult
	runJSON(t, &status, append([]string{"status"}, machine...)...)
	if d := status.Deployments; len(d) != 2 || d[0].Image != installed.Upgrade || d[1].Image != installed.Upgrade {
		t.Errorf("%+v", d)
	}

	before = len(p.objects())
	put("tree/usr/share/3", strings.Repeat("once more ", 100))
	three := p.commit(3, other, "dir="+in("tree"))
	if n := len(p.objects()) - before; n != 1 {
		t.Fatalf("%d new objects", n)
	}
	p.requests("")
	refused(t, "is not known (nothing has changed: the machine boots as before)", append([]string{"upgrade", "--check"}, machine...)...)
	refused(t, "is not known (the machine boots as before)", append([]string{"upgrade"}, machine...)...)
	if got := p.requests(".filez"); len(got) > 0 {
		t.Errorf("asked for %q of a commit that nobody known has signed", got)
	}
	// A key that is given counts from then on.
	if r = upgrade("upgrade", "--gpg-key", in("other.gpg")); r.Commit.Checksum != three || r.Commit.Pulled.Files != 1 {
		t.Errorf("%+v", r.Commit.Pulled)
	}
	if got := p.requests(".filez"); len(got) != 1 {
		t.Errorf("asked for %q", got)
	}
	put("tree/usr/share/3", "and once more")
	if r = upgrade("upgrade"); !r.Same {
		t.Errorf("%+v", r.Commit)
	}
	p.commit(4, other, "dir="+in("tree"))
	if r = upgrade("upgrade"); r.Same || r.Commit.Pulled.Files != 1 {
		t.Errorf("%+v", r.Commit)
	}

	p.ostree("reset", "os/stable", two)
	p.ostree("summary", "--update")
	older := "older than what is there, of 2023-11-14T22:17:20Z: composefs-boot switch " + installed.Upgrade + " takes it"
	refused(t, older, append([]string{"upgrade"}, machine...)...)
	refused(t, older, append([]string{"upgrade", "--check"}, machine...)...)
	refused(t, older, append([]string{"upgrade", "--dry-run"}, machine...)...)
	if err := os.Remove(in(p.remote())); err != nil {
		t.Fatal(err)
	}
	if r = upgrade("switch", installed.Upgrade); r.Commit.Checksum != two {
		t.Errorf("%+v", r.Commit)
	}
	if r = upgrade("upgrade"); !r.Same {
		t.Errorf("%+v", r.Commit)
	}

	// A repository on the machine itself is remembered by its path.
	if r = upgrade("switch", "ostree:ostree:os/stable"); r.Image != "ostree:"+p.dir+":os/stable" || r.Commit.Checksum != two {
		t.Errorf("%+v", r)
	}
	p.commit(5, nil, "dir="+in("tree"))
	p.requests("")
	if r = upgrade("upgrade"); r.Same || r.Image != "ostree:"+p.dir+":os/stable" || len(p.requests("")) > 0 {
		t.Errorf("%+v", r)
	}
}

// A disk that was made of commits from a web server is the same bits whenever it is made: what the network said besides is not on it. What
// was installed from a directory, or an image, can be upgraded from a web server.
func TestTargetCommit(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	smallSystem(t, in("tree"))
	p := newPublisher(t, in("ostree"))
	key := newKey(t, in("key.gpg"))
	p.commit(1, key, "dir="+in("tree"))
	url := "ostree:" + p.url() + ":os/stable"
	var disks [2][]byte
	for k := range disks {
		var installed installResult
		disk := in(fmt.Sprintf("disk%d", k))
		runJSON(t, &installed, "install", url, "--gpg-key", in("key.gpg"), "--arch", "amd64", "--disk", disk, "--root-free", "0")
		var err error
		if disks[k], err = os.ReadFile(disk); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(disks[0], disks[1]) {
		t.Error("two disks of one commit differ")
	}
	for _, want := range []string{"refspec=" + p.remote() + ":os/stable\n", "url=" + p.url() + "\n"} {
		if !bytes.Contains(disks[0], []byte(want)) {
			t.Errorf("no %q on the disk", want)
		}
	}

	machine := []string{"--root", in("root"), "--esp", in("esp")}
	for _, d := range []string{"root", "esp"} {
		if err := os.Mkdir(in(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// The remote is configured in another repository.
	putFile(t, in("remotes.conf"), "[remote \"my-os\"]\nurl="+p.url()+"\ngpgkeypath="+in("key.gpg")+"\n")
	install := slices.Concat([]string{"install", "ostree:" + in("ostree") + ":os/stable", "--arch", "amd64", "--insecure", "--root-arg", "root=LABEL=x"}, machine)
	refused(t, "which another machine can reach", append(install, "--target-image", "ostree:"+in("ostree")+":os/stable")...)
	refused(t, "no such remote", append(install, "--target-image", "ostree:my-os:os/stable")...)
	refused(t, "--target-image: remote \"anonymous\": no keys", append(install, "--target-image", url)...)
	install = append(install, "--target-image", "ostree:my-os:os/stable", "--remote-config", in("remotes.conf"))
	var installed installResult
	runJSON(t, &installed, append(install, "--dry-run")...)
	if _, err := os.Stat(in("root/composefs")); err == nil || installed.Upgrade != "ostree:my-os:os/stable" {
		t.Errorf("%+v, and something is written in a dry run", installed)
	}
	runJSON(t, &installed, install...)
	var r upgradeResult
	if runJSON(t, &r, slices.Concat([]string{"upgrade"}, machine)...); !r.Same || r.Image != "ostree:my-os:os/stable" {
		t.Errorf("%+v", r)
	}
	// The keys are with the machine.
	if err := os.Remove(in("key.gpg")); err != nil {
		t.Fatal(err)
	}
	putFile(t, in("tree/usr/share/1"), "changed")
	p.commit(2, key, "dir="+in("tree"))
	if runJSON(t, &r, slices.Concat([]string{"upgrade"}, machine)...); r.Same || len(r.Commit.Signers) != 1 {
		t.Errorf("%+v", r)
	}
	p.commit(3, nil, "dir="+in("tree"))
	refused(t, "not signed", slices.Concat([]string{"upgrade"}, machine)...)
	if runJSON(t, &r, slices.Concat([]string{"upgrade", "--no-verify"}, machine)...); len(r.Commit.Signers) > 0 {
		t.Errorf("%+v", r)
	}
	p.commit(4, nil, "dir="+in("tree"))
	refused(t, "not signed", slices.Concat([]string{"upgrade"}, machine)...) // it was said for once
}

func TestParseCommit(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("here", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]commitName{
		"ostree:here:a/b":                           {true, "here", "a/b"},
		"ostree:here:remote:a/b":                    {true, "here", "remote:a/b"},
		"ostree:./gone:a":                           {true, "./gone", "a"},
		"ostree:/gone:a":                            {true, "/gone", "a"},
		"ostree:my-os:a/b":                          {false, "my-os", "a/b"},
		"ostree:https://example.org/repo:a/b":       {false, "https://example.org/repo", "a/b"},
		"ostree:http://example.org:8080/repo:a":     {false, "http://example.org:8080/repo", "a"},
		"ostree:http://example.org:8080/re:po:a":    {false, "http://example.org:8080/re:po", "a"},
		"ostree:http://[::1]:8080/:a":               {false, "http://[::1]:8080/", "a"},
		"ostree:mirrorlist=https://example.org/m:a": {false, "mirrorlist=https://example.org/m", "a"},
		"ostree:here":                               {},
		"ostree::a":                                 {},
		"ostree:here:":                              {},
		"ostree:https://example.org:8080/repo":      {},
		"ostree:https://example.org:a":              {},
		"ostree:https://example.org/repo:":          {},
	} {
		got, err := parseCommit(name)
		if got != want || (err != nil) != (want == commitName{}) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		if err == nil && got.String() != name {
			t.Errorf("%s: %v", name, got)
		}
	}
}
