package ostree

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Objects are those of a commit: all of them, when it is complete.
type Objects struct {
	Commit Checksum

	alg     fsverity.Algorithm
	entries map[Checksum]entry
}

// entry is an object: commits, dirtrees and dirmetas as they are; a content object as the header of an archive, behind which stands
// the content, unless that is an object of the repository.
type entry struct {
	data   []byte
	object fsverity.Digest // zero: none
}

// newObjects returns an empty set of objects for a repository with these digests.
func newObjects(a fsverity.Algorithm, commit Checksum) *Objects {
	return &Objects{Commit: commit, alg: a, entries: map[Checksum]entry{}}
}

// maxInline is the size in bytes up to which the content of a file stays in the stream and in the image. It is that of composefs-rs: as
// much as two digests, which is fstree.MaxInline for SHA-256 alone.
func maxInline(a fsverity.Algorithm) int64 { return 2 * int64(a.Size()) }

// Len returns the number of objects.
func (o *Objects) Len() int { return len(o.entries) }

// Names returns the checksums of all objects, sorted.
func (o *Objects) Names() []Checksum {
	return slices.SortedFunc(maps.Keys(o.entries), func(a, b Checksum) int { return bytes.Compare(a[:], b[:]) })
}

// Has reports whether there is an object.
func (o *Objects) Has(c Checksum) bool {
	_, ok := o.entries[c]
	return ok
}

// Metadata returns a commit, dirtree or dirmeta, whose checksum is checked. The error is ErrNotFound if there is none.
func (o *Objects) Metadata(n ObjectName) ([]byte, error) {
	e, ok := o.entries[n.Checksum]
	if !ok {
		return nil, fmt.Errorf("object %v: %w", n, ErrNotFound)
	}
	return e.metadata(n)
}

func (e entry) metadata(n ObjectName) ([]byte, error) {
	if !e.object.IsZero() {
		return nil, fmt.Errorf("object %v: it is a content object", n)
	}
	return e.data, n.Verify(e.data)
}

// StoredFile is a content object whose content is Inline, or the object of the repository.
type StoredFile struct {
	FileHeader
	Inline []byte
	Object fsverity.Digest // zero: there is none
}

// File returns a content object. What is inline is checked against the checksum. The error is ErrNotFound if there is none.
func (o *Objects) File(c Checksum) (*StoredFile, error) {
	e, ok := o.entries[c]
	if !ok {
		return nil, fmt.Errorf("object %v: %w", ObjectName{c, KindFile}, ErrNotFound)
	}
	return e.checked(c)
}

// checked is file, with the checksum of what is inline.
func (e entry) checked(c Checksum) (*StoredFile, error) {
	n := ObjectName{c, KindFile}
	f, err := e.file()
	if err != nil {
		return nil, fmt.Errorf("object %v: %w", n, err)
	}
	if f.Object.IsZero() {
		h, err := f.NewHash()
		if err != nil {
			return nil, err
		}
		h.Write(f.Inline)
		if got := Checksum(h.Sum(nil)); got != c {
			return nil, fmt.Errorf("object %v: %w: %v", n, ErrChecksum, got)
		}
	}
	return f, nil
}

// file takes the entry of a content object apart.
func (e entry) file() (*StoredFile, error) {
	if len(e.data) < prefixSize {
		return nil, fmt.Errorf("a content object of %d bytes", len(e.data))
	}
	n, err := headerSize(e.data)
	if err != nil {
		return nil, err
	}
	if n > len(e.data)-prefixSize {
		return nil, fmt.Errorf("a header of %d bytes in %d", n, len(e.data))
	}
	h, err := parseHeader(filezType, e.data[prefixSize:prefixSize+n])
	if err != nil {
		return nil, err
	}
	f := &StoredFile{*h, e.data[prefixSize+n:], e.object}
	switch {
	case f.Object.IsZero() && int64(len(f.Inline)) != f.Size:
		return nil, fmt.Errorf("%d bytes of content, the header says %d", len(f.Inline), f.Size)
	case !f.Object.IsZero() && (len(f.Inline) > 0 || f.IsSymlink()):
		return nil, fmt.Errorf("an object of the repository, and a content of its own")
	}
	return f, nil
}

// newEntry makes the entry of a content object. The content is inline, if there is no object.
func newEntry(h *FileHeader, inline []byte, object fsverity.Digest) (entry, error) {
	data, err := h.EncodeFilez()
	return entry{append(data, inline...), object}, err
}

// commit parses the commit object.
func (o *Objects) commit() (*Commit, error) {
	data, err := o.Metadata(ObjectName{o.Commit, KindCommit})
	if err != nil {
		return nil, err
	}
	return ParseCommit(data)
}

// The stream of a commit, all numbers little endian:
//
//	u32           the number of the commit among the objects
//	u32           0
//	u32[256]      for each value of the first byte of a checksum, the number of objects up to and with it
//	byte[32][n]   checksums, sorted
//	{u32 u32 u32}[n]  where the object begins, in units of 8 bytes behind this table; its size; the number of the object of the
//	              repository that the stream refers to and that has the content, all ones if there is none
//	byte[]        the objects, each aligned to 8 bytes
//
// It is one inline chunk, since readers of composefs-rs take it from one. The content type tells it from others.
const (
	// CommitContent is the content type of the streams.
	CommitContent = 0xAFE138C18C463EF1
	streamHeader  = 8 + 256*4
	refSize       = 12
	none          = 1<<32 - 1
	// maxStream limits the stream in bytes: some millions of objects.
	maxStream = 1 << 31
)

