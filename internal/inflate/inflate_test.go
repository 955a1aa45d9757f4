package inflate

import (
	"bytes"
	stdflate "compress/flate"
	stdgzip "compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/flate"
)

// contents are of every kind that a compressor treats otherwise.
func contents() map[string][]byte {
	random := rand.New(rand.NewPCG(1, 2))
	bytesOf := func(n int, f func(int) byte) []byte {
		b := make([]byte, n)
		for k := range b {
			b[k] = f(k)
		}
		return b
	}
	fibonacci := func() []byte { // codes as long as there are
		var b []byte
		x, y := 1, 1
		for k := range 24 {
			b = append(b, bytes.Repeat([]byte{byte(k)}, x)...)
			x, y = y, x+y
		}
		random.Shuffle(len(b), func(i, j int) { b[i], b[j] = b[j], b[i] })
		return b
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		panic(err)
	}
	return map[string][]byte{
		"empty":      nil,
		"one":        {7},
		"zeros":      make([]byte, 1<<20),
		"random":     bytesOf(1<<20, func(int) byte { return byte(random.Uint32()) }),
		"nibbles":    bytesOf(1<<20, func(int) byte { return byte(random.Uint32() & 15) }),
		"short runs": bytesOf(1<<20, func(k int) byte { return byte(k / 3) }),
		"periods":    bytesOf(1<<20, func(k int) byte { return byte(k % (2 + k>>16%7)) }),
		"skewed":     fibonacci(),
		"mixed": bytesOf(1<<20, func(k int) byte { // blocks of all kinds
			if k>>13&1 == 0 {
				return byte(random.Uint32())
			}
			return byte(k >> 10)
		}),
		"program": self[:min(len(self), 4<<20)],
	}
}

func TestRoundTrip(t *testing.T) {
	for name, content := range contents() {
		for level := -2; level <= 9; level++ {
			var packed bytes.Buffer
			w, err := stdflate.NewWriter(&packed, level)
			if err != nil {
				t.Fatal(err)
			}
			w.Write(content)
			w.Close()
			have, err := io.ReadAll(NewReader(bytes.NewReader(packed.Bytes())))
			if err != nil || !bytes.Equal(have, content) {
				t.Errorf("%s at level %d: %d bytes of %d, %v", name, level, len(have), len(content), err)
			}
			have, err = io.ReadAll(NewReader(&pieces{packed.Bytes(), 0}))
			if err != nil || !bytes.Equal(have, content) {
				t.Errorf("%s at level %d, in pieces: %d bytes of %d, %v", name, level, len(have), len(content), err)
			}
			if len(content) > 4096 {
				content := content[:4096]
				packed.Reset()
				w.Reset(&packed)
				w.Write(content)
				w.Close()
				have, err := io.ReadAll(iotest.OneByteReader(NewReader(iotest.OneByteReader(&packed))))
				if err != nil || !bytes.Equal(have, content) {
					t.Errorf("%s at level %d, byte by byte: %d bytes, %v", name, level, len(have), err)
				}
			}
		}
	}
}

// TestFlushed reads many short blocks, between them empty stored ones, which begin at whole bytes.
func TestFlushed(t *testing.T) {
	content := contents()["program"][:200000]
	var packed bytes.Buffer
	w, _ := stdflate.NewWriter(&packed, 6)
	for k := 0; k < len(content); k += 20 {
		w.Write(content[k : k+20])
		w.Flush()
	}
	w.Close()
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(packed.Bytes()), "in pieces": &pieces{packed.Bytes(), 0}} {
		have, err := io.ReadAll(NewReader(r))
		if err != nil || !bytes.Equal(have, content) {
			t.Errorf("%s: %d bytes of %d, %v", name, len(have), len(content), err)
		}
	}
}

// pieces reads a few bytes more each time, from one to a thousand.
type pieces struct {
	b []byte
	n int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.b) == 0 {
		return 0, io.EOF
	}
	p.n = p.n%1000 + 1
	n := copy(b, p.b[:min(p.n, len(p.b))])
	p.b = p.b[n:]
	return n, nil
}

