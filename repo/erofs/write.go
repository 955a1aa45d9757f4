package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Write writes the tree as an image. The tree is not changed. An inode's Nlink is written as it is, for directories it
// follows from their entries. Errors are those of w, and of trees that do not fit in an image, with the path.
func Write(w io.Writer, t *fstree.Tree, f Format) error {
	nodes, err := collect(t, f)
	if err != nil {
		return err
	}
	img := &image{format: f, nodes: nodes}
	if err := img.attributes(); err != nil {
		return err
	}
	img.layout()
	out := &writer{w: bufio.NewWriterSize(w, 1<<16)}
	img.write(out)
	if out.err != nil {
		return out.err
	}
	return out.w.Flush()
}

// image is an image whose every byte is decided.
type image struct {
	format    Format
	nodes     []node
	acl       bool
	shared    []*attr
	buildTime fstree.Time
	inodesEnd uint64
	xattrsEnd uint64
	end       uint64
}

// attributes makes the attributes of every node: those of the tree, with the ones escaped that overlayfs would take for
// its own, and those that overlayfs shall read.
func (img *image) attributes() error {
	table := newAttrTable(img.format)
	var list []fstree.Xattr
	for k := range img.nodes {
		n := &img.nodes[k]
		list = overlayAttributes(list[:0], n, img.format)
		for _, x := range n.inode.Xattrs {
			if rest, ok := strings.CutPrefix(x.Name, overlayPrefix); ok {
				x.Name = escapedPrefix + rest
			}
			img.acl = img.acl || x.Name == xattrACLAccess || x.Name == xattrACLDefault
			// What marks whiteouts replaces what the tree has under these names.
			if img.format == V2 || !slices.ContainsFunc(list, func(have fstree.Xattr) bool { return have.Name == x.Name }) {
				list = append(list, x)
			}
		}
		if k == 0 && img.format != V2 {
			list = append(list, fstree.Xattr{Name: xattrOpaque, Value: []byte("y")})
		}
		if img.format != V2 {
			slices.SortFunc(list, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
		}
		if len(list) == 0 {
			continue
		}
		n.attrs = make([]*attr, len(list))
		for i, x := range list {
			a, err := table.use(x.Name, string(x.Value))
			if err != nil {
				return fmt.Errorf("%s: %w", img.path(int32(k)), err)
			}
			n.attrs[i] = a
		}
	}
	shared, size := table.share()
	img.shared, img.xattrsEnd = shared, size
	return img.splitAttributes()
}

// splitAttributes puts the references to shared attributes before the ones that are written in full.
func (img *image) splitAttributes() error {
	most := uint32(maxSharedV2)
	if img.format != V2 {
		most = maxSharedV1
	}
	for k := range img.nodes {
		n := &img.nodes[k]
		if len(n.attrs) == 0 {
			continue
		}
		var full []*attr
		size := uint64(xattrHeaderSize)
		refs := n.attrs[:0]
		for _, a := range n.attrs {
			if a.count > 1 && uint32(len(refs)) < most {
				refs = append(refs, a)
				size += 4
			} else {
				full = append(full, a)
				size += a.size()
			}
		}
		n.shared = uint32(len(refs))
		n.attrs = append(refs, full...)
		if (size-xattrHeaderSize)/4+1 > math.MaxUint16 {
			return fmt.Errorf("%s: %d bytes of extended attributes do not fit in an inode", img.path(int32(k)), size)
		}
		n.xattrSize = uint32(size)
	}
	return nil
}

// overlayAttributes appends the attributes that overlayfs reads: where a file's data is, and what is a whiteout.
func overlayAttributes(list []fstree.Xattr, n *node, f Format) []fstree.Xattr {
	if o := n.object(); o != nil {
		var metacopy []byte
		if !o.Digest.IsZero() {
			sum := o.Digest.Bytes()
			metacopy = append([]byte{0, byte(4 + len(sum)), 0, byte(o.Digest.Algorithm())}, sum...)
		}
		list = append(list, fstree.Xattr{Name: xattrMetacopy, Value: metacopy})
		if path := o.Payload(); path != "" {
			list = append(list, fstree.Xattr{Name: xattrRedirect, Value: []byte("/" + path)})
		}
	}
	if n.escaped {
		list = append(list, fstree.Xattr{Name: xattrWhiteoutEscaped}, fstree.Xattr{Name: xattrWhiteoutUser})
	}
	if n.whiteout {
		list = append(list, fstree.Xattr{Name: xattrWhiteoutsEscaped}, fstree.Xattr{Name: xattrWhiteoutsUser})
		if f == V1 {
			list = append(list, fstree.Xattr{Name: xattrOpaqueEscaped, Value: []byte("x")},
				fstree.Xattr{Name: xattrOpaqueUser, Value: []byte("x")})
		}
	}
	return list
}

// path finds a name of a node, for an error.
func (img *image) path(k int32) string {
	if k == 0 {
		return "/"
	}
	for d := range img.nodes {
		for _, e := range img.nodes[d].entries {
			if e.node == k && e.name != "." && e.name != ".." {
				return strings.TrimSuffix(img.path(int32(d)), "/") + "/" + e.name
			}
		}
	}
	return "?"
}

// writer counts what it writes and keeps the first error.
type writer struct {
	w   *bufio.Writer
	pos uint64
	err error
}

var zeros [blockSize]byte

func (w *writer) bytes(b []byte) {
	n, err := w.w.Write(b)
	w.pos += uint64(n)
	if err != nil && w.err == nil {
		w.err = err
	}
}

func (w *writer) string(s string) {
	n, err := w.w.WriteString(s)
	w.pos += uint64(n)
	if err != nil && w.err == nil {
		w.err = err
	}
}

// padTo writes zeros up to a position.
func (w *writer) padTo(pos uint64) {
	for w.pos < pos && w.err == nil {
		w.bytes(zeros[:min(pos-w.pos, blockSize)])
	}
}

func (img *image) write(w *writer) {
	w.bytes(img.header())
	w.padTo(superOffset)
	w.bytes(img.superblock())
	buf := make([]byte, 0, blockSize)
	for k := range img.nodes {
		n := &img.nodes[k]
		w.padTo(n.pos)
		buf = img.appendXattrs(img.appendInode(buf[:0], k), n)
		w.bytes(buf)
		img.writeTail(w, n)
	}
	w.padTo(img.inodesEnd)
	for _, a := range img.shared {
		buf = a.appendTo(buf[:0])
		w.bytes(buf)
	}
	for k := range img.nodes {
		if n := &img.nodes[k]; n.blocks > 0 {
			w.padTo(uint64(n.block) * blockSize)
			img.writeBlocks(w, n)
		}
	}
	w.padTo(img.end)
}

func (img *image) header() []byte {
	b := make([]byte, 0, 32)
	le := binary.LittleEndian
	b = le.AppendUint32(b, composefsMagic)
	b = le.AppendUint32(b, composefsVersion)
	flags := uint32(0)
	if img.acl && img.format != V2 {
		flags |= flagHasACL
	}
	b = le.AppendUint32(b, flags)
	b = le.AppendUint32(b, uint32(img.format))
	return b[:cap(b)]
}

func (img *image) superblock() []byte {
	b := make([]byte, superSize)
	le := binary.LittleEndian
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], compatMtime|compatXattrBits)
	b[12] = blockBits
	le.PutUint16(b[14:], uint16(img.nodes[0].pos/slotSize))
	le.PutUint64(b[16:], uint64(len(img.nodes)))
	le.PutUint32(b[36:], uint32(img.end/blockSize))
	if img.format != V2 {
		le.PutUint64(b[24:], uint64(img.buildTime.Sec))
		le.PutUint32(b[32:], img.buildTime.Nsec)
		le.PutUint32(b[44:], uint32(img.inodesEnd/blockSize))
	}
	return b
}

