package summary

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"slices"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

const indexType = "(a{s(ayaaya{sv})}a{sv})"

// Index lists the subsummaries of a repository whose refs are many, as flatpak's repositories have it in the file summary.idx, of type
//
//	(a{s(ayaaya{sv})}a{sv})
//
// For each subsummary, by its name, which is an architecture as a rule: its SHA-256, those of earlier versions, and metadata. The
// subsummary is summaries/HEX.gz, compressed with gzip; summaries/HEX-HEX.delta makes a later one of an earlier one, see ApplyDiff.
// The signatures of the index are in summary.idx.sig, and in summaries/HEX.idx.sig, whose name has the index's own SHA-256, so that a
// reader never sees a new one with an old one's signatures.
//
// What is the same for all stands in the dictionary of the index: when it was written, whose refs these are. A subsummary says nothing of
// the kind, so that it stays the same, and has its time as "ot.ts" in place of ostree.commit.timestamp.
type Index struct {
	Subsummaries map[string]Subsummary
	About        Summary // without refs
}

// Subsummary is an entry of the index.
type Subsummary struct {
	Sum      [32]byte // SHA-256 of it, decompressed
	Previous [][32]byte
	Other    gvariant.Dict
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
	v, err := gvariant.New(indexType, b)
	if err != nil {
		return nil, err
	}
	x := &Index{Subsummaries: map[string]Subsummary{}}
	dict, err := v.At(1)
	if err == nil {
		err = x.About.parseAbout(dict)
	}
	if err != nil {
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
		other, err := v.At(2)
		if err != nil {
			return err
		}
		x.Subsummaries[name] = s
		return eachEntry(other, func(key string, v gvariant.Value) error {
			if s.Other == nil {
				s.Other = gvariant.Dict{}
				x.Subsummaries[name] = s
			}
			s.Other[key] = v
			return nil
		})
	})
	return x, err
}

// Encode writes an index.
func (x *Index) Encode() ([]byte, error) {
	list := gvariant.List{}
	for _, name := range slices.Sorted(maps.Keys(x.Subsummaries)) {
		s := x.Subsummaries[name]
		previous := gvariant.List{}
		for _, p := range s.Previous {
			previous = append(previous, p[:])
		}
		list = append(list, gvariant.Tuple{name, gvariant.Tuple{s.Sum[:], previous, s.Other}})
	}
	about, err := x.About.about()
	if err != nil {
		return nil, err
	}
	v, err := gvariant.Encode(indexType, gvariant.Tuple{list, about})
	return v.Bytes(), err
}

// EncodeSubsummary writes a subsummary: the refs of a summary, and which deltas there are.
func EncodeSubsummary(refs []Ref) ([]byte, error) {
	version, err := gvariant.Encode("u", uint32(1))
	if err != nil {
		return nil, err
	}
	s := Summary{Refs: slices.Clone(refs), IndexedDeltas: true, Other: gvariant.Dict{"xa.summary-version": version}}
	for i := range s.Refs {
		r := &s.Refs[i]
		if r.Timestamp.IsZero() {
			continue
		}
		t, err := gvariant.Encode("t", bits.ReverseBytes64(uint64(r.Timestamp.Unix())))
		if err != nil {
			return nil, err
		}
		other := gvariant.Dict{"ot.ts": t}
		maps.Copy(other, r.Other)
		r.Other, r.Timestamp = other, time.Time{}
	}
	return s.Encode()
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

// Compress returns the file summaries/HEX.gz of a subsummary.
func Compress(b []byte) ([]byte, error) {
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	return out.Bytes(), err
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
