package ostree

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/bits"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

const (
	fileType  = "(uuuusa(ayay))"
	filezType = "(tuuuusa(ayay))"
	// maxFileHeader limits the header of a content object, in bytes: Linux has at most 64 KiB of names of extended attributes.
	maxFileHeader = 16 << 20
	prefixSize    = 8
)

// FileHeader is what a content object has before the content. Mode says that it is a regular file or a symbolic link.
type FileHeader struct {
	Meta
	Size   int64  // of the content; 0 for a symbolic link
	Target string // of a symbolic link
}

// IsSymlink reports whether the object is a symbolic link, which has no content.
func (h *FileHeader) IsSymlink() bool { return h.Mode&fstree.TypeMask == fstree.TypeSymlink }

// check tells what cannot be a file.
func (h *FileHeader) check() error {
	switch h.Mode &^ 0o7777 {
	case fstree.TypeRegular:
		if h.Target != "" {
			return errors.New("a regular file with the target of a symbolic link")
		}
	case fstree.TypeSymlink:
		if h.Target == "" || len(h.Target) > fstree.MaxSymlink {
			return fmt.Errorf("a symbolic link with a target of %d bytes: 1 to %d are possible", len(h.Target), fstree.MaxSymlink)
		}
		if h.Size != 0 {
			return fmt.Errorf("a symbolic link of %d bytes", h.Size)
		}
	default:
		return fmt.Errorf("mode %#o is not that of a file or symbolic link", h.Mode)
	}
	return nil
}

// Encode returns the header as it is hashed, with the size before it. The content follows.
func (h *FileHeader) Encode() ([]byte, error) {
	return sized(fileType, gvariant.Tuple{big32(h.UID), big32(h.GID), big32(h.Mode), uint32(0), h.Target, xattrList(h.Xattrs)})
}

// EncodeFilez returns the header as it is in an archive and in a commit's stream: with the size of the content.
func (h *FileHeader) EncodeFilez() ([]byte, error) {
	return sized(filezType, gvariant.Tuple{big64(uint64(h.Size)), big32(h.UID), big32(h.GID), big32(h.Mode), uint32(0), h.Target,
		xattrList(h.Xattrs)})
}

func sized(typ string, t gvariant.Tuple) ([]byte, error) {
	v, err := gvariant.Encode(typ, t)
	if err != nil {
		return nil, fmt.Errorf("file header: %w", err)
	}
	b := make([]byte, prefixSize, prefixSize+len(v.Bytes()))
	binary.BigEndian.PutUint32(b, uint32(len(v.Bytes())))
	return append(b, v.Bytes()...), nil
}

// NewHash returns a hash that has the header already: written the content, its sum is the object's checksum.
func (h *FileHeader) NewHash() (hash.Hash, error) {
	b, err := h.Encode()
	if err != nil {
		return nil, err
	}
	sum := sha256.New()
	sum.Write(b)
	return sum, nil
}

// ReadFileHeader reads the header of a content object as it is hashed. Size is not in it, and is 0.
func ReadFileHeader(r io.Reader) (*FileHeader, error) { return readHeader(r, fileType) }

// ReadFilezHeader reads the header of a content object of an archive. What follows is the content, compressed with raw deflate.
func ReadFilezHeader(r io.Reader) (*FileHeader, error) { return readHeader(r, filezType) }

func readHeader(r io.Reader, typ string) (*FileHeader, error) {
	var prefix [prefixSize]byte
	if _, err := io.ReadFull(r, prefix[:]); err != nil {
		return nil, fmt.Errorf("file header: %w", unexpected(err))
	}
	n, err := headerSize(prefix[:])
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("file header of %d bytes: %w", n, unexpected(err))
	}
	return parseHeader(typ, b)
}

// headerSize reads what stands before a header.
func headerSize(prefix []byte) (int, error) {
	n := binary.BigEndian.Uint32(prefix)
	if n > maxFileHeader || binary.BigEndian.Uint32(prefix[4:]) != 0 {
		return 0, fmt.Errorf("file header: %d bytes, at most %d are possible, and zeros after that", n, maxFileHeader)
	}
	return int(n), nil
}

func parseHeader(typ string, b []byte) (*FileHeader, error) {
	h, err := parseFile(typ, b)
	if err == nil {
		err = h.check()
	}
	if err != nil {
		return nil, fmt.Errorf("file header: %w", err)
	}
	return h, nil
}

func parseFile(typ string, b []byte) (*FileHeader, error) {
	v, err := gvariant.New(typ, b)
	if err != nil {
		return nil, err
	}
	if err := v.Check(); err != nil {
		return nil, err
	}
	m, err := members(v)
	if err != nil {
		return nil, err
	}
	h := &FileHeader{}
	if typ == filezType {
		size, err := m[0].BigUint64()
		if err != nil {
			return nil, err
		}
		if size > 1<<62 {
			return nil, fmt.Errorf("a content of %d bytes", size)
		}
		h.Size = int64(size)
		m = m[1:]
	}
	var device uint32
	for i, to := range []*uint32{&h.UID, &h.GID, &h.Mode, &device} {
		if *to, err = m[i].BigUint32(); err != nil {
			return nil, err
		}
	}
	if device != 0 {
		return nil, fmt.Errorf("a device number, %#x", device)
	}
	if h.Target, err = m[4].String(); err != nil {
		return nil, err
	}
	h.Xattrs, err = parseXattrs(m[5])
	return h, err
}

// unexpected is for an end where there must be more.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// big32 and big64 turn numbers so that gvariant, which writes them little endian, has them big endian in the end.
func big32(n uint32) uint32 { return bits.ReverseBytes32(n) }
func big64(n uint64) uint64 { return bits.ReverseBytes64(n) }
