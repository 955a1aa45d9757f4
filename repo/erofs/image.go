package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// reader reads the structures of an image. Nothing in an image is trusted: every position is checked against the size of
// the image, and the sum of all that is read against it, too, since inodes, directories and attributes of an honest image
// do not overlap. Without that sum a small image could stand for terabytes.
type reader struct {
	r    io.ReaderAt
	size int64

	format     Format
	root       uint64 // nid: position of the inode in slots
	buildTime  fstree.Time
	xattrStart int64 // of the shared attributes' table

	mu       sync.Mutex
	pages    map[int64][]byte
	last     []byte // the page that was used last
	lastAt   int64  // its number
	shared   map[int64]fstree.Xattr
	scratch  []byte // the attributes of an inode
	redirect []byte // the path of its object
	lastList []fstree.Xattr
	budget   int64 // bytes that may still be read
	limit    bool  // whether budget counts
}

const (
	pageSize = 1 << 16
	maxPages = 256
)

var le = binary.LittleEndian

func newReader(r io.ReaderAt, size int64) (*reader, error) {
	img := &reader{r: r, size: size, pages: map[int64][]byte{}, lastAt: -1, shared: map[int64]fstree.Xattr{}}
	head, err := img.bytes(0, superOffset+superSize)
	if err != nil {
		return nil, fmt.Errorf("not an image: %w", err)
	}
	if le.Uint32(head) != composefsMagic {
		return nil, errors.New("not a composefs image: no magic number at offset 0")
	}
	if v := le.Uint32(head[4:]); v != composefsVersion {
		return nil, fmt.Errorf("composefs header version %d at offset 4: want %d", v, composefsVersion)
	}
	img.format = Format(le.Uint32(head[12:]))
	if img.format < V0 || img.format > V2 {
		return nil, fmt.Errorf("composefs version %d at offset 12: want 0, 1 or 2", uint32(img.format))
	}
	super := head[superOffset:]
	if le.Uint32(super) != superMagic {
		return nil, fmt.Errorf("no EROFS magic number at offset %d", superOffset)
	}
	if super[12] != blockBits {
		return nil, fmt.Errorf("block size 1<<%d at offset %d: want 1<<%d", super[12], superOffset+12, blockBits)
	}
	if f := le.Uint32(super[80:]); f != 0 {
		return nil, fmt.Errorf("unknown features %#x at offset %d", f, superOffset+80)
	}
	if meta := le.Uint32(super[40:]); meta != 0 {
		return nil, fmt.Errorf("metadata in block %d: want 0", meta)
	}
	if blocks := int64(le.Uint32(super[36:])); blocks*blockSize > size {
		return nil, fmt.Errorf("truncated: %d bytes, but the superblock says %d blocks of %d", size, blocks, blockSize)
	}
	img.root = uint64(le.Uint16(super[14:]))
	img.buildTime = fstree.Time{Sec: int64(le.Uint64(super[24:])), Nsec: le.Uint32(super[32:])}
	img.xattrStart = int64(le.Uint32(super[44:])) * blockSize
	return img, nil
}

// inodeCount returns how many inodes there are, as a hint: what the superblock says, and at most what could be.
func (img *reader) inodeCount() int {
	head, err := img.bytes(superOffset+16, 8)
	if err != nil {
		return 0
	}
	return int(min(le.Uint64(head), uint64(img.size/(2*slotSize))))
}

// bytes returns part of the image. The slice is valid until the next call, and not to be changed.
func (img *reader) bytes(pos, n int64) ([]byte, error) {
	if pos < 0 || n < 0 || n > img.size || pos > img.size-n {
		return nil, fmt.Errorf("%d bytes at offset %d: the image has only %d", n, pos, img.size)
	}
	if img.limit {
		if img.budget -= n; img.budget < 0 {
			return nil, fmt.Errorf("%d bytes at offset %d: structures overlap", n, pos)
		}
	}
	page, err := img.page(pos / pageSize)
	if err != nil {
		return nil, err
	}
	at := pos % pageSize
	if at+n <= int64(len(page)) {
		return page[at : at+n], nil
	}
	whole := make([]byte, 0, n)
	for int64(len(whole)) < n {
		if page, err = img.page((pos + int64(len(whole))) / pageSize); err != nil {
			return nil, err
		}
		part := page[(pos+int64(len(whole)))%pageSize:]
		whole = append(whole, part[:min(int64(len(part)), n-int64(len(whole)))]...)
	}
	return whole, nil
}

func (img *reader) page(k int64) ([]byte, error) {
	if k == img.lastAt {
		return img.last, nil
	}
	if page, ok := img.pages[k]; ok {
		img.last, img.lastAt = page, k
		return page, nil
	}
	if len(img.pages) == maxPages {
		for old := range img.pages {
			delete(img.pages, old)
			break
		}
	}
	page := make([]byte, min(pageSize, img.size-k*pageSize))
	if n, err := img.r.ReadAt(page, k*pageSize); n < len(page) {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("reading the image at offset %d: %w", k*pageSize, err)
	}
	img.pages[k] = page
	img.last, img.lastAt = page, k
	return page, nil
}

