package delta

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A patch makes a new file out of an old one. It is bsdiff's format without its header and compression, as one stream of
//
//	i64 add, i64 copy, i64 seek   little endian, the sign apart in the highest bit
//	add bytes                     to add, byte by byte modulo 256, to the old file from its place on, which moves along
//	copy bytes                    that follow in the new file
//
// After each, the place in the old file moves by seek. It may lie outside of the old file: there, zeros are added to. The patch ends
// where the new file has its size; what follows is ignored.

// maxRun limits the numbers of bytes in a patch: bspatch takes no larger ones.
const maxRun = 1<<31 - 1

// patched reads the new file that a patch makes.
type patched struct {
	patch   io.Reader
	old     io.ReaderAt
	oldSize int64
	at      int64 // in the old file
	left    int64 // of the new file

	add, copy, seek int64 // left of the run
	buf             []byte
}

func newPatched(patch io.Reader, old io.ReaderAt, oldSize, newSize int64) *patched {
	return &patched{patch: patch, old: old, oldSize: oldSize, left: newSize}
}

var errPatchShort = errors.New("the patch ends before the file does")

func (p *patched) Read(b []byte) (int, error) {
	for p.add == 0 && p.copy == 0 {
		if p.left == 0 {
			return 0, io.EOF
		}
		if err := p.next(); err != nil {
			return 0, err
		}
	}
	run := &p.add
	if p.add == 0 {
		run = &p.copy
	}
	b = b[:min(int64(len(b)), *run)]
	n, err := p.patch.Read(b)
	if err == io.EOF && n < len(b) {
		err = errPatchShort
	} else if err == io.EOF {
		err = nil
	}
	if run == &p.add {
		if old := p.addOld(b[:n]); old != nil {
			return 0, old
		}
		p.at += int64(n)
	}
	*run -= int64(n)
	p.left -= int64(n)
	if p.add == 0 && p.copy == 0 {
		p.at += p.seek
		p.seek = 0
	}
	return n, err
}

// next reads the numbers of the next run.
func (p *patched) next() error {
	var b [24]byte
	if _, err := io.ReadFull(p.patch, b[:]); err != nil {
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			err = errPatchShort
		}
		return err
	}
	p.add, p.copy, p.seek = offtin(b[:]), offtin(b[8:]), offtin(b[16:])
	if p.add < 0 || p.copy < 0 || p.add > maxRun || p.copy > maxRun || p.add+p.copy > p.left {
		return fmt.Errorf("the patch adds %d and copies %d bytes where %d are left", p.add, p.copy, p.left)
	}
	// So far away is nothing. A seek that overflows ends beyond, too, at the other side.
	const far = 1 << 61
	if p.at > far || p.at < -far {
		return fmt.Errorf("the patch seeks to %d", p.at)
	}
	if p.add == 0 && p.copy == 0 {
		p.at += p.seek
	}
	return nil
}

// addOld adds the bytes of the old file from p.at on.
func (p *patched) addOld(b []byte) error {
	from, to := max(p.at, 0), min(p.at+int64(len(b)), p.oldSize)
	if from >= to {
		return nil
	}
	if len(p.buf) < len(b) {
		p.buf = make([]byte, len(b))
	}
	old := p.buf[:to-from]
	if n, err := p.old.ReadAt(old, from); n < len(old) {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("source: %w", err)
	}
	b = b[from-p.at:]
	for i, x := range old {
		b[i] += x
	}
	return nil
}

func offtin(b []byte) int64 {
	n := binary.LittleEndian.Uint64(b)
	if n>>63 != 0 {
		return -int64(n &^ (1 << 63))
	}
	return int64(n)
}

func appendOfftin(b []byte, n int64) []byte {
	if n < 0 {
		return binary.LittleEndian.AppendUint64(b, uint64(-n)|1<<63)
	}
	return binary.LittleEndian.AppendUint64(b, uint64(n))
}
