package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

const (
	chunkSize   = 256 << 10 // of decompressed bytes on their way
	smallFile   = 256 << 10 // larger files are stored one by one, while they are read
	pieceBytes  = 512 << 10 // of small files in a piece
	pieceInline = 256 << 10
	pieceFiles  = 256
	pieces      = 8 // of one layer on their way
)

// splitter makes splitstreams of layers. The work on one layer is done by stages that follow each other through bounded
// queues, so that memory does not grow with it:
//
//	download, decompress -> hash for the diff ID -> read headers, cut into pieces -> digest and store the files of a
//	piece, several pieces at a time -> write the splitstream, in order
type splitter struct {
	i      *repo.Import
	limits Limits
	work   chan *piece
	done   sync.WaitGroup
}

func newSplitter(i *repo.Import, l Limits) *splitter {
	s := &splitter{i: i, limits: l, work: make(chan *piece)}
	for range runtime.GOMAXPROCS(0) {
		s.done.Go(func() {
			for p := range s.work {
				p.digests, p.err = i.PutAll(p.contents)
				close(p.stored)
			}
		})
	}
	return s
}

func (s *splitter) close() {
	close(s.work)
	s.done.Wait()
}

// piece is a part of a layer: inline bytes, and files between them.
type piece struct {
	inline   []byte
	files    []pieceFile
	data     []byte // of the files
	contents [][]byte
	digests  []fsverity.Digest
	stored   chan struct{} // closed when the digests are there
	err      error
}

type pieceFile struct {
	at   int // in inline
	size int64
}

// split is what became of a layer.
type split struct {
	stream fsverity.Digest
	added  int64 // bytes of the stream's object, 0 if it was there
	files  int   // objects that the layer has, each counted as often as it is there
	inline int64 // bytes
}

// layer stores a layer that is read from blob, and returns its stream, which has no name yet. The content must have the diff ID.
func (s *splitter) layer(ctx context.Context, blob io.Reader, diffID Digest) (split, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var stages sync.WaitGroup
	stage := func(f func() error, end func()) {
		stages.Go(func() {
			if err := f(); err != nil {
				stop(err) // before the next stage learns that nothing more comes
			}
			end()
		})
	}
	raw, hashed := make(chan []byte, 4), make(chan []byte, 4)
	ordered := make(chan *piece, pieces)
	buffers := sync.Pool{New: func() any { return make([]byte, chunkSize) }}
	stage(func() error { return s.read(ctx, blob, &buffers, raw) }, func() { close(raw) })
	hash := diffID.newHash()
	stage(func() error {
		for chunk := range raw {
			hash.Write(chunk)
			if !send(ctx, hashed, chunk) {
				return nil
			}
		}
		return nil
	}, func() { close(hashed) })
	stage(func() error {
		in := &chunks{ctx: ctx, in: hashed, buffers: &buffers}
		c := &cutter{s: s, ctx: ctx, in: in, out: ordered, piece: newPiece()}
		return c.run()
	}, func() { close(ordered) })
	w := splitstream.NewWriter(s.i.Algorithm(), LayerContent)
	var result split
	stage(func() error {
		for p := range ordered {
			select {
			case <-p.stored:
			case <-ctx.Done():
				return nil
			}
			if err := p.writeTo(w, &result); err != nil {
				return err
			}
			freePieces.Put(p)
		}
		return nil
	}, func() {})
	stages.Wait()
	if err := context.Cause(ctx); err != nil {
		return split{}, err
	}
	if err := diffID.check(hash); err != nil {
		return split{}, err
	}
	return result.put(s.i, w)
}

// put stores the stream itself.
func (s split) put(i *repo.Import, w *splitstream.Writer) (split, error) {
	var err error
	s.stream, s.added, err = i.PutStream(w)
	return s, err
}

// read decompresses the blob into chunks.
func (s *splitter) read(ctx context.Context, blob io.Reader, buffers *sync.Pool, out chan<- []byte) error {
	content, end, err := decompress(blob)
	if err != nil {
		return err
	}
	defer end()
	limited := &atMost{content, s.limits.Layer}
	for {
		chunk := buffers.Get().([]byte)[:chunkSize]
		n, err := fill(limited, chunk)
		if n > 0 && !send(ctx, out, chunk[:n]) || err == io.EOF {
			return nil
		}
		if errors.Is(err, ErrTooLarge) {
			return fmt.Errorf("more than %d bytes: %w", s.limits.Layer, err)
		}
		if err != nil {
			return err
		}
	}
}

// fill reads until the buffer is full. An error is the reader's own: io.EOF is the end, also after some bytes.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

// send is false if the context has ended.
func send[T any](ctx context.Context, to chan<- T, v T) bool {
	select {
	case to <- v:
		return true
	case <-ctx.Done():
		return false
	}
}

