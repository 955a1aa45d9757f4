package fsverity_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Both ways to the tree give the same.
func TestWriteTree(t *testing.T) {
	content := bytes.Repeat([]byte("some content "), 4096*70)
	for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		perBlock := fsverity.BlockSize / alg.Size()
		for _, size := range []int{0, 1, 4096, 4097, 4096 * perBlock, 4096*perBlock + 1, len(content)} {
			want, _, err := fsverity.MetadataOf(alg, bytes.NewReader(content[:size]))
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Create(t.TempDir() + "/tree")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got, err := fsverity.WriteTree(alg, bytes.NewReader(content[:size]), int64(size), f)
			if err != nil || got.Digest != want.Digest || !bytes.Equal(got.Descriptor, want.Descriptor) {
				t.Errorf("%v of %d bytes: %v, %v, want %v", alg, size, got.Digest, err, want.Digest)
			}
			tree, err := os.ReadFile(f.Name())
			if err != nil || !bytes.Equal(tree, want.Tree) {
				t.Errorf("%v of %d bytes: tree of %d bytes differs from that of %d", alg, size, len(tree), len(want.Tree))
			}
			if n := fsverity.TreeSize(alg, int64(size)); n != int64(len(want.Tree)) {
				t.Errorf("%v of %d bytes: TreeSize %d, want %d", alg, size, n, len(want.Tree))
			}
		}
		for _, size := range []int64{0, 4095, 4097, 100 * 4096} {
			f, err := os.Create(t.TempDir() + "/tree")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			_, err = fsverity.WriteTree(alg, bytes.NewReader(content[:4096]), size, f)
			if err == nil || !strings.Contains(err.Error(), "has 4096 bytes instead of") {
				t.Errorf("%v, planned %d: %v", alg, size, err)
			}
		}
	}
}
