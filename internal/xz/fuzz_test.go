package xz

import (
	"bytes"
	"io"
	"testing"
)

func FuzzReader(f *testing.F) {
	var b bytes.Buffer
	in := bytes.Repeat([]byte("hello"), 100)
	if err := new(Compressor).Compress(&b, bytes.NewReader(in), int64(len(in))); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := NewReader(bytes.NewReader(b))
		if err != nil {
			return
		}
		// LZMA2 packs at most 273 bytes into a few bits.
		if n, _ := io.Copy(io.Discard, io.LimitReader(x, 1<<26)); n > int64(len(b))*10_000 {
			t.Errorf("%d bytes out of %d", n, len(b))
		}
	})
}

// FuzzCompress packs, and unpacks again. Each byte says what follows: bytes of its own, or some from before.
func FuzzCompress(f *testing.F) {
	f.Add([]byte("\x05hello\x85\x01\xff\xff\x03wor\x90\x00"))
	f.Add([]byte{0xff, 0, 1, 'x', 0xff, 1, 0xfe, 1, 2, 'a', 'b', 0xff, 2, 0x81, 1, 1, 'y', 0xa0, 3})
	var c Compressor
	f.Fuzz(func(t *testing.T, recipe []byte) {
		var in []byte
		for len(recipe) > 1 && len(in) < 1<<18 {
			n, rest := int(recipe[0]&0x7f), recipe[1:]
			switch {
			case recipe[0] < 0x80:
				n = min(n, len(rest))
				in, recipe = append(in, rest[:n]...), rest[n:]
			default:
				back := int(rest[0])*int(rest[0])/4 + 1
				for range n * n / 16 {
					if back <= len(in) {
						in = append(in, in[len(in)-back])
					}
				}
				recipe = rest[1:]
			}
		}
		var b bytes.Buffer
		if err := c.Compress(&b, bytes.NewReader(in), int64(len(in))); err != nil {
			t.Fatal(err)
		}
		r, err := NewReader(&b)
		if err != nil {
			t.Fatal(err)
		}
		if out, err := io.ReadAll(r); err != nil || !bytes.Equal(out, in) {
			t.Errorf("%d bytes of %d, %v", len(out), len(in), err)
		}
	})
}
