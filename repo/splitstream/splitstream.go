// Package splitstream reads and writes splitstreams: files such as tar archives whose larger parts are objects of a repository.
//
// A splitstream has a header, and sections that the header and the info section place anywhere behind it. All numbers are
// little endian; a range is two u64, where it starts and where it ends.
//
//	header  "SplitStream", u8 version 0, u16 flags, u8 algorithm, u8 log2 of the block size, range of the info section
//	info    ranges of: stream references, object references, the stream, named references; u64 content type; u64 size
//
// References are arrays of binary digests. The stream is compressed with zstd and is a sequence of chunks: an i64, and if
// it is negative as many bytes as its absolute value says; otherwise it is the index of an object. Named references are
// compressed, too: records "N:NAME" that end with NUL, where N is the index of a stream.
//
// Other than in a file on its way through a program, what a stream refers to can be told without decompressing anything. An
// object may be referred to without being a part of the stream, and a name may lead to an image.
//
// The format is that of composefs-rs (splitstream_format.rs), version 0. bootc up to 1.15 wrote the header in another order: the
// range first, then the flags, and the magic at offset 18. Such streams are read, and never written.
package splitstream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

const (
	magic      = "SplitStream"
	headerSize = 32
	infoSize   = 80
	// maxRefs limits the references of one stream, maxNamed the uncompressed size of the named ones, in bytes.
	maxRefs  = 1 << 24
	maxNamed = 64 << 20
	maxZstd  = 128 << 20 // window
)

// Reader is an open splitstream.
type Reader struct {
	ContentType uint64
	Size        uint64            // of what the stream is the split form of
	Objects     []fsverity.Digest // that the stream refers to, in the order of their numbers
	Streams     []fsverity.Digest // other streams, by the digests of their objects
	Named       []NamedRef

	r      io.ReaderAt
	stream section
	named  section
}

// NamedRef is another stream by the name that this one gives it.
type NamedRef struct {
	Name   string
	Stream fsverity.Digest
}

type section struct{ start, end int64 }

// Open reads the header and the references of a splitstream of size bytes. Digests must be of the algorithm a.
func Open(r io.ReaderAt, size int64, a fsverity.Algorithm) (*Reader, error) {
	s := &Reader{r: r}
	header, err := readSection(r, size, section{0, headerSize}, headerSize)
	if err != nil {
		return nil, fmt.Errorf("splitstream: header: %w", err)
	}
	if string(header[18:29]) == magic {
		header = slices.Concat(header[18:29], header[29:30], header[16:18], header[30:32], header[:16])
	}
	if string(header[:11]) != magic {
		return nil, errors.New("not a splitstream: no magic at offset 0")
	}
	if header[11] != 0 {
		return nil, fmt.Errorf("splitstream version %d: want 0", header[11])
	}
	if fsverity.Algorithm(header[14]) != a || header[15] != 12 {
		return nil, fmt.Errorf("splitstream of algorithm %d with blocks of 1<<%d: want %v with 1<<12", header[14], header[15], a)
	}
	infoAt := rangeAt(header, 16)
	if infoAt.end-infoAt.start < infoSize {
		return nil, fmt.Errorf("splitstream: info section of %d bytes: want at least %d", infoAt.end-infoAt.start, infoSize)
	}
	info, err := readSection(r, size, section{infoAt.start, infoAt.start + infoSize}, infoSize)
	if err != nil {
		return nil, fmt.Errorf("splitstream: info section: %w", err)
	}
	if s.Streams, err = digests(r, size, rangeAt(info, 0), a); err != nil {
		return nil, fmt.Errorf("splitstream: stream references: %w", err)
	}
	if s.Objects, err = digests(r, size, rangeAt(info, 16), a); err != nil {
		return nil, fmt.Errorf("splitstream: object references: %w", err)
	}
	s.stream = rangeAt(info, 32)
	if err := s.stream.check(size); err != nil {
		return nil, fmt.Errorf("splitstream: stream: %w", err)
	}
	s.named = rangeAt(info, 48)
	if err := s.readNamed(size, s.named); err != nil {
		return nil, fmt.Errorf("splitstream: named references: %w", err)
	}
	s.ContentType = binary.LittleEndian.Uint64(info[64:])
	s.Size = binary.LittleEndian.Uint64(info[72:])
	return s, nil
}

func rangeAt(b []byte, at int) section {
	return section{int64(binary.LittleEndian.Uint64(b[at:])), int64(binary.LittleEndian.Uint64(b[at+8:]))}
}

func (s section) check(size int64) error {
	if s.start < 0 || s.end < s.start || s.end > size {
		return fmt.Errorf("from %d to %d in a file of %d bytes", s.start, s.end, size)
	}
	return nil
}

func readSection(r io.ReaderAt, size int64, s section, limit int64) ([]byte, error) {
	if err := s.check(size); err != nil {
		return nil, err
	}
	if s.end-s.start > limit {
		return nil, fmt.Errorf("%d bytes, at most %d are possible", s.end-s.start, limit)
	}
	b := make([]byte, s.end-s.start)
	if _, err := io.ReadFull(io.NewSectionReader(r, s.start, int64(len(b))), b); err != nil {
		return nil, err
	}
	return b, nil
}

func digests(r io.ReaderAt, size int64, s section, a fsverity.Algorithm) ([]fsverity.Digest, error) {
	b, err := readSection(r, size, s, int64(maxRefs*a.Size()))
	if err != nil {
		return nil, err
	}
	if len(b)%a.Size() != 0 {
		return nil, fmt.Errorf("%d bytes are no whole number of digests", len(b))
	}
	list := make([]fsverity.Digest, 0, len(b)/a.Size())
	for ; len(b) > 0; b = b[a.Size():] {
		d, err := fsverity.MakeDigest(a, b[:a.Size()])
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, nil
}

// namedDecoder is for what is small and decompressed at once: a decoder of streams allocates their window.
var namedDecoder = sync.OnceValue(func() *zstd.Decoder {
	z, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxNamed), zstd.WithDecoderMaxWindow(maxZstd))
	if err != nil {
		panic(err) // the options do not depend on anything
	}
	return z
})

func (s *Reader) readNamed(size int64, at section) error {
	if err := at.check(size); err != nil {
		return err
	}
	if at.start == at.end {
		return nil
	}
	packed, err := readSection(s.r, size, at, maxNamed)
	if err != nil {
		return err
	}
	text, err := namedDecoder().DecodeAll(packed, nil)
	if errors.Is(err, zstd.ErrDecoderSizeExceeded) {
		err = fmt.Errorf("more than %d bytes", maxNamed)
	}
	if err != nil {
		return err
	}
	for len(text) > 0 {
		record, rest, ok := bytes.Cut(text, []byte{0})
		if !ok {
			return errors.New("the last record has no end")
		}
		text = rest
		number, name, ok := bytes.Cut(record, []byte(":"))
		n, err := strconv.ParseUint(string(number), 10, 32)
		if !ok || err != nil || n >= uint64(len(s.Streams)) {
			return fmt.Errorf("record %.60q: want the number of one of %d streams, a colon and a name", record, len(s.Streams))
		}
		s.Named = append(s.Named, NamedRef{string(name), s.Streams[n]})
	}
	return nil
}
