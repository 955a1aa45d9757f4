package splitstream_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// streams returns the splitstreams of a golden repository, and a function that opens its objects.
func streams(t testing.TB) (map[string][]byte, func(fsverity.Digest) (io.ReadCloser, error)) {
	dir := filepath.Join(golden.Extract(t, "repos/oci-boot.sha256.v2.tar.gz"), "repo")
	names, err := filepath.Glob(filepath.Join(dir, "streams", "oci-*"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no streams: %v", err)
	}
	list := map[string][]byte{}
	for _, name := range names {
		if list[filepath.Base(name)], err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	return list, func(d fsverity.Digest) (io.ReadCloser, error) {
		return os.Open(filepath.Join(dir, "objects", d.ObjectPath()))
	}
}

// The stream of an OCI config is the config again; its SHA-256 is in its name.
func TestGoldenStreams(t *testing.T) {
	list, open := streams(t)
	for name, data := range list {
		s, err := splitstream.Open(bytes.NewReader(data), int64(len(data)), fsverity.SHA256)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var out bytes.Buffer
		if err := s.WriteTo(&out, open); err != nil || uint64(out.Len()) != s.Size {
			t.Errorf("%s: %d bytes of %d: %v", name, out.Len(), s.Size, err)
		}
		if strings.HasPrefix(name, "oci-manifest-") && len(s.Named) == 0 {
			t.Errorf("%s: no named references", name)
		}
	}
}

func TestHostile(t *testing.T) {
	list, open := streams(t)
	var base []byte
	for name, data := range list {
		if strings.HasPrefix(name, "oci-manifest-") {
			base = data
		}
	}
	info := int(binary.LittleEndian.Uint64(base[16:]))
	for name, c := range map[string]struct {
		want   string
		change func([]byte) []byte
	}{
		"empty":            {"header", func(b []byte) []byte { return nil }},
		"wrong-magic":      {"no magic", func(b []byte) []byte { b[0] = 'x'; return b }},
		"wrong-version":    {"version 1", func(b []byte) []byte { b[11] = 1; return b }},
		"wrong-algorithm":  {"algorithm 2", func(b []byte) []byte { b[14] = 2; return b }},
		"wrong-block-size": {"1<<16", func(b []byte) []byte { b[15] = 16; return b }},
		"info-past-the-end": {"info section", func(b []byte) []byte {
			binary.LittleEndian.PutUint64(b[24:], 1<<40)
			binary.LittleEndian.PutUint64(b[16:], 1<<39)
			return b
		}},
		"info-too-small":   {"at least 80", func(b []byte) []byte { copy(b[24:32], b[16:24]); return b }},
		"refs-backwards":   {"stream references", func(b []byte) []byte { binary.LittleEndian.PutUint64(b[info:], 1<<62); return b }},
		"refs-negative":    {"stream references", func(b []byte) []byte { binary.LittleEndian.PutUint64(b[info:], 1<<63); return b }},
		"refs-odd-length":  {"no whole number", func(b []byte) []byte { b[info]++; return b }},
		"stream-truncated": {"stream", func(b []byte) []byte { binary.LittleEndian.PutUint64(b[info+40:], 1<<40); return b }},
		"size-lies":        {"info section says", func(b []byte) []byte { b[info+72]++; return b }},
		"named-not-zstd":   {"named references", func(b []byte) []byte { copy(b[info+48:info+64], b[info:info+16]); return b }},
	} {
		b := c.change(bytes.Clone(base))
		s, err := splitstream.Open(bytes.NewReader(b), int64(len(b)), fsverity.SHA256)
		if err == nil {
			err = s.WriteTo(io.Discard, open)
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// The header that bootc wrote up to 1.15 leads to the same.
func TestOldHeader(t *testing.T) {
	list, open := streams(t)
	for name, data := range list {
		old := slices.Concat(data[16:32], data[12:14], data[:11], data[11:12], data[14:16], data[32:])
		var out [2]bytes.Buffer
		for k, b := range [][]byte{data, old} {
			s, err := splitstream.Open(bytes.NewReader(b), int64(len(b)), fsverity.SHA256)
			if err == nil {
				err = s.WriteTo(&out[k], open)
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if !bytes.Equal(out[0].Bytes(), out[1].Bytes()) {
			t.Errorf("%s: the old header gives another content", name)
		}
	}
}

// What is written is read again: content, references, names.
func TestRoundTrip(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		b := make([]byte, r.IntN(1<<14))
		for k := range b {
			b[k] = byte(r.Uint32() >> r.IntN(9)) // more or less compressible
		}
		roundTrip(t, b, seed%2 == 0)
	}
}

func FuzzRoundTrip(f *testing.F) {
	f.Add([]byte("\x00abc\x05defghijkl"), true)
	f.Fuzz(func(t *testing.T, b []byte, wide bool) { roundTrip(t, b, wide) })
}

// roundTrip writes a stream whose parts the bytes tell: a length and a kind, then as many bytes.
func roundTrip(t *testing.T, b []byte, wide bool) {
	a := fsverity.SHA256
	if wide {
		a = fsverity.SHA512
	}
	write := func() (splitted, content []byte, objects map[fsverity.Digest][]byte, names map[string]fsverity.Digest) {
		w := splitstream.NewWriter(a, 42)
		objects, names = map[fsverity.Digest][]byte{}, map[string]fsverity.Digest{}
		for rest := b; len(rest) > 0; {
			n := min(int(rest[0]>>2), len(rest)-1)
			kind, part := rest[0]&3, rest[1:1+n]
			rest = rest[1+n:]
			switch d := fsverity.Of(a, part); {
			case kind == 0 && n > 0:
				objects[d] = part
				content = append(content, part...)
				if err := w.Object(d, uint64(n)); err != nil {
					t.Fatal(err)
				}
			case kind == 1:
				name := strings.ReplaceAll(string(part), "\x00", "")
				names[name] = d
				if err := w.Name(name, d); err != nil {
					t.Fatal(err)
				}
			default:
				for range 1 + n*n {
					w.Write(part)
					content = append(content, part...)
					if err := w.Cut(); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		out, size, err := w.Finish()
		if err == nil {
			splitted, err = io.ReadAll(out)
		}
		if err != nil || int64(len(splitted)) != size {
			t.Fatalf("%d bytes of %d: %v", len(splitted), size, err)
		}
		return splitted, content, objects, names
	}
	splitted, content, objects, names := write()
	if again, _, _, _ := write(); !bytes.Equal(splitted, again) {
		t.Fatal("the second time it is another stream")
	}
	s, err := splitstream.Open(bytes.NewReader(splitted), int64(len(splitted)), a)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := s.WriteTo(&out, func(d fsverity.Digest) (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(objects[d])), nil
	}); err != nil || !bytes.Equal(out.Bytes(), content) {
		t.Fatalf("%d bytes, want %d: %v", out.Len(), len(content), err)
	}
	if len(s.Objects) != len(objects) || s.ContentType != 42 || len(s.Named) != len(names) {
		t.Fatalf("%d objects, %d names, type %d", len(s.Objects), len(s.Named), s.ContentType)
	}
	for _, n := range s.Named {
		if names[n.Name] != n.Stream {
			t.Fatalf("name %q leads to %v", n.Name, n.Stream)
		}
	}
}

func FuzzOpen(f *testing.F) {
	list, _ := streams(f)
	for _, data := range list {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := splitstream.Open(bytes.NewReader(b), int64(len(b)), fsverity.SHA256)
		if err != nil {
			return
		}
		missing := errors.New("no object")
		out := &limited{n: 16 << 20}
		s.WriteTo(out, func(fsverity.Digest) (io.ReadCloser, error) { return nil, missing })
	})
}

// limited ends what would write without end.
type limited struct{ n int }

func (l *limited) Write(b []byte) (int, error) {
	if l.n -= len(b); l.n < 0 {
		return 0, errors.New("enough")
	}
	return len(b), nil
}
