package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
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
// its own, and those that overlayfs shall read. Most inodes have the attributes of another one, but for their objects.
func (img *image) attributes() error {
	table := newAttrTable(img.format)
	unique := img.uniqueObjects()
	type source struct {
		xattrs *fstree.Xattr // the first one; sources use the same list for many inodes
		count  int
		own    fsverity.Algorithm // of an object of its own
	}
	known := map[source]*attrSet{}
	const mostKnown = 1 << 16
	for k := range img.nodes {
		n := &img.nodes[k]
		from := source{count: len(n.inode.Xattrs)}
		if from.count > 0 {
			from.xattrs = &n.inode.Xattrs[0]
		}
		o := n.object()
		if o != nil && unique(o) {
			from.own = o.Digest.Algorithm()
		}
		// What depends on more than that is not looked up.
		plain := k > 0 && !n.escaped && !n.whiteout && (o == nil || from.own != 0)
		if plain {
			n.attrs = known[from]
		}
		if n.attrs == nil {
			attrs, err := img.attrsOf(k, from.own != 0, table)
			if err != nil {
				return fmt.Errorf("%s: %w", img.path(int32(k)), err)
			}
			if len(attrs) == 0 {
				continue
			}
			n.attrs = table.set(attrs)
			if plain && len(known) < mostKnown {
				known[from] = n.attrs
			}
		}
		n.attrs.inodes++
	}
	img.shared, img.xattrsEnd = table.share()
	for _, s := range table.list {
		if err := s.split(img.format); err != nil {
			k := slices.IndexFunc(img.nodes, func(n node) bool { return n.attrs == s })
			return fmt.Errorf("%s: %w", img.path(int32(k)), err)
		}
	}
	return nil
}

// uniqueObjects returns a function that tells of an object whether no other inode has the same one. It may err on the side of
// "no": two digests that begin alike are as good as the same.
func (img *image) uniqueObjects() func(*fstree.Object) bool {
	count := 0
	for k := range img.nodes {
		if img.nodes[k].object() != nil {
			count++
		}
	}
	start := func(d fsverity.Digest) uint64 {
		var b [64]byte
		sum, _ := d.AppendBinary(b[:0])
		return binary.LittleEndian.Uint64(sum)
	}
	seen, again := newSet(2*count), map[uint64]bool{}
	see := func(d fsverity.Digest) {
		if x := start(d); !seen.add(x) {
			again[x] = true
		}
	}
	for k := range img.nodes {
		o := img.nodes[k].object()
		if o == nil {
			continue
		}
		if !o.Digest.IsZero() {
			see(o.Digest)
		}
		if o.Path != "" { // it may be the path of another object
			if d, err := fsverity.ParseObjectPath(o.Path); err == nil {
				see(d)
			}
		}
	}
	return func(o *fstree.Object) bool { return o.Path == "" && !o.Digest.IsZero() && !again[start(o.Digest)] }
}

// attrsOf makes the attributes of a node, in the order of the format.
func (img *image) attrsOf(k int, own bool, table *attrTable) ([]*attr, error) {
	n := &img.nodes[k]
	list := overlayAttributes(nil, n, img.format)
	fromTree := len(list)
	for _, x := range n.inode.Xattrs {
		if rest, ok := strings.CutPrefix(x.Name, overlayPrefix); ok {
			x.Name = escapedPrefix + rest
		}
		img.acl = img.acl || x.Name == xattrACLAccess || x.Name == xattrACLDefault
		// What marks whiteouts replaces what the tree has under these names.
		if img.format == V2 || !slices.ContainsFunc(list[:fromTree], func(have fstree.Xattr) bool { return have.Name == x.Name }) {
			list = append(list, x)
		}
	}
	if k == 0 && img.format != V2 {
		list = append(list, fstree.Xattr{Name: xattrOpaque, Value: []byte("y")})
	}
	if img.format != V2 {
		slices.SortFunc(list, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	}
	attrs := make([]*attr, len(list))
	for i, x := range list {
		var err error
		if own && (x.Name == xattrMetacopy || x.Name == xattrRedirect) {
			attrs[i], err = table.useOwn(x.Name, x.Value)
		} else {
			attrs[i], err = table.use(x.Name, string(x.Value))
		}
		if err != nil {
			return nil, err
		}
	}
	return attrs, nil
}

// overlayAttributes appends the attributes that overlayfs reads: where a file's data is, and what is a whiteout.
func overlayAttributes(list []fstree.Xattr, n *node, f Format) []fstree.Xattr {
	if o := n.object(); o != nil {
		var metacopy []byte
		if !o.Digest.IsZero() {
			metacopy = appendMetacopy(nil, o.Digest)
		}
		list = append(list, fstree.Xattr{Name: xattrMetacopy, Value: metacopy})
		switch {
		case o.Path != "":
			list = append(list, fstree.Xattr{Name: xattrRedirect, Value: []byte("/" + o.Path)})
		case !o.Digest.IsZero():
			list = append(list, fstree.Xattr{Name: xattrRedirect, Value: appendRedirect(nil, o.Digest)})
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
		l := img.nodes[d].dir
		for i := 0; l != nil && i < l.len(); i++ {
			if e := l.at(i); e.node == k && e.name != "." && e.name != ".." {
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
		buf = a.appendTo(buf[:0], nil)
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
	if n.attrs != nil {
		icount = uint16((n.attrs.size-xattrHeaderSize)/4 + 1)
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
	if n.attrs == nil {
		return b
	}
	le := binary.LittleEndian
	b = le.AppendUint32(b, n.attrs.filter)
	b = append(b, byte(n.attrs.shared), 0, 0, 0, 0, 0, 0, 0)
	start := img.inodesEnd
	if img.format != V2 {
		start %= blockSize // counted from the block where the table begins
	}
	for _, a := range n.attrs.attrs[:n.attrs.shared] {
		b = le.AppendUint32(b, uint32((start+uint64(a.offset))/4))
	}
	for _, a := range n.attrs.attrs[n.attrs.shared:] {
		b = a.appendTo(b, n.object())
	}
	return b
}

func (img *image) writeTail(w *writer, n *node) {
	if n.tail == 0 {
		return
	}
	switch {
	case n.dir != nil:
		first := 0
		for range n.blocks {
			first, _ = n.dir.block(first)
		}
		img.writeEntries(w, n.dir, first, n.dir.len())
	case n.object() != nil:
		writeNullChunks(w, int(n.tail/4))
	default:
		data := n.data()
		w.bytes(data[len(data)-int(n.tail):])
	}
}

func (img *image) writeBlocks(w *writer, n *node) {
	switch {
	case n.dir != nil:
		first := 0
		for k := range n.blocks {
			end, _ := n.dir.block(first)
			img.writeEntries(w, n.dir, first, end)
			first = end
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

// writeEntries writes the entries from first to end as a block: all heads, then all names.
func (img *image) writeEntries(w *writer, l *listing, first, end int) {
	var b [direntSize]byte
	le := binary.LittleEndian
	offset := direntSize * (end - first)
	for k := first; k < end; k++ {
		e := l.at(k)
		child := &img.nodes[e.node]
		le.PutUint64(b[0:], child.pos/slotSize)
		le.PutUint16(b[8:], uint16(offset))
		b[10] = child.fileType()
		w.bytes(b[:])
		offset += len(e.name)
	}
	for k := first; k < end; k++ {
		w.string(l.at(k).name)
	}
}
