package splitstream

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// longInline is how many inline bytes are collected, at most, before Cut ends their chunk.
const longInline = 1 << 20

// Writer makes a splitstream. It keeps the compressed stream and the references in memory: what is large is an object. The same
// calls give the same bytes.
type Writer struct {
	alg         fsverity.Algorithm
	contentType uint64
	size        uint64
	inline      []byte // of the chunk that is not ended yet
	z           *zstd.Encoder
	stream      bytes.Buffer // compressed
	objects     numbering
	streams     numbering
	named       map[string]int
}

// numbering gives every digest a number, in the order of their first appearance.
type numbering struct {
	list   []fsverity.Digest
	number map[fsverity.Digest]int
}

func (n *numbering) of(d fsverity.Digest) int {
	k, ok := n.number[d]
	if !ok {
		k = len(n.list)
		n.number[d] = k
		n.list = append(n.list, d)
	}
	return k
}

// NewWriter begins a splitstream whose references are of this algorithm.
func NewWriter(a fsverity.Algorithm, contentType uint64) *Writer {
	w := &Writer{alg: a, contentType: contentType, named: map[string]int{},
		objects: numbering{number: map[fsverity.Digest]int{}}, streams: numbering{number: map[fsverity.Digest]int{}}}
	w.z = newEncoder(&w.stream)
	return w
}

// encoders are expensive to make. The result of each depends on nothing but its input.
var encoders = sync.Pool{New: func() any {
	z, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithZeroFrames(true),
		zstd.WithWindowSize(2<<20))
	if err != nil {
		panic(err) // the options do not depend on anything
	}
	return z
}}

func newEncoder(w io.Writer) *zstd.Encoder {
	z := encoders.Get().(*zstd.Encoder)
	z.Reset(w)
	return z
}

// endEncoder ends what is encoded. Encoders of streams that are never finished are left to the garbage collector.
func endEncoder(z *zstd.Encoder) error {
	err := z.Close()
	z.Reset(nil)
	encoders.Put(z)
	return err
}

// Write adds inline bytes.
func (w *Writer) Write(b []byte) (int, error) {
	w.size += uint64(len(b))
	w.inline = append(w.inline, b...)
	return len(b), nil
}

// Cut permits the inline bytes to go on in another chunk. Readers of composefs-rs take what belongs together, such as a file's
// content, from one chunk.
func (w *Writer) Cut() error {
	if len(w.inline) < longInline {
		return nil
	}
	return w.endInline()
}

func (w *Writer) endInline() error {
	if len(w.inline) == 0 {
		return nil
	}
	head := binary.LittleEndian.AppendUint64(nil, uint64(-int64(len(w.inline))))
	if _, err := w.z.Write(head); err != nil {
		return err
	}
	_, err := w.z.Write(w.inline)
	w.inline = w.inline[:0]
	return err
}

// Object adds an object, of size bytes, as the next part of the stream.
func (w *Writer) Object(d fsverity.Digest, size uint64) error {
	if err := w.endInline(); err != nil {
		return err
	}
	w.size += size
	_, err := w.z.Write(binary.LittleEndian.AppendUint64(nil, uint64(w.objects.of(d))))
	return err
}

// Refer adds a reference to an object that is not a part of the stream, and returns its number.
func (w *Writer) Refer(d fsverity.Digest) int { return w.objects.of(d) }

// Name adds a named reference to another stream, or to an image, by the digest of its object.
func (w *Writer) Name(name string, stream fsverity.Digest) error {
	if strings.ContainsRune(name, 0) {
		return fmt.Errorf("splitstream: the name %q has a NUL in it", name)
	}
	w.named[name] = w.streams.of(stream)
	return nil
}

// Finish returns the whole splitstream, of size bytes. The writer is over then.
func (w *Writer) Finish() (r io.Reader, size int64, err error) {
	if err := w.endInline(); err != nil {
		return nil, 0, err
	}
	if err := endEncoder(w.z); err != nil {
		return nil, 0, err
	}
	var named bytes.Buffer
	z := newEncoder(&named)
	names := make([]string, 0, len(w.named))
	for name := range w.named {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(z, "%d:%s\x00", w.named[name], name)
	}
	if err := endEncoder(z); err != nil {
		return nil, 0, err
	}
	front := front(w.alg, w.contentType, w.size, w.streams.list, w.objects.list, int64(named.Len()), int64(w.stream.Len()))
	size = int64(len(front) + named.Len() + w.stream.Len())
	return io.MultiReader(bytes.NewReader(front), &named, &w.stream), size, nil
}

// front returns all that stands before the named references and the stream: header, info section and references.
func front(a fsverity.Algorithm, contentType, size uint64, streams, objects []fsverity.Digest, named, stream int64) []byte {
	le := binary.LittleEndian
	at := int64(headerSize)
	place := func(b []byte, size int64) []byte {
		b = le.AppendUint64(b, uint64(at))
		at += size
		return le.AppendUint64(b, uint64(at))
	}
	b := append([]byte(magic), 0, 0, 0, byte(a), 12)
	b = place(b, infoSize)
	b = place(b, int64(len(streams)*a.Size()))
	b = place(b, int64(len(objects)*a.Size()))
	namedAt := at
	at += named
	b = place(b, stream)
	at = namedAt
	b = place(b, named)
	b = le.AppendUint64(b, contentType)
	b = le.AppendUint64(b, size)
	for _, list := range [][]fsverity.Digest{streams, objects} {
		for _, d := range list {
			b, _ = d.AppendBinary(b)
		}
	}
	return b
}

// WriteAs writes the splitstream with the references of another repository: the digests that the same objects and streams have
// there, in the same order. The chunks refer to them by number, so they stay as they are.
func (s *Reader) WriteAs(w io.Writer, a fsverity.Algorithm, objects, streams []fsverity.Digest) error {
	if len(objects) != len(s.Objects) || len(streams) != len(s.Streams) {
		return fmt.Errorf("splitstream: %d objects and %d streams, want %d and %d", len(objects), len(streams), len(s.Objects), len(s.Streams))
	}
	if _, err := w.Write(front(a, s.ContentType, s.Size, streams, objects, s.named.end-s.named.start, s.stream.end-s.stream.start)); err != nil {
		return err
	}
	for _, part := range []section{s.named, s.stream} {
		if _, err := io.Copy(w, io.NewSectionReader(s.r, part.start, part.end-part.start)); err != nil {
			return err
		}
	}
	return nil
}
