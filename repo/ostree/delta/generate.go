package delta

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"github.com/composefs-boot/composefs-boot/internal/xz"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// Options tell how a delta is made.
type Options struct {
	Name
	// MaxPart is the size of a part before compression, in bytes, up to which another object is added; 0 is for DefaultMaxPart.
	MaxPart int64
	// MinFallback is the size of a file, in bytes, above which it is left to be fetched by itself, unless a small change describes it;
	// 0 is for none.
	MinFallback int64
	// MaxDiff is the size of two files together, in bytes, up to which one is described by the other; 0 is for none.
	MaxDiff int64
	// Inline puts the parts into the superblock.
	Inline bool
	// Time is what the superblock says that it is made at, in seconds since 1970.
	Time uint64
	// CommitMeta is the detached metadata of the target, an a{sv}, or nil.
	CommitMeta []byte
	// Sign returns the signatures of a superblock as package sign makes them, an a{sv}. If it is nil, the superblock is not signed.
	Sign func(superblock []byte) (dictionary []byte, err error)
}

// The values that ostree has for options, in bytes.
const (
	DefaultMaxPart     = 32_000_000
	DefaultMinFallback = 4_000_000
	DefaultMaxDiff     = 128_000_000
)

// maxWorkers limits how many parts are compressed, and how many changes are computed, at the same time: both take memory.
const maxWorkers = 4

// Generate makes a delta of commits that a source has; it uses the source from several goroutines. The same commits and options always give the same bytes. It hands over the files of the delta by their names
// in its directory: "0", "1" and so on if parts are not inline, and at last "superblock".
func Generate(ctx context.Context, from ostree.Source, opts Options, write func(name string, r io.Reader) error) error {
	g := &generator{from: from, opts: opts}
	if opts.MaxPart == 0 {
		g.opts.MaxPart = DefaultMaxPart
	}
	g.slots = make(chan *xz.Compressor, min(runtime.GOMAXPROCS(0), maxWorkers))
	for range cap(g.slots) {
		g.slots <- &xz.Compressor{}
	}
	err := g.run(ctx, write)
	g.wait.Wait() // for what goes on after an error
	for _, p := range g.parts {
		if p.packed != nil {
			p.packed.data.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("delta %s: %w", opts.Name, err)
	}
	return nil
}

// generator makes one delta.
type generator struct {
	from      ostree.Source
	opts      Options
	fallbacks gvariant.List
	packer    *packer
	parts     []*pressed
	slots     chan *xz.Compressor // that have nothing to do
	wait      sync.WaitGroup
}

// pressed is a part that is compressed, or will be.
type pressed struct {
	packed *packed
	err    error
}

// newFile is a file object that the delta has to make.
type newFile struct {
	treeFile
	size     int64
	link     bool
	base     ostree.Checksum // what it is described by, zero for nothing
	fallback bool
}

func (g *generator) run(ctx context.Context, write func(string, io.Reader) error) error {
	commit, err := metadata(ctx, g.from, ostree.ObjectName{Checksum: g.opts.To, Kind: ostree.KindCommit})
	if err != nil {
		return err
	}
	to, err := readTree(ctx, g.from, commit)
	if err != nil {
		return err
	}
	base := &tree{}
	if !g.opts.From.IsZero() {
		b, err := metadata(ctx, g.from, ostree.ObjectName{Checksum: g.opts.From, Kind: ostree.KindCommit})
		if err == nil {
			base, err = readTree(ctx, g.from, b)
		}
		if err != nil {
			return err
		}
	}
	metadata, files, err := g.plan(ctx, base, to)
	if err != nil {
		return err
	}
	g.packer = newPacker()
	for _, o := range metadata {
		if err := g.addMetadata(ctx, o); err != nil {
			return err
		}
	}
	if err := g.addFiles(ctx, files); err != nil {
		return err
	}
	if len(g.packer.objects) > 0 {
		g.compress()
	}
	g.wait.Wait()
	return g.write(commit, write)
}

// plan returns the objects to make, in order: files that are described by others in front, so that the rest is near to its likes.
func (g *generator) plan(ctx context.Context, base, to *tree) ([]ostree.ObjectName, []newFile, error) {
	have := map[ostree.ObjectName]bool{}
	for _, o := range base.metadata {
		have[o] = true
	}
	for _, f := range base.files {
		have[fileName(f.sum)] = true
	}
	metadata := slices.DeleteFunc(slices.Clone(to.metadata), func(o ostree.ObjectName) bool { return have[o] })
	s := newSimilar(g.from, base)
	var files []newFile
	for _, f := range to.files {
		if have[fileName(f.sum)] {
			continue
		}
		open, err := openFile(ctx, g.from, f.sum)
		if err != nil {
			return nil, nil, err
		}
		open.Close()
		n := newFile{treeFile: f, size: open.Size, link: open.IsSymlink()}
		if !n.link {
			sum, size, err := s.find(ctx, f, n.size)
			if err != nil {
				return nil, nil, err
			}
			if !sum.IsZero() && n.size+size <= g.opts.MaxDiff {
				n.base = sum
			}
			n.fallback = g.opts.MinFallback > 0 && n.size > g.opts.MinFallback
		}
		files = append(files, n)
	}
	slices.SortStableFunc(files, func(a, b newFile) int { return a.rank() - b.rank() })
	return metadata, files, nil
}

func (f *newFile) rank() int {
	switch {
	case f.link:
		return 2
	case f.base.IsZero():
		return 1
	}
	return 0
}

func (g *generator) addMetadata(ctx context.Context, o ostree.ObjectName) error {
	b, err := metadata(ctx, g.from, o)
	if err != nil {
		return err
	}
	g.room(int64(len(b)))
	return g.packer.metadata(o, b)
}

// addFiles adds files. Changes are computed ahead, several at a time.
func (g *generator) addFiles(ctx context.Context, files []newFile) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		change *change
		err    error
	}
	ahead := make(chan chan result, cap(g.slots)-1)
	g.wait.Go(func() {
		defer close(ahead)
		for _, f := range files {
			one := make(chan result, 1)
			select {
			case ahead <- one:
			case <-ctx.Done():
				return
			}
			g.wait.Go(func() {
				c, err := g.describe(ctx, f)
				one <- result{c, err}
			})
		}
	})
	i := 0
	for one := range ahead {
		r := <-one
		if r.err == nil {
			r.err = g.addFile(ctx, files[i], r.change)
		}
		if r.err != nil {
			return r.err
		}
		i++
	}
	return ctx.Err()
}

