package ostree_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// TestMain is also the program that is killed: it pulls from a repository.
func TestMain(m *testing.M) {
	path := os.Getenv("TEST_PULL_REPO")
	if path == "" {
		os.Exit(m.Run())
	}
	err := func() error {
		r, err := repo.Open(path, repo.Options{})
		if err != nil {
			return err
		}
		l, err := ostree.OpenLocal(os.Getenv("TEST_PULL_SOURCE"))
		if err != nil {
			return err
		}
		_, err = ostree.Pull(ctx, r, l, []string{ref}, ostree.PullOptions{})
		return err
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func mustBeClean(t *testing.T, r *repo.Repo) {
	t.Helper()
	report, err := r.Fsck(ctx, repo.FsckOptions{})
	if err != nil || !report.OK() {
		t.Fatalf("%+v, %v", report, err)
	}
	commits, err := ostree.Fsck(ctx, r, ostree.FsckOptions{})
	if err != nil || len(commits.Findings) > 0 {
		t.Fatalf("%v, %v", commits.Findings, err)
	}
}

// Killed at any moment, a pull leaves a repository without fault, whose ref leads to nothing or to all of it, and the next one goes on.
func TestPullKilled(t *testing.T) {
	source := vector(t, "archive")
	var r *repo.Repo
	killed, complete := 0, 0
	random := rand.New(rand.NewPCG(2, 3))
	longest := 300 * time.Millisecond
	for round := range 100 {
		if r == nil {
			r = newRepo(t, fsverity.SHA256, erofs.V1)
		}
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "TEST_PULL_REPO="+r.Path(), "TEST_PULL_SOURCE="+source)
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
			longest = max(20*time.Millisecond, time.Since(start)) // about as long as a pull takes here
		} else if killed++; errs.Len() > 0 {
			t.Fatalf("round %d: %s", round, errs.String())
		}
		mustBeClean(t, r)
		tags, tagErr := ostree.Tags(r)
		if tagErr != nil || err == nil && len(tags) != 1 {
			t.Fatalf("round %d: %v, %v", round, tags, tagErr)
		}
		if len(tags) == 1 {
			r = nil // and from the beginning
		}
	}
	if killed < 20 || complete == 0 {
		t.Errorf("%d of 100 were killed, %d were complete", killed, complete)
	}
}

// A pull that is cut again and again brings each object once, and is known as partial until it ends.
func TestResume(t *testing.T) {
	m := newMemory(t)
	c := m.system("os", ostree.Checksum{}, 60, 1, 2, 3)
	whole := pull(t, newRepo(t, fsverity.SHA256, erofs.V1), m, "os", ostree.PullOptions{})
	clear(m.asked)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	random := rand.New(rand.NewPCG(7, 8))
	reset := errors.New("connection reset")
	cuts := 0
	for {
		next := m.total + 1 + random.IntN(40)
		m.fail = func(n int, _ ostree.ObjectName) error {
			if n >= next {
				return reset
			}
			return nil
		}
		list, err := ostree.Pull(ctx, r, m, []string{"os"}, ostree.PullOptions{})
		partial, partialErr := ostree.Partial(r)
		if partialErr != nil {
			t.Fatal(partialErr)
		}
		if err == nil {
			if list[0].Linked[0] != whole.Linked[0] || len(partial) > 0 {
				t.Errorf("%+v, want %+v; partial %v", list[0].Linked, whole.Linked, partial)
			}
			break
		}
		cuts++
		if !errors.Is(err, reset) || !strings.Contains(err.Error(), "commit "+c.String()) {
			t.Fatal(err)
		}
		if tags, _ := ostree.Tags(r); len(tags) > 0 {
			t.Fatalf("tags: %v", tags)
		}
		if len(m.asked) > 3 && !slices.Equal(partial, []ostree.Checksum{c}) {
			t.Errorf("partial: %v", partial)
		}
	}
	mustBeClean(t, r)
	for n, times := range m.asked {
		if times > 1 && n.Kind != ostree.KindCommit { // the commit object says what there is to do
			t.Errorf("%v was fetched %d times, in %d cuts", n, times, cuts)
		}
	}
	if len(m.asked) != len(m.files)+len(m.metas) || cuts < 3 {
		t.Errorf("%d objects of %d and %d, %d cuts", len(m.asked), len(m.files), len(m.metas), cuts)
	}
}

