package scan_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

func imageDigest(t *testing.T, tree *fstree.Tree, format erofs.Format, alg fsverity.Algorithm) string {
	t.Helper()
	d := fsverity.NewDigester(alg)
	if err := erofs.Write(d, tree, format); err != nil {
		t.Fatal(err)
	}
	return d.Sum().String()
}

// Every golden tree gives the image digests of the reference tools, in every mode that needs no boot transform.
func TestGoldenTrees(t *testing.T) {
	for name, vectors := range golden.Load(t).Trees {
		dir := golden.Extract(t, "trees/"+name+".tar.gz")
		for mode, algorithms := range vectors.Modes {
			if mode == "boot" {
				continue // package boot has these
			}
			for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
				xattrs := fstree.XattrsAllowlist
				if mode == "keep-user-xattrs" {
					xattrs = fstree.XattrsKeepUser
				}
				if mode == "as-is" {
					xattrs = fstree.XattrsAll
				}
				tree, err := scan.Dir(context.Background(), dir, scan.Digests(alg), scan.Options{Xattrs: xattrs})
				if err != nil {
					t.Fatal(err)
				}
				if mode != "as-is" {
					if err := tree.MakeContainerRoot(xattrs); err != nil {
						t.Fatal(err)
					}
				}
				for format, want := range algorithms[alg.String()] {
					f, err := erofs.ParseFormat(format)
					if err != nil {
						t.Fatal(err)
					}
					if got := imageDigest(t, tree, f, alg); got != want {
						t.Errorf("%s %s %v %s: %s, want %s", name, mode, alg, format, got, want)
					}
				}
			}
		}
	}
}

// The C tool keeps every attribute and makes a file of its own of every name; with options it leaves more out.
func TestGoldenTreesOfTheCTool(t *testing.T) {
	for name, vectors := range golden.Load(t).Trees {
		dir := golden.Extract(t, "trees/"+name+".tar.gz")
		if len(vectors.CTool) != 2 {
			t.Errorf("%s: %d vectors", name, len(vectors.CTool))
		}
		for options, formats := range vectors.CTool {
			tree, err := scan.Dir(context.Background(), dir, scan.Digests(fsverity.SHA256), scan.Options{Xattrs: fstree.XattrsAll})
			if err != nil {
				t.Fatal(err)
			}
			tree.Walk(func(_ string, i *fstree.Inode) error {
				if strings.Contains(options, "--use-epoch") {
					i.Mtime = fstree.Time{}
				}
				if strings.Contains(options, "--skip-xattrs") {
					i.Xattrs = nil
				}
				if d := i.Dir(); d != nil {
					kept := d.Entries[:0]
					for _, e := range d.Entries {
						if _, device := e.Inode.Content.(fstree.Device); device && strings.Contains(options, "--skip-devices") {
							continue
						}
						if e.Inode.Dir() == nil {
							single := *e.Inode
							e.Inode = &single
						}
						kept = append(kept, e)
					}
					d.Entries = kept
				}
				return nil
			})
			tree.CountLinks()
			for format, want := range formats {
				f, err := erofs.ParseFormat(format)
				if err != nil {
					t.Fatal(err)
				}
				if got := imageDigest(t, tree, f, fsverity.SHA256); got != want {
					t.Errorf("%s %s %s: %s, want %s", name, options, format, got, want)
				}
			}
		}
	}
}