func (img *image) appendInode(b []byte, k int) []byte {
	n := &img.nodes[k]
	le := binary.LittleEndian
	layout, size, union := img.inodeData(n)
	var icount uint16
	if n.xattrSize > 0 {
		icount = uint16((n.xattrSize-xattrHeaderSize)/4 + 1)
	}
	version := uint16(1)
	if n.compact {
		version = 0
	}
	b = le.AppendUint16(b, layout<<1|version)
	b = le.AppendUint16(b, icount)
	b = le.AppendUint16(b, uint16(n.mode()))
	if n.compact {
		b = le.AppendUint16(b, uint16(n.nlink))
		b = le.AppendUint32(b, uint32(size))
		b = le.AppendUint32(b, 0)
		b = le.AppendUint32(b, union)
		b = le.AppendUint32(b, uint32(k))
		b = le.AppendUint16(b, uint16(n.inode.UID))
		b = le.AppendUint16(b, uint16(n.inode.GID))
		return le.AppendUint32(b, 0)
	}
	ino, nsec := uint32(k), n.inode.Mtime.Nsec
	if img.format == V2 {
		ino, nsec = uint32(n.pos/slotSize), 0
	}
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, size)
	b = le.AppendUint32(b, union)
	b = le.AppendUint32(b, ino)
	b = le.AppendUint32(b, n.inode.UID)
	b = le.AppendUint32(b, n.inode.GID)
	b = le.AppendUint64(b, uint64(n.inode.Mtime.Sec))
	b = le.AppendUint32(b, nsec)
	b = le.AppendUint32(b, n.nlink)
	return append(b, zeros[:16]...)
}

