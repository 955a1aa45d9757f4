package disk_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// BenchmarkWrite makes the image of a repository with the numbers of a minimal systemd OS: 8,000 objects, 270 MB, most of
// them small.
func BenchmarkWrite(b *testing.B) {
	dir := b.TempDir()
	r := rand.New(rand.NewPCG(1, 2))
	var total int64
	for range 8000 {
		size := 100 + int(r.ExpFloat64()*r.ExpFloat64()*33_000)
		data := make([]byte, size)
		for k := range data {
			data[k] = byte(r.Uint32())
		}
		file := filepath.Join(dir, "composefs/objects", fsverity.Of(fsverity.SHA512, data).ObjectPath())
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(file, data, 0o644); err != nil {
			b.Fatal(err)
		}
		total += int64(size)
	}
	b.SetBytes(total)
	for b.Loop() {
		out, err := os.Create(filepath.Join(b.TempDir(), "disk.img"))
		if err != nil {
			b.Fatal(err)
		}
		if err := writeAll(out, reproducibleLayoutOf(dir, 1<<30)); err != nil {
			b.Fatal(err)
		}
		out.Close()
	}
}
