// Package tardiff makes an archive again out of its difference to a tree of files, in the format of containers/tar-diff.
//
// A delta begins with eight bytes, "tardf1\n\0" or "tardf2\n\0". What follows is compressed with zstd: a sequence of operations, each of
// which is one byte that says what it does, a number as an unsigned varint of at most 64 bits, and as many bytes of data as the number
// says, except for Copy and Seek:
//
//	0 Data      write the data
//	1 Open      from now on, read from the file of the old tree whose path is the data, from its beginning
//	2 Copy      write so many bytes of the file
//	3 AddData   write as many bytes of the file as there are of data, each with that of the data added, modulo 256
//	4 Seek      go to this position of the file
//	5 ZstdDict  write what the data, a zstd frame, is with the whole file as its dictionary, and go to the file's end; only tardf2
//
// Data is the headers of the archive, and what is new in it; only the contents of files are taken from the old tree. Formats:
// https://github.com/containers/tar-diff/blob/main/file-format.md for tardf1, and the crate oci-delta 0.1 for tardf2.
//
// A delta is not trusted: paths are those of a tree in memory that the caller looks them up in, what it writes has the limit that the
// caller's writer sets, and what it takes otherwise has limits here. Whether the archive is the right one, its digest tells.
package tardiff

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"
)

const (
	header1 = "tardf1\n\x00"
	header2 = "tardf2\n\x00"
)

// Operations.
const (
	opData = iota
	opOpen
	opCopy
	opAddData
	opSeek
	opZstdDict
)

const (
	maxPath   = 4096
	maxWindow = 128 << 20 // of the operations, in bytes
	maxDict   = 512 << 20 // bytes of a file that is a dictionary, and of the window then: what generators make at most
	maxIdle   = 1 << 24   // operations that write nothing
	chunkSize = 64 << 10
)

// A dictionary is in memory as a whole: there is one at a time.
var dictionary sync.Mutex

// File is a regular file of the old tree.
type File interface {
	io.ReaderAt
	io.Closer
	Size() int64 // in bytes
}

// ErrTooLarge tells that a delta has more operations, or uses more of the old files as dictionaries, than the limit permits.
var ErrTooLarge = errors.New("larger than the limit")

// Apply reads a delta and writes the archive. Files of the old tree are opened by their paths, which are slash-separated, relative and
// have no "." or ".." in them; one is open at a time. limit is how many bytes the operations may have at most, decompressed.
func Apply(w io.Writer, delta io.Reader, open func(path string) (File, error), limit int64) error {
	magic := make([]byte, len(header1))
	if _, err := io.ReadFull(delta, magic); err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return err
	}
	if m := string(magic); m != header1 && m != header2 {
		return fmt.Errorf("tar-diff: it begins with %q, not with tardf1 or tardf2", magic)
	}
	z, err := zstd.NewReader(delta, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return fmt.Errorf("tar-diff: zstd: %w", err)
	}
	defer z.Close()
	p := &patch{limited: limited{z, limit}, open: open, out: w, buf: make([]byte, chunkSize), dict: string(magic) == header2}
	p.in = bufio.NewReaderSize(&p.limited, chunkSize)
	defer p.close()
	for n := 0; ; n++ {
		op, err := p.in.ReadByte()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = p.do(op)
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("tar-diff: operation %d, after %d bytes: %w", n, p.written, err)
		}
	}
}

// limited is an error after a number of bytes, rather than the end.
type limited struct {
	r    io.Reader
	left int64
}

func (l *limited) Read(b []byte) (int, error) {
	n, err := l.r.Read(b)
	if wrong := l.take(int64(n)); wrong != nil {
		return 0, wrong
	}
	return n, err
}

func (l *limited) take(n int64) error {
	if l.left -= n; l.left < 0 {
		return ErrTooLarge
	}
	return nil
}

// patch is a delta that is applied.
type patch struct {
	limited
	in      *bufio.Reader
	open    func(path string) (File, error)
	out     io.Writer
	written int64
	idle    int
	dict    bool // ZstdDict may be there
	buf     []byte

	path string
	file File // nil: none yet
	at   int64
}

func (p *patch) close() {
	if p.file != nil {
		p.file.Close()
	}
}