func (g *generator) addFile(ctx context.Context, f newFile, c *change) error {
	o := fileName(f.sum)
	open, err := openFile(ctx, g.from, f.sum)
	if err != nil {
		return err
	}
	defer open.Close()
	switch {
	case c != nil: // read before
		g.room(int64(len(c.literal)))
		return g.packer.changed(o, &open.FileHeader, c)
	case f.fallback:
		return g.addFallback(ctx, o)
	case f.link:
		g.room(int64(len(open.Target)))
		err = g.packer.link(o, &open.FileHeader)
	default:
		g.room(f.size)
		err = g.packer.file(o, &open.FileHeader, open, f.size)
	}
	if err != nil {
		return fmt.Errorf("object %s: %w", o, err)
	}
	// The end is where the checksum is compared.
	if n, err := io.Copy(io.Discard, open); err != nil || n > 0 {
		return errors.Join(err, fmt.Errorf("object %s: it has other than %d bytes", o, f.size))
	}
	return nil
}

// addFallback leaves a file out. What is fetched instead is the object of an archive.
func (g *generator) addFallback(ctx context.Context, o ostree.ObjectName) error {
	f, err := g.from.File(ctx, o.Checksum)
	if err != nil {
		return fmt.Errorf("object %s: %w", o, err)
	}
	defer f.Content.Close()
	head, err := f.EncodeFilez()
	stored := int64(len(head)) + f.Size
	if err == nil && f.Deflated {
		stored, err = io.Copy(io.Discard, f.Content)
		stored += int64(len(head))
	}
	if err != nil {
		return fmt.Errorf("object %s: %w", o, err)
	}
	g.fallbacks = append(g.fallbacks, gvariant.Tuple{byte(o.Kind), o.Checksum[:], uint64(stored), uint64(f.Size)})
	return nil
}

// change describes a file by another one.
type change struct {
	from    ostree.Checksum
	size    int64   // of the file, in bytes
	literal []byte  // the patch, or what pieces write literally
	pieces  []piece // nil if it is a patch
}

// describe describes a file by its base, or returns nil if that has none or is not worth it.
func (g *generator) describe(ctx context.Context, f newFile) (*change, error) {
	if f.base.IsZero() {
		return nil, nil
	}
	old, err := g.content(ctx, f.base)
	if err != nil {
		return nil, err
	}
	new, err := g.content(ctx, f.sum)
	if err != nil {
		return nil, err
	}
	runs := diff(old, new)
	list := pieces(runs, old, new)
	byPieces, byPatch := piecesCost(list), patchCost(runs, old, new)
	switch {
	case min(byPieces, byPatch) > len(new)/4*3:
		return nil, nil
	case byPieces <= byPatch+byPatch/8+64: // it is applied faster, and makes a smaller part
		c := &change{from: f.base, size: f.size, pieces: list}
		at := 0
		for _, p := range list {
			if p.old < 0 {
				c.literal = append(c.literal, new[at:at+p.size]...)
			}
			at += p.size
		}
		return c, nil
	}
	return &change{from: f.base, size: f.size, literal: patch(runs, old, new)}, nil
}

