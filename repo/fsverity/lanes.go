package fsverity

import "encoding/binary"

// block is a data block or a block of hashes.
type block = [BlockSize]byte

// lanes is a way to hash several blocks at once: lane k of every vector register belongs to block k.
type lanes struct {
	name   string
	width  int // of a vector register, in blocks; 0 if there is no such way
	from   int // the least number of blocks that it hashes faster than the standard library does one after the other
	hash32 func(state *uint32, in **block)
	hash64 func(state *uint64, in **block)
}

// maxLanes is the largest width.
const maxLanes = 16

// initial values of the state, from FIPS 180-4.
var (
	initial256 = [8]uint32{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}
	initial512 = [8]uint64{0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
		0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179}
)

// hash hashes as many blocks as there are pointers, at most width, and appends the hashes to out.
func (l *lanes) hash(blocks []*block, out []byte) []byte {
	var in [maxLanes]*block
	copy(in[:], blocks)
	for k := len(blocks); k < l.width; k++ {
		in[k] = blocks[0] // a lane that nobody needs
	}
	if l.hash64 != nil {
		var state [8 * maxLanes / 2]uint64
		for k := range state[:8*l.width] {
			state[k] = initial512[k/l.width]
		}
		l.hash64(&state[0], &in[0])
		for lane := range blocks {
			for word := range 8 {
				out = binary.BigEndian.AppendUint64(out, state[word*l.width+lane])
			}
		}
		return out
	}
	var state [8 * maxLanes]uint32
	for k := range state[:8*l.width] {
		state[k] = initial256[k/l.width]
	}
	l.hash32(&state[0], &in[0])
	for lane := range blocks {
		for word := range 8 {
			out = binary.BigEndian.AppendUint32(out, state[word*l.width+lane])
		}
	}
	return out
}

// hashEach hashes blocks that are anywhere and appends the hashes to out.
func hashEach(a Algorithm, blocks []*block, out []byte) []byte {
	l := &engines[a]
	for l.width > 0 && len(blocks) >= l.from {
		n := min(len(blocks), l.width)
		out = l.hash(blocks[:n], out)
		blocks = blocks[n:]
	}
	for _, b := range blocks {
		out = appendHash(a, b[:], out)
	}
	return out
}
