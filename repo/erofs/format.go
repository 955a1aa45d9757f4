// Package erofs writes file trees as composefs images and reads them back.
//
// A composefs image is an EROFS file system that holds only metadata: directories, inodes with their extended
// attributes, symlink targets and files of a few bytes. Larger files have a size and no blocks; overlayfs finds their
// data by two attributes, trusted.overlay.redirect (the path of the object) and trusted.overlay.metacopy (its fs-verity
// digest). EROFS itself is described in the kernel's Documentation/filesystems/erofs.rst.
//
// An image is laid out like this:
//
//	0     composefs header: magic, version, flags, composefs version
//	1024  EROFS superblock, 128 bytes
//	1152  inodes in slots of 32 bytes: inode, its attributes, its tail (the last, partial block of its data)
//	...   attributes that more than one inode has
//	...   whole blocks of data, each at a multiple of 4096
//
// Since an image is named by its digest, the writer has no freedom: the same tree must give the same bytes as the tools
// that made the name. There are three such sets of rules:
//
//   - V0 and V1 are those of the C tools. Inodes are in breadth-first order, a directory's in the order of its names.
//     An inode is compact (32 bytes) where its numbers fit and its mtime is the build time of the image, the smallest
//     mtime of all. The root directory is opaque and gets the entries 00 to ff that are not there as whiteouts, so that
//     the object store, which lies below it as another layer, does not show through. Whiteouts of the tree are
//     escaped. V1 differs from V0 in one thing: a directory with escaped whiteouts is marked for kernels since 6.8, too.
//   - V2 is that of composefs-rs before it had V1: depth-first order, extended inodes (64 bytes) only, no build time,
//     no nanoseconds, nothing added to the root.
package erofs

import (
	"fmt"
)

// Format is one of the sets of rules by which a tree becomes an image.
type Format int

// The formats, see the package comment.
const (
	V0 Format = iota
	V1
	V2
)

// String returns "v0", "v1" or "v2".
func (f Format) String() string { return fmt.Sprintf("v%d", int(f)) }

// ParseFormat reads "v0", "v1" or "v2", also without the "v".
func ParseFormat(s string) (Format, error) {
	for _, f := range []Format{V0, V1, V2} {
		if s == f.String() || s == f.String()[1:] {
			return f, nil
		}
	}
	return 0, fmt.Errorf("unknown image format %q: want v0, v1 or v2", s)
}

// Sizes and numbers of the disk format.
const (
	blockSize = 4096
	blockBits = 12
	slotSize  = 32 // inodes start at multiples of it

	composefsMagic   = 0xd078629a
	composefsVersion = 1 // of the header, the same in all formats
	flagHasACL       = 1 << 0

	superOffset     = 1024
	superSize       = 128
	superMagic      = 0xe0f5e1e2
	compatMtime     = 1 << 1
	compatXattrBits = 1 << 2 // inodes have a filter of the attribute names they have

	compactSize  = 32
	extendedSize = 64
	direntSize   = 12

	layoutPlain  = 0 // data in whole blocks
	layoutInline = 2 // as plain, but the tail follows the inode
	layoutChunks = 4 // a list of chunks; composefs has null chunks only

	chunkBitsMax    = 31 // of a chunk, in blocks: the largest chunk is 1<<(12+31) bytes
	maxChunks       = 1024
	nullChunk       = 0xffffffff
	maxInline       = 5000 // of file content that a dumpfile may place in the image
	maxTail         = blockSize / 2
	xattrHeaderSize = 12
	maxSharedV1     = 128 // shared attributes an inode of V0 and V1 refers to; more are written in full
	maxSharedV2     = 255
)

// Numbers of file types in directory entries.
const (
	ftRegular = 1 + iota
	ftDir
	ftChar
	ftBlock
	ftFifo
	ftSocket
	ftSymlink
)

// Names of attributes that overlayfs reads, or that stand for what it would read.
const (
	overlayPrefix = "trusted.overlay."
	escapedPrefix = "trusted.overlay.overlay."

	xattrMetacopy = overlayPrefix + "metacopy"
	xattrRedirect = overlayPrefix + "redirect"
	xattrOpaque   = overlayPrefix + "opaque"

	xattrWhiteoutEscaped  = escapedPrefix + "whiteout"
	xattrWhiteoutUser     = "user.overlay.whiteout"
	xattrWhiteoutsEscaped = escapedPrefix + "whiteouts"
	xattrWhiteoutsUser    = "user.overlay.whiteouts"
	xattrOpaqueEscaped    = escapedPrefix + "opaque"
	xattrOpaqueUser       = "user.overlay.opaque"

	xattrSELinux    = "security.selinux"
	xattrACLAccess  = "system.posix_acl_access"
	xattrACLDefault = "system.posix_acl_default"
)

func align(n, to uint64) uint64 { return (n + to - 1) / to * to }

// chunkBits returns the size of a file's chunks as a power of two, in blocks: as few chunks as possible.
func chunkBits(size uint64) uint32 {
	bits := uint32(blockBits)
	for bits < blockBits+chunkBitsMax && size > 1<<bits {
		bits++
	}
	return bits - blockBits
}

func chunkCount(size uint64) uint64 {
	chunk := uint64(1) << (blockBits + chunkBits(size))
	return size/chunk + min(size%chunk, 1)
}
