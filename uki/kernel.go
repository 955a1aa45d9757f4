package uki

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// Limits of compressed kernels.
const (
	maxKernel = 1 << 30 // bytes when decompressed
	maxWindow = 1 << 28 // bytes of a window or dictionary
)

// compressions are what kernels are compressed with, by how the file begins.
var compressions = []struct{ magic, name string }{
	{"\x1f\x8b", "gzip"}, {"\x28\xb5\x2f\xfd", "zstd"}, {"\x02\x21\x4c\x18", "lz4"}, {"\x04\x22\x4d\x18", "lz4"}, {"BZh", "bzip2"},
	{"\x5d\x00\x00", "lzma"}, {"\xfd7zXZ", "xz"}, {"\x89LZO", "lzo"},
}

// Kernel returns what the firmware can start: the kernel as it is if it is a PE program, and else decompressed, as for the
// Image.gz of some architectures.
func Kernel(c Content) (Content, error) {
	_, notPE := ParsePE(c, c.Size)
	if notPE == nil {
		return c, nil
	}
	name := compression(c)
	if name == "" {
		return c, fmt.Errorf("no kernel that UEFI can start: %w", notPE)
	}
	r, err := decompress(name, c.Reader())
	if err != nil {
		return c, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxKernel+1))
	if err != nil {
		return c, fmt.Errorf("%s: %w", name, err)
	}
	if len(b) > maxKernel {
		return c, fmt.Errorf("%s: more than %d bytes when decompressed", name, maxKernel)
	}
	if _, err := ParsePE(bytes.NewReader(b), int64(len(b))); err != nil {
		return c, fmt.Errorf("no kernel that UEFI can start, when decompressed: %w", err)
	}
	return Bytes(b), nil
}

// compression returns how the content is compressed, or "".
func compression(c Content) string {
	b := make([]byte, 8)
	n, _ := c.ReadAt(b, 0)
	for _, k := range compressions {
		if strings.HasPrefix(string(b[:n]), k.magic) {
			return k.name
		}
	}
	return ""
}

func decompress(name string, r io.Reader) (io.ReadCloser, error) {
	switch name {
	case "gzip":
		return gzip.NewReader(r)
	case "zstd":
		d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case "lz4":
		return io.NopCloser(lz4.NewReader(r)), nil
	case "bzip2":
		return io.NopCloser(bzip2.NewReader(r)), nil
	case "xz":
		x, err := xz.ReaderConfig{DictCap: maxWindow}.NewReader(r)
		return io.NopCloser(x), err
	case "lzma":
		x, err := lzma.ReaderConfig{DictCap: maxWindow}.NewReader(r)
		return io.NopCloser(x), err
	}
	return nil, fmt.Errorf("compressed with %s, which is not read: decompress it first", name)
}

// Patterns of the kernel's release, as uname -r prints it.
var (
	headerVersion = regexp.MustCompile(`^([A-Za-z0-9._+~-]+) \(`)
	bannerVersion = regexp.MustCompile(`Linux version ([0-9]+\.\S+) \(`)
)

// Uname returns the release of a kernel, or "" if it does not say it: from the header of a bzImage
// (Documentation/arch/x86/boot.rst), or from the banner in an Image, also in the compressed payload of an EFI zboot image.
func Uname(c Content) (string, error) {
	if v := bzImageVersion(c); v != "" {
		return v, nil
	}
	r, err := payload(c)
	if err != nil {
		return "", fmt.Errorf("release of the kernel: %w; give it with --uname", err)
	}
	defer r.Close()
	v, err := scanBanner(io.LimitReader(r, maxKernel))
	if err != nil {
		return "", fmt.Errorf("release of the kernel: %w; give it with --uname", err)
	}
	return v, nil
}

func bzImageVersion(c Content) string {
	b := make([]byte, 16)
	if n, _ := c.ReadAt(b, 0x200); n < len(b) || string(b[2:6]) != "HdrS" {
		return ""
	}
	text := make([]byte, 128)
	n, _ := c.ReadAt(text, 0x200+int64(binary.LittleEndian.Uint16(b[14:])))
	text, _, _ = bytes.Cut(text[:n], []byte{0})
	if m := headerVersion.FindSubmatch(text); m != nil {
		return string(m[1])
	}
	return ""
}

// payload returns a reader of the kernel proper. The header of a zboot image is defined by the kernel's
// drivers/firmware/efi/libstub/zboot-header.S: "zimg" at 4, offset and size of the payload at 8, its compression at 24.
func payload(c Content) (io.ReadCloser, error) {
	b := make([]byte, 32)
	if n, _ := c.ReadAt(b, 0); n == len(b) && string(b[:2]) == "MZ" && string(b[4:8]) == "zimg" {
		offset, size := int64(binary.LittleEndian.Uint32(b[8:])), int64(binary.LittleEndian.Uint32(b[12:]))
		if offset+size > c.Size {
			return nil, fmt.Errorf("offset 8: zboot payload of %d bytes at %d: the file ends at %d", size, offset, c.Size)
		}
		name, _, _ := strings.Cut(string(b[24:]), "\x00")
		switch name {
		case "zstd22":
			name = "zstd"
		case "xzkern":
			name = "xz"
		}
		return decompress(name, io.NewSectionReader(c, offset, size))
	}
	if name := compression(c); name != "" {
		return decompress(name, c.Reader())
	}
	return io.NopCloser(c.Reader()), nil
}

// scanBanner looks for the banner, which may lie across two reads. An end that is cut off after it does not matter.
func scanBanner(r io.Reader) (string, error) {
	const most = 256 // bytes of a banner up to the parenthesis
	buffer := make([]byte, 1<<18)
	have := 0
	for {
		n, err := io.ReadFull(r, buffer[have:])
		have += n
		for text := buffer[:have]; ; {
			at := bytes.Index(text, []byte("Linux version "))
			if at < 0 {
				break
			}
			if m := bannerVersion.FindSubmatch(text[at:min(at+most, len(text))]); m != nil && bytes.HasPrefix(text[at:], m[0]) {
				return string(m[1]), nil
			}
			text = text[at+1:]
		}
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		have = copy(buffer, buffer[have-most:have])
	}
}
