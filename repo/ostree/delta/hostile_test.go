package delta

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/xz"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// crafted is a delta that is put together for a test: of one part, which makes a file of its name's content.
type crafted struct {
	*packer
	entry     func(gvariant.Tuple) // changes the entry of the part
	part      func([]byte) []byte  // changes the part
	fallbacks gvariant.List
	commit    []byte
	from      ostree.Checksum
}

var fileMode = ostree.FileHeader{Meta: fstreeMeta(fstree.TypeRegular | 0o644)}

func fstreeMeta(mode uint32) (m ostree.Meta) {
	m.Mode = mode
	return m
}

// fileNamed returns the name of a file object.
func fileNamed(t testing.TB, h ostree.FileHeader, content string) ostree.ObjectName {
	t.Helper()
	h.Size = int64(len(content))
	sum, err := h.NewHash()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(sum, content)
	return fileName(ostree.Checksum(sum.Sum(nil)))
}

func craft(t testing.TB) *crafted {
	t.Helper()
	c := &ostree.Commit{}
	b, err := c.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return &crafted{packer: newPacker(), commit: b}
}

// file adds an object that is a file of this content, and its mode and attributes, but no operations.
func (c *crafted) file(t testing.TB, content string) {
	t.Helper()
	if _, _, err := c.owner(&fileMode); err != nil {
		t.Fatal(err)
	}
	c.object(fileNamed(t, fileMode, content), int64(len(content)))
}

func (c *crafted) write(s string) { io.WriteString(c.blob, s) }