// rawInode is an inode as it stands in the image.
type rawInode struct {
	nid    uint64
	mode   uint32
	nlink  uint32
	uid    uint32
	gid    uint32
	size   uint64
	mtime  fstree.Time
	layout uint16
	union  uint32
	xattrs int64 // position of the attributes
	tail   int64 // position of what follows the attributes
}

func (img *reader) inode(nid uint64) (i rawInode, err error) {
	if nid > uint64(img.size)/slotSize {
		return i, fmt.Errorf("inode %d: past the end of the image", nid)
	}
	pos := int64(nid * slotSize)
	b, err := img.bytes(pos, compactSize)
	if err != nil {
		return i, fmt.Errorf("inode %d: %w", nid, err)
	}
	format := le.Uint16(b)
	i.nid, i.layout = nid, format>>1&7
	icount := int64(le.Uint16(b[2:]))
	i.mode = uint32(le.Uint16(b[4:]))
	if format&^0xf != 0 || i.layout != layoutPlain && i.layout != layoutInline && i.layout != layoutChunks {
		return i, fmt.Errorf("inode %d at offset %d: unknown format %#x", nid, pos, format)
	}
	if format&1 == 0 {
		i.nlink = uint32(le.Uint16(b[6:]))
		i.size = uint64(le.Uint32(b[8:]))
		i.union = le.Uint32(b[16:])
		i.uid = uint32(le.Uint16(b[24:]))
		i.gid = uint32(le.Uint16(b[26:]))
		i.mtime = img.buildTime
		i.xattrs = pos + compactSize
	} else {
		if b, err = img.bytes(pos, extendedSize); err != nil {
			return i, fmt.Errorf("inode %d: %w", nid, err)
		}
		i.size = le.Uint64(b[8:])
		i.union = le.Uint32(b[16:])
		i.uid = le.Uint32(b[24:])
		i.gid = le.Uint32(b[28:])
		i.mtime = fstree.Time{Sec: int64(le.Uint64(b[32:])), Nsec: le.Uint32(b[40:])}
		i.nlink = le.Uint32(b[44:])
		i.xattrs = pos + extendedSize
	}
	i.tail = i.xattrs
	if icount > 0 {
		i.tail += xattrHeaderSize + (icount-1)*4
	}
	if i.mtime.Nsec > 999_999_999 {
		return i, fmt.Errorf("inode %d at offset %d: %d nanoseconds", nid, pos, i.mtime.Nsec)
	}
	return i, nil
}

// attributes calls f for an inode's attributes as they stand in the image. The value is valid until f returns.
func (img *reader) attributes(i *rawInode, f func(name attrName, value []byte) error) error {
	if i.tail == i.xattrs {
		return nil
	}
	b, err := img.bytes(i.xattrs, i.tail-i.xattrs)
	if err != nil {
		return fmt.Errorf("attributes: %w", err)
	}
	count := int(b[4])
	if len(b) < xattrHeaderSize+4*count {
		return fmt.Errorf("attributes at offset %d: %d shared ones do not fit", i.xattrs, count)
	}
	img.scratch = append(img.scratch[:0], b...) // reading shared attributes makes b invalid
	b = img.scratch
	for k := range count {
		x, err := img.sharedAttr(img.xattrStart + int64(le.Uint32(b[xattrHeaderSize+4*k:]))*4)
		if err != nil {
			return fmt.Errorf("shared attribute: %w", err)
		}
		if err := f(attrName{whole: x.Name}, x.Value); err != nil {
			return err
		}
	}
	for rest := b[xattrHeaderSize+4*count:]; len(rest) > 0; {
		name, value, n, err := parseAttr(rest)
		if err == nil {
			err = f(name, value)
		}
		if err != nil {
			return fmt.Errorf("attributes at offset %d: %w", i.tail-int64(len(rest)), err)
		}
		rest = rest[min(align(uint64(n), 4), uint64(len(rest))):]
	}
	return nil
}

func (img *reader) sharedAttr(pos int64) (fstree.Xattr, error) {
	if x, ok := img.shared[pos]; ok {
		return x, nil
	}
	head, err := img.bytes(pos, 4)
	if err != nil {
		return fstree.Xattr{}, err
	}
	body, err := img.bytes(pos, 4+int64(head[0])+int64(le.Uint16(head[2:])))
	if err != nil {
		return fstree.Xattr{}, err
	}
	name, value, _, err := parseAttr(body)
	if err != nil {
		return fstree.Xattr{}, fmt.Errorf("at offset %d: %w", pos, err)
	}
	x := fstree.Xattr{Name: name.String(), Value: bytes.Clone(value)}
	img.shared[pos] = x
	return x, nil
}

