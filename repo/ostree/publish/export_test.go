package publish_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/packet"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/publish"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// What is exported is what ostree would have, in all modes, and comes back as it was.
func TestExport(t *testing.T) {
	r := newRepo(t, fsverity.SHA256)
	for _, name := range []string{"files", "metadata", "names", "links"} {
		dir := tree(t, name)
		for _, mode := range modes {
			t.Run(name+"/"+string(mode), func(t *testing.T) {
				var canonical []func(*fstree.Tree)
				if mode == ostree.BareUserOnly {
					canonical = append(canonical, func(tree *fstree.Tree) { ostree.CanonicalPermissions.Apply(tree) })
				}
				s := commit(t, r, dir, ostree.Description{Time: 1, Refs: []string{"os/" + name}}, "os/"+name, canonical...)
				target := newTarget(t, mode)
				items := []publish.Item{{Commit: s, Refs: []string{"os/" + name}}}
				dry, err := target.Export(ctx, r, items, publish.Options{DryRun: true})
				if err != nil {
					t.Fatal(err)
				}
				result, err := target.Export(ctx, r, items, publish.Options{})
				if err != nil {
					t.Fatal(err)
				}
				if fmt.Sprint(dry) != fmt.Sprint(result) || result.Files == 0 || len(result.Commits) != 1 {
					t.Errorf("%+v, and without writing %+v", result, dry)
				}
				again, err := target.Export(ctx, r, items, publish.Options{})
				if err != nil || again.Files+again.Metadata+len(again.Commits) > 0 || again.Present != result.Files+result.Metadata+1 {
					t.Errorf("again: %+v, %v", again, err)
				}
				target.Close()
				mustBeHarmless(t, target)
				peer(t, "fsck", "--repo="+target.Path)
				if got := peer(t, "rev-parse", "--repo="+target.Path, "os/"+name); got != s.Checksum.String() {
					t.Errorf("the ref leads to %s", got)
				}
				mustReturn(t, target.Path, "os/"+name, s)
				if mode == ostree.Archive || mode == ostree.Bare {
					mustCheckOut(t, r, target.Path, s)
				}
			})
		}
	}
}

