package remote_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

// TestMain is also a pull in a process of its own, which can be killed.
func TestMain(m *testing.M) {
	url := os.Getenv("TEST_PULL_URL")
	if url == "" {
		os.Exit(m.Run())
	}
	if err := pullAlone(url, os.Getenv("TEST_PULL_REPO")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func pullAlone(url, path string) error {
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		return err
	}
	defer r.Close()
	rem, err := remote.Open(context.Background(), remote.Anonymous(url, nil), remote.Options{Trust: remote.Trust{Waived: true}, Retry: quick})
	if err != nil {
		return err
	}
	_, err = rem.Pull(context.Background(), r, []string{"os"}, never)
	return err
}

func alone(url string, r *repo.Repo) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "TEST_PULL_URL="+url, "TEST_PULL_REPO="+r.Path())
	return cmd
}

var waived = remote.Options{Trust: remote.Trust{Waived: true}, Retry: quick}

func run(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// published makes an archive with the ref os, of many small files and a few large ones, and returns the directory, and the digest of
// the image.
func published(t testing.TB, small int) (dir, image string) {
	t.Helper()
	tree, dir := t.TempDir(), filepath.Join(t.TempDir(), "archive")
	random := rand.NewChaCha8([32]byte{byte(small)})
	add := func(name string, size int) {
		b := make([]byte, size)
		random.Read(b)
		write(t, filepath.Join(tree, name), string(b))
	}
	for k := range small {
		add(fmt.Sprintf("usr/%d/%d", k%20, k), 20+k%3000)
	}
	for k := range 3 {
		add(fmt.Sprintf("usr/lib/large-%d", k), 3<<20)
	}
	run(t, vm.Ostree(t, "init", "--repo="+dir, "--mode=archive"))
	run(t, vm.Ostree(t, "commit", "--repo="+dir, "--branch=os", "--tree=dir="+tree, "--canonical-permissions"))
	run(t, vm.Ostree(t, "summary", "--update", "--repo="+dir))
	l, err := ostree.OpenLocal(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	list, err := ostree.Pull(t.Context(), newRepo(t), l, []string{"os"}, ostree.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return dir, imageOf(t, list[0].Stored)
}

func imageOf(t testing.TB, s *ostree.Stored) string {
	t.Helper()
	d, ok := s.Image()
	if !ok {
		t.Fatal("no image")
	}
	return d.String()
}

// sizeOf returns the bytes of all objects of an archive.
func sizeOf(t testing.TB, dir string) (size int64) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(dir, "objects"), func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		size += info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// cutAtRandom cuts objects at random places, a number of times in all.
func (s *web) cutAtRandom(times int64) {
	random, mu := rand.New(rand.NewPCG(7, 8)), sync.Mutex{}
	s.cut = func(path string, size int) int {
		mu.Lock()
		defer mu.Unlock()
		if !strings.HasPrefix(path, "/objects/") || s.cuts.Load() >= times || random.IntN(2) == 0 {
			return -1
		}
		return random.IntN(size)
	}
}

// The connection is cut 200 times at random places, in one pull, which goes on: no byte comes twice.
func TestCuts(t *testing.T) {
	dir, image := published(t, 400)
	s := &web{dir: dir}
	s.cutAtRandom(200)
	url := s.start(t)
	r := newRepo(t)
	o := waived
	o.Counters = &remote.Counters{}
	o.Retry.Attempts = 100 // of one object, if it is that one each time
	p := mustPull(t, open(t, remote.Anonymous(url, nil), o), r, never, "os").Commits[0]
	clean(t, r)
	summary, err := os.Stat(filepath.Join(dir, "summary"))
	if err != nil {
		t.Fatal(err)
	}
	want := sizeOf(t, dir) + summary.Size()
	const notFound = 2 << 10 // the text that says that there are no signatures
	if got := o.Counters.Bytes.Load(); got < want || got > want+notFound || imageOf(t, p.Stored) != image || s.cuts.Load() < 200 {
		t.Errorf("%d cuts, %d bytes of %d", s.cuts.Load(), got, want)
	}
}

// Each pull ends with its first lost connection, and the next one goes on: in the middle of a large file, too.
func TestCutsInManyPulls(t *testing.T) {
	dir, image := published(t, 100)
	s := &web{dir: dir}
	s.cutAtRandom(30)
	url := s.start(t)
	r := newRepo(t)
	o := waived
	o.Retry = remote.Retry{Wait: 1} // no other attempt
	o.Counters = &remote.Counters{}
	for pulls := 1; ; pulls++ {
		result, err := open(t, remote.Anonymous(url, nil), o).Pull(t.Context(), r, []string{"os"}, never)
		if err == nil {
			if imageOf(t, result.Commits[0].Stored) != image {
				t.Error("another image")
			}
			part := float64(o.Counters.Bytes.Load()) / float64(sizeOf(t, dir))
			t.Logf("%d cuts, %d pulls, %.2fx the bytes", s.cuts.Load(), pulls, part)
			// What is on its way when another file is cut comes again, but not what has come.
			if part > 2 || pulls < 3 {
				t.Errorf("%d pulls, %.2fx the bytes", pulls, part)
			}
			break
		}
		if pulls > 200 {
			t.Fatal(err)
		}
		if tags, _ := ostree.Tags(r); len(tags) > 0 {
			t.Fatalf("a commit that is not complete has a name: %v", tags)
		}
	}
	clean(t, r)
}

// Killed at any moment, a pull leaves a repository without fault and no name; the next one goes on where it was.
func TestKills(t *testing.T) {
	kills := 4
	if n := os.Getenv("KILLS"); n != "" {
		fmt.Sscan(n, &kills)
	}
	dir, image := published(t, 2000)
	size := sizeOf(t, dir)
	random := rand.New(rand.NewPCG(5, 6))
	for killed := 0; killed < kills; {
		s := &web{dir: dir, delay: 200 * time.Millisecond} // some nine seconds for all
		url := s.start(t)
		r := newRepo(t)
		mine := 0
		for {
			cmd := alone(url, r)
			var errs bytes.Buffer
			cmd.Stderr = &errs
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			s.killAfter(200+random.IntN(1200), cmd.Process)
			err := cmd.Wait()
			if errs.Len() > 0 {
				t.Fatal(errs.String())
			}
			report, fsckErr := r.Fsck(t.Context(), repo.FsckOptions{})
			tags, tagErr := ostree.Tags(r)
			if fsckErr != nil || !report.OK() || tagErr != nil || err == nil && len(tags) != 1 {
				t.Fatalf("after %d kills: %v, %v, %v, %v", killed, report.Findings, tags, fsckErr, tagErr)
			}
			if err == nil {
				break
			}
			killed, mine = killed+1, mine+1
		}
		c, err := ostree.Open(r, "os")
		if err != nil || imageOf(t, c) != image {
			t.Errorf("%v, %v", c, err)
		}
		clean(t, r)
		part := float64(s.sent.Load()) / float64(size)
		t.Logf("%d kills: %.2fx the bytes", mine, part)
		if mine > 3 && part > 1+float64(mine)*0.4 {
			t.Errorf("%d kills: %.2fx the bytes", mine, part)
		}
	}
}

// killAfter kills a process when so many requests more have been answered.
func (s *web) killAfter(requests int, p *os.Process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.victim, s.until = p, requests
}

// Of two pulls of one ref at the same time, one brings the commit, and the other one waits.
func TestTwoPulls(t *testing.T) {
	dir, image := published(t, 300)
	s := &web{dir: dir, delay: 10 * time.Millisecond}
	url := s.start(t)
	path := newRepo(t).Path()
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			r, err := repo.Open(path, repo.Options{})
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			rem, err := remote.Open(t.Context(), remote.Anonymous(url, nil), waived)
			if err != nil {
				t.Error(err)
				return
			}
			result, err := rem.Pull(t.Context(), r, []string{"os"}, never)
			if err != nil || imageOf(t, result.Commits[0].Stored) != image {
				t.Errorf("%v, %v", result, err)
			}
		})
	}
	both.Wait()
	if requests, paths := s.count(`\.(filez|dirtree|dirmeta)$`); requests != paths {
		t.Errorf("%d requests for %d objects", requests, paths)
	}
	clean(t, openRepo(t, path))
}

