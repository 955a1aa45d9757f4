package repo_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// files returns the regular files below a directory, with what they hold.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil && info.Mode() != 0o644 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		text, err := os.ReadFile(path)
		found[strings.TrimPrefix(path, dir+"/")] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// A store has the objects and nothing else, whichever way they came. Those that are there and right stay what they are.
func TestStore(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	small, large := bytes.Repeat([]byte("small"), 100), bytes.Repeat([]byte("large"), 1<<20)
	for _, unnamed := range []bool{true, false} {
		restore := repo.SetNoUnnamed(!unnamed)
		dir := filepath.Join(t.TempDir(), "a/b")
		put := func(contents ...[]byte) {
			t.Helper()
			i, err := repo.BeginStore(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer i.Abort()
			var all sync.WaitGroup
			for range 3 {
				for _, content := range contents {
					all.Go(func() {
						d, err := i.Put(bytes.NewReader(content), int64(len(content)))
						if err != nil || d != fsverity.Of(fsverity.SHA256, content) {
							t.Errorf("%v, %v", d, err)
						}
						// The same from a file, which may be cloned.
						f, err := os.CreateTemp(t.TempDir(), "")
						if err == nil {
							defer f.Close()
							f.Write(content)
							f.Seek(0, 0)
							d, err = i.Put(f, int64(len(content)))
						}
						if err != nil || d != fsverity.Of(fsverity.SHA256, content) {
							t.Errorf("%v, %v", d, err)
						}
					})
				}
			}
			all.Wait()
			if err := i.Commit(); err != nil {
				t.Fatal(err)
			}
		}
		put(small, large)
		one, two := fsverity.Of(fsverity.SHA256, small).ObjectPath(), fsverity.Of(fsverity.SHA256, large).ObjectPath()
		before, err := os.Stat(filepath.Join(dir, one))
		if err != nil {
			t.Fatal(err)
		}
		os.WriteFile(filepath.Join(dir, two), []byte("broken"), 0o644)
		put(small, large)
		found := files(t, dir)
		if len(found) != 2 || found[one] != string(small) || found[two] != string(large) {
			t.Errorf("unnamed files %v: %d files", unnamed, len(found))
		}
		if after, err := os.Stat(filepath.Join(dir, one)); err != nil || !os.SameFile(before, after) {
			t.Errorf("a good object was replaced: %v", err)
		}
		if _, err := os.Stat(filepath.Join(dir, "tmp")); err == nil {
			t.Error("tmp/ is still there")
		}
		restore()
	}
}

func TestStoreThatCannotBeMade(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	os.WriteFile(file, nil, 0o644)
	if _, err := repo.BeginStore(file + "/store"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("%v", err)
	}
}