// superblock returns the bytes of the delta.
func (c *crafted) superblock(t testing.TB) []byte {
	t.Helper()
	p, err := c.finish(&xz.Compressor{})
	if err != nil {
		t.Fatal(err)
	}
	if c.part != nil {
		b, _ := io.ReadAll(p.data.reader())
		p.data = &spool{}
		p.data.Write(c.part(b))
		b, _ = io.ReadAll(p.data.reader())
		sum := sha256.Sum256(b)
		p.entry[1], p.entry[2] = sum[:], uint64(len(b))
	}
	if c.entry != nil {
		c.entry(p.entry)
	}
	g := &generator{opts: Options{Name: Name{c.from, sha256.Sum256(c.commit)}, Inline: true}, parts: []*pressed{{packed: p}}, fallbacks: c.fallbacks}
	l, err := g.superblock(c.commit, gvariant.List{p.entry})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(l.reader())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// openAndApply opens and applies a delta.
func openAndApply(b []byte, sources ostree.Source) (*memory, error) {
	m := &memory{sources: sources}
	d, err := Open(bytes.NewReader(b), int64(len(b)))
	if err == nil {
		err = d.Apply(context.Background(), m, nil)
	}
	return m, err
}

// one is a source of one file.
type one struct {
	ostree.Source
	content string
}

func (o one) File(_ context.Context, sum ostree.Checksum) (*ostree.File, error) {
	if sum != sourceSum {
		return nil, ostree.ErrNotFound
	}
	h := fileMode
	h.Size = int64(len(o.content))
	return &ostree.File{FileHeader: h, Content: io.NopCloser(strings.NewReader(o.content))}, nil
}

var sourceSum = ostree.Checksum{1, 2, 3}

func offtins(n ...int64) (s string) {
	for _, n := range n {
		s += string(appendOfftin(nil, n))
	}
	return s
}

func TestHostilePart(t *testing.T) {
	hello := func(t *testing.T, c *crafted) {
		c.file(t, "hello")
		c.write("hello")
	}
	// patched makes a file by a patch of the source "hallo".
	patch := func(patch string) func(*testing.T, *crafted) {
		return func(t *testing.T, c *crafted) {
			c.file(t, "hello")
			c.write(string(sourceSum[:]) + patch)
			c.op(opSetSource, 0)
			c.op(opOpen, 0, 0, 5)
			c.op(opPatch, 32, uint64(len(patch)))
			c.op(opClose)
		}
	}
	// written makes a file by ranges of the source.
	written := func(ranges ...uint64) func(*testing.T, *crafted) {
		return func(t *testing.T, c *crafted) {
			c.file(t, "hello")
			c.write(string(sourceSum[:]))
			c.op(opOpen, 0, 0, 5)
			c.op(opSetSource, 0)
			for i := 0; i < len(ranges); i += 2 {
				c.op(opWrite, ranges[i], ranges[i+1])
			}
			c.op(opClose)
		}
	}
	good := offtins(5, 0, 0) + "\x00\x04\x00\x00\x00"
	raw := func(s string) func(*testing.T, *crafted) {
		return func(t *testing.T, c *crafted) {
			hello(t, c)
			c.ops = append(c.ops, s...)
		}
	}
	for _, test := range []struct {
		name  string
		craft func(*testing.T, *crafted)
		want  string // "" if it is right
	}{
		{"splice", func(t *testing.T, c *crafted) { hello(t, c); c.op(opSplice, 0, 0, 5, 0) }, ""},
		{"patch", patch(good), ""},
		{"patch and more behind it", patch(good + "xxx"), ""},
		{"patch of many empty runs", patch(strings.Repeat(offtins(0, 0, 7), 1000) + offtins(0, 5, 0) + "hello"), ""},
		{"patch outside of the source", patch(offtins(0, 0, -100) + offtins(5, 0, 0) + "hello"), ""},
		{"written", func(t *testing.T, c *crafted) {
			c.file(t, "hallo")
			c.write(string(sourceSum[:]) + "a")
			c.op(opOpen, 0, 0, 5)
			c.op(opSetSource, 0)
			c.op(opWrite, 1, 0)
			c.op(opUnsetSource)
			c.op(opWrite, 1, 32)
			c.op(opSetSource, 0)
			c.op(opWrite, 3, 2)
			c.op(opClose)
		}, ""},
		{"no operations", hello, "the operations end before object"},
		{"unknown operation", raw("x"), `operation 'x'`},
		{"write outside", raw("w\x05\x00"), "without an open object"},
		{"close outside", raw("c"), "without an open object"},
		{"patch outside", raw("B\x00\x00"), "without an open object"},
		{"no operand", raw("S"), "unexpected EOF"},
		{"varint ends", raw("S\x80"), "unexpected EOF"},
		{"varint of 71 bits", raw("S" + strings.Repeat("\x80", 10) + "\x01"), "more than 64 bits"},
		{"varint of 65 bits", raw("S" + strings.Repeat("\x80", 9) + "\x02"), "more than 64 bits"},
		{"open inside", raw("o\x00\x00\x05o\x00\x00\x05"), "inside of an object"},
		{"open and end", raw("o\x00\x00\x05"), "unexpected EOF"},
		{"closed too early", raw("o\x00\x00\x05w\x04\x00c"), "closed 1 bytes too early"},
		{"written too much", raw("o\x00\x00\x05w\x05\x00w\x01\x00c"), "1 bytes written where 0 are left"},
		{"splice behind the blob", raw("S\x00\x00\x05\x01"), "outside of the blob"},
		{"splice of 2^64-1", func(t *testing.T, c *crafted) { hello(t, c); c.op(opSplice, 0, 0, math.MaxUint64, 6) }, "too large"},
		{"splice from 2^64-1", func(t *testing.T, c *crafted) { hello(t, c); c.op(opSplice, 0, 0, 5, math.MaxUint64) }, "outside of the blob"},
		{"write behind the blob", raw("o\x00\x00\x05w\x05\x01c"), "outside of the blob"},
		{"mode out of range", raw("S\x01\x00\x05\x00"), "mode:"},
		{"mode 2^64-1", func(t *testing.T, c *crafted) { hello(t, c); c.op(opSplice, math.MaxUint64, 0, 5, 0) }, "mode:"},
		{"attributes out of range", raw("S\x00\x01\x05\x00"), "extended attributes:"},
		{"other content", func(t *testing.T, c *crafted) {
			c.file(t, "hello")
			c.write("hallo")
			c.op(opSplice, 0, 0, 5, 0)
		}, fileNamed(t, fileMode, "hello").String()},
		{"more objects", raw("S\x00\x00\x05\x00S\x00\x00\x05\x00"), "more objects are made than the 1"},
		{"fewer objects", func(t *testing.T, c *crafted) {
			hello(t, c)
			c.op(opSplice, 0, 0, 5, 0)
			c.file(t, "")
		}, "the operations end before object " + fileNamed(t, fileMode, "").String()},
		{"more bytes than said", func(t *testing.T, c *crafted) {
			hello(t, c)
			c.makes = 4
			c.op(opSplice, 0, 0, 5, 0)
		}, "more than what the part says"},
		{"a directory", func(t *testing.T, c *crafted) {
			c.object(fileNamed(t, fileMode, ""), 0)
			c.owner(&ostree.FileHeader{Meta: fstreeMeta(fstree.TypeDir | 0o755)})
			c.op(opSplice, 0, 0, 0, 0)
		}, "mode"},
		{"a long link", func(t *testing.T, c *crafted) {
			c.object(fileNamed(t, fileMode, ""), 0)
			c.owner(&ostree.FileHeader{Meta: fstreeMeta(fstree.TypeSymlink | 0o777)})
			c.write(strings.Repeat("x", 5000))
			c.op(opSplice, 0, 0, 5000, 0)
		}, "symbolic link"},
		{"a link that is opened", func(t *testing.T, c *crafted) {
			c.object(fileNamed(t, fileMode, ""), 0)
			c.owner(&ostree.FileHeader{Meta: fstreeMeta(fstree.TypeSymlink | 0o777)})
			c.op(opOpen, 0, 0, 0)
			c.op(opClose)
		}, "symbolic link"},
		{"metadata that is opened", func(t *testing.T, c *crafted) {
			c.object(ostree.ObjectName{Kind: ostree.KindDirTree}, 0)
			c.op(opOpen, 0, 0, 0)
		}, "opened as a file"},
		{"metadata of 1 GiB", func(t *testing.T, c *crafted) {
			c.object(ostree.ObjectName{Kind: ostree.KindDirTree}, 1<<30)
			c.op(opSplice, 1<<30, 0)
		}, "too large"},
		{"other metadata", func(t *testing.T, c *crafted) {
			c.object(ostree.ObjectName{Kind: ostree.KindDirTree}, 0)
			c.op(opSplice, 0, 0)
		}, ostree.ObjectName{Kind: ostree.KindDirTree}.String()},
		{"source behind the blob", func(t *testing.T, c *crafted) { hello(t, c); c.op(opSetSource, 0) }, "outside of the blob"},
		{"source that is missing", func(t *testing.T, c *crafted) {
			c.file(t, "hello")
			c.write(strings.Repeat("\xaa", 32))
			c.op(opOpen, 0, 0, 5)
			c.op(opSetSource, 0)
			c.op(opWrite, 5, 0)
			c.op(opClose)
		}, "source " + strings.Repeat("aa", 32) + ": not found"},
		{"write behind the source", written(5, 1), "5 bytes from 1 of the source " + sourceSum.String() + ", which has 5"},
		{"write from 2^64-1", written(5, math.MaxUint64), "of the source"},
		{"patch without a source", raw("o\x00\x00\x05B\x00\x05c"), "a patch without a source"},
		{"source is unset by close", func(t *testing.T, c *crafted) {
			written(0, 0)(t, c)
			c.objects, c.ops = nil, nil
			c.file(t, "")
			c.file(t, "hello")
			c.op(opSetSource, 0)
			c.op(opOpen, 0, 0, 0)
			c.op(opClose)
			c.op(opOpen, 0, 0, 5)
			c.op(opPatch, 0, 0)
		}, "a patch without a source"},
		{"patch behind the blob", func(t *testing.T, c *crafted) {
			patch("")(t, c)
			c.ops = bytes.Replace(c.ops, []byte("B\x20\x00"), []byte("B\x20\x01"), 1)
		}, "outside of the blob"},
		{"empty patch", patch(""), "the patch ends before the file does"},
		{"short patch", patch(good[:26]), "the patch ends before the file does"},
		{"half a run", patch(good[:20]), "the patch ends before the file does"},
		{"patch of another size", patch(offtins(6, 0, 0) + "xxxxxx"), "6 and copies 0 bytes where 5 are left"},
		{"patch that copies more", patch(offtins(0, 6, 0) + "xxxxxx"), "0 and copies 6 bytes where 5 are left"},
		{"patch of negative size", patch(offtins(-1, 6, 0) + "xxxxxx"), "adds -1"},
		{"patch of sizes that overflow", patch(offtins(math.MaxInt64, math.MaxInt64, 0) + "xxxxxx"), "where 5 are left"},
		{"patch that seeks far", patch(strings.Repeat(offtins(0, 0, math.MaxInt64), 3) + good), "the patch seeks to"},
		{"patch that seeks far back", patch(strings.Repeat(offtins(0, 0, -math.MaxInt64), 3) + good), "the patch seeks to"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := craft(t)
			test.craft(t, c)
			m, err := openAndApply(c.superblock(t), one{content: "hallo"})
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want == "" && len(m.made) != 1:
				t.Errorf("%d objects are made", len(m.made))
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "part 0")):
				t.Errorf("error %v, want one of part 0 with %q", err, test.want)
			}
		})
	}
}

