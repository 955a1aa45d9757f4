package oci

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

const (
	blockSize = 512
	// maxExtended limits what the extended headers of one entry take, in bytes, and maxHeaders how many there are.
	maxExtended = 1 << 20
	maxHeaders  = 16
	maxPath     = 4096
)

// Types of entries, as the header says them.
const (
	typeRegular    = '0'
	typeOldRegular = 0
	typeLink       = '1'
	typeSymlink    = '2'
	typeChar       = '3'
	typeBlock      = '4'
	typeDirectory  = '5'
	typeFifo       = '6'
	typeContiguous = '7' // a regular file
	typePAX        = 'x'
	typePAXGlobal  = 'g'
	typeGNUName    = 'L'
	typeGNULink    = 'K'
	typeGNUSparse  = 'S'
)

// entry is a file of an archive.
type entry struct {
	path   string // without slashes at either end; "" is the root
	inode  fstree.Inode
	isLink bool
	link   string // of a hard link: the path of the other name
	size   int64  // of what follows in the archive, without padding
	sparse *sparse
}

// padding returns how many bytes stand between the data and the next header.
func (e *entry) padding() int64 { return -e.size & (blockSize - 1) }

func (e *entry) isRegular() bool { return !e.isLink && e.inode.Content == nil }

// tarReader reads the headers of an archive; what stands between them is for the caller to read, from the same reader. The
// formats are v7, ustar, PAX and GNU. Where archives are ambiguous it follows archive/tar and GNU tar; what they read in
// different ways, such as a link with data, is refused.
type tarReader struct {
	r     io.Reader
	at    int64 // in the archive
	block [blockSize]byte
}

func (t *tarReader) readBlock() error {
	n, err := io.ReadFull(t.r, t.block[:])
	t.at += int64(n)
	return err
}

// skip tells of bytes that the caller has read.
func (t *tarReader) skip(n int64) { t.at += n }

// next reads the headers of the next entry. At the end of the archive the error is io.EOF: more bytes may follow, which mean nothing.
func (t *tarReader) next() (*entry, error) {
	start := t.at
	e, err := t.read()
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("tar header at %d: %w", start, err)
	}
	return e, err
}