// A journal that is torn, or anything else, costs what was in it and no more.
func TestJournalTorn(t *testing.T) {
	m := newMemory(t)
	c := m.system("os", ostree.Checksum{}, 30, 1)
	for name, damage := range map[string]func([]byte) []byte{
		"short": func(b []byte) []byte { return b[:len(b)-1] },
		"bit":   func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"size":  func(b []byte) []byte { b[7] = 0x7f; return b },
		"zeros": func(b []byte) []byte { return make([]byte, len(b)) },
		"empty": func([]byte) []byte { return nil },
		"more":  func(b []byte) []byte { return append(b, "garbage behind it"...) },
	} {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		limit := m.total + 20
		m.fail = func(n int, _ ostree.ObjectName) error {
			if n > limit {
				return errors.New("cut")
			}
			return nil
		}
		if _, err := ostree.Pull(ctx, r, m, []string{"os"}, ostree.PullOptions{}); err == nil {
			t.Fatal("not cut")
		}
		m.fail = nil
		path := filepath.Join(r.Path(), "tmp", ostree.JournalName(c))
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, damage(b), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		p := pull(t, r, m, "os", ostree.PullOptions{})
		if (p.Stats.Reused > 0) != (name == "more") {
			t.Errorf("%s: %+v", name, p.Stats)
		}
		mustBeClean(t, r)
	}
}

// The objects of the parent, of the ref's last commit, and of a base, are not fetched; nor is anything of a commit that is here.
func TestReuse(t *testing.T) {
	m := newMemory(t)
	first := m.system("os", ostree.Checksum{}, 40, 1, 2, 3)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pull(t, r, m, "os", ostree.PullOptions{})
	asked := func() int {
		n := len(m.asked)
		clear(m.asked)
		return n
	}
	asked()
	if again := pull(t, r, m, "os", ostree.PullOptions{}); again.Checksum != first || asked() != 0 {
		t.Error("something was read of a commit that is there")
	}
	const fresh = 1 + 2 + 40 // commit, two dirtrees, files
	m.system("os", first, 40, 1, 2, 4)
	if p := pull(t, r, m, "os", ostree.PullOptions{}); asked() != fresh || p.Stats.Files != 40 || p.Stats.Metadata != 3 || p.Stats.Reused != 83 {
		t.Errorf("child: %+v", p.Stats)
	}
	m.system("os", ostree.Checksum{}, 40, 1, 2, 5)
	if p := pull(t, r, m, "os", ostree.PullOptions{}); asked() != fresh {
		t.Errorf("the ref's next: %+v", p.Stats)
	}
	m.system("other", ostree.Checksum{}, 40, 1, 2, 6)
	if p := pull(t, r, m, "other", ostree.PullOptions{Base: []string{"os"}}); asked() != fresh {
		t.Errorf("base: %+v", p.Stats)
	}
	m.system("third", ostree.Checksum{}, 40, 1, 2, 7)
	m.system("fourth", ostree.Checksum{}, 40, 1, 2, 7, 8)
	list, err := ostree.Pull(ctx, newRepo(t, fsverity.SHA256, erofs.V1), m, []string{"third", "fourth"}, ostree.PullOptions{})
	if err != nil || list[1].Stats.Files != 40 {
		t.Errorf("two at once: %+v, %v", list, err)
	}
	if _, err := ostree.Pull(ctx, r, m, []string{"os"}, ostree.PullOptions{Base: []string{"nothing"}}); !errors.Is(err, repo.ErrNotFound) {
		t.Errorf("no base: %v", err)
	}
	// A base whose contents are gone is fetched.
	m.system("fifth", ostree.Checksum{}, 40, 1, 9)
	objects, _ := filepath.Glob(filepath.Join(r.Path(), "objects/*/*"))
	for _, o := range objects {
		if b, err := os.ReadFile(o); err == nil && bytes.HasPrefix(b, []byte("39 in 1, ")) {
			os.WriteFile(o, bytes.Repeat([]byte("x"), len(b)), 0o644)
		}
	}
	r = openRepo(t, r.Path())
	asked()
	if p := pull(t, r, m, "fifth", ostree.PullOptions{Base: []string{"os"}}); p.Stats.Files < 41 {
		t.Errorf("damaged base: %+v", p.Stats)
	}
	mustBeClean(t, r)
}