// TestTruncated cuts a stream at every place: the end is never taken for a whole stream.
func TestTruncated(t *testing.T) {
	var packed bytes.Buffer
	w, _ := stdflate.NewWriter(&packed, 6)
	w.Write(contents()["program"][:20000])
	w.Close()
	for n := range packed.Len() {
		if _, err := io.ReadAll(NewReader(bytes.NewReader(packed.Bytes()[:n]))); err != io.ErrUnexpectedEOF {
			t.Fatalf("%d bytes of %d: %v", n, packed.Len(), err)
		}
	}
	broken := errors.New("broken")
	if _, err := io.ReadAll(NewReader(io.MultiReader(bytes.NewReader(packed.Bytes()[:500]), iotest.ErrReader(broken)))); err != broken {
		t.Errorf("a source that breaks: %v", err)
	}
	if _, err := io.ReadAll(NewReader(silent{})); err != io.ErrNoProgress {
		t.Errorf("a source that gives nothing: %v", err)
	}
}

type silent struct{}

func (silent) Read([]byte) (int, error) { return 0, nil }

func TestGzip(t *testing.T) {
	var file, want bytes.Buffer
	for k, content := range [][]byte{[]byte("first"), nil, contents()["program"][:300000]} {
		w := stdgzip.NewWriter(&file)
		w.Name, w.Comment, w.Extra = "name", fmt.Sprint(k), []byte("extra")
		w.Write(content)
		w.Close()
		want.Write(content)
	}
	have, err := io.ReadAll(NewGzipReader(bytes.NewReader(file.Bytes())))
	if err != nil || !bytes.Equal(have, want.Bytes()) {
		t.Fatalf("three members: %d bytes, %v", len(have), err)
	}
	whole := file.Bytes()
	changed := func(at int) []byte {
		b := bytes.Clone(whole)
		b[at] ^= 1
		return b
	}
	for name, c := range map[string]struct {
		file []byte
		want error
	}{
		"nothing":       {nil, io.ErrUnexpectedEOF},
		"half a header": {whole[:5], io.ErrUnexpectedEOF},
		"no trailer":    {whole[:len(whole)-4], io.ErrUnexpectedEOF},
		"magic":         {changed(0), ErrHeader},
		"method":        {changed(2), ErrHeader},
		"size":          {changed(len(whole) - 1), ErrChecksum},
		"checksum":      {changed(len(whole) - 5), ErrChecksum},
		"garbage":       {append(bytes.Clone(whole), "garbage, ten bytes and more"...), ErrHeader},
	} {
		if _, err := io.ReadAll(NewGzipReader(bytes.NewReader(c.file))); err != c.want {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// FuzzReader compares with another decompressor whatever comes.
func FuzzReader(f *testing.F) {
	for _, content := range contents() {
		for _, level := range []int{-2, 0, 1, 9} {
			var packed bytes.Buffer
			w, _ := stdflate.NewWriter(&packed, level)
			w.Write(content[:min(len(content), 1000)])
			w.Close()
			f.Add(packed.Bytes())
		}
	}
	const most = 1 << 20
	f.Fuzz(func(t *testing.T, b []byte) {
		want, wantErr := io.ReadAll(io.LimitReader(stdflate.NewReader(bytes.NewReader(b)), most))
		have, err := io.ReadAll(io.LimitReader(NewReader(iotest.HalfReader(bytes.NewReader(b))), most))
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%v, but %v", err, wantErr)
		}
		if err == nil && !bytes.Equal(have, want) {
			t.Fatalf("%d bytes, but %d", len(have), len(want))
		}
	})
}

func BenchmarkReader(b *testing.B) {
	for _, name := range []string{"nibbles", "program", "random", "zeros"} {
		content := contents()[name]
		var packed bytes.Buffer
		w, _ := stdflate.NewWriter(&packed, 6)
		w.Write(content)
		w.Close()
		for _, d := range []struct {
			name string
			new  func(io.Reader) io.Reader
		}{
			{"ours", func(r io.Reader) io.Reader { return NewReader(r) }},
			{"klauspost", func(r io.Reader) io.Reader { return flate.NewReader(r) }},
			{"std", func(r io.Reader) io.Reader { return stdflate.NewReader(r) }},
		} {
			b.Run(name+"/"+d.name, func(b *testing.B) {
				b.SetBytes(int64(len(content)))
				for b.Loop() {
					io.Copy(struct{ io.Writer }{io.Discard}, d.new(bytes.NewReader(packed.Bytes())))
				}
			})
		}
	}
}
