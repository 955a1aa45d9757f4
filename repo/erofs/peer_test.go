package erofs_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// fitC makes a random tree one that the C tools can take: they know sha256 digests only, and no fsck complains about what
// they write.
func fitC(t *fstree.Tree) {
	t.Walk(func(_ string, i *fstree.Inode) error {
		if o, ok := i.Content.(*fstree.Object); ok && o.Digest.Algorithm() == fsverity.SHA512 {
			o.Digest = fsverity.Of(fsverity.SHA256, o.Digest.Bytes())
		}
		// composefs-info reads a path to the next NUL, and there is one only where the attribute is padded.
		if o, ok := i.Content.(*fstree.Object); ok && len(o.Path)%4 == 3 {
			o.Path += "/"
		}
		return nil
	})
}

// The C tools make the same images of random trees, and print the same dumps of them.
func TestRandomTreesAgainstTheCTools(t *testing.T) {
	dir := t.TempDir()
	dump, image := filepath.Join(dir, "dump"), filepath.Join(dir, "image")
	for seed := range 40 {
		r := rand.New(rand.NewPCG(uint64(seed), 99))
		tree := randomTree(r, 1+r.IntN(500))
		fitC(tree)
		var text bytes.Buffer
		if err := dumpfile.Write(&text, tree, dumpfile.Cfsctl); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dump, text.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		// What the dump cannot say, an image need not have.
		tree, err := dumpfile.Read(bytes.NewReader(text.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		for version, format := range map[string]erofs.Format{"0": erofs.V0, "1": erofs.V1} {
			cmd := vm.Peer(t, "usr/bin/mkcomposefs", "--from-file", "--min-version="+version, "--max-version="+version, dump, image)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("seed %d: mkcomposefs: %v\n%s", seed, err, out)
			}
			want, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if err := erofs.Write(&got, tree, format); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Fatalf("seed %d %v: mkcomposefs makes another image", seed, format)
			}
			out, err := vm.Peer(t, "usr/bin/composefs-info", "dump", image).Output()
			if err != nil {
				t.Fatalf("seed %d: composefs-info: %v", seed, err)
			}
			style := map[erofs.Format]dumpfile.Style{erofs.V0: dumpfile.InfoV0, erofs.V1: dumpfile.InfoV1}[format]
			text.Reset()
			if err := dumpfile.Write(&text, tree, style); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(text.Bytes(), out) {
				want, got := bytes.Split(out, []byte("\n")), bytes.Split(text.Bytes(), []byte("\n"))
				for k := range want {
					if k >= len(got) || !bytes.Equal(want[k], got[k]) {
						t.Fatalf("seed %d %v: composefs-info prints another dump, at line %d:\n%s\n%s", seed, format, k+1, want[k], got[min(k, len(got)-1)])
					}
				}
				t.Fatalf("seed %d %v: composefs-info prints a shorter dump", seed, format)
			}
		}
	}
}
