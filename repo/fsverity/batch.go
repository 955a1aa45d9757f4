package fsverity

import "sync"

// scratch is what OfAll works with.
type scratch struct {
	padded []block // one for each content: its last block, then its hashes
	blocks []*block
	hashes []byte
}

var scratches = sync.Pool{New: func() any { return &scratch{} }}

// OfAll returns the digests of files with these contents. Small files are hashed together, which is several times faster than
// one after the other where the processor can hash many blocks at once.
func OfAll(a Algorithm, contents [][]byte) []Digest {
	digests := make([]Digest, len(contents))
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	if len(s.padded) < len(contents) {
		s.padded = make([]block, len(contents))
	}
	// The data: a file takes part if its hashes fit in one block.
	most := BlockSize / a.Size() * BlockSize
	s.blocks = s.blocks[:0]
	for k, c := range contents {
		if len(c) > most {
			digests[k] = Of(a, c)
			continue
		}
		for ; len(c) >= BlockSize; c = c[BlockSize:] {
			s.blocks = append(s.blocks, (*block)(c))
		}
		if len(c) > 0 {
			pad(&s.padded[k], c)
			s.blocks = append(s.blocks, &s.padded[k])
		}
	}
	s.hashes = hashEach(a, s.blocks, s.hashes[:0])
	// The hashes of files of more than one block.
	s.blocks = s.blocks[:0]
	rest := s.hashes
	single := make([]bool, len(contents))
	for k, c := range contents {
		if len(c) > most {
			continue
		}
		n := (len(c) + BlockSize - 1) / BlockSize * a.Size()
		single[k] = n <= a.Size()
		pad(&s.padded[k], rest[:n])
		if !single[k] {
			s.blocks = append(s.blocks, &s.padded[k])
		}
		rest = rest[n:]
	}
	roots := hashEach(a, s.blocks, s.hashes[:0])
	for k, c := range contents {
		switch {
		case len(c) > most:
		case single[k]: // of an empty file zeros, which is what is there
			digests[k] = descriptorDigest(a, uint64(len(c)), s.padded[k][:a.Size()])
		default:
			digests[k] = descriptorDigest(a, uint64(len(c)), roots[:a.Size()])
			roots = roots[a.Size():]
		}
	}
	clear(s.blocks) // the contents are not ours to keep
	return digests
}

func pad(b *block, content []byte) { clear(b[copy(b[:], content):]) }