// write makes a file with its directories.
func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func dump(t *testing.T, dir string, o scan.Options) string {
	t.Helper()
	tree, err := scan.Dir(context.Background(), dir, scan.Digests(fsverity.SHA256), o)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := dumpfile.Write(&b, tree, dumpfile.Cfsctl); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestWorkersDoNotShowInTheResult(t *testing.T) {
	dir := t.TempDir()
	for k := range 300 {
		path := filepath.Join(dir, fmt.Sprint("d", k%7), fmt.Sprint("e", k%11), fmt.Sprint("f", k))
		write(t, path, strings.Repeat("x", k))
		if k%5 == 0 && k > 100 {
			if err := os.Link(path, filepath.Join(dir, fmt.Sprint("d", (k+1)%7), fmt.Sprint("link", k))); err != nil {
				t.Fatal(err)
			}
		}
	}
	one := dump(t, dir, scan.Options{Workers: 1})
	if !strings.Contains(one, " @120000 ") {
		t.Error("no hard link was kept")
	}
	for _, workers := range []int{2, 16} {
		if got := dump(t, dir, scan.Options{Workers: workers}); got != one {
			t.Errorf("%d workers give another tree than one", workers)
		}
	}
	var progress scan.Progress
	dump(t, dir, scan.Options{Progress: &progress})
	if progress.Files.Load() != int64(strings.Count(one, "\n")-1) {
		t.Errorf("progress counted %d files of %d", progress.Files.Load(), strings.Count(one, "\n")-1)
	}
}

func TestMountIsNotCrossed(t *testing.T) {
	for _, mounted := range []string{"directory", "file"} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "usr/here/file"), "x")
		target, source, kind, flags := filepath.Join(dir, "usr/here"), "tmpfs", "tmpfs", uintptr(0)
		if mounted == "file" {
			target, source, kind, flags = filepath.Join(dir, "usr/here/file"), "/proc/version", "", unix.MS_BIND
		}
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			t.Fatalf("mounting needs root: %v", err)
		}
		_, err := scan.Dir(context.Background(), dir, scan.Digests(fsverity.SHA256), scan.Options{})
		tree, mountsErr := scan.Dir(context.Background(), dir, scan.Digests(fsverity.SHA256), scan.Options{Mounts: true})
		unix.Unmount(target, 0)
		if mountsErr != nil || tree.Lookup(strings.TrimPrefix(target, dir)) == nil || mounted == "directory" && tree.Lookup("usr/here/file") != nil {
			t.Errorf("with Mounts, what is mounted at a %s is not read: %v", mounted, mountsErr)
		}
		if !errors.Is(err, scan.ErrCrossesMount) || !strings.Contains(err.Error(), strings.TrimPrefix(target, dir+"/")) {
			t.Errorf("a mounted %s: %v", mounted, err)
		}
	}
}

// changing is a sink in whose hands the tree changes.
type changing struct {
	fstree.Sink
	change func()
}

func (s changing) Put(r io.Reader, size int64) (fsverity.Digest, error) {
	s.change()
	return s.Sink.Put(r, size)
}

// large is the content of a file that is not read together with others.
var large = strings.Repeat("x", 100<<10)

func TestFileThatGrowsIsAnError(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "usr/log")
	write(t, path, large)
	grow := changing{scan.Digests(fsverity.SHA256), func() { write(t, path, large+"x") }}
	_, err := scan.Dir(context.Background(), dir, grow, scan.Options{})
	if err == nil || !strings.Contains(err.Error(), "usr/log: changed while it was read") {
		t.Errorf("%v", err)
	}
}

func TestFileReplacedBySymlinkIsNotFollowed(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a"), large)
	write(t, filepath.Join(dir, "b"), large)
	replace := changing{scan.Digests(fsverity.SHA256), func() {
		for _, name := range []string{"a", "b"} {
			os.Remove(filepath.Join(dir, name))
			os.Symlink("/etc/shadow", filepath.Join(dir, name))
		}
	}}
	_, err := scan.Dir(context.Background(), dir, replace, scan.Options{Workers: 1})
	if !errors.Is(err, unix.ELOOP) {
		t.Errorf("%v", err)
	}
}

func TestErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "x")
	for _, path := range []string{file, file + "-missing"} {
		if _, err := scan.Dir(context.Background(), path, scan.Digests(fsverity.SHA256), scan.Options{}); err == nil ||
			!strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
		}
	}
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := scan.Dir(canceled, "/usr", scan.Digests(fsverity.SHA256), scan.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

func TestSymlinkToTheTree(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "tree/usr/file"), "x")
	os.Symlink("tree", filepath.Join(dir, "link"))
	if dump(t, filepath.Join(dir, "link"), scan.Options{}) != dump(t, filepath.Join(dir, "tree"), scan.Options{}) {
		t.Error("through a symlink the tree is another one")
	}
}

func TestFilesReadsBack(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "usr/file"), strings.Repeat("content", 100))
	tree, err := scan.Dir(context.Background(), dir, scan.Digests(fsverity.SHA256), scan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	open := scan.Files(dir)
	f, err := open("/usr/file", tree.Lookup("usr/file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, _ := io.ReadAll(f); string(b) != strings.Repeat("content", 100) {
		t.Errorf("read %d other bytes", len(b))
	}
	os.Remove(filepath.Join(dir, "usr/file"))
	os.Symlink("/etc/shadow", filepath.Join(dir, "usr/file"))
	if _, err := open("/usr/file", nil); err == nil {
		t.Error("a symlink in the file's place was followed")
	}
}