func (t *tarReader) read() (*entry, error) {
	var x extended
	total := int64(0)
	for headers := 0; ; headers++ {
		err := t.readBlock()
		if err == io.EOF && headers == 0 {
			return nil, io.EOF // without an end that is marked, which some programs leave out
		}
		if err == nil && t.block == [blockSize]byte{} && headers == 0 {
			// Two blocks of zeros are the end, and one is nothing, except at the very end.
			if err = t.readBlock(); err == io.EOF || err == nil && t.block == [blockSize]byte{} {
				return nil, io.EOF
			}
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
		h := header(t.block[:])
		if err := h.check(); err != nil {
			return nil, err
		}
		switch kind := h[156]; kind {
		case typePAX, typePAXGlobal, typeGNUName, typeGNULink:
			data, err := t.extension(h, &total)
			if err != nil {
				return nil, err
			}
			if headers >= maxHeaders {
				return nil, fmt.Errorf("more than %d extended headers", maxHeaders)
			}
			if err := x.add(kind, data); err != nil {
				return nil, err
			}
			if kind == typePAXGlobal {
				headers = -1 // it stands alone
			}
		default:
			return t.entry(h, &x)
		}
	}
}

// extension reads the data of an extended header.
func (t *tarReader) extension(h header, total *int64) ([]byte, error) {
	size, err := h.number(124, 12)
	if err != nil {
		return nil, fmt.Errorf("size: %w", err)
	}
	if *total += size; size < 0 || size > maxExtended || *total > maxExtended {
		return nil, fmt.Errorf("extended headers of %d bytes: at most %d are read", size, maxExtended)
	}
	data := make([]byte, (size+blockSize-1)&^(blockSize-1))
	n, err := io.ReadFull(t.r, data)
	t.at += int64(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return data[:min(size, int64(n))], err
}

// header is one block of an archive that describes an entry.
type header []byte

var errChecksum = errors.New("wrong checksum: not a tar archive, or a damaged one")

func (h header) check() error {
	want, err := h.number(148, 8)
	if err != nil {
		return errChecksum
	}
	var sum, signed int64
	for k, c := range h {
		if k >= 148 && k < 156 {
			c = ' '
		}
		sum += int64(c)
		signed += int64(int8(c)) // as some old programs counted
	}
	if want != sum && want != signed {
		return errChecksum
	}
	return nil
}

func (h header) text(at, size int) string {
	s, _, _ := bytes.Cut(h[at:at+size], []byte{0})
	return string(s)
}

// number reads an octal number, or one of base 256, whose first bit is set.
func (h header) number(at, size int) (int64, error) {
	b := h[at : at+size]
	if b[0]&0x80 != 0 {
		negative := b[0]&0x40 != 0
		var x uint64
		for k, c := range b {
			if negative {
				c = ^c
			}
			if k == 0 {
				c &= 0x7f
			}
			if x>>55 != 0 {
				return 0, errors.New("number out of range")
			}
			x = x<<8 | uint64(c)
		}
		if negative {
			return ^int64(x), nil
		}
		return int64(x), nil
	}
	text := strings.Trim(string(b), " \x00")
	var x int64
	for _, c := range []byte(text) {
		if c < '0' || c > '7' || x > math.MaxInt64>>3 {
			return 0, fmt.Errorf("%q is not an octal number", text)
		}
		x = x<<3 | int64(c-'0')
	}
	return x, nil
}

// isUstar reports whether the header has device numbers, and whether it has a prefix of the name.
func (h header) isUstar() (devices, prefix bool) {
	switch string(h[257:265]) {
	case "ustar\x0000":
		return true, true
	case "ustar  \x00":
		return true, false // of GNU, which has other fields there
	}
	return false, false
}

// entry makes the entry of a header and the extended ones before it.
func (t *tarReader) entry(h header, x *extended) (*entry, error) {
	e := &entry{}
	name, link := h.text(0, 100), h.text(157, 100)
	devices, prefix := h.isUstar()
	if p := h.text(345, 155); prefix && p != "" {
		name = p + "/" + name
	}
	if x.hasName {
		name = x.name
	}
	if x.hasLink {
		link = x.link
	}
	var err error
	numbers := map[string]int64{}
	for _, field := range []struct {
		name     string
		at, size int
	}{{"mode", 100, 8}, {"uid", 108, 8}, {"gid", 116, 8}, {"size", 124, 12}, {"mtime", 136, 12}, {"major", 329, 8}, {"minor", 337, 8}} {
		if n, ok := x.numbers[field.name]; ok {
			numbers[field.name] = n
			continue
		}
		if field.at > 300 && (!devices || h[156] != typeChar && h[156] != typeBlock) {
			continue
		}
		if numbers[field.name], err = h.number(field.at, field.size); err != nil {
			return nil, fmt.Errorf("%s: %w", field.name, err)
		}
	}
	for _, id := range []string{"uid", "gid"} {
		if numbers[id] < 0 || numbers[id] > math.MaxUint32 {
			return nil, fmt.Errorf("%s %d: out of range", id, numbers[id])
		}
	}
	e.size = numbers["size"]
	if e.size < 0 || e.size > math.MaxInt64-blockSize {
		return nil, fmt.Errorf("size %d: out of range", e.size)
	}
	e.inode = fstree.Inode{Perm: uint32(numbers["mode"]) & 0o7777, UID: uint32(numbers["uid"]), GID: uint32(numbers["gid"]),
		Mtime: fstree.Time{Sec: numbers["mtime"]}, Xattrs: x.xattrs}
	if x.hasMtime {
		e.inode.Mtime = x.mtime
	}
	kind := h[156]
	if kind == typeOldRegular && strings.HasSuffix(name, "/") {
		kind = typeDirectory // there was no other way to say so
	}
	if e.path, err = cleanPath(name); err != nil {
		return nil, err
	}
	return e, t.content(e, h, x, kind, link, numbers)
}

// content fills in what depends on the type of the entry.
func (t *tarReader) content(e *entry, h header, x *extended, kind byte, link string, numbers map[string]int64) (err error) {
	switch kind {
	case typeRegular, typeOldRegular, typeContiguous:
		e.sparse, err = x.sparse(e.size)
		if e.sparse != nil && e.sparse.name != "" {
			if e.path, err = cleanPath(e.sparse.name); err != nil {
				return err
			}
		}
		return err
	case typeGNUSparse:
		e.sparse, err = t.oldSparse(h)
		return err
	case typeLink:
		e.isLink = true
		e.link, err = cleanPath(link)
	case typeSymlink:
		if link == "" || len(link) > fstree.MaxSymlink || strings.ContainsRune(link, 0) {
			return fmt.Errorf("%s: a symlink target of %d bytes: want 1 to %d", e.path, len(link), fstree.MaxSymlink)
		}
		e.inode.Content = fstree.Symlink(link)
	case typeChar, typeBlock:
		major, minor := numbers["major"], numbers["minor"]
		if major < 0 || major >= 1<<12 || minor < 0 || minor >= 1<<20 {
			return fmt.Errorf("%s: device %d:%d: out of range", e.path, major, minor)
		}
		e.inode.Content = fstree.Device{Block: kind == typeBlock, Rdev: uint32(unix.Mkdev(uint32(major), uint32(minor)))}
	case typeDirectory:
		e.inode.Content = &fstree.Directory{}
	case typeFifo:
		e.inode.Content = fstree.Fifo{}
	default:
		return fmt.Errorf("%s: type %q: not a type of file", e.path, kind)
	}
	if err == nil && e.size != 0 {
		// Some programs pass the data over, others take them for the next header.
		err = fmt.Errorf("%s: %d bytes of data, but it is not a regular file", e.path, e.size)
	}
	return err
}

// cleanPath returns a path without "." and needless slashes. What could lead out of the tree is an error.
func cleanPath(path string) (string, error) {
	if len(path) > maxPath {
		return "", fmt.Errorf("a path of %d bytes: at most %d are possible", len(path), maxPath)
	}
	if path == "" {
		return "", errors.New("empty path")
	}
	var parts []string
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." {
			continue
		}
		name := part
		if len(part) > fstree.MaxName { // a whiteout for a long name is longer than names can be
			name = strings.TrimPrefix(part, whiteout)
		}
		if err := fstree.CheckName(name); err != nil {
			return "", fmt.Errorf("path %.100q: %w", path, err)
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, "/"), nil
}