func (p *patch) do(op byte) error {
	u, err := binary.ReadUvarint(p.in)
	if err != nil {
		return err
	}
	if u > math.MaxInt64 {
		return fmt.Errorf("size %d: too large", u)
	}
	size, before := int64(u), p.written
	if p.file == nil && op >= opCopy && op <= opZstdDict {
		return errors.New("it reads from a file, and none is open")
	}
	switch op {
	case opData:
		err = p.copy(p.in, size)
	case opOpen:
		err = p.openFile(size)
	case opCopy:
		err = p.copy(io.NewSectionReader(p.file, p.at, min(size, math.MaxInt64-p.at)), size)
		p.at += size
	case opAddData:
		err = p.add(size)
	case opSeek:
		if size > p.file.Size() {
			return fmt.Errorf("%q: position %d, it has %d bytes", p.path, size, p.file.Size())
		}
		p.at = size
	case opZstdDict:
		err = p.zstd(size)
	default:
		return fmt.Errorf("unknown operation %d", op)
	}
	if err == nil && p.written == before {
		if p.idle++; p.idle > maxIdle {
			err = fmt.Errorf("more than %d operations that write nothing", maxIdle)
		}
	}
	return err
}

func (p *patch) Write(b []byte) (int, error) {
	n, err := p.out.Write(b)
	p.written += int64(n)
	return n, err
}

// copy writes so many bytes, or it is an error.
func (p *patch) copy(r io.Reader, size int64) error {
	for size > 0 {
		n, err := io.ReadFull(r, p.buf[:min(size, chunkSize)])
		if err != nil {
			return err
		}
		if _, err := p.Write(p.buf[:n]); err != nil {
			return err
		}
		size -= int64(n)
	}
	return nil
}

func (p *patch) openFile(size int64) error {
	if size > maxPath {
		return fmt.Errorf("a path of %d bytes: at most %d are taken", size, maxPath)
	}
	name := make([]byte, size)
	if _, err := io.ReadFull(p.in, name); err != nil {
		return err
	}
	path := strings.TrimPrefix(string(name), "/")
	if !fs.ValidPath(path) || path == "." || strings.Contains(path, "\x00") {
		return fmt.Errorf("path %q: not one of a file in the tree", name)
	}
	p.close()
	p.file = nil
	file, err := p.open(path)
	if err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	p.path, p.file, p.at = path, file, 0
	return nil
}

func (p *patch) add(size int64) error {
	old := make([]byte, min(size, chunkSize))
	for size > 0 {
		n := min(size, chunkSize)
		if _, err := io.ReadFull(p.in, p.buf[:n]); err != nil {
			return err
		}
		if _, err := io.ReadFull(io.NewSectionReader(p.file, p.at, n), old[:n]); err != nil {
			return fmt.Errorf("%q: %w", p.path, err)
		}
		for k := range n {
			p.buf[k] += old[k]
		}
		if _, err := p.Write(p.buf[:n]); err != nil {
			return err
		}
		p.at, size = p.at+n, size-n
	}
	return nil
}

func (p *patch) zstd(size int64) error {
	if !p.dict {
		return errors.New("a dictionary, which tardf1 does not know")
	}
	whole := p.file.Size()
	if whole > maxDict {
		return fmt.Errorf("%q: %d bytes are no dictionary: at most %d are taken", p.path, whole, maxDict)
	}
	// Reading is work as well, of which a few bytes could ask for much.
	if err := p.take(whole); err != nil {
		return fmt.Errorf("dictionaries: %w", err)
	}
	dictionary.Lock()
	defer dictionary.Unlock()
	content := make([]byte, whole)
	if _, err := io.ReadFull(io.NewSectionReader(p.file, 0, whole), content); err != nil {
		return fmt.Errorf("%q: %w", p.path, err)
	}
	frame := io.LimitReader(p.in, size)
	z, err := zstd.NewReader(frame, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxDict), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderDictRaw(0, content))
	if err != nil {
		return fmt.Errorf("zstd: %w", err)
	}
	defer z.Close()
	if _, err := io.CopyBuffer(p, reader{z}, p.buf); err != nil {
		return fmt.Errorf("zstd: %w", err)
	}
	p.at = whole
	_, err = io.Copy(io.Discard, frame)
	return err
}

// reader hides that it can write itself.
type reader struct{ io.Reader }