// Garbage collection waits for a pull, and after one that was interrupted it takes nothing that the next one uses.
func TestGCDuringPull(t *testing.T) {
	dir, image := published(t, 300)
	began, goOn := make(chan bool), make(chan bool)
	var once sync.Once
	s := &web{dir: dir}
	s.fault = func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, ".filez") {
			once.Do(func() { close(began); <-goOn })
		}
		return false
	}
	url := s.start(t)
	r := newRepo(t)
	var both sync.WaitGroup
	both.Go(func() {
		p := mustPull(t, open(t, remote.Anonymous(url, nil), waived), openRepo(t, r.Path()), never, "os").Commits[0]
		if imageOf(t, p.Stored) != image {
			t.Error("another image")
		}
	})
	<-began
	_, err := r.GC(t.Context(), repo.GCOptions{Lock: repo.LockOptions{Timeout: 50 * time.Millisecond}})
	if err == nil {
		t.Error("garbage collection does not wait")
	}
	close(goOn)
	both.Wait()
	if _, err := r.GC(t.Context(), repo.GCOptions{}); err != nil {
		t.Error(err)
	}
	c, err := ostree.Open(r, "os")
	if err != nil || imageOf(t, c) != image {
		t.Errorf("%v, %v", c, err)
	}
	clean(t, r)
}