// attrName is the name of an attribute: a prefix and the rest as it stands in the image, or the whole.
type attrName struct {
	whole  string
	prefix byte
	rest   []byte
}

func (n attrName) String() string {
	if n.rest == nil {
		return n.whole
	}
	return prefixes[n.prefix] + string(n.rest)
}

// is reports whether this is the name of an attribute that begins with "trusted.".
func (n attrName) is(name string) bool {
	if n.rest == nil {
		return n.whole == name
	}
	return n.prefix == 4 && string(n.rest) == name[len("trusted."):]
}

// parseAttr reads the attribute that b begins with, and returns how many bytes it takes.
func parseAttr(b []byte) (name attrName, value []byte, size int, err error) {
	if len(b) < 4 {
		return name, nil, 0, errors.New("cut off")
	}
	nameEnd := 4 + int(b[0])
	end := nameEnd + int(le.Uint16(b[2:]))
	if len(b) < end {
		return name, nil, 0, errors.New("cut off")
	}
	if int(b[1]) >= len(prefixes) {
		return name, nil, 0, fmt.Errorf("name prefix %d is unknown", b[1])
	}
	if prefixes[b[1]] == "" && nameEnd == 4 {
		return name, nil, 0, errors.New("no name")
	}
	return attrName{prefix: b[1], rest: b[4:nameEnd:nameEnd]}, b[nameEnd:end], end, nil
}

// data returns the content of a directory, symlink or inline file of at most limit bytes.
func (img *reader) data(i *rawInode, limit uint64) ([]byte, error) {
	if i.size > limit {
		return nil, fmt.Errorf("%d bytes of data, at most %d are possible", i.size, limit)
	}
	size, tail := int64(i.size), int64(0)
	switch i.layout {
	case layoutInline:
		tail = size % blockSize
		if img.format == V2 && i.mode&fstree.TypeMask != fstree.TypeDir {
			tail = size // V2 does not cut files
		}
		// The kernel maps the block that the tail is in.
		if tail > 0 && i.tail/blockSize != (i.tail+tail-1)/blockSize && img.format != V2 {
			return nil, fmt.Errorf("the tail at offset %d crosses the end of a block", i.tail)
		}
	case layoutChunks:
		return nil, errors.New("a list of chunks where there must be data")
	}
	var whole []byte
	if size > tail {
		b, err := img.bytes(int64(i.union)*blockSize, size-tail)
		if err != nil {
			return nil, err
		}
		whole = append(whole, b...)
	}
	if tail > 0 {
		b, err := img.bytes(i.tail, tail)
		if err != nil {
			return nil, err
		}
		whole = append(whole, b...)
	}
	return whole, nil
}

// rawDirent is an entry of a directory in the image.
type rawDirent struct {
	name     string
	nid      uint64
	fileType byte
}

// entries returns all entries of a directory, "." and ".." included, and checks their order.
func (img *reader) entries(i *rawInode) ([]rawDirent, error) {
	data, err := img.data(i, uint64(img.size))
	if err != nil {
		return nil, fmt.Errorf("directory: %w", err)
	}
	var entries []rawDirent
	for block := 0; len(data) > 0; block++ {
		b := data[:min(blockSize, len(data))]
		data = data[len(b):]
		if len(b) < direntSize {
			return nil, fmt.Errorf("directory block %d: cut off", block)
		}
		count := int(le.Uint16(b[8:])) / direntSize
		if int(le.Uint16(b[8:]))%direntSize != 0 || count == 0 || count*direntSize > len(b) {
			return nil, fmt.Errorf("directory block %d: names begin at %d", block, le.Uint16(b[8:]))
		}
		for k := range count {
			start, end := int(le.Uint16(b[k*direntSize+8:])), len(b)
			if k+1 < count {
				end = int(le.Uint16(b[(k+1)*direntSize+8:]))
			}
			if start < count*direntSize || start >= end || end > len(b) {
				return nil, fmt.Errorf("directory block %d: entry %d has its name at %d to %d", block, k, start, end)
			}
			name := b[start:end]
			if k+1 == count {
				// The last name ends where the block ends, or at the first of the zeros that fill it.
				for len(name) > 0 && name[len(name)-1] == 0 {
					name = name[:len(name)-1]
				}
			}
			e := rawDirent{name: string(name), nid: le.Uint64(b[k*direntSize:]), fileType: b[k*direntSize+10]}
			if n := len(entries); n > 0 && entries[n-1].name >= e.name {
				return nil, fmt.Errorf("directory block %d: %q is not sorted after %q", block, e.name, entries[n-1].name)
			}
			entries = append(entries, e)
		}
	}
	return entries, nil
}
