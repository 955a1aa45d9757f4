package initrd

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// endings are those of compressed files that distributions have.
var endings = []string{".xz", ".zst", ".gz"}

// cutCompression returns a name without the ending of a compression, and that ending.
func cutCompression(name string) (stem, ending string) {
	for _, e := range endings {
		if stem, ok := strings.CutSuffix(name, e); ok {
			return stem, e
		}
	}
	return name, ""
}

// decompress reads all of a file, decompressed if its name says that it is compressed. It holds at most maxFile bytes.
func decompress(r io.Reader, name string) ([]byte, error) {
	_, ending := cutCompression(name)
	d, err := decompressor(r, ending)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var b bytes.Buffer
	n, err := b.ReadFrom(io.LimitReader(d, maxFile+1))
	if err != nil {
		return nil, err
	}
	if n > maxFile {
		return nil, fmt.Errorf("%w: more than %d bytes", errTooLarge, maxFile)
	}
	return b.Bytes(), nil
}

// decompressor reads what is compressed as the ending says; with none, it is as it is.
func decompressor(r io.Reader, ending string) (io.ReadCloser, error) {
	switch ending {
	case ".xz":
		x, err := xz.ReaderConfig{DictCap: 64 << 20}.NewReader(r)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(x), nil
	case ".zst":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case ".gz":
		return gzip.NewReader(r)
	}
	return io.NopCloser(r), nil
}
