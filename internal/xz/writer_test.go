package xz

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func compress(t testing.TB, c *Compressor, in []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := c.Compress(&b, bytes.NewReader(in), int64(len(in))); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// corpus is what packs well, badly, and both in turns.
func corpus(t testing.TB) map[string][]byte {
	r := rand.NewChaCha8([32]byte{4})
	noise := make([]byte, 3<<20+5)
	r.Read(noise)
	var records, mixed []byte
	for k := range 40_000 {
		records = append(records, byte(k), byte(k>>8), 0, 0, byte(r.Uint64())&3, 7, 7, byte(k>>3))
	}
	for len(mixed) < 5<<20 {
		k, n := int(r.Uint64()%1000), int(r.Uint64()%200_000)
		mixed = append(mixed, records[k*100:][:k]...)
		mixed = append(mixed, noise[n:][:n]...)
	}
	program, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{
		"nothing": nil, "a byte": {0}, "two": {1, 1}, "three": {1, 2, 1}, "words": []byte(strings.Repeat("a word, ", 9)), "zeros": make([]byte, 5<<20),
		"noise": noise, "records": records, "mixed": mixed, "program": program[:min(len(program), 3<<20)],
	}
}

// What is packed is unpacked by xz and by this package, and is not larger than what xz makes.
func TestCompress(t *testing.T) {
	var c Compressor
	for name, in := range corpus(t) {
		packed := compress(t, &c, in)
		r, err := NewReader(bytes.NewReader(packed))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if out, err := io.ReadAll(r); err != nil || !bytes.Equal(out, in) {
			t.Errorf("%s: %d bytes of %d, %v", name, len(out), len(in), err)
		}
		if out := xz(t, packed, "--decompress"); !bytes.Equal(out, in) {
			t.Errorf("%s: xz unpacks %d bytes of %d", name, len(out), len(in))
		}
		if theirs := xz(t, in, "-8", "--threads=1"); len(packed) > len(theirs)+len(theirs)/50+16 {
			t.Errorf("%s: %d bytes, xz makes %d", name, len(packed), len(theirs))
		}
		if again := compress(t, &Compressor{}, in); !bytes.Equal(again, packed) {
			t.Errorf("%s: another compressor packs it in another way", name)
		}
	}
}

// Content of more than a block.
func TestBlocks(t *testing.T) {
	in := make([]byte, blockSize+blockSize/8)
	r := rand.NewChaCha8([32]byte{5})
	for at := 0; at < len(in); at += 1 << 20 {
		r.Read(in[at:min(at+1<<12, len(in))])
	}
	packed := compress(t, &Compressor{}, in)
	if out := xz(t, packed, "--decompress"); !bytes.Equal(out, in) {
		t.Errorf("xz unpacks %d bytes of %d", len(out), len(in))
	}
	if list := xz(t, packed, "--robot", "--list", "--verbose"); bytes.Count(list, []byte("\nblock")) != 2 || !bytes.Contains(list, []byte("CRC64")) {
		t.Errorf("%s", list)
	}
}

// A reader that ends early is told of.
func TestCompressShort(t *testing.T) {
	if err := new(Compressor).Compress(io.Discard, strings.NewReader("short"), 6); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
}

// xz runs xz with an input, which it reads from a file: it lists no others.
func xz(t testing.TB, in []byte, args ...string) []byte {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "*.xz")
	if err == nil {
		_, err = f.Write(in)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("xz", append(args, "--stdout", f.Name())...).Output()
	if err != nil && args[0] != "--robot" {
		t.Fatalf("xz %q: %v (apt-get install xz-utils)", args, err)
	}
	return out
}
