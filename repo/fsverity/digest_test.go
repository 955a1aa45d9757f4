package fsverity_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func TestGoldenDigests(t *testing.T) {
	vectors := golden.Load(t).Fsverity
	if len(vectors) == 0 {
		t.Fatal("no vectors")
	}
	for _, v := range vectors {
		content := v.Content()
		for alg, want := range map[fsverity.Algorithm]string{fsverity.SHA256: v.Sha256, fsverity.SHA512: v.Sha512} {
			if got := fsverity.Of(alg, content); got.String() != want {
				t.Errorf("%v of %d bytes: %v, want %s", alg, v.Size, got, want)
			}
			got, n, err := fsverity.OfReader(alg, bytes.NewReader(content))
			if err != nil || n != int64(v.Size) || got.String() != want {
				t.Errorf("%v of a reader of %d bytes: %v, %d, %v", alg, v.Size, got, n, err)
			}
			m, _, err := fsverity.MetadataOf(alg, bytes.NewReader(content))
			if err != nil || m.Digest != got {
				t.Errorf("metadata of %d bytes: %v, %v", v.Size, m.Digest, err)
			}
		}
	}
}

// However the content is cut into writes, the digest is the same.
func TestWritesOfAnySize(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		content := make([]byte, r.IntN(1<<20))
		for i := range content {
			content[i] = byte(r.Uint32())
		}
		for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
			d := fsverity.NewDigester(alg)
			for rest := content; len(rest) > 0; {
				n := min(1+r.IntN(20000), len(rest))
				d.Write(rest[:n])
				rest = rest[n:]
			}
			if got, want := d.Sum(), fsverity.Of(alg, content); got != want {
				t.Fatalf("%v, %d bytes in pieces: %v, at once: %v", alg, len(content), got, want)
			}
		}
	}
}

// Files are the same together as alone.
func TestOfAll(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 100 {
		contents := make([][]byte, r.IntN(70))
		for k := range contents {
			contents[k] = make([]byte, []int{0, 1, 4095, 4096, 4097, 64 * 4096, 64*4096 + 1, 128 * 4096, 128*4096 + 1, r.IntN(1 << 16)}[r.IntN(10)])
			for n := range contents[k] {
				contents[k][n] = byte(r.Uint32())
			}
		}
		for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
			for k, got := range fsverity.OfAll(alg, contents) {
				if want := fsverity.Of(alg, contents[k]); got != want {
					t.Fatalf("%v of %d bytes, together: %v, alone: %v", alg, len(contents[k]), got, want)
				}
			}
		}
	}
}

func TestResetForgetsTheFile(t *testing.T) {
	d := fsverity.NewDigester(fsverity.SHA512)
	d.Write(make([]byte, 3*fsverity.BlockSize*64+5))
	d.Sum()
	d.Reset()
	d.Write([]byte("hello"))
	if got, want := d.Sum(), fsverity.Of(fsverity.SHA512, []byte("hello")); got != want {
		t.Errorf("after Reset: %v, want %v", got, want)
	}
}

func TestDigestNames(t *testing.T) {
	d := fsverity.Of(fsverity.SHA256, nil)
	for _, parse := range []func() (fsverity.Digest, error){
		func() (fsverity.Digest, error) { return fsverity.ParseHex(d.String()) },
		func() (fsverity.Digest, error) { return fsverity.ParseObjectPath(d.ObjectPath()) },
		func() (fsverity.Digest, error) { return fsverity.MakeDigest(d.Algorithm(), d.Bytes()) },
	} {
		if got, err := parse(); err != nil || got != d {
			t.Errorf("got %v, %v, want %v", got, err, d)
		}
	}
	for _, bad := range []string{"", "00", "3D248CA542A24FC62D1C43B916EAE5016878E2533C88238480B26128A1F1AF95",
		"zd248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95", d.String() + "0", "/" + d.String()[1:]} {
		if _, err := fsverity.ParseHex(bad); err == nil {
			t.Errorf("ParseHex(%q) is accepted", bad)
		}
	}
}

func BenchmarkDigest(b *testing.B) {
	data := make([]byte, 16<<20)
	for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		b.Run(alg.String(), func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				fsverity.Of(alg, data)
			}
		})
	}
}
