package xz

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"
)

// TestUnxz reads what xz writes, in all the ways that change the format.
func TestUnxz(t *testing.T) {
	r := rand.New(rand.NewChaCha8([32]byte{2}))
	var text, noise bytes.Buffer
	for text.Len() < 1<<20 {
		// Words that come again after a while, with some that are new.
		text.WriteString(strings.Repeat(string(rune('a'+r.IntN(26))), 1+r.IntN(40)))
		text.WriteByte(byte(r.Uint32()))
		text.Write(text.Bytes()[r.IntN(text.Len()):][:min(text.Len()/8, r.IntN(300))])
	}
	for noise.Len() < 100_000 {
		noise.WriteByte(byte(r.Uint32()))
	}
	both := append(append(bytes.Clone(text.Bytes()), noise.Bytes()...), text.Bytes()...)
	inputs := map[string][]byte{"nothing": nil, "a byte": []byte("x"), "text": text.Bytes(), "noise": noise.Bytes(), "both": both, "zeros": make([]byte, 1<<20)}
	for _, args := range []string{"-0", "-8", "--lzma2=preset=1,lc=0,lp=4,pb=4", "--lzma2=preset=1,lc=4,lp=0,pb=0", "--lzma2=preset=1,lc=1,lp=3,pb=1",
		"--lzma2=preset=1,dict=4096", "--lzma2=preset=1,dict=300000", "-1 --block-size=200000", "-1 --check=none", "-1 --check=crc32", "-1 --check=sha256"} {
		for name, in := range inputs {
			c := exec.Command("xz", append(strings.Fields(args), "--stdout", "--threads=1")...)
			c.Stdin = bytes.NewReader(in)
			packed, err := c.Output()
			if err != nil {
				t.Fatalf("xz %s: %v (apt-get install xz-utils)", args, err)
			}
			x, err := NewReader(bytes.NewReader(packed))
			if err != nil {
				t.Fatalf("xz %s: %s: %v", args, name, err)
			}
			if out, err := io.ReadAll(x); err != nil || !bytes.Equal(out, in) {
				t.Errorf("xz %s: %s: %d bytes of %d, %v", args, name, len(out), len(in), err)
			}
		}
	}
}

// TestDictionaryMoves unpacks more than the buffer holds.
func TestDictionaryMoves(t *testing.T) {
	in := make([]byte, 3*slide)
	r := rand.NewChaCha8([32]byte{3})
	r.Read(in[:1<<20])
	for n := 1 << 20; n < len(in); {
		n += copy(in[n:min(n+3000, len(in))], in[n-1<<20+5:]) // from nearly as far back as the dictionary reaches, at odd places
		r.Read(in[n:min(n+300, len(in))])                     // what cannot be packed ends chunks at odd places
		n = min(n+300, len(in))
	}
	c := exec.Command("xz", "--lzma2=preset=0,dict=1MiB,lc=2,lp=2,pb=4", "--stdout")
	c.Stdin = bytes.NewReader(in)
	packed, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	x, err := NewReader(bytes.NewReader(packed))
	if err == nil {
		err = x.nextBlock()
	}
	if err != nil {
		t.Fatal(err)
	}
	d := x.block.(*lzma2)
	if out, err := io.ReadAll(d); err != nil || !bytes.Equal(out, in) {
		t.Errorf("%d bytes of %d, %v", len(out), len(in), err)
	}
	if cap(d.buf) > 1<<20+slide {
		t.Errorf("a buffer of %d bytes", cap(d.buf))
	}
}

// TestDamagedLZMA unpacks what is damaged: into anything, or an error.
func TestDamagedLZMA(t *testing.T) {
	in := []byte(strings.Repeat("some words, and some words again; ", 40))
	c := exec.Command("xz", "--format=raw", "--lzma2=preset=1,dict=4096", "--stdout")
	c.Stdin = bytes.NewReader(in)
	packed, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	failed := 0
	for at := range packed {
		for bit := range 8 {
			b := bytes.Clone(packed)
			b[at] ^= 1 << bit
			out, err := io.ReadAll(newLZMA2(bytes.NewReader(b), 4096))
			if len(out) > 2<<20 {
				t.Fatalf("%d bytes", len(out))
			}
			if err != nil {
				failed++
			}
		}
	}
	if failed < len(packed)*6 {
		t.Errorf("%d of %d damages are found", failed, len(packed)*8)
	}
	// A match at the very beginning, and bytes that are stored before there is a dictionary.
	for _, b := range []string{"\xe0\x00\x00\x00\x05\x00\x00\xff\xff\xff\xfe\xff", "\x02\x00\x00x\x00", "\x80\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00", "\x03\x00\x00x\x00", "\x01\x00\x00x\xa0\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00", ""} {
		if out, err := io.ReadAll(newLZMA2(strings.NewReader(b), 4096)); err == nil {
			t.Errorf("%q unpacks to %q", b, out)
		}
	}
}