func TestHostileSuperblock(t *testing.T) {
	entry := func(i int, x any) func(*crafted) {
		return func(c *crafted) { c.entry = func(e gvariant.Tuple) { e[i] = x } }
	}
	part := func(b []byte) func(*crafted) {
		return func(c *crafted) { c.part = func([]byte) []byte { return b } }
	}
	xz := func(change func([]byte)) func(*crafted) {
		return func(c *crafted) {
			c.part = func(b []byte) []byte {
				b = bytes.Clone(b)
				change(b[1:])
				return b
			}
		}
	}
	plain := func(ends ...byte) []byte { return append([]byte{0, 's', 'o', 'm', 'e'}, ends...) }
	for _, test := range []struct {
		name  string
		craft func(*crafted)
		want  string
	}{
		{"right", func(*crafted) {}, ""},
		{"version 1", entry(0, uint32(1)), "part 0: version 1"},
		{"checksum of 31 bytes", entry(1, make([]byte, 31)), "part 0: a checksum of 31 bytes"},
		{"other checksum", entry(1, make([]byte, 32)), "part 0: its checksum is"},
		{"smaller size", entry(2, uint64(10)), "part 0: it has more than 10 bytes"},
		{"larger size", entry(2, uint64(10_000)), "part 0: it has "},
		{"size 2^64-1", entry(2, uint64(math.MaxUint64)), "part 0: it has "},
		{"makes 2^64-1", entry(3, uint64(math.MaxUint64)), ""},
		{"objects of 32 bytes", entry(4, make([]byte, 32)), "part 0: a list of objects of 32 bytes"},
		{"object of kind 0", entry(4, make([]byte, 33)), "is of kind 0"},
		{"object of kind 6", entry(4, append([]byte{6}, make([]byte, 32)...)), "is of kind 6"},
		{"fallback of kind 5", func(c *crafted) {
			c.fallbacks = gvariant.List{gvariant.Tuple{byte(5), make([]byte, 32), uint64(1), uint64(1)}}
		}, "fallbacks: object 0 of kind 5"},
		{"fallback with a checksum of 33 bytes", func(c *crafted) {
			c.fallbacks = gvariant.List{gvariant.Tuple{byte(1), make([]byte, 33), uint64(1), uint64(1)}}
		}, "fallbacks: object 0 of kind 1 with a checksum of 33 bytes"},
		{"no commit", func(c *crafted) { c.commit = nil }, ""},
		{"empty part", part(nil), "part 0: unexpected EOF"},
		{"compressed with gzip", part([]byte("g...")), "compressed in a way 'g'"},
		{"plain and empty", part([]byte{0}), "part 0: payload"},
		{"offset too large", part(plain(4, 2, 9)), "framing offsets"},
		{"offsets that descend", part(plain(1, 3, 2)), "framing offsets"},
		{"modes of 1 byte", part(plain(1, 1, 1)), "part 0: "},
		{"no xz", part([]byte("xsomething else")), "no .xz stream"},
		{"xz that ends", func(c *crafted) { c.part = func(b []byte) []byte { return b[:len(b)-30] } }, "part 0: "},
		{"xz without its footer", func(c *crafted) { c.part = func(b []byte) []byte { return b[:len(b)-12] } }, "part 0: unexpected EOF"},
		{"bytes behind xz", func(c *crafted) { c.part = func(b []byte) []byte { return append(bytes.Clone(b), 0) } }, "bytes behind the .xz stream"},
		{"xz with a dictionary of 4 GiB", xz(func(b []byte) { b[16] = 40; fixCRC(b[12:24]) }), "needs 4294967295 bytes of memory"},
		{"xz with an unknown filter", xz(func(b []byte) { b[14] = 3; fixCRC(b[12:24]) }), "other filters than LZMA2"},
		{"xz of other content", xz(func(b []byte) { b[len(b)-12-16] ^= 1 }), "part 0: "},
		{"xz with another footer", xz(func(b []byte) { b[len(b)-3] ^= 1 }), "no .xz stream"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := craft(t)
			c.file(t, "hello")
			c.write("hello")
			c.op(opSplice, 0, 0, 5, 0)
			test.craft(c)
			_, err := openAndApply(c.superblock(t), nil)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
		})
	}
}

