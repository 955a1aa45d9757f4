package erofs

import (
	"math"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// layout decides where everything goes.
func (img *image) layout() {
	img.buildTime = img.nodes[0].inode.Mtime
	for k := range img.nodes {
		if t := img.nodes[k].inode.Mtime; t.Before(img.buildTime) {
			img.buildTime = t
		}
	}
	pos := uint64(superOffset + superSize)
	for k := range img.nodes {
		n := &img.nodes[k]
		n.sizeData(img.format)
		n.compact = img.format != V2 && n.fitsCompact(img.buildTime)
		head := uint64(extendedSize)
		if n.compact {
			head = compactSize
		}
		head += n.attrs.bytes()
		pos = align(pos, slotSize)
		switch {
		case img.format == V2:
			pos = n.placeV2(pos, head)
		case n.fileType() == ftSymlink:
			pos = n.placeSymlink(pos, head)
		default:
			pos = n.place(pos, head)
		}
		n.pos = pos
		pos += head + uint64(n.tail)
	}
	img.inodesEnd = align(pos, slotSize)
	img.xattrsEnd += img.inodesEnd
	img.end = align(img.xattrsEnd, blockSize)
	for k := range img.nodes {
		if n := &img.nodes[k]; n.blocks > 0 {
			n.block = uint32(img.end / blockSize)
			img.end += uint64(n.blocks) * blockSize
		}
	}
}

// sizeData cuts a node's data into whole blocks and a tail.
func (n *node) sizeData(f Format) {
	switch {
	case n.dir != nil:
		end, size := n.dir.block(0)
		for end < n.dir.len() {
			n.blocks++
			end, size = n.dir.block(end)
		}
		n.tail = uint32(size)
		if n.tail > maxTail {
			n.blocks, n.tail = n.blocks+1, 0
		}
	case n.object() != nil && f == V2:
		if !n.object().Digest.IsZero() {
			n.tail = 4 // one null chunk, whatever the size
		}
	case n.object() != nil:
		n.tail = uint32(chunkCount(n.object().Size) * 4)
	case n.fileType() == ftSymlink || f == V2:
		n.tail = uint32(len(n.data()))
	default:
		size := len(n.data())
		n.blocks, n.tail = uint32(size/blockSize), uint32(size%blockSize)
		if n.tail > maxTail {
			n.blocks, n.tail = n.blocks+1, 0
		}
	}
}

func (n *node) fitsCompact(buildTime fstree.Time) bool {
	size := n.inode.Size()
	if n.dir != nil {
		size = uint64(n.blocks)*blockSize + uint64(n.tail)
	}
	return n.inode.Mtime == buildTime && n.nlink <= math.MaxUint16 && n.inode.UID <= math.MaxUint16 &&
		n.inode.GID <= math.MaxUint16 && size <= math.MaxUint32
}

// place returns where from pos on an inode of V0 and V1 goes whose tail must not cross the end of a block.
func (n *node) place(pos, head uint64) uint64 {
	left := blockSize - (pos+head)%blockSize
	if left >= uint64(n.tail) {
		return pos
	}
	next := pos + align(left, slotSize)
	if uint64(n.tail) <= blockSize-(next+head)%blockSize {
		return next
	}
	n.blocks, n.tail = n.blocks+1, 0
	return align(pos, blockSize)
}

// placeSymlink does it for symlinks, whose inode and target must be in one block. If they are too long for that, the
// target becomes a block of its own; the place is that of the whole all the same.
func (n *node) placeSymlink(pos, head uint64) uint64 {
	total := head + uint64(n.tail)
	if total >= blockSize {
		n.blocks, n.tail = n.blocks+1, 0
	}
	if pos/blockSize != (pos+total-1)/blockSize {
		return align(pos, blockSize)
	}
	return pos
}

// placeV2 does it for V2, by another measure: the last byte before the tail and the first one after it must be in one
// block. Chunks are not looked at.
func (n *node) placeV2(pos, head uint64) uint64 {
	if n.tail == 0 || n.object() != nil {
		return pos
	}
	last := pos + head - 1
	if last/blockSize == (pos+head+uint64(n.tail)%blockSize)/blockSize {
		return pos
	}
	return align(pos+blockSize-last%blockSize, slotSize)
}