// The commits before a commit come along, and stay as long as it does.
func TestDepth(t *testing.T) {
	m := newMemory(t)
	var commits []ostree.Checksum
	var parent ostree.Checksum
	for k := range 4 {
		parent = m.system("os", parent, 10, 1, k+2)
		commits = append(commits, parent)
	}
	delete(m.metas, ostree.ObjectName{Checksum: commits[0], Kind: ostree.KindCommit}) // the source has no more
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	count := func() int {
		t.Helper()
		s, err := ostree.Open(r, "os")
		if err != nil {
			t.Fatal(err)
		}
		list, more, err := s.History(r)
		if err != nil || !more {
			t.Fatalf("%v, %v", more, err)
		}
		return len(list)
	}
	for _, c := range []struct{ depth, want int }{{0, 1}, {1, 2}, {-1, 3}, {0, 3}} {
		p := pull(t, r, m, "os", ostree.PullOptions{Depth: c.depth})
		if n := count(); n != c.want || c.depth != 0 && len(p.Parents) != c.want-1 {
			t.Errorf("depth %d: %d commits, parents %v", c.depth, n, p.Parents)
		}
		if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
			t.Fatal(err)
		}
		if n := count(); n != c.want {
			t.Errorf("depth %d: %d commits after garbage collection", c.depth, n)
		}
	}
	mustBeClean(t, r)
	if err := ostree.Untag(ctx, r, "os", repo.LockOptions{}); err != nil {
		t.Fatal(err)
	}
	if plan, err := r.GC(ctx, repo.GCOptions{}); err != nil || len(plan.Streams) != 3 {
		t.Errorf("%v, %v", plan.Streams, err)
	}
}

// Two pulls of one ref at once fetch it once, while garbage is collected.
func TestPullTwice(t *testing.T) {
	m := newMemory(t)
	m.system("os", ostree.Checksum{}, 100, 1, 2, 3)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	var wait sync.WaitGroup
	results := make([]ostree.Pulled, 3)
	errs := make([]error, 4)
	for k := range results {
		wait.Go(func() {
			other, err := repo.Open(r.Path(), repo.Options{})
			if err == nil {
				defer other.Close()
				var list []ostree.Pulled
				if list, err = ostree.Pull(ctx, other, m, []string{"os"}, ostree.PullOptions{}); err == nil {
					results[k] = list[0]
				}
			}
			errs[k] = err
		})
	}
	wait.Go(func() { _, errs[3] = r.GC(ctx, repo.GCOptions{}) })
	wait.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	files := 0
	for _, p := range results {
		files += p.Stats.Files
	}
	if files != 300 {
		t.Errorf("%d files were fetched", files)
	}
	mustBeClean(t, openRepo(t, r.Path()))
}