// inodeData returns how an inode's data is laid out, its size, and the field whose meaning depends on that.
func (img *image) inodeData(n *node) (layout uint16, size uint64, union uint32) {
	layout = layoutPlain
	if n.tail > 0 {
		layout = layoutInline
	}
	union = n.block
	switch c := n.inode.Content.(type) {
	case *fstree.Directory:
		return layout, uint64(n.blocks)*blockSize + uint64(n.tail), union
	case fstree.Inline, fstree.Symlink:
		return layout, n.inode.Size(), union
	case *fstree.Object:
		if c.Size == 0 {
			return layoutPlain, 0, 0
		}
		if img.format == V2 {
			return layoutChunks, c.Size, chunkBitsMax
		}
		// The number of chunks per block takes the lower half of what would be the block's number.
		return layoutChunks, c.Size, union&^0xffff | chunkBits(c.Size)
	case fstree.Device:
		return layoutPlain, 0, c.Rdev // an escaped whiteout has number 0, which is right for a file, too
	}
	return layoutPlain, 0, 0
}

func (img *image) appendXattrs(b []byte, n *node) []byte {
	if n.xattrSize == 0 {
		return b
	}
	le := binary.LittleEndian
	filter := ^uint32(0)
	for _, a := range n.attrs {
		filter &^= a.filterBit()
	}
	b = le.AppendUint32(b, filter)
	b = append(b, byte(n.shared), 0, 0, 0, 0, 0, 0, 0)
	start := img.inodesEnd
	if img.format != V2 {
		start %= blockSize // counted from the block where the table begins
	}
	for _, a := range n.attrs[:n.shared] {
		b = le.AppendUint32(b, uint32((start+uint64(a.offset))/4))
	}
	for _, a := range n.attrs[n.shared:] {
		b = a.appendTo(b)
	}
	return b
}

func (img *image) writeTail(w *writer, n *node) {
	if n.tail == 0 {
		return
	}
	switch {
	case n.entries != nil:
		first := 0
		for range n.blocks {
			first += blockEntries(n.entries[first:])
		}
		img.writeEntries(w, n.entries[first:])
	case n.object() != nil:
		writeNullChunks(w, int(n.tail/4))
	default:
		data := n.data()
		w.bytes(data[len(data)-int(n.tail):])
	}
}

func (img *image) writeBlocks(w *writer, n *node) {
	switch {
	case n.entries != nil:
		rest := n.entries
		for k := range n.blocks {
			count := blockEntries(rest)
			img.writeEntries(w, rest[:count])
			rest = rest[count:]
			w.padTo(uint64(n.block+k+1) * blockSize)
		}
	case n.object() != nil:
		writeNullChunks(w, blockSize/4)
	default:
		data := n.data()
		w.bytes(data[:len(data)-int(n.tail)])
	}
}

func writeNullChunks(w *writer, count int) {
	for range count {
		w.string("\xff\xff\xff\xff")
	}
}

// blockEntries returns how many of the entries fit in one block.
func blockEntries(entries []dirent) int {
	size := 0
	for k, e := range entries {
		if size += direntSize + len(e.name); size > blockSize {
			return k
		}
	}
	return len(entries)
}

func (img *image) writeEntries(w *writer, entries []dirent) {
	var b [direntSize]byte
	le := binary.LittleEndian
	offset := direntSize * len(entries)
	for _, e := range entries {
		child := &img.nodes[e.node]
		le.PutUint64(b[0:], child.pos/slotSize)
		le.PutUint16(b[8:], uint16(offset))
		b[10] = child.fileType()
		w.bytes(b[:])
		offset += len(e.name)
	}
	for _, e := range entries {
		w.string(e.name)
	}
}
