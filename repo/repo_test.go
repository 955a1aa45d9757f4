package repo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

var ctx = context.Background()

// newRepo makes a repository for a file system without fs-verity, as build machines have them.
func newRepo(t testing.TB) *repo.Repo {
	t.Helper()
	path := filepath.Join(t.TempDir(), "repo")
	if _, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA256, Format: erofs.V1, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	return open(t, path)
}

func open(t testing.TB, path string) *repo.Repo {
	t.Helper()
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// newTree makes a directory of n files over 64 bytes whose content depends on seed.
func newTree(t testing.TB, n int, seed uint64) string {
	t.Helper()
	dir := t.TempDir()
	r := rand.New(rand.NewPCG(seed, 1))
	for k := range n {
		sub := filepath.Join(dir, "usr", fmt.Sprint("d", k%5))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		content := bytes.Repeat([]byte(fmt.Sprintln(r.Uint64())), 10+r.IntN(200))
		if err := os.WriteFile(filepath.Join(sub, fmt.Sprint("f", k)), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// importTree does what create-image does.
func importTree(r *repo.Repo, dir, ref string) (fsverity.Digest, repo.ImportStats, error) {
	i, err := r.Begin(ctx, repo.LockOptions{})
	if err != nil {
		return fsverity.Digest{}, repo.ImportStats{}, err
	}
	defer i.Abort()
	tree, err := scan.Dir(ctx, dir, i, scan.Options{})
	if err != nil {
		return fsverity.Digest{}, i.Stats(), err
	}
	d, err := i.PutImage(tree, r.Format(), ref)
	if err != nil {
		return d, i.Stats(), err
	}
	return d, i.Stats(), i.Commit()
}

func mustImport(t testing.TB, r *repo.Repo, dir, ref string) fsverity.Digest {
	t.Helper()
	d, _, err := importTree(r, dir, ref)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func mustBeClean(t testing.TB, r *repo.Repo) repo.FsckReport {
	t.Helper()
	report, err := r.Fsck(ctx, repo.FsckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range report.Findings {
		t.Error(f)
	}
	return report
}

// Repositories made by cfsctl open, list and check clean; their images are what the vectors say.
func TestGoldenRepositories(t *testing.T) {
	for name, want := range map[string]struct {
		alg    fsverity.Algorithm
		format erofs.Format
	}{
		"oci-boot.sha512.v1": {fsverity.SHA512, erofs.V1},
		"oci-boot.sha256.v2": {fsverity.SHA256, erofs.V2},
	} {
		r := open(t, filepath.Join(golden.Extract(t, "repos/"+name+".tar.gz"), "repo"))
		if r.Algorithm() != want.alg || r.Format() != want.format {
			t.Errorf("%s: %v, %v", name, r.Algorithm(), r.Format())
		}
		report := mustBeClean(t, r)
		if report.Objects == 0 || report.Images != 2 || report.Streams != 6 {
			t.Errorf("%s: %+v", name, report)
		}
		images, err := filepath.Glob(filepath.Join(r.Path(), "images", "*"))
		if err != nil || len(images) != 2 {
			t.Fatalf("%s: images %v, %v", name, images, err)
		}
		for _, path := range images {
			tree, format, err := r.ReadImage(filepath.Base(path))
			if err != nil || format != want.format {
				t.Errorf("%s: %v: %v", path, format, err)
				continue
			}
			d := fsverity.NewDigester(want.alg)
			if err := erofs.Write(d, tree, format); err != nil || d.Sum().String() != filepath.Base(path) {
				t.Errorf("%s: written again it is %v, %v", path, d.Sum(), err)
			}
		}
		// Everything hangs on the stream ref. cfsctl, too, finds two objects that nothing leads to.
		plan, err := r.GC(ctx, repo.GCOptions{DryRun: true})
		if err != nil || plan.Objects != 2 || len(plan.Streams)+len(plan.Images)+len(plan.Odd) > 0 {
			t.Errorf("%s: gc: %+v, %v", name, plan, err)
		}
	}
}

func TestInit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	c := repo.Config{Algorithm: fsverity.SHA512, Format: erofs.V1, Insecure: true}
	if created, err := repo.Init(path, c); !created || err != nil {
		t.Fatalf("%v, %v", created, err)
	}
	if created, err := repo.Init(path, c); created || err != nil {
		t.Errorf("again: %v, %v", created, err)
	}
	other := c
	other.Algorithm = fsverity.SHA256
	if _, err := repo.Init(path, other); err == nil || !strings.Contains(err.Error(), "fsverity-sha512-12") {
		t.Errorf("with another algorithm: %v", err)
	}
	if _, err := repo.Open(t.TempDir(), repo.Options{}); err == nil || !strings.Contains(err.Error(), "composefs-boot init") {
		t.Errorf("no repository: %v", err)
	}
	if _, err := repo.Open(path, repo.Options{RequireVerity: true}); !errors.Is(err, repo.ErrNoVerity) {
		t.Errorf("fs-verity required: %v", err)
	}
}

func TestMetaJSON(t *testing.T) {
	r := newRepo(t)
	meta := filepath.Join(r.Path(), "meta.json")
	for text, want := range map[string]string{
		`{"version":1,"algorithm":"fsverity-sha256-12"}`:                                       "",
		`{"version":2,"algorithm":"fsverity-sha256-12"}`:                                       "version 2",
		`{"version":1,"algorithm":"fsverity-md5-12"}`:                                          "unknown fs-verity algorithm",
		`{"version":1,"algorithm":"fsverity-sha256-12","features":{"incompatible":["later"]}}`: "later",
		`{"version":1,"algorithm":"fsverity-sha256-12","erofs_formats":{"default":7}}`:         "image format 7",
		`{"version":1`: "meta.json",
		"":             "meta.json",
	} {
		if err := os.WriteFile(meta, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		r, err := repo.Open(r.Path(), repo.Options{})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
		if err == nil {
			r.Close()
		}
	}
	readOnly := `{"version":1,"algorithm":"fsverity-sha256-12","features":{"read-only-compatible":["later"]}}`
	if err := os.WriteFile(meta, []byte(readOnly), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := importTree(open(t, r.Path()), newTree(t, 1, 1), ""); !errors.Is(err, repo.ErrReadOnly) {
		t.Errorf("unknown read-only-compatible feature: %v", err)
	}
}

func TestImportAndRead(t *testing.T) {
	r := newRepo(t)
	dir := newTree(t, 50, 1)
	d := mustImport(t, r, dir, "os/one")
	if got := mustImport(t, r, dir, "os/two"); got != d {
		t.Errorf("the same tree gives %v and %v", d, got)
	}
	refs, err := r.Images()
	if err != nil || len(refs) != 2 || refs[0].Name != "os/one" || refs[1].Digest != d {
		t.Errorf("images: %v, %v", refs, err)
	}
	for _, name := range []string{d.String(), "os/one", "refs/os/two", "ref/os/two"} {
		f, got, err := r.OpenImage(name)
		if err != nil || got != d {
			t.Errorf("%s: %v, %v", name, got, err)
			continue
		}
		f.Close()
	}
	for _, name := range []string{"os/none", "none", "../meta.json", "os", "", fsverity.Of(fsverity.SHA256, nil).String()} {
		if f, _, err := r.OpenImage(name); err == nil {
			f.Close()
			t.Errorf("image %q is there", name)
		}
	}
	tree, _, err := r.ReadImage("os/one")
	if err != nil {
		t.Fatal(err)
	}
	if objects := repo.Objects(tree); len(objects) != 50 {
		t.Errorf("%d objects", len(objects))
	}
	if report := mustBeClean(t, r); report.Objects != 51 || report.Images != 1 {
		t.Errorf("%+v", report)
	}
}

// A second import takes what is there, and writes again what is damaged.
func TestExistingObjectsAreMeasured(t *testing.T) {
	r := newRepo(t)
	dir := newTree(t, 20, 1)
	mustImport(t, r, dir, "x")
	objects, _ := filepath.Glob(filepath.Join(r.Path(), "objects/*/*"))
	damage := []func(string) error{
		func(p string) error { // the same size
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			b[len(b)/2] ^= 1
			return os.WriteFile(p, b, 0o644)
		},
		func(p string) error { return os.Truncate(p, 1) },
		os.Remove,
		func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/etc/passwd", p)) },
	}
	for k, f := range damage {
		if err := f(objects[k]); err != nil {
			t.Fatal(err)
		}
	}
	again := open(t, r.Path())
	report, err := again.Fsck(ctx, repo.FsckOptions{})
	if err != nil || report.ObjectsBad != 3 || report.OK() {
		t.Errorf("fsck of the damage: %+v, %v", report, err)
	}
	_, stats, err := importTree(again, dir, "x")
	if err != nil || stats.Objects != len(damage) || stats.Reused != 21-len(damage) {
		t.Errorf("%+v, %v", stats, err)
	}
	mustBeClean(t, again)
}

func TestFileSystemsWithoutUnnamedFiles(t *testing.T) {
	defer repo.SetNoUnnamed(true)()
	r := newRepo(t)
	mustImport(t, r, newTree(t, 20, 1), "x")
	mustBeClean(t, r)
	left, _ := filepath.Glob(filepath.Join(r.Path(), "tmp/*"))
	if len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
	i, err := r.Begin(ctx, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := i.Put(strings.NewReader(strings.Repeat("x", 100)), 101); err == nil {
		t.Error("a content that is too short was taken")
	}
	i.Abort()
	old := filepath.Join(r.Path(), "tmp/old")
	if err := os.WriteFile(old, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A name that was to take the place of another when the process was killed.
	if err := os.Symlink("nowhere", filepath.Join(r.Path(), "tmp/name")); err != nil {
		t.Fatal(err)
	}
	mustBeClean(t, r)
	if plan, err := r.GC(ctx, repo.GCOptions{Margins: repo.DefaultMargins}); err != nil || len(plan.Temporary) != 0 {
		t.Errorf("a new temporary file is garbage: %+v, %v", plan, err)
	}
	plan, err := r.GC(ctx, repo.GCOptions{})
	slices.Sort(plan.Temporary)
	if err != nil || !slices.Equal(plan.Temporary, []string{"tmp/name", "tmp/old"}) {
		t.Errorf("an old temporary file is not: %+v, %v", plan, err)
	}
}

func TestLargeContentStreams(t *testing.T) {
	r := newRepo(t)
	i, err := r.Begin(ctx, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const size = 9<<20 + 3
	content := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	d, err := i.Put(content(), size)
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Commit(); err != nil {
		t.Fatal(err)
	}
	if want, _, _ := fsverity.OfReader(fsverity.SHA256, content()); d != want {
		t.Errorf("%v, want %v", d, want)
	}
	mustBeClean(t, r)
}

func TestAbortLeavesNoImage(t *testing.T) {
	r := newRepo(t)
	i, err := r.Begin(ctx, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := i.PutImage(fstree.New(), erofs.V1, "x")
	if err != nil {
		t.Fatal(err)
	}
	i.Abort()
	if _, _, err := r.OpenImage(d.String()); !errors.Is(err, repo.ErrNotFound) {
		t.Errorf("%v", err)
	}
	if err := i.Commit(); err == nil {
		t.Error("Commit after Abort")
	}
	if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
		t.Errorf("the lock was not released: %v", err)
	}
}

func TestGC(t *testing.T) {
	r := newRepo(t)
	one := mustImport(t, r, newTree(t, 30, 1), "keep")
	two := mustImport(t, r, newTree(t, 30, 2), "")
	three := mustImport(t, r, newTree(t, 30, 3), "")
	if err := os.WriteFile(filepath.Join(r.Path(), "objects/00-odd"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(filepath.Join(r.Path(), "objects/aa"), 0o755)
	if err := os.WriteFile(filepath.Join(r.Path(), "objects/aa/README"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	young, err := r.GC(ctx, repo.GCOptions{DryRun: true, Margins: repo.DefaultMargins})
	if err != nil || young.Objects != 0 || young.Recent != 62 {
		t.Errorf("within the margin: %d objects, %d recent, %v", young.Objects, young.Recent, err)
	}
	dry, err := r.GC(ctx, repo.GCOptions{DryRun: true, Roots: []string{three.String()}})
	if err != nil {
		t.Fatal(err)
	}
	mustBeThere := func(d fsverity.Digest, want bool) {
		t.Helper()
		f, _, err := r.OpenImage(d.String())
		if err == nil {
			f.Close()
		}
		if (err == nil) != want {
			t.Errorf("image %v: %v", d, err)
		}
	}
	mustBeThere(two, true)
	plan, err := r.GC(ctx, repo.GCOptions{Roots: []string{three.String()}})
	if err != nil || plan.Objects != dry.Objects || plan.Objects != 31 || len(plan.Images) != 1 {
		t.Errorf("%d objects, %v, %v, dry run %d", plan.Objects, plan.Images, err, dry.Objects)
	}
	if !slices.Contains(plan.Odd, "objects/aa/README") {
		t.Errorf("odd: %v", plan.Odd)
	}
	mustBeThere(one, true)
	mustBeThere(two, false)
	mustBeThere(three, true)
	if _, err := os.Stat(filepath.Join(r.Path(), "objects/aa/README")); err != nil {
		t.Errorf("a foreign file was removed: %v", err)
	}
}

// An image that cannot be read might need everything.
func TestGCStopsAtWhatItCannotRead(t *testing.T) {
	r := newRepo(t)
	d := mustImport(t, r, newTree(t, 3, 1), "x")
	mustImport(t, r, newTree(t, 3, 2), "")
	if err := os.WriteFile(filepath.Join(r.Path(), "objects", d.ObjectPath()), []byte("junk"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := r.GC(ctx, repo.GCOptions{}); err == nil || !strings.Contains(err.Error(), "nothing is removed") {
		t.Errorf("%v", err)
	}
}

// What a ref leads to is wanted. If it is lost, nothing that it may need is removed, and the ref says what to bring back.
func TestGCKeepsWhatALostImageNeeds(t *testing.T) {
	for name, lose := range map[string]func(d fsverity.Digest) string{
		"object": func(d fsverity.Digest) string { return "objects/" + d.ObjectPath() },
		"link":   func(d fsverity.Digest) string { return "images/" + d.String() },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRepo(t)
			tree := newTree(t, 3, 1)
			d := mustImport(t, r, tree, "x")
			if err := os.Remove(filepath.Join(r.Path(), lose(d))); err != nil {
				t.Fatal(err)
			}
			for _, dry := range []bool{true, false} {
				_, err := r.GC(ctx, repo.GCOptions{DryRun: dry})
				if err == nil || !strings.Contains(err.Error(), "images/refs/x: it leads to nothing") {
					t.Errorf("dry run %v: %v", dry, err)
				}
			}
			report, err := r.Fsck(ctx, repo.FsckOptions{})
			if err != nil || report.OK() {
				t.Errorf("fsck: %v, %v", report.Findings, err)
			}
			mustImport(t, r, tree, "x")
			if _, err := r.GC(ctx, repo.GCOptions{}); err != nil {
				t.Error(err)
			}
			if report, err := r.Fsck(ctx, repo.FsckOptions{}); err != nil || !report.OK() {
				t.Errorf("after the image was brought back: %v, %v", report.Findings, err)
			}
		})
	}
}

// What was measured in one import may have been collected by another process before the next one.
func TestImportAfterForeignGC(t *testing.T) {
	r := newRepo(t)
	tree := newTree(t, 3, 1)
	mustImport(t, r, tree, "")
	if plan, err := open(t, r.Path()).GC(ctx, repo.GCOptions{}); err != nil || plan.Objects != 4 {
		t.Fatalf("%+v, %v", plan, err)
	}
	mustImport(t, r, tree, "x")
	mustBeClean(t, r)
}

func TestFsckFindings(t *testing.T) {
	r := newRepo(t)
	d := mustImport(t, r, newTree(t, 5, 1), "x")
	other := fsverity.Of(fsverity.SHA256, nil).String()
	link := func(target, name string) {
		path := filepath.Join(r.Path(), name)
		os.MkdirAll(filepath.Dir(path), 0o755)
		os.Remove(path)
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	}
	link("../objects/"+d.ObjectPath(), "images/"+other)
	link("/etc/passwd", "images/refs/planted")
	link("../../elsewhere", "streams/name")
	link("../objects/"+d.ObjectPath(), "streams/not-a-stream")
	os.WriteFile(filepath.Join(r.Path(), "images/file"), nil, 0o644)
	report, err := r.Fsck(ctx, repo.FsckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range report.Findings {
		got = append(got, string(f.Kind)+" "+f.Path)
	}
	slices.Sort(got)
	want := []string{"broken-symlink images/" + other, "broken-symlink images/refs/planted", "broken-symlink streams/name",
		"entry-not-symlink images/file", "stream-read-failed streams/not-a-stream"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestLock(t *testing.T) {
	r := newRepo(t)
	i, err := r.Begin(ctx, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.GC(ctx, repo.GCOptions{}); !errors.Is(err, repo.ErrUpgrade) {
		t.Errorf("gc during an import of the same process: %v", err)
	}
	// Somebody else, as it were: another open file.
	other := open(t, r.Path())
	waited := ""
	_, err = other.GC(ctx, repo.GCOptions{Lock: repo.LockOptions{Timeout: 20 * time.Millisecond, Waiting: func(h string) { waited = h }}})
	if !errors.Is(err, repo.ErrLocked) || !strings.Contains(err.Error(), "process") || waited == "" {
		t.Errorf("%v, waited for %q", err, waited)
	}
	go func() {
		time.Sleep(20 * time.Millisecond)
		i.Abort()
	}()
	if _, err := other.GC(ctx, repo.GCOptions{}); err != nil {
		t.Errorf("waiting for the import: %v", err)
	}
}

// Eight writers of trees that overlap, two collectors and a reader at once: no error, no lost object. STRESS=1m makes it longer.
func TestConcurrentImportsAndGC(t *testing.T) {
	duration := 2 * time.Second
	if text := os.Getenv("STRESS"); text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	path := newRepo(t).Path()
	var trees []string
	for _, seed := range []uint64{1, 1, 2, 3} {
		trees = append(trees, newTree(t, 40, seed), newTree(t, 60, seed))
	}
	want := map[string]fsverity.Digest{}
	for k, dir := range trees {
		want[fmt.Sprint("tree", k)] = mustImport(t, newRepo(t), dir, "x")
	}
	end := time.Now().Add(duration)
	var all sync.WaitGroup
	for k, dir := range trees {
		all.Go(func() {
			r := open(t, path)
			ref := fmt.Sprint("tree", k)
			for time.Now().Before(end) {
				if d, _, err := importTree(r, dir, ref); err != nil || d != want[ref] {
					t.Error(d, err)
				}
				if k%2 == 0 { // the others keep what they made
					os.Remove(filepath.Join(path, "images/refs", ref))
				}
			}
			mustImport(t, r, dir, ref)
		})
	}
	for range 2 {
		all.Go(func() {
			r := open(t, path)
			for time.Now().Before(end) {
				if _, err := r.GC(ctx, repo.GCOptions{}); err != nil && !strings.Contains(err.Error(), "leads to nothing") {
					t.Error(err)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	all.Go(func() {
		r := open(t, path)
		for time.Now().Before(end) {
			report, err := r.VerifyImage(ctx, "refs/tree1", repo.VerifyOptions{})
			if errors.Is(err, repo.ErrNotFound) {
				continue // not yet
			}
			if err != nil || len(report.Findings) > 0 {
				t.Error(report.Findings, err)
			}
			time.Sleep(time.Millisecond)
		}
	})
	all.Wait()
	last := open(t, path)
	mustBeClean(t, last)
	for ref, d := range want {
		if report, err := last.VerifyImage(ctx, ref, repo.VerifyOptions{}); err != nil || len(report.Findings) > 0 || report.Image != d {
			t.Error(ref, report, err)
		}
	}
}

// TestMain is also the program that is killed.
func TestMain(m *testing.M) {
	if work := os.Getenv("REPO_TEST_CHILD"); work != "" {
		what, rest, _ := strings.Cut(work, " ")
		path, dir, _ := strings.Cut(rest, " ")
		r, err := repo.Open(path, repo.Options{})
		if err == nil && what == "import" {
			_, _, err = importTree(r, dir, filepath.Base(dir))
		}
		if err == nil && what == "gc" {
			_, err = r.GC(ctx, repo.GCOptions{})
		}
		if err == nil && what == "repair" {
			_, err = r.Repair(ctx, repo.RepairOptions{From: []string{dir}})
		}
		if err == nil && what == "convert" {
			var to *repo.Repo
			if to, err = repo.Open(dir, repo.Options{}); err == nil {
				_, err = r.ConvertTo(ctx, to, repo.ConvertOptions{Format: erofs.V1})
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child is a process of its own that does something with the repository at path, see TestMain.
func child(what, path, dir string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "REPO_TEST_CHILD="+what+" "+path+" "+dir)
	cmd.Stderr = os.Stderr
	return cmd
}

// Killed at any moment, an import or a garbage collection leaves a repository without fault, and the next run ends what
// it began.
func TestKilled(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	path := newRepo(t).Path()
	trees := []string{newTree(t, 700, 1), newTree(t, 700, 2)}
	child := func(what, dir string) *exec.Cmd { return child(what, path, dir) }
	whole := map[string]time.Duration{}
	for _, what := range []string{"import", "gc"} {
		start := time.Now()
		if err := child(what, trees[0]).Run(); err != nil {
			t.Fatal(err)
		}
		whole[what] = time.Since(start)
	}
	killed := 0
	for k := range 400 {
		// Each round begins with work to do: a ref less, so that there is garbage, and a tree more.
		what := []string{"import", "gc"}[k%2]
		dir := trees[r.IntN(2)]
		if what == "gc" {
			os.Remove(filepath.Join(path, "images/refs", filepath.Base(dir)))
		}
		cmd := child(what, dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(r.Int64N(int64(whole[what]) + 1)))
		cmd.Process.Kill()
		if err := cmd.Wait(); err != nil {
			killed++
		}
		rr := open(t, path)
		if report, err := rr.Fsck(ctx, repo.FsckOptions{MetadataOnly: k%10 != 0}); err != nil || !report.OK() {
			t.Fatalf("round %d: after %s was killed: %v, %v", k, what, report.Findings, err)
		}
		rr.Close()
	}
	if killed < 100 {
		t.Errorf("only %d of 400 were killed before they ended", killed)
	}
	last := open(t, path)
	for _, dir := range trees {
		if _, stats, err := importTree(last, dir, "again"); err != nil || stats.Objects+stats.Reused != 701 {
			t.Errorf("%+v, %v", stats, err)
		}
	}
	mustBeClean(t, last)
}
