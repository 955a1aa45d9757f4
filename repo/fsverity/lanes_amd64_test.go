package fsverity

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// ways returns every way that this processor has to hash blocks, by name. The empty one is the standard library.
func ways() map[string][3]lanes {
	f := features()
	all := map[string][3]lanes{"standard": choose(cpuFeatures{})}
	if f.avx2 {
		all["avx2"] = choose(cpuFeatures{avx2: true})
	}
	if f.avx512 {
		all["avx512"] = choose(cpuFeatures{avx2: true, avx512: true})
		all["avx512+sha"] = choose(cpuFeatures{avx2: true, avx512: true, sha: f.sha})
	}
	return all
}

func use(t testing.TB, e [3]lanes) {
	before := engines
	engines = e
	t.Cleanup(func() { engines = before })
}

func randomBytes(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for k := range b {
		b[k] = byte(r.Uint32())
	}
	return b
}

// Every way gives the hashes of the standard library: any number of blocks, at any address, with bytes of any kind.
func TestEveryWayToHash(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	data := randomBytes(r, 40*BlockSize)
	copy(data[3*BlockSize:], bytes.Repeat([]byte{0xff}, BlockSize))
	copy(data[5*BlockSize:], make([]byte, BlockSize))
	for name, e := range ways() {
		t.Run(name, func(t *testing.T) {
			use(t, e)
			for count := range 36 {
				start := r.IntN(64)
				blocks := data[start : start+count*BlockSize]
				want256, want512 := []byte("before"), []byte("before")
				for k := range count {
					one, two := sha256.Sum256(blocks[k*BlockSize:][:BlockSize]), sha512.Sum512(blocks[k*BlockSize:][:BlockSize])
					want256, want512 = append(want256, one[:]...), append(want512, two[:]...)
				}
				if got := hashBlocks(SHA256, blocks, []byte("before")); !bytes.Equal(got, want256) {
					t.Errorf("sha256 of %d blocks differs", count)
				}
				if got := hashBlocks(SHA512, blocks, []byte("before")); !bytes.Equal(got, want512) {
					t.Errorf("sha512 of %d blocks differs", count)
				}
			}
		})
	}
}

// What is chosen for the processors that there are.
func TestChoice(t *testing.T) {
	for f, want := range map[cpuFeatures][2]string{
		{}:                                    {"", ""},
		{avx2: true}:                          {"avx2", "avx2"},
		{avx2: true, sha: true}:               {"", "avx2"},
		{avx2: true, avx512: true}:            {"avx512", "avx512"},
		{avx2: true, avx512: true, sha: true}: {"avx512", "avx512"},
	} {
		e := choose(f)
		if got := [2]string{e[SHA256].name, e[SHA512].name}; got != want {
			t.Errorf("%+v: %q, want %q", f, got, want)
		}
	}
}

// BenchmarkBlocks tells what each way makes of a core: 16 blocks at a time.
func BenchmarkBlocks(b *testing.B) {
	data := randomBytes(rand.New(rand.NewPCG(1, 1)), 16*BlockSize)
	out := make([]byte, 0, 16*64)
	for _, a := range []Algorithm{SHA256, SHA512} {
		for name, e := range ways() {
			b.Run(fmt.Sprintf("%v/%s", a, name), func(b *testing.B) {
				use(b, e)
				b.SetBytes(int64(len(data)))
				for b.Loop() {
					hashBlocks(a, data, out)
				}
			})
		}
	}
}

// The assembly is what the generator writes.
func TestAssemblyIsGenerated(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("go", "run", ".", "-out", filepath.Join(dir, "blocks.s"), "-stubs", filepath.Join(dir, "blocks.go"), "-pkg", "fsverity")
	cmd.Dir = "asm"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for have, want := range map[string]string{"blocks_amd64.s": "blocks.s", "blocks_amd64.go": "blocks.go"} {
		a, err := os.ReadFile(have)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(dir, want))
		if err != nil {
			t.Fatal(err)
		}
		// The first line names the files.
		_, a, _ = bytes.Cut(a, []byte("\n"))
		_, b, _ = bytes.Cut(b, []byte("\n"))
		if !bytes.Equal(a, b) {
			t.Errorf("%s is not what the generator writes: run go generate", have)
		}
	}
}