// mustBeHarmless looks at the files of a repository whose objects only say what their mode is: nobody can run them as their owner.
func mustBeHarmless(t *testing.T, target *publish.Repository) {
	t.Helper()
	if target.Mode == ostree.Bare || target.Mode == ostree.BareSplitXattrs {
		return
	}
	err := filepath.WalkDir(filepath.Join(target.Path, "objects"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil && (info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky) != 0 || info.Mode().Perm()&0o002 != 0 || info.Mode().Perm()&0o400 == 0) && e.Type().IsRegular() {
			t.Errorf("%s: %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// mustReturn pulls a commit from where it was exported to.
func mustReturn(t *testing.T, path, ref string, s *ostree.Stored) {
	t.Helper()
	l, err := ostree.OpenLocal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	list, err := ostree.Pull(ctx, newRepo(t, fsverity.SHA256), l, []string{ref}, ostree.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	was, _ := s.Image()
	if is, _ := list[0].Image(); is != was || list[0].Checksum != s.Checksum {
		t.Errorf("it comes back as commit %v, image %v: was %v, %v", list[0].Checksum, is, s.Checksum, was)
	}
}

// mustCheckOut compares the tree of a commit with what ostree checkout makes of it.
func mustCheckOut(t *testing.T, r *repo.Repo, path string, s *ostree.Stored) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "checkout")
	peer(t, "checkout", "--repo="+path, "--force-copy", s.Checksum.String(), dir)
	got, err := scan.Dir(ctx, dir, scan.Digests(r.Algorithm()), scan.Options{Xattrs: fstree.XattrsAll})
	if err != nil {
		t.Fatal(err)
	}
	o, err := s.Objects(r)
	if err != nil {
		t.Fatal(err)
	}
	want, err := o.Tree(ostree.RightNames)
	if err != nil {
		t.Fatal(err)
	}
	for _, tree := range []*fstree.Tree{got, want} { // a checkout has times, and no links of files that are alike
		tree.Walk(func(_ string, i *fstree.Inode) error {
			i.Mtime, i.Nlink = fstree.Time{}, 1
			return nil
		})
	}
	err = fstree.Diff(want, got, func(d fstree.Difference) error {
		if d.Attribute != fstree.AttrLink {
			t.Errorf("checked out: %+v", d)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestMain is also the program that is killed: it exports.
func TestMain(m *testing.M) {
	path := os.Getenv("TEST_EXPORT_REPO")
	if path == "" {
		os.Exit(m.Run())
	}
	err := func() error {
		r, err := repo.Open(path, repo.Options{})
		if err != nil {
			return err
		}
		s, err := ostree.Open(r, "os")
		if err != nil {
			return err
		}
		to, err := publish.Open(ctx, os.Getenv("TEST_EXPORT_TO"), repo.LockOptions{})
		if err != nil {
			return err
		}
		_, err = to.Export(ctx, r, []publish.Item{{Commit: s, Refs: []string{"os"}}}, publish.Options{Depth: -1})
		return err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// bulk makes a directory with files of all sizes.
func bulk(t testing.TB, seed uint64) string {
	t.Helper()
	dir := t.TempDir()
	random := rand.New(rand.NewPCG(seed, 1))
	for k := range 300 {
		sub := filepath.Join(dir, fmt.Sprintf("dir%d", k%10))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		content := make([]byte, random.IntN(20000))
		for i := range content {
			content[i] = byte(random.IntN(50))
		}
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%d", k)), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Killed at any moment, an export leaves a repository that ostree finds sound, whose ref leads to nothing or to all; the next one goes on.
func TestExportKilled(t *testing.T) {
	r := newRepo(t, fsverity.SHA256)
	first := commit(t, r, bulk(t, 1), ostree.Description{Time: 1}, "os")
	commit(t, r, bulk(t, 2), ostree.Description{Time: 2, Parent: first.Checksum}, "os")
	random := rand.New(rand.NewPCG(3, 4))
	killed, complete := 0, 0
	longest := 500 * time.Millisecond
	var target *publish.Repository
	for round := range 40 {
		if target == nil {
			target = newTarget(t, []ostree.Mode{ostree.Archive, ostree.BareUser}[round%2])
			target.Close()
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TEST_EXPORT_REPO="+r.Path(), "TEST_EXPORT_TO="+target.Path)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		start := time.Now()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Duration(random.Int64N(int64(longest))), func() { cmd.Process.Kill() })
		err := cmd.Wait()
		timer.Stop()
		if err == nil {
			complete++
			longest = max(20*time.Millisecond, time.Since(start))
		} else if killed++; errs.Len() > 0 {
			t.Fatalf("round %d: %s", round, errs.String())
		}
		if round%4 == 0 || err == nil {
			peer(t, "fsck", "--repo="+target.Path)
		}
		refs := peer(t, "refs", "--repo="+target.Path)
		if refs != "os" && (refs != "" || err == nil) {
			t.Fatalf("round %d: refs %q, %v", round, refs, err)
		}
		if refs == "os" {
			mustHaveAll(t, target.Path)
			target = nil // and from the beginning
		}
	}
	if killed < 5 || complete == 0 {
		t.Errorf("%d of 40 were killed, %d were complete", killed, complete)
	}
}

// mustHaveAll pulls what the ref leads to, and what was before it.
func mustHaveAll(t *testing.T, path string) {
	t.Helper()
	l, err := ostree.OpenLocal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	list, err := ostree.Pull(ctx, newRepo(t, fsverity.SHA256), l, []string{"os"}, ostree.PullOptions{Depth: -1})
	if err != nil || len(list[0].Parents) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
}

// newKey makes a GPG key, and a file with what is public of it.
func newKey(t testing.TB) (sign.Signer, string) {
	t.Helper()
	key, err := openpgp.NewEntity("One", "", "one@example.org", &packet.Config{Time: func() time.Time { return time.Unix(1700000000, 0) }})
	if err != nil {
		t.Fatal(err)
	}
	var secret, public bytes.Buffer
	ring := filepath.Join(t.TempDir(), "one.gpg")
	if err = key.SerializePrivate(&secret, nil); err == nil {
		if err = key.Serialize(&public); err == nil {
			err = os.WriteFile(ring, public.Bytes(), 0o644)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	signer, err := sign.GPGSigner(&secret, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	return signer, ring
}

// ostree pulls over HTTP what was published here: by objects, and by a static delta that is in the summary; signatures are good.
func TestServed(t *testing.T) {
	r := newRepo(t, fsverity.SHA256)
	signer, ring := newKey(t)
	signed := func(s *ostree.Stored) *ostree.Stored {
		o, err := s.Objects(r)
		if err != nil {
			t.Fatal(err)
		}
		data, err := o.Metadata(ostree.ObjectName{Checksum: s.Checksum, Kind: ostree.KindCommit})
		if err != nil {
			t.Fatal(err)
		}
		detached, err := sign.Add(nil, data, signer)
		if err == nil {
			err = ostree.SetDetached(ctx, r, s, detached, repo.LockOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	target := newTarget(t, ostree.Archive)
	server := httptest.NewServer(http.FileServer(http.Dir(target.Path)))
	defer server.Close()
	theirs := filepath.Join(t.TempDir(), "theirs")
	peer(t, "init", "--repo="+theirs, "--mode=bare-user")
	peer(t, "remote", "add", "--repo="+theirs, "--gpg-import="+ring, "--set=gpg-verify-summary=true", "here", server.URL)
	publishIt := func(s *ostree.Stored) {
		t.Helper()
		if _, err := target.Export(ctx, r, []publish.Item{{Commit: s, Refs: []string{"os"}}}, publish.Options{}); err != nil {
			t.Fatal(err)
		}
		summary, err := target.Summarize(ctx, time.Unix(5, 0))
		if err == nil {
			err = target.WriteSummary(summary, signer)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	first := signed(commit(t, r, bulk(t, 1), ostree.Description{Time: 1, Refs: []string{"os"}, Metadata: []ostree.MetadataEntry{{Key: "version", Value: text("7")}}}, "os"))
	publishIt(first)
	if out := peer(t, "remote", "summary", "--repo="+theirs, "here"); !strings.Contains(out, first.Checksum.String()) || !strings.Contains(out, "7") {
		t.Errorf("summary: %s", out)
	}
	peer(t, "pull", "--repo="+theirs, "here", "os")
	second := signed(commit(t, r, bulk(t, 2), ostree.Description{Time: 2, Refs: []string{"os"}, Parent: first.Checksum}, "os"))
	publishIt(second)
	peer(t, "static-delta", "generate", "--repo="+target.Path, "--from="+first.Checksum.String(), "--to="+second.Checksum.String())
	publishIt(second)
	peer(t, "pull", "--repo="+theirs, "--require-static-deltas", "here", "os")
	if got := peer(t, "rev-parse", "--repo="+theirs, "here:os"); got != second.Checksum.String() {
		t.Errorf("the ref leads to %s, want %v", got, second.Checksum)
	}
	peer(t, "fsck", "--repo="+theirs)
	// Signatures that are not there are missed: this is what the pulls above have looked at.
	summary, err := target.Summarize(ctx, time.Unix(6, 0))
	if err == nil {
		err = target.WriteSummary(summary)
	}
	if err != nil {
		t.Fatal(err)
	}
	if indexes, _ := filepath.Glob(filepath.Join(target.Path, "delta-indexes/*/*.index")); len(indexes) != 1 || len(summary.Deltas) != 1 {
		t.Errorf("%d deltas, indexes %v", len(summary.Deltas), indexes)
	}
	if out, err := vm.Ostree(t, "pull", "--repo="+theirs, "here", "os").CombinedOutput(); err == nil {
		t.Errorf("pulled without signatures: %s", out)
	}
}

// What a repository cannot hold, and refs that are none, are refused before anything is written.
func TestExportRefuses(t *testing.T) {
	r := newRepo(t, fsverity.SHA256)
	s := commit(t, r, tree(t, "metadata"), ostree.Description{Time: 1, Refs: []string{"os"}}, "os")
	target := newTarget(t, ostree.BareUserOnly)
	_, err := target.Export(ctx, r, []publish.Item{{Commit: s, Refs: []string{"os"}}}, publish.Options{})
	if err == nil || !strings.Contains(err.Error(), ".file: owner ") || !strings.Contains(err.Error(), "--canonical-permissions") {
		t.Error(err)
	}
	archive := newTarget(t, ostree.Archive)
	for _, ref := range []string{"", ".", "..", "../../x", "a/../b", "/etc/x", "a b", "a:b", "-x", ".hidden", "a//b", "a\n", strings.Repeat("x", 300)} {
		if _, err := archive.Export(ctx, r, []publish.Item{{Commit: s, Refs: []string{ref}}}, publish.Options{AnyRef: true}); err == nil {
			t.Errorf("ref %q was written", ref)
		}
	}
	if _, err := archive.Export(ctx, r, []publish.Item{{Commit: s, Refs: []string{"other"}}}, publish.Options{}); err == nil {
		t.Error("a ref that the commit is not meant for was written")
	}
	for _, l := range []*publish.Repository{target, archive} {
		if objects, _ := filepath.Glob(filepath.Join(l.Path, "objects/*/*")); len(objects) > 0 {
			t.Errorf("written: %v", objects)
		}
	}
}

// A repository that is there stays as it is; one that was made by half is finished.
func TestInit(t *testing.T) {
	target := newTarget(t, ostree.Archive)
	path := filepath.Join(target.Path, "config")
	if created, err := publish.Init(target.Path, ostree.Archive, "org.example.Other"); err != nil || created {
		t.Error(created, err)
	}
	if _, err := publish.Init(target.Path, ostree.Bare, ""); err == nil {
		t.Error("it has two modes")
	}
	if err := os.Remove(filepath.Join(target.Path, "objects")); err != nil {
		t.Fatal(err)
	}
	if _, err := publish.Init(target.Path, ostree.Bare, ""); err == nil {
		t.Error("another config was replaced")
	}
	if created, err := publish.Init(target.Path, ostree.Archive, ""); err != nil || !created {
		t.Error(created, err)
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "[core]\nrepo_version=1\nmode=archive-z2\n" {
		t.Errorf("%s, %v", text, err)
	}
	if _, err := publish.Init(t.TempDir(), ostree.Archive, "a\nmode=bare"); err == nil {
		t.Error("a collection with a line break")
	}
}

// An object whose content was changed here is not exported, and the next one is.
func TestExportCorrupt(t *testing.T) {
	r := newRepo(t, fsverity.SHA256)
	s := commit(t, r, bulk(t, 1), ostree.Description{Time: 1}, "os")
	objects, err := filepath.Glob(filepath.Join(r.Path(), "objects/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	var victim string
	for _, path := range objects {
		if info, err := os.Stat(path); err == nil && info.Size() > 15000 && info.Size() < 20000 {
			victim = path
		}
	}
	content, err := os.ReadFile(victim)
	if err != nil {
		t.Fatal(err)
	}
	wrong := bytes.Clone(content)
	wrong[7] ^= 1
	for _, b := range [][]byte{wrong, content[:1000], append(bytes.Clone(content), 0)} {
		if err := replaceFile(victim, b); err != nil {
			t.Fatal(err)
		}
		target := newTarget(t, ostree.Archive)
		_, err = target.Export(ctx, r, []publish.Item{{Commit: s}}, publish.Options{})
		if err == nil || !strings.Contains(err.Error(), "object ") || !strings.Contains(err.Error(), "--repair") {
			t.Errorf("%d bytes of %d: %v", len(b), len(content), err)
		}
		if commits, _ := filepath.Glob(filepath.Join(target.Path, "objects/*/*.commit")); len(commits) > 0 {
			t.Errorf("written: %v", commits)
		}
	}
	if err := replaceFile(victim, content); err != nil {
		t.Fatal(err)
	}
	target := newTarget(t, ostree.Archive)
	if _, err := target.Export(ctx, r, []publish.Item{{Commit: s}}, publish.Options{}); err != nil {
		t.Error(err)
	}
	target.Close()
	if left, _ := os.ReadDir(filepath.Join(target.Path, "tmp")); len(left) > 0 {
		t.Errorf("left in tmp: %v", left)
	}
}

func replaceFile(path string, b []byte) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o444)
}