func (g *generator) content(ctx context.Context, sum ostree.Checksum) ([]byte, error) {
	f, err := openFile(ctx, g.from, sum)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := bytes.NewBuffer(make([]byte, 0, min(f.Size, g.opts.MaxDiff)+bytes.MinRead))
	if n, err := b.ReadFrom(io.LimitReader(f, g.opts.MaxDiff+1)); err != nil {
		return nil, err
	} else if n != f.Size {
		return nil, fmt.Errorf("object %s: it has other than %d bytes", fileName(sum), f.Size)
	}
	return b.Bytes(), nil
}

// room begins another part if the present one has no room for this number of bytes.
func (g *generator) room(n int64) {
	if len(g.packer.objects) > 0 && g.packer.size()+n > g.opts.MaxPart {
		g.compress()
	}
}

// compress compresses the present part, while the next one is filled.
func (g *generator) compress() {
	p, into := g.packer, &pressed{}
	g.packer = newPacker()
	g.parts = append(g.parts, into)
	c := <-g.slots
	g.wait.Go(func() {
		into.packed, into.err = p.finish(c)
		g.slots <- c
	})
}

// write hands over the files of the delta.
func (g *generator) write(commit []byte, write func(string, io.Reader) error) error {
	entries := make(gvariant.List, len(g.parts))
	for i, p := range g.parts {
		if p.err != nil {
			return fmt.Errorf("part %d: %w", i, p.err)
		}
		entries[i] = p.packed.entry
		if !g.opts.Inline {
			if err := write(strconv.Itoa(i), p.packed.data.reader()); err != nil {
				return err
			}
		}
	}
	l, err := g.superblock(commit, entries)
	if err != nil {
		return err
	}
	r := l.reader()
	if g.opts.Sign != nil {
		if r, err = signed(r, g.opts.Sign); err != nil {
			return err
		}
	}
	return write("superblock", r)
}

// superblock puts the superblock together. Parts inside of it are not read for that.
func (g *generator) superblock(commit []byte, entries gvariant.List) (*layout, error) {
	var l layout
	var ends []int64
	entry := func(key string, value io.Reader, size int64, typ string) {
		l.align8()
		start := l.size
		l.bytes(append([]byte(key), 0))
		end := l.size - start
		l.align8()
		l.add(value, size)
		l.bytes(append([]byte{0}, typ...))
		l.frame(start, []int64{end})
		ends = append(ends, l.size)
	}
	entry("ostree.endianness", bytes.NewReader([]byte{byte(LittleEndian)}), 1, "y")
	if g.opts.Inline {
		for i, p := range g.parts {
			entry(g.opts.Path()+"/"+strconv.Itoa(i), p.packed.data.reader(), p.packed.data.size, "(yay)")
		}
	}
	if g.opts.CommitMeta != nil {
		entry(g.opts.Path()+"/commitmeta", bytes.NewReader(g.opts.CommitMeta), int64(len(g.opts.CommitMeta)), "a{sv}")
	}
	l.frame(0, ends)

	ends = []int64{l.size}
	l.align8()
	l.bytes(binary.BigEndian.AppendUint64(nil, g.opts.Time))
	if !g.opts.From.IsZero() {
		l.bytes(g.opts.From[:])
	}
	ends = append(ends, l.size)
	l.bytes(g.opts.To[:])
	ends = append(ends, l.size)
	l.align8()
	l.bytes(commit)
	ends = append(ends, l.size, l.size) // nothing has to be applied before
	parts, err := gvariant.Encode("a(uayttay)", entries)
	if err != nil {
		return nil, err
	}
	fallbacks, err := gvariant.Encode("a(yaytt)", g.fallbacks)
	if err != nil {
		return nil, err
	}
	l.align8()
	l.bytes(parts.Bytes())
	ends = append(ends, l.size)
	l.align8()
	l.bytes(fallbacks.Bytes())
	l.tuple(ends)
	return &l, nil
}

// signed wraps a superblock with its signatures. All of it is in memory: signatures are not made of streams.
func signed(r io.Reader, sign func([]byte) ([]byte, error)) (io.Reader, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	dictionary, err := sign(b)
	if err != nil {
		return nil, fmt.Errorf("signature: %w", err)
	}
	var l layout
	l.bytes([]byte(signedMagic))
	l.bytes(b)
	ends := []int64{l.size}
	l.align8()
	l.bytes(dictionary)
	l.tuple(ends)
	return l.reader(), nil
}