// What decides about commits is asked before anything else of them is fetched, and about those that are here, too.
func TestVerify(t *testing.T) {
	m := newMemory(t)
	c := m.system("os", ostree.Checksum{}, 5, 1)
	m.metas[ostree.ObjectName{Checksum: c, Kind: ostree.KindCommitMeta}] = []byte{}
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	no := errors.New("no signature")
	o := ostree.PullOptions{Verify: func(sum ostree.Checksum, commit, detached []byte) error {
		if sum != c || len(commit) == 0 || detached == nil {
			t.Errorf("%v, %d bytes, %v", sum, len(commit), detached)
		}
		return no
	}}
	for range 2 {
		if _, err := ostree.Pull(ctx, r, m, []string{"os"}, o); !errors.Is(err, no) {
			t.Errorf("%v", err)
		}
		if len(m.asked) > 2 {
			t.Errorf("%d objects were fetched", len(m.asked))
		}
		p := pull(t, r, m, "os", ostree.PullOptions{})
		if d, err := p.Detached(r); err != nil || d == nil {
			t.Errorf("detached metadata: %v, %v", d, err)
		}
		clear(m.asked)
	}
}

// What comes in another way is checked, kept, and not fetched.
func TestPrefetch(t *testing.T) {
	m := newMemory(t)
	first := m.system("os", ostree.Checksum{}, 5, 1)
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	pull(t, r, m, "os", ostree.PullOptions{})
	m.system("os", first, 30, 1, 2)
	clear(m.asked)
	p := pull(t, r, m, "os", ostree.PullOptions{Prefetch: func(_ context.Context, c ostree.Checksum, in *ostree.Collector) error {
		for sum, f := range m.files {
			if in.Has(sum) {
				old, err := in.File(sum)
				if err != nil {
					return err
				}
				old.Content.Close()
				continue
			}
			if err := in.PutFile(sum, &f.FileHeader, bytes.NewReader(append(f.content, 'x'))); err == nil {
				t.Error("a wrong content was taken")
			}
			if err := in.PutFile(sum, &f.FileHeader, bytes.NewReader(f.content)); err != nil {
				return err
			}
		}
		for n, data := range m.metas {
			if n.Kind == ostree.KindDirTree && !in.Has(n.Checksum) {
				if err := in.PutMetadata(n, append(data[:len(data):len(data)], 0)); !errors.Is(err, ostree.ErrChecksum) {
					t.Errorf("%v", err)
				}
				if err := in.PutMetadata(n, data); err != nil {
					return err
				}
			}
		}
		return nil
	}})
	if len(m.asked) != 1 || p.Stats.Files != 55 {
		t.Errorf("%d were fetched, %+v", len(m.asked), p.Stats)
	}
	mustBeClean(t, r)
}

// The image to boot has /usr/etc as /etc, and extended attributes by their right names.
func TestBootTree(t *testing.T) {
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	transform := func(tree *fstree.Tree, _ fstree.Open) error { return nil }
	p := pull(t, r, local(t, vector(t, "archive")), ref, ostree.PullOptions{Transform: transform, Formats: []erofs.Format{erofs.V1, erofs.V2}})
	if len(p.Linked) != 4 {
		t.Fatalf("%+v", p.Linked)
	}
	f, _, err := r.OpenImage(p.Linked[2].Digest.String())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	tree, _, err := erofs.Read(f, info.Size())
	if err != nil {
		t.Fatal(err)
	}
	if tree.Lookup("/etc/os-release") == nil || tree.Lookup("/usr/etc") != nil {
		t.Error("/usr/etc is not /etc")
	}
	if _, ok := tree.Lookup("/usr/bin/ping").Xattr("security.capability"); !ok {
		t.Error("ping has lost its capability")
	}
	if image, ok := p.Image(); !ok || image != p.Linked[0].Digest {
		t.Errorf("composefs.image is %v", image)
	}
	for _, path := range []string{"/etc/x", "/etc"} {
		both := fstree.New()
		both.Root.Dir().Set("usr", fstree.NewDir(0o755))
		both.Lookup("/usr").Dir().Set("etc", fstree.NewDir(0o755))
		both.Root.Dir().Set("etc", fstree.NewDir(0o755))
		if path != "/etc" {
			both.Lookup("/etc").Dir().Set("x", fstree.NewDir(0o755))
		}
		if err := ostree.PlaceEtc(both); (err != nil) != (path != "/etc") {
			t.Errorf("%s and /usr/etc: %v", path, err)
		}
	}
}