// chunks reads what comes through a queue.
type chunks struct {
	ctx     context.Context
	in      <-chan []byte
	buffers *sync.Pool
	chunk   []byte // whole
	rest    []byte
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		if c.chunk != nil {
			c.buffers.Put(c.chunk) //nolint:staticcheck // one allocation for 256 KiB
		}
		var ok bool
		if c.chunk, ok = <-c.in; !ok {
			c.chunk = nil
			if err := context.Cause(c.ctx); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		c.rest = c.chunk
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

var freePieces = sync.Pool{New: func() any { return &piece{} }}

func newPiece() *piece {
	p := freePieces.Get().(*piece)
	*p = piece{inline: p.inline[:0], files: p.files[:0], data: p.data[:0], contents: p.contents[:0], stored: make(chan struct{})}
	return p
}

// writeTo adds a piece whose files are stored to the stream.
func (p *piece) writeTo(w *splitstream.Writer, sum *split) error {
	if p.err != nil {
		return p.err
	}
	from := 0
	for k, f := range p.files {
		w.Write(p.inline[from:f.at])
		from = f.at
		if err := w.Object(p.digests[k], uint64(f.size)); err != nil {
			return err
		}
	}
	w.Write(p.inline[from:])
	sum.files += len(p.files)
	sum.inline += int64(len(p.inline))
	return w.Cut()
}

// cutter reads the archive and cuts it into pieces. Headers, padding and small contents are inline; what is more than
// fstree.MaxInline bytes of a file is an object.
type cutter struct {
	s     *splitter
	ctx   context.Context
	in    io.Reader
	out   chan<- *piece
	piece *piece
}

// Read reads from the archive what is inline.
func (c *cutter) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	c.piece.inline = append(c.piece.inline, p[:n]...)
	return n, err
}

func (c *cutter) run() error {
	t := &tarReader{r: c}
	for {
		e, err := t.next()
		if err == io.EOF {
			return c.trailer()
		}
		if err == nil {
			err = c.content(e)
			t.skip(e.size + e.padding())
			if err != nil && c.ctx.Err() == nil {
				err = fmt.Errorf("%s, before %d: %w", e.path, t.at, err)
			}
		}
		if err != nil {
			return err
		}
		if len(c.piece.data) >= pieceBytes || len(c.piece.inline) >= pieceInline || len(c.piece.files) >= pieceFiles {
			c.end()
		}
	}
}

// content takes the data of an entry and the padding after it.
func (c *cutter) content(e *entry) error {
	inline := e.padding()
	p := c.piece
	switch {
	case e.size <= fstree.MaxInline:
		inline += e.size
	case e.size <= smallFile:
		if cap(p.data) < len(p.data)+int(e.size) {
			// The contents that are there stay where they are.
			p.data = make([]byte, 0, pieceBytes+smallFile)
		}
		content := p.data[len(p.data) : len(p.data)+int(e.size)]
		if _, err := io.ReadFull(c.in, content); err != nil {
			return unexpected(err)
		}
		p.data = p.data[:len(p.data)+int(e.size)]
		p.contents = append(p.contents, content)
		p.files = append(p.files, pieceFile{len(p.inline), e.size})
	default:
		c.end()
		d, err := c.s.i.Put(&exactly{c.in, e.size}, e.size)
		if err != nil {
			return err
		}
		if _, err := io.CopyN(io.Discard, c, inline); err != nil {
			return unexpected(err)
		}
		c.stored([]fsverity.Digest{d}, e.size)
		return nil
	}
	_, err := io.CopyN(io.Discard, c, inline)
	return unexpected(err)
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// exactly reads n bytes; if there are not as many, that is an error, and not the end.
type exactly struct {
	r io.Reader
	n int64
}

func (e *exactly) Read(p []byte) (int, error) {
	if e.n == 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(p[:min(int64(len(p)), e.n)])
	if e.n -= int64(n); e.n > 0 && err == io.EOF {
		err = fmt.Errorf("the archive ends, %d bytes too early: %w", e.n, io.ErrUnexpectedEOF)
	}
	return n, err
}

// end sends the piece on its way and begins another one.
func (c *cutter) end() {
	if len(c.piece.inline) == 0 && len(c.piece.files) == 0 {
		return
	}
	p := c.piece
	c.piece = newPiece()
	if len(p.contents) == 0 {
		close(p.stored)
	} else if !send(c.ctx, c.s.work, p) {
		return
	}
	send(c.ctx, c.out, p)
}

// trailer takes what stands behind the end of the archive, zeros that fill it up as a rule. More than that is an object.
func (c *cutter) trailer() error {
	c.end()
	rest := make([]byte, pieceInline)
	for inline := true; ; inline = false {
		n, err := fill(c.in, rest)
		if err != nil && err != io.EOF {
			return err
		}
		if inline {
			c.piece.inline = append(c.piece.inline, rest[:n]...)
			c.end()
		} else if n > 0 {
			digests, err := c.s.i.PutAll([][]byte{rest[:n]})
			if err != nil {
				return err
			}
			c.stored(digests, int64(n))
		}
		if err == io.EOF {
			return nil
		}
	}
}

// stored sends a piece on its way that begins with a content which is stored already.
func (c *cutter) stored(digests []fsverity.Digest, size int64) {
	p := c.piece
	p.files, p.digests = append(p.files, pieceFile{0, size}), digests
	close(p.stored)
	send(c.ctx, c.out, p)
	c.piece = newPiece()
}
