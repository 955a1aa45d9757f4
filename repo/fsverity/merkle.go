package fsverity

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"io"
)

// hashBlocks hashes every block of data, whose length is a multiple of BlockSize, and appends the hashes to out.
// Everything that fs-verity hashes but the descriptor goes through here.
func hashBlocks(a Algorithm, data, out []byte) []byte {
	var blocks [maxLanes]*block
	for len(data) > 0 {
		n := 0
		for ; n < len(blocks) && len(data) > 0; n++ {
			blocks[n] = (*block)(data)
			data = data[BlockSize:]
		}
		out = hashEach(a, blocks[:n], out)
	}
	return out
}

func appendHash(a Algorithm, data, out []byte) []byte {
	if a == SHA512 {
		sum := sha512.Sum512(data)
		return append(out, sum[:]...)
	}
	sum := sha256.Sum256(data)
	return append(out, sum[:]...)
}

// Digester computes the digest of what is written to it. It holds one block a level of the Merkle tree (at most eight),
// whatever the size of the file.
type Digester struct {
	alg    Algorithm
	size   uint64
	block  []byte   // the data block being filled
	buf    []byte   // for ReadFrom
	levels [][]byte // hashes of each level that do not fill a block yet; level 0 holds the hashes of data blocks
	tree   func(level int, block []byte)
}

// NewDigester returns a digester of an empty file. The algorithm must be SHA256 or SHA512.
func NewDigester(a Algorithm) *Digester {
	return &Digester{alg: a, block: make([]byte, 0, BlockSize)}
}

// Reset makes d a digester of an empty file again, with the same algorithm; its memory is used again.
func (d *Digester) Reset() {
	d.size = 0
	d.block = d.block[:0]
	for i := range d.levels {
		d.levels[i] = d.levels[i][:0]
	}
}

// Write adds data to the end of the file. It never fails.
func (d *Digester) Write(p []byte) (int, error) {
	n := len(p)
	d.size += uint64(n)
	if len(d.block) > 0 {
		k := copy(d.block[len(d.block):BlockSize], p)
		d.block = d.block[:len(d.block)+k]
		p = p[k:]
		if len(d.block) < BlockSize {
			return n, nil
		}
		d.addBlocks(0, d.block)
		d.block = d.block[:0]
	}
	if whole := len(p) / BlockSize * BlockSize; whole > 0 {
		d.addBlocks(0, p[:whole])
		p = p[whole:]
	}
	d.block = append(d.block, p...)
	return n, nil
}

// ReadFrom adds what r gives, to its end. It returns the number of bytes and the error of r, if there is one.
func (d *Digester) ReadFrom(r io.Reader) (int64, error) {
	if d.buf == nil {
		d.buf = make([]byte, 64*BlockSize)
	}
	var total int64
	for {
		// Whole blocks keep Write from copying.
		n, err := io.ReadFull(r, d.buf)
		d.Write(d.buf[:n])
		total += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// addBlocks hashes whole blocks of the level below into level. A full level is hashed into the next one only when one
// more hash arrives: until then it may be the top of the tree.
func (d *Digester) addBlocks(level int, blocks []byte) {
	if level == len(d.levels) {
		d.levels = append(d.levels, make([]byte, 0, BlockSize))
	}
	for len(blocks) > 0 {
		hashes := d.levels[level]
		if len(hashes) == BlockSize {
			d.pushUp(level)
			hashes = d.levels[level]
		}
		n := min((BlockSize-len(hashes))/d.alg.Size()*BlockSize, len(blocks))
		d.levels[level] = hashBlocks(d.alg, blocks[:n], hashes)
		blocks = blocks[n:]
	}
}

// pushUp hashes the block of hashes of a level, padded with zeros, into the next one.
func (d *Digester) pushUp(level int) {
	hashes := d.levels[level]
	full := hashes[:BlockSize]
	clear(full[len(hashes):])
	if d.tree != nil {
		d.tree(level, full)
	}
	d.addBlocks(level+1, full)
	d.levels[level] = d.levels[level][:0]
}

// Size returns the number of bytes written so far.
func (d *Digester) Size() uint64 { return d.size }

// Sum returns the digest of what was written. The digester must be Reset before it is used again.
func (d *Digester) Sum() Digest {
	return descriptorDigest(d.alg, d.size, d.root())
}

func (d *Digester) root() []byte {
	if d.size == 0 {
		return make([]byte, d.alg.Size())
	}
	if len(d.block) > 0 {
		block := d.block[:BlockSize]
		clear(block[len(d.block):])
		d.addBlocks(0, block)
		d.block = d.block[:0]
	}
	for level := 0; ; level++ {
		top := true
		for _, above := range d.levels[level+1:] {
			top = top && len(above) == 0
		}
		if top && len(d.levels[level]) == d.alg.Size() {
			return d.levels[level]
		}
		d.pushUp(level)
	}
}

// DescriptorSize is the size in bytes of a descriptor as the kernel stores it.
const DescriptorSize = 256

func descriptor(a Algorithm, size uint64, root []byte) (desc [DescriptorSize]byte) {
	desc[0] = 1 // version
	desc[1] = byte(a)
	desc[2] = 12 // log2 of the block size
	binary.LittleEndian.PutUint64(desc[8:], size)
	copy(desc[16:80], root)
	return desc
}

func descriptorDigest(a Algorithm, size uint64, root []byte) Digest {
	desc := descriptor(a, size, root)
	sum := Digest{alg: a}
	appendHash(a, desc[:], sum.sum[:0])
	return sum
}

// Of returns the digest of a file with this content.
func Of(a Algorithm, data []byte) Digest {
	d := NewDigester(a)
	d.Write(data)
	return d.Sum()
}

// OfReader returns the digest and the size of a file with the content that r gives.
func OfReader(a Algorithm, r io.Reader) (Digest, int64, error) {
	d := NewDigester(a)
	n, err := d.ReadFrom(r)
	if err != nil {
		return Digest{}, n, err
	}
	return d.Sum(), n, nil
}

// Metadata is what a file system stores next to the data of a file with fs-verity enabled.
type Metadata struct {
	Digest     Digest
	Descriptor []byte // DescriptorSize bytes
	Tree       []byte // Merkle tree blocks, root level first; empty for files of at most one block
}

// MetadataOf computes what the kernel would store on enabling fs-verity for a file with the content that r gives, so
// that a file system image can be written with it. The tree takes 1/128 (sha256) or 1/64 (sha512) of the file's size in
// memory.
func MetadataOf(a Algorithm, r io.Reader) (Metadata, int64, error) {
	var levels [][]byte
	d := NewDigester(a)
	d.tree = func(level int, block []byte) {
		for level >= len(levels) {
			levels = append(levels, nil)
		}
		levels[level] = append(levels[level], block...)
	}
	if n, err := d.ReadFrom(r); err != nil {
		return Metadata{}, n, err
	}
	root := d.root()
	desc := descriptor(d.alg, d.size, root)
	m := Metadata{Digest: descriptorDigest(d.alg, d.size, root), Descriptor: desc[:]}
	for i := len(levels) - 1; i >= 0; i-- {
		m.Tree = append(m.Tree, levels[i]...)
	}
	return m, int64(d.Size()), nil
}
