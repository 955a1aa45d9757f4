package delta

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/composefs-boot/composefs-boot/internal/xz"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// maxTable limits the modes and the extended attributes of a part, each, in bytes.
const maxTable = 16 << 20

// payload is a part as it is decompressed, and checked against its checksum.
type payload struct {
	spool  *spool
	modes  gvariant.Value
	xattrs gvariant.Value
	blob   *io.SectionReader
	ops    *io.SectionReader
}

// loadPart reads a part to its end.
func (p *Part) loadPart(r io.Reader) (*payload, error) {
	sum := sha256.New()
	limited := &io.LimitedReader{R: r, N: int64(min(p.Size, 1<<62))}
	in := bufio.NewReaderSize(io.TeeReader(limited, sum), 64<<10)
	s := &spool{}
	err := decompress(s, in, p.maxPayload())
	// A wrong checksum explains all other errors.
	if _, rest := io.Copy(io.Discard, in); rest != nil {
		err = rest
	} else if limited.N > 0 {
		err = fmt.Errorf("it has %d bytes, want %d", p.Size-uint64(limited.N), p.Size)
	} else if n, _ := r.Read(make([]byte, 1)); n > 0 {
		err = fmt.Errorf("it has more than %d bytes", p.Size)
	} else if is := ostree.Checksum(sum.Sum(nil)); is != p.Checksum {
		err = fmt.Errorf("its checksum is %s, want %s", is, p.Checksum)
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return openPayload(s)
}

// maxPayload limits the size of a part decompressed. A patch has at most 24 bytes for each 8 of the file; operations and tables are
// small beside what they make.
func (p *Part) maxPayload() int64 {
	return 64<<20 + 4*int64(min(p.Makes, 1<<60))
}

func decompress(w io.Writer, r *bufio.Reader, limit int64) error {
	c, err := r.ReadByte()
	if err != nil {
		return unexpected(err)
	}
	var plain io.Reader
	switch c {
	case 0:
		plain = r
	case 'x':
		if plain, err = xz.NewReader(r); err != nil {
			return err
		}
	default:
		return fmt.Errorf("compressed in a way %q that is not known", c)
	}
	n, err := io.Copy(w, io.LimitReader(plain, limit+1))
	if err == nil && n > limit {
		err = fmt.Errorf("%w: decompressed it has more than %d bytes", errTooLarge, limit)
	}
	return err
}

func openPayload(s *spool) (*payload, error) {
	p := &payload{spool: s}
	if err := p.open(s.reader()); err != nil {
		s.Close()
		return nil, fmt.Errorf("payload: %w", err)
	}
	return p, nil
}

func (p *payload) open(r *io.SectionReader) error {
	ends, limit, err := tuple(r, 3)
	if err != nil {
		return err
	}
	modes, err := load(r, 0, ends[0], maxTable)
	if err != nil {
		return err
	}
	if p.modes, err = gvariant.New("a(uuu)", modes); err != nil {
		return err
	}
	xattrs, err := load(r, ends[0], ends[1], maxTable)
	if err != nil {
		return err
	}
	if p.xattrs, err = gvariant.New("aa(ayay)", xattrs); err != nil {
		return err
	}
	if p.blob, err = part(r, ends[1], ends[2]); err != nil {
		return err
	}
	p.ops, err = part(r, ends[2], limit)
	return err
}

func (p *payload) Close() error { return p.spool.Close() }

var errRange = errors.New("a range outside of the blob")

// fromBlob returns a range of the blob.
func (p *payload) fromBlob(offset, size uint64) (io.Reader, error) {
	all := uint64(p.blob.Size())
	if offset > all || size > all-offset {
		return nil, fmt.Errorf("%w: %d bytes from %d of %d", errRange, size, offset, all)
	}
	return io.NewSectionReader(p.blob, int64(offset), int64(size)), nil
}

func (p *payload) checksumAt(offset uint64) (ostree.Checksum, error) {
	var sum ostree.Checksum
	r, err := p.fromBlob(offset, uint64(len(sum)))
	if err == nil {
		_, err = io.ReadFull(r, sum[:])
	}
	return sum, err
}