// encode writes the stream, except for the contents that are objects of the repository: refer gives those a number.
func (o *Objects) encode(refer func(fsverity.Digest) int) ([]byte, error) {
	names := o.Names()
	le := binary.LittleEndian
	b := make([]byte, streamHeader, streamHeader+len(names)*(sha256.Size+refSize))
	le.PutUint32(b, none)
	var counts [256]uint32
	for k, c := range names {
		if c == o.Commit {
			le.PutUint32(b, uint32(k))
		}
		counts[c[0]]++
		b = append(b, c[:]...)
	}
	var sum uint32
	for k, n := range counts {
		sum += n
		le.PutUint32(b[8+4*k:], sum)
	}
	at := 0
	for _, c := range names {
		e := o.entries[c]
		number := uint32(none)
		if !e.object.IsZero() {
			number = uint32(refer(e.object))
		}
		b = le.AppendUint32(b, uint32(at/8))
		b = le.AppendUint32(b, uint32(len(e.data)))
		b = le.AppendUint32(b, number)
		at += (len(e.data) + 7) &^ 7
	}
	if at > maxStream {
		return nil, fmt.Errorf("commit %v: its metadata and small files have %d bytes: at most %d fit", o.Commit, at, maxStream)
	}
	b = slices.Grow(b, at)
	var zero [7]byte
	for _, c := range names {
		data := o.entries[c].data
		b = append(b, data...)
		b = append(b, zero[:-len(data)&7]...)
	}
	return b, nil
}

// decode is the inverse of encode: numbered are the objects of the repository. The commit itself may be missing where not all of it is
// expected; then it is what the caller says.
func decode(b []byte, a fsverity.Algorithm, numbered []fsverity.Digest, partial bool) (*Objects, error) {
	le := binary.LittleEndian
	if len(b) < streamHeader {
		return nil, fmt.Errorf("commit stream of %d bytes: want at least %d", len(b), streamHeader)
	}
	var last uint32
	for k := range 256 {
		end := le.Uint32(b[8+4*k:])
		if end < last {
			return nil, fmt.Errorf("commit stream: %d objects up to %#02x, and %d before", end, k, last)
		}
		last = end
	}
	n := int(last)
	if n > (len(b)-streamHeader)/(sha256.Size+refSize) {
		return nil, fmt.Errorf("commit stream: %d objects in %d bytes", n, len(b))
	}
	ids := b[streamHeader:]
	refs := ids[n*sha256.Size:]
	content := refs[n*refSize:]
	o := &Objects{alg: a, entries: make(map[Checksum]entry, n)}
	var before Checksum
	for k := range n {
		c := Checksum(ids[k*sha256.Size:])
		if k > 0 && bytes.Compare(before[:], c[:]) >= 0 {
			return nil, fmt.Errorf("commit stream: object %d is not after the one before it", k)
		}
		if uint32(k) >= le.Uint32(b[8+4*int(c[0]):]) || c[0] > 0 && uint32(k) < le.Uint32(b[4+4*int(c[0]):]) {
			return nil, fmt.Errorf("commit stream: object %v is in the wrong bucket", c)
		}
		before = c
		ref := refs[k*refSize:]
		start, size, number := int64(le.Uint32(ref))*8, int64(le.Uint32(ref[4:])), le.Uint32(ref[8:])
		if start+size > int64(len(content)) {
			return nil, fmt.Errorf("commit stream: object %v from %d to %d of %d bytes", c, start, start+size, len(content))
		}
		e := entry{data: content[start : start+size : start+size]}
		if number != none {
			if int64(number) >= int64(len(numbered)) {
				return nil, fmt.Errorf("commit stream: object %v refers to object %d of %d", c, number, len(numbered))
			}
			e.object = numbered[number]
		}
		o.entries[c] = e
	}
	switch k := le.Uint32(b); {
	case int64(k) < int64(n):
		o.Commit = Checksum(ids[k*sha256.Size:])
	case k != none || !partial:
		return nil, fmt.Errorf("commit stream: the commit is object %d of %d", k, n)
	}
	return o, nil
}

// Open opens a content object, whose content is in the repository. The error is ErrNotFound if there is none.
func (o *Objects) Open(r *repo.Repo, c Checksum) (*File, error) {
	e, ok := o.entries[c]
	if !ok {
		return nil, fmt.Errorf("object %v: %w", ObjectName{c, KindFile}, ErrNotFound)
	}
	return e.open(r, c)
}

func (e entry) open(r *repo.Repo, c Checksum) (*File, error) {
	f, err := e.checked(c)
	if err != nil {
		return nil, err
	}
	if f.Object.IsZero() {
		return &File{f.FileHeader, io.NopCloser(bytes.NewReader(f.Inline)), false}, nil
	}
	content, err := r.OpenVerified(f.Object)
	if err != nil {
		return nil, fmt.Errorf("object %v: %w", ObjectName{c, KindFile}, err)
	}
	return &File{f.FileHeader, content, false}, nil
}
