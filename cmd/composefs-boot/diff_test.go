package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// writeImage writes a tree's image to a file.
func writeImage(t testing.TB, tree *fstree.Tree, path string) {
	t.Helper()
	var b bytes.Buffer
	if err := erofs.Write(&b, tree, erofs.V1); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Two images of 100,000 files that differ in one of a hundred.
func BenchmarkDiffImages(b *testing.B) {
	dir := b.TempDir()
	for version, name := range []string{"a", "b"} {
		tree := fstree.New()
		for k := range 1000 {
			sub := fstree.NewDir(0o755)
			for n := range 100 {
				content := fmt.Sprint(k, n)
				if n == 50 {
					content += fmt.Sprint(" of ", version)
				}
				i := &fstree.Inode{Perm: 0o644, Nlink: 1, Mtime: fstree.Time{Sec: 1_700_000_000, Nsec: uint32(k)},
					Content: &fstree.Object{Digest: fsverity.Of(fsverity.SHA256, []byte(content)), Size: 1000}}
				i.SetXattr("security.selinux", []byte("system_u:object_r:usr_t:s0\x00"))
				sub.Dir().Set(fmt.Sprintf("file-%02d", n), i)
			}
			tree.Root.Dir().Set(fmt.Sprintf("dir-%03d", k), sub)
		}
		writeImage(b, tree, filepath.Join(dir, name))
	}
	b.ReportAllocs()
	for b.Loop() {
		var out bytes.Buffer
		args := []string{"composefs-boot", "diff", filepath.Join(dir, "a"), filepath.Join(dir, "b")}
		if code := run(context.Background(), args, nil, &out, io.Discard); code != 1 || bytes.Count(out.Bytes(), []byte("\n~ ")) != 999 {
			b.Fatalf("exit code %d, %d bytes", code, out.Len())
		}
	}
}