// TestOtherCommit has a commit in the superblock that is not the one of the name.
func TestOtherCommit(t *testing.T) {
	c := craft(t)
	b := c.superblock(t)
	at := bytes.Index(b, c.commit)
	if at < 0 {
		t.Fatal("no commit")
	}
	b[at+len(c.commit)/2] ^= 1
	sum := ostree.Checksum(sha256.Sum256(c.commit))
	if _, err := openAndApply(b, nil); err == nil || !strings.Contains(err.Error(), "commit "+sum.String()+": its checksum is") {
		t.Errorf("error %v", err)
	}
}

// TestBomb has a part decompress to more than it can need.
func TestBomb(t *testing.T) {
	c := craft(t)
	c.file(t, "hello")
	c.write("hello")
	for range 65 {
		c.blob.Write(make([]byte, 1<<20))
	}
	c.op(opSplice, 0, 0, 5, 0)
	if _, err := openAndApply(c.superblock(t), nil); !errors.Is(err, errTooLarge) {
		t.Errorf("error %v, want that it is too large", err)
	}
}

// TestDamaged flips bits of a delta, and cuts it: nothing but the right objects is ever made.
func TestDamaged(t *testing.T) {
	l := vectors(t)
	b := golden.Read(t, "ostree/offline.delta")
	want := map[ostree.Checksum]bool{}
	for o := range objects(t, l, checksum(t, second)) {
		want[o.Checksum] = true
	}
	for at := 0; at < len(b); at += 3 {
		flipped := bytes.Clone(b)
		flipped[at] ^= 1 << (at % 8)
		m, _ := openAndApply(flipped, l)
		for o := range m.made {
			if !want[o.Checksum] {
				t.Fatalf("a bit at %d is another one: object %s is made", at, o)
			}
		}
		if _, err := openAndApply(b[:at], l); err == nil {
			t.Fatalf("cut at %d, and no error", at)
		}
	}
}

