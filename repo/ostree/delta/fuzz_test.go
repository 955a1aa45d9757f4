package delta

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// fixCRC makes the CRC right that a header ends with.
func fixCRC(b []byte) {
	binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.ChecksumIEEE(b[:len(b)-4]))
}

func FuzzSuperblock(f *testing.F) {
	for _, name := range []string{"offline.delta", "offline-nobsdiff.delta"} {
		f.Add(golden.Read(f, "ostree/"+name))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Open(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		n := 0
		for _, p := range d.Parts {
			n += objectSize * len(p.Objects)
			if p.inline != nil {
				n += int(p.inline.Size())
			}
		}
		if n > 2*len(b) {
			t.Errorf("%d bytes of parts in %d", n, len(b))
		}
	})
}

// FuzzPart runs operations on a blob, and a patch in it.
func FuzzPart(f *testing.F) {
	f.Add([]byte("hello"), []byte("S\x00\x00\x05\x00"))
	f.Add([]byte(string(sourceSum[:])+"a"), []byte("o\x00\x00\x05r\x00w\x01\x00Rw\x01\x20r\x00w\x03\x02c"))
	f.Add([]byte(string(sourceSum[:])+offtins(5, 0, 0)+"\x00\x04\x00\x00\x00"), []byte("r\x00o\x00\x00\x05B\x20\x1dcR"))
	f.Fuzz(func(t *testing.T, blob, ops []byte) {
		const makes = 1 << 20
		entry := &Part{Makes: makes, Objects: []ostree.ObjectName{fileName(sourceSum), fileName(sourceSum), {Kind: ostree.KindDirTree}}}
		c := craft(t)
		c.owner(&fileMode)
		c.blob.Write(blob)
		c.ops = ops
		l, err := c.payload()
		if err != nil {
			t.Fatal(err)
		}
		var s spool
		io.Copy(&s, l.reader())
		p, err := openPayload(&s)
		if err != nil {
			t.Fatal(err)
		}
		m := newMachine(p, entry, func(sum ostree.Checksum) (*source, error) {
			return openSource(&memory{sources: one{content: "hallo"}}, sum)
		})
		defer m.Close()
		made := int64(0)
		for {
			_, h, err := m.next()
			if err != nil {
				break
			}
			n, err := io.Copy(io.Discard, m)
			if h != nil && n > h.Size || h != nil && err == nil && n != h.Size {
				t.Errorf("%d bytes of %d are made", n, h.Size)
			}
			made += n
		}
		if made > makes {
			t.Errorf("%d bytes are made", made)
		}
	})
}

func FuzzPatch(f *testing.F) {
	f.Add([]byte("hallo"), []byte(offtins(5, 0, 0)+"\x00\x04\x00\x00\x00"), 5)
	f.Add([]byte("hallo"), []byte(offtins(0, 0, -100)+offtins(5, 0, 0)+"hello"), 5)
	f.Fuzz(func(t *testing.T, old, patch []byte, size int) {
		if size < 0 || size > 1<<20 {
			return
		}
		n, err := io.Copy(io.Discard, newPatched(bytes.NewReader(patch), bytes.NewReader(old), int64(len(old)), int64(size)))
		if n > int64(size) || n > int64(len(patch)) || err == nil && n != int64(size) {
			t.Errorf("%d bytes of %d: %v", n, size, err)
		}
	})
}

// FuzzDiff describes one file by another, and makes it again.
func FuzzDiff(f *testing.F) {
	f.Add([]byte("one file and another file"), []byte("another file and one file"))
	f.Fuzz(func(t *testing.T, old, new []byte) { describeAndMake(t, old, new) })
}
