package oci

import (
	"compress/gzip"
	"errors"
	"io"
	"strings"

	fast "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
)

// compressor is a way to compress a layer that programs which make images have. Its result depends on nothing but the content, so that
// the blob of a layer can be had again though only the archive was kept, if it was made in one of these ways.
type compressor struct {
	name string
	zstd bool // otherwise gzip
	open func(io.Writer) (io.WriteCloser, error)
}

// compressors are in the order in which they are tried: the frequent ones first.
var compressors = []compressor{
	{"gzip of Go, level 6", false, goGzip(gzip.DefaultCompression)},                                // Docker, BuildKit, containerd
	{"pgzip", false, func(w io.Writer) (io.WriteCloser, error) { return pgzip.NewWriter(w), nil }}, // podman, buildah, skopeo, umoci
	{"gzip of Go, level 1", false, goGzip(gzip.BestSpeed)},                                         // ko, crane
	{"gzip of Go, level 9", false, goGzip(gzip.BestCompression)},
	{"gzip of klauspost/compress", false, func(w io.Writer) (io.WriteCloser, error) { return fast.NewWriter(w), nil }},
	{"zstd of klauspost/compress", true, func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w, zstd.WithEncoderConcurrency(1)) }},
}

func goGzip(level int) func(io.Writer) (io.WriteCloser, error) {
	return func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriterLevel(w, level) }
}

// likely returns the ways in which a layer may have been compressed, by its media type: none if it is not compressed. The first one
// is also how it is compressed if none fits.
func likely(mediaType string, order []compressor) []compressor {
	isGzip, isZstd := strings.Contains(mediaType, "gzip"), strings.Contains(mediaType, "zstd")
	var list []compressor
	for _, c := range order {
		if c.zstd && isZstd || !c.zstd && isGzip {
			list = append(list, c)
		}
	}
	return list
}

// compressed returns what write writes, compressed. Closing it ends write with an error.
func (c compressor) compressed(write func(io.Writer) error) io.ReadCloser {
	return piped(func(w io.Writer) error {
		z, err := c.open(w)
		if err == nil {
			err = errors.Join(write(z), z.Close()) // pgzip has goroutines, which end with it
		}
		return err
	})
}

// piped returns what write writes.
func piped(write func(io.Writer) error) io.ReadCloser {
	r, w := io.Pipe()
	go func() { w.CloseWithError(write(w)) }()
	return r
}

// makes reports whether the compressor makes the blob of a descriptor out of what write writes. It gives up as soon as there is more
// than that.
func (c compressor) makes(d Descriptor, write func(io.Writer) error) (bool, error) {
	in := c.compressed(write)
	defer in.Close()
	h := d.Digest.newHash()
	n, err := io.Copy(h, io.LimitReader(in, d.Size+1))
	return err == nil && n == d.Size && d.Digest.check(h) == nil, err
}