func TestByteOrder(t *testing.T) {
	swapped := func(e gvariant.Tuple) {
		for _, i := range []int{2, 3} {
			e[i] = binary.BigEndian.Uint64(binary.LittleEndian.AppendUint64(nil, e[i].(uint64)))
		}
	}
	for _, test := range []struct {
		name  string
		order ByteOrder
		entry func(gvariant.Tuple)
	}{
		{"little", LittleEndian, nil},
		{"big", BigEndian, swapped},
		{"little, and does not say so", UnknownOrder, nil},
		{"big, and does not say so", UnknownOrder, swapped},
		{"neither", 'm', nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := craft(t)
			content := strings.Repeat("hello", 1000)
			c.file(t, content)
			c.write(content)
			c.op(opSplice, 0, 0, uint64(len(content)), 0)
			c.entry = test.entry
			b := c.superblock(t)
			// The value that the superblock has is replaced where it stands.
			at := bytes.Index(b, []byte("ostree.endianness\x00"))
			value := at + 24
			if b[value] != 'l' {
				t.Fatalf("%q", b[at:value+8])
			}
			if test.order == UnknownOrder {
				b[at] = 'x'
			} else {
				b[value] = byte(test.order)
			}
			m, err := openAndApply(b, nil)
			if test.order == 'm' {
				if err == nil || !strings.Contains(err.Error(), "ostree.endianness") {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil || len(m.made) != 1 {
				t.Errorf("%d objects, %v", len(m.made), err)
			}
		})
	}
}
