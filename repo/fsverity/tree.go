package fsverity

import (
	"fmt"
	"io"
)

// TreeSize returns the length in bytes of the Merkle tree of a file of this size: 0 for at most one block.
func TreeSize(a Algorithm, size int64) int64 {
	var n int64
	for _, blocks := range treeLevels(a, size) {
		n += blocks
	}
	return n * BlockSize
}

// treeLevels returns the number of blocks of each level of the tree, the level of the data's hashes first.
func treeLevels(a Algorithm, size int64) []int64 {
	var levels []int64
	perBlock := int64(BlockSize / a.Size())
	for n := (size + BlockSize - 1) / BlockSize; n > 1; {
		n = (n + perBlock - 1) / perBlock
		levels = append(levels, n)
	}
	return levels
}

// WriteTree is [MetadataOf] in memory that does not grow with the file: the Merkle tree goes to w, the root level at 0, and
// is not in the result. It has [TreeSize] bytes. The content that r gives must have the size; another one is an error.
func WriteTree(a Algorithm, r io.Reader, size int64, w io.WriterAt) (Metadata, error) {
	levels := treeLevels(a, size)
	next := make([]int64, len(levels)) // where the next block of a level belongs
	for k := len(levels) - 2; k >= 0; k-- {
		next[k] = next[k+1] + levels[k+1]*BlockSize
	}
	var failed error
	d := NewDigester(a)
	d.tree = func(level int, block []byte) {
		// More blocks than there should be come from a longer file; the size is checked at the end.
		if failed != nil || level >= len(levels) || levels[level] == 0 {
			return
		}
		_, failed = w.WriteAt(block, next[level])
		next[level] += BlockSize
		levels[level]--
	}
	buf := make([]byte, 64*BlockSize)
	if _, err := io.CopyBuffer(struct{ io.Writer }{d}, struct{ io.Reader }{r}, buf); err != nil {
		return Metadata{}, err
	}
	if d.Size() != uint64(size) {
		return Metadata{}, fmt.Errorf("has %d bytes instead of %d: it changed meanwhile", d.Size(), size)
	}
	root := d.root()
	desc := descriptor(d.alg, d.size, root)
	m := Metadata{Digest: descriptorDigest(d.alg, d.size, root), Descriptor: desc[:]}
	return m, failed
}
