package summary

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// Index lists the subsummaries of a repository whose refs are many, as flatpak's repositories have it in the file summary.idx, of type
//
//	(a{s(ayaaya{sv})}a{sv})
//
// For each subsummary, by its name, which is an architecture as a rule: its SHA-256, those of earlier versions, and metadata. The
// subsummary is summaries/HEX.gz, compressed with gzip; summaries/HEX-HEX.delta makes a later one of an earlier one, see ApplyDiff.
// The signatures of the index are in summary.idx.sig, and in summaries/HEX.idx.sig, whose name has the index's own SHA-256, so that a
// reader never sees a new one with an old one's signatures.
type Index struct {
	Subsummaries map[string]Subsummary
	Other        gvariant.Value // a{sv}
}

// Subsummary is an entry of the index.
type Subsummary struct {
	Sum      [32]byte // SHA-256 of it, decompressed
	Previous [][32]byte
	Other    gvariant.Value // a{sv}
}

// Path returns where the subsummary is in the repository.
func (s Subsummary) Path() string { return "summaries/" + hex.EncodeToString(s.Sum[:]) + ".gz" }

// DiffPath returns where the file is that makes the subsummary of an earlier one.
func (s Subsummary) DiffPath(from [32]byte) string {
	return fmt.Sprintf("summaries/%x-%x.delta", from, s.Sum)
}

// IndexSignaturePath returns where the signatures of an index are in the repository.
func IndexSignaturePath(index []byte) string {
	return fmt.Sprintf("summaries/%x.idx.sig", sha256.Sum256(index))
}

// ParseIndex reads an index.
func ParseIndex(b []byte) (*Index, error) {
	x, err := parseIndex(b)
	if err != nil {
		return nil, fmt.Errorf("summary index: %w", err)
	}
	return x, nil
}

func parseIndex(b []byte) (*Index, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("%d bytes, more than %d", len(b), MaxSize)
	}
	v, err := gvariant.New("(a{s(ayaaya{sv})}a{sv})", b)
	if err != nil {
		return nil, err
	}
	x := &Index{Subsummaries: map[string]Subsummary{}}
	if x.Other, err = v.At(1); err != nil {
		return nil, err
	}
	list, err := v.At(0)
	if err != nil {
		return nil, err
	}
	err = eachEntry(list, func(name string, v gvariant.Value) error {
		var s Subsummary
		sum, err := v.At(0)
		if err == nil {
			s.Sum, err = parseSum(sum)
		}
		if err != nil {
			return err
		}
		previous, err := v.At(1)
		if err != nil {
			return err
		}
		n, err := previous.Len()
		if err != nil {
			return err
		}
		for i := range n {
			e, err := previous.At(i)
			if err != nil {
				return err
			}
			sum, err := parseSum(e)
			if err != nil {
				return err
			}
			s.Previous = append(s.Previous, sum)
		}
		s.Other, err = v.At(2)
		x.Subsummaries[name] = s
		return err
	})
	return x, err
}

// Decompress returns the subsummary that is in a file summaries/HEX.gz.
func (s Subsummary) Decompress(gz []byte) ([]byte, error) {
	b, err := gunzip(gz)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.Path(), err)
	}
	return b, s.check(b)
}

func (s Subsummary) check(b []byte) error {
	if sum := sha256.Sum256(b); sum != s.Sum {
		return fmt.Errorf("subsummary %x: it has the SHA-256 %x", s.Sum, sum)
	}
	return nil
}

func gunzip(gz []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(gz))
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, MaxSize+1))
	if err == nil && len(b) > MaxSize {
		err = fmt.Errorf("more than %d bytes, decompressed", MaxSize)
	}
	return b, err
}

// ApplyDiff makes the subsummary of an earlier one. A diff is compressed with gzip, and has "xadf"; the number of operations; the
// operations; data. The numbers are of 32 bits, little endian: the upper four bits of an operation say what is done, the others to how
// many bytes: 0 takes them from the old one, 1 passes over them there, 2 takes them from the data.
func (s Subsummary) ApplyDiff(old, diff []byte) ([]byte, error) {
	b, err := applyDiff(old, diff)
	if err != nil {
		return nil, fmt.Errorf("diff to subsummary %x: %w", s.Sum, err)
	}
	return b, s.check(b)
}

func applyDiff(old, diff []byte) ([]byte, error) {
	diff, err := gunzip(diff)
	if err != nil {
		return nil, err
	}
	if len(diff) < 8 || string(diff[:4]) != "xadf" {
		return nil, errors.New("not a diff of summaries")
	}
	n := uint64(binary.LittleEndian.Uint32(diff[4:]))
	if n*4 > uint64(len(diff)-8) {
		return nil, fmt.Errorf("%d operations in %d bytes", n, len(diff))
	}
	ops, data := diff[8:8+n*4], diff[8+n*4:]
	var out []byte
	take := func(from *[]byte, n int) ([]byte, error) {
		if n > len(*from) {
			return nil, fmt.Errorf("%d bytes of %d", n, len(*from))
		}
		b := (*from)[:n]
		*from = (*from)[n:]
		return b, nil
	}
	for at := 0; at < len(ops); at += 4 {
		op := binary.LittleEndian.Uint32(ops[at:])
		from := &old
		if op>>28 == 2 {
			from = &data
		}
		b, err := take(from, int(op&(1<<28-1)))
		if err == nil && op>>28 > 2 {
			err = errors.New("an unknown one")
		}
		if err != nil {
			return nil, fmt.Errorf("operation %d: %w", at/4, err)
		}
		if op>>28 != 1 {
			out = append(out, b...)
		}
	}
	return out, nil
}
