package main

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// mustBehave runs a command on hostile input: it ends with 0 or 1, and an error is one line.
func mustBehave(t *testing.T, stdin []byte, args ...string) {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(context.Background(), args, bytes.NewReader(stdin), &out, &errs)
	text := strings.TrimSuffix(errs.String(), "\n")
	last := text[strings.LastIndexByte(text, '\n')+1:]
	if code != 0 && code != 1 || code == 1 && (last == "" || len(last) > 8192) || strings.Contains(text, "goroutine ") {
		t.Errorf("%q: exit code %d: %.500s", args, code, text)
	}
}

// Hostile dumpfiles go through every command that reads them.
func TestHostileDumpfilesEverywhere(t *testing.T) {
	list, err := filepath.Glob(filepath.Join(vm.Top(t), "repo/dumpfile/testdata/*.dump"))
	if err != nil || len(list) < 30 {
		t.Fatal("no hostile dumpfiles", err)
	}
	dir := t.TempDir()
	repository := filepath.Join(dir, "repo")
	mustBehave(t, nil, "composefs-boot", "init", "--insecure", repository)
	for _, path := range list {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		mustBehave(t, text, "composefs-boot", "dump-to-image")
		mustBehave(t, text, "composefs-boot", "--repo", repository, "import-image", "--from-dumpfile", "hostile")
		mustBehave(t, nil, "mkcomposefs", "--from-file", path, filepath.Join(dir, "image"))
		mustBehave(t, nil, "composefs-boot", "diff", path, path)
		mustBehave(t, nil, "composefs-boot", "ls", path)
	}
}

// Images with wrong bytes, and cut ones, go through every command that reads them.
func TestHostileImagesEverywhere(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	dir := t.TempDir()
	repository := filepath.Join(dir, "repo")
	mustBehave(t, nil, "composefs-boot", "init", "--insecure", "--hash", "sha256", repository)
	image := filepath.Join(dir, "image")
	for _, name := range []string{"every-type.v0", "every-type.v1", "deep.v1", "dir-block-edges.v1", "devices.v0"} {
		whole := golden.Read(t, "images/"+name+".erofs.gz")
		good := filepath.Join(dir, "good")
		if err := os.WriteFile(good, whole, 0o644); err != nil {
			t.Fatal(err)
		}
		if code, out, errs := command("ls", "-R", good); code != 0 || out == "" {
			t.Fatalf("%s as it is: %s", name, errs)
		}
		for k := range 40 {
			bad := bytes.Clone(whole)
			if k%8 == 0 {
				bad = bad[:r.IntN(len(bad))]
			}
			for range 1 + r.IntN(4) {
				if len(bad) > 0 {
					// Most of an image is zeros that nobody reads.
					at := r.IntN(min(len(bad), 1024+1<<r.IntN(16)))
					bad[at] = byte(r.Uint32())
				}
			}
			if err := os.WriteFile(image, bad, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, what := range []string{"dump", "ls", "objects", "missing-objects"} {
				mustBehave(t, nil, "composefs-info", "--basedir="+dir, what, image)
			}
			mustBehave(t, nil, "composefs-boot", "ls", "-R", image)
			mustBehave(t, nil, "composefs-boot", "cat", image, "/etc/passwd", "/")
			mustBehave(t, nil, "composefs-boot", "diff", image, good)
			mustBehave(t, nil, "composefs-boot", "export", "--tar", "-o", filepath.Join(dir, "tar"), image)
			mustBehave(t, nil, "composefs-boot", "extract", "--dry-run", image, filepath.Join(dir, "out"))
			mustBehave(t, nil, "composefs-boot", "extract", image, filepath.Join(dir, "out"))
			os.RemoveAll(filepath.Join(dir, "out"))
			mustBehave(t, nil, "composefs-boot", "-q", "--repo", repository, "verify", image)
			mustBehave(t, bad, "composefs-boot", "--repo", repository, "import-image", "hostile")
			mustBehave(t, nil, "composefs-boot", "--repo", repository, "image-objects", "hostile")
			mustBehave(t, nil, "composefs-boot", "--repo", repository, "dump-files", "hostile", "/")
			mustBehave(t, nil, "composefs-boot", "--repo", repository, "mount", "--dry-run", "hostile", dir)
			mustBehave(t, nil, "composefs-boot", "-q", "--repo", repository, "verify", "hostile")
			mustBehave(t, nil, "composefs-boot", "-q", "--repo", repository, "fsck")
			mustBehave(t, nil, "composefs-boot", "-q", "--repo", repository, "fsck", "--repair")
			mustBehave(t, nil, "composefs-boot", "-q", "--repo", repository, "convert")
			os.RemoveAll(filepath.Join(repository, "images"))
		}
	}
}
