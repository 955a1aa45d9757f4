package oci

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/composefs-boot/composefs-boot/internal/inflate"
)

// maxWindow is the largest window of zstd that is decompressed, in bytes: level 22 needs as much.
const maxWindow = 128 << 20

// ErrTooLarge tells that a layer is larger than the limits permit.
var ErrTooLarge = errors.New("larger than the limit")

// decompress returns the content of a layer, which may be compressed with gzip or zstd: what its first bytes say counts, since
// registries and media types are wrong at times. Several gzip members or zstd frames in sequence are one content; skippable
// frames, such as zstd:chunked has, are passed over.
func decompress(r io.Reader) (io.Reader, func(), error) {
	in := bufio.NewReaderSize(r, 128<<10)
	magic, err := in.Peek(4)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return named{"gzip", inflate.NewGzipReader(in)}, func() {}, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}),
		len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, fmt.Errorf("zstd: %w", err)
		}
		return named{"zstd", z}, z.Close, nil
	}
	return in, func() {}, nil
}

// named says in errors what it was that could not be decompressed.
type named struct {
	name string
	r    io.Reader
}

func (n named) Read(p []byte) (int, error) {
	k, err := n.r.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%s: %w", n.name, err)
	}
	return k, err
}

// atMost is an error after n bytes, rather than the end.
type atMost struct {
	r io.Reader
	n int64
}

func (a *atMost) Read(p []byte) (int, error) {
	n, err := a.r.Read(p[:min(int64(len(p)), a.n+1)])
	if a.n -= int64(n); a.n < 0 {
		return 0, ErrTooLarge
	}
	return n, err
}
