package splitstream_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
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
