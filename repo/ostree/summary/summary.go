// Package summary reads and writes the file summary of an OSTree repository: which refs it has, and what stands where.
//
// A web server cannot be asked what it has, so the repository says so in a file at its top, a GVariant of type
//
//	(a(s(taya{sv}))a{sv})
//
// The first member lists refs, sorted by name: the name; the size in bytes of the commit object, little endian; its checksum; and
// metadata: ostree.commit.timestamp (t, seconds since 1970, big endian) and ostree.commit.version (s). The second member is a
// dictionary:
//
//	ostree.summary.last-modified      t    seconds since 1970, big endian: when it was written
//	ostree.summary.expires            t    the same: when another one is due
//	ostree.summary.mode               s    of the repository: archive-z2
//	ostree.summary.tombstone-commits  b    deleted commits leave a tombstone
//	ostree.summary.indexed-deltas     b    the deltas to a commit are listed in delta-indexes/
//	ostree.summary.collection-id      s    the collection that the refs of the first member belong to
//	ostree.summary.collection-map     a{sa(s(taya{sv}))}  refs of other collections
//	ostree.static-deltas              a{sv} names of static deltas: HEX, or HEX-HEX with a base; values are ay, the SHA-256 of the
//	                                  superblock
//
// Other keys are kept. Signatures are in summary.sig, see package sign. A repository of many refs has several smaller summaries and
// an index of them instead, see Index.
//
// The summary comes from anybody as long as it is not signed: it is bounded in size, names of refs cannot be paths to somewhere else,
// and no name stands twice, for two readers could each take another one.
package summary

import (
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree/delta"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// MaxSize is how many bytes a summary has at most, as in ostree.
const MaxSize = 128 << 20

const typ = "(a(s(taya{sv}))a{sv})"

// Summary is what a summary says.
type Summary struct {
	Refs          []Ref            // sorted by name
	Collection    string           // that they belong to, "" if to none
	Collections   map[string][]Ref // of other collections
	Deltas        delta.Digests
	LastModified  time.Time // zero: not known
	Expires       time.Time // zero: never
	Mode          string
	Tombstones    bool
	IndexedDeltas bool
	Other         gvariant.Dict // what else stands in the dictionary
}

// Ref is a ref and the commit that it leads to.
type Ref struct {
	Name      string
	Commit    [32]byte
	Size      uint64    // of the commit object, bytes
	Timestamp time.Time // of the commit; zero: not known
	Version   string    // of the commit, ""
	Other     gvariant.Dict
}

// Lookup returns the ref of that name, of a collection, or of the repository's own if that is "".
func (s *Summary) Lookup(collection, name string) (Ref, bool) {
	refs := s.Refs
	if collection != "" && collection != s.Collection {
		refs = s.Collections[collection]
	}
	i, ok := slices.BinarySearchFunc(refs, name, func(r Ref, name string) int { return strings.Compare(r.Name, name) })
	if !ok {
		return Ref{}, false
	}
	return refs[i], true
}

var validRef = regexp.MustCompile(`^[\w][\w.-]*(/[\w][\w.-]*)*$`)

// CheckRef tells why a name cannot be one of a ref. Words of letters, digits, "_", "-" and "." are separated by slashes; no word
// begins with "." or "-".
func CheckRef(name string) error {
	if len(name) > 255 || !validRef.MatchString(name) {
		return fmt.Errorf("ref %.260q: not a name of a ref", name)
	}
	return nil
}

// Parse reads a summary.
func Parse(b []byte) (*Summary, error) {
	s, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("summary: %w", err)
	}
	return s, nil
}

func parse(b []byte) (*Summary, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("%d bytes, more than %d", len(b), MaxSize)
	}
	v, err := gvariant.New(typ, b)
	if err != nil {
		return nil, err
	}
	s := &Summary{}
	list, err := v.At(0)
	if err == nil {
		s.Refs, err = parseRefs(list)
	}
	if err != nil {
		return nil, err
	}
	dict, err := v.At(1)
	if err != nil {
		return nil, err
	}
	return s, s.parseAbout(dict)
}

// parseAbout reads the dictionary of a summary, or that of an index.
func (s *Summary) parseAbout(dict gvariant.Value) error {
	return eachEntry(dict, func(key string, v gvariant.Value) error {
		var err error
		switch key {
		case "ostree.summary.last-modified":
			s.LastModified, err = parseTime(v)
		case "ostree.summary.expires":
			s.Expires, err = parseTime(v)
		case "ostree.summary.mode":
			s.Mode, err = v.String()
		case "ostree.summary.tombstone-commits":
			s.Tombstones, err = v.Bool()
		case "ostree.summary.indexed-deltas":
			s.IndexedDeltas, err = v.Bool()
		case "ostree.summary.collection-id":
			s.Collection, err = v.String()
		case "ostree.summary.collection-map":
			s.Collections, err = parseCollections(v)
		case delta.DigestsKey:
			if v.Type() != "a{sv}" {
				return fmt.Errorf("type %s", v.Type())
			}
			s.Deltas, err = delta.ParseDigests(v)
		default:
			if s.Other == nil {
				s.Other = gvariant.Dict{}
			}
			s.Other[key] = v
		}
		return err
	})
}

// eachEntry walks through a dictionary of strings, in which no key may stand twice.
func eachEntry(v gvariant.Value, f func(key string, value gvariant.Value) error) error {
	n, err := v.Len()
	if err != nil {
		return err
	}
	seen := make(map[string]bool, min(n, 1024))
	for i := range n {
		key, value, err := v.Entry(i)
		if err == nil && seen[key] {
			err = errors.New("it stands there twice")
		}
		if err == nil {
			seen[key] = true
			err = f(key, value)
		}
		if err != nil {
			return fmt.Errorf("%.300q: %w", key, err)
		}
	}
	return nil
}

func parseTime(v gvariant.Value) (time.Time, error) {
	n, err := v.BigUint64()
	if err != nil || n == 0 {
		return time.Time{}, err
	}
	if n > 1<<40 {
		return time.Time{}, fmt.Errorf("%d is no time", n)
	}
	return time.Unix(int64(n), 0).UTC(), nil
}

func parseRefs(v gvariant.Value) ([]Ref, error) {
	if v.Type() != "a(s(taya{sv}))" {
		return nil, fmt.Errorf("refs of type %s", v.Type())
	}
	n, err := v.Len()
	if err != nil {
		return nil, err
	}
	refs := make([]Ref, n)
	for i := range refs {
		e, err := v.At(i)
		if err == nil {
			refs[i], err = parseRef(e)
		}
		if err != nil {
			return nil, fmt.Errorf("ref %d: %w", i, err)
		}
	}
	slices.SortStableFunc(refs, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	for i := 1; i < n; i++ {
		if refs[i].Name == refs[i-1].Name {
			return nil, fmt.Errorf("ref %q: it stands there twice", refs[i].Name)
		}
	}
	return refs, nil
}

func parseRef(e gvariant.Value) (Ref, error) {
	var r Ref
	name, err := e.At(0)
	if err == nil {
		r.Name, err = name.String()
	}
	if err == nil {
		err = CheckRef(r.Name)
	}
	if err != nil {
		return r, err
	}
	what, err := e.At(1)
	if err != nil {
		return r, err
	}
	size, err := what.At(0)
	if err == nil {
		r.Size, err = size.Uint64()
	}
	if err != nil {
		return r, err
	}
	sum, err := what.At(1)
	if err == nil {
		r.Commit, err = parseSum(sum)
	}
	if err != nil {
		return r, fmt.Errorf("%q: %w", r.Name, err)
	}
	dict, err := what.At(2)
	if err != nil {
		return r, err
	}
	err = eachEntry(dict, func(key string, v gvariant.Value) error {
		var err error
		switch key {
		case "ostree.commit.timestamp", "ot.ts": // flatpak has the short one
			r.Timestamp, err = parseTime(v)
		case "ostree.commit.version":
			r.Version, err = v.String()
		default:
			if r.Other == nil {
				r.Other = gvariant.Dict{}
			}
			r.Other[key] = v
		}
		return err
	})
	if err != nil {
		return r, fmt.Errorf("%q: %w", r.Name, err)
	}
	return r, nil
}

func parseSum(v gvariant.Value) (sum [32]byte, err error) {
	if v.Type() != "ay" || len(v.Bytes()) != len(sum) {
		return sum, fmt.Errorf("%d bytes of type %s are no checksum", len(v.Bytes()), v.Type())
	}
	return [32]byte(v.Bytes()), nil
}

func parseCollections(v gvariant.Value) (map[string][]Ref, error) {
	if v.Type() != "a{sa(s(taya{sv}))}" {
		return nil, fmt.Errorf("type %s", v.Type())
	}
	all := map[string][]Ref{}
	err := eachEntry(v, func(key string, list gvariant.Value) (err error) {
		all[key], err = parseRefs(list)
		return err
	})
	return all, err
}

// Encode writes a summary.
func (s *Summary) Encode() ([]byte, error) {
	dict, err := s.about()
	if err != nil {
		return nil, err
	}
	refs, err := encodeRefs(s.Refs)
	if err != nil {
		return nil, err
	}
	v, err := gvariant.Encode(typ, gvariant.Tuple{refs, dict})
	return v.Bytes(), err
}

// about makes the dictionary.
func (s *Summary) about() (gvariant.Dict, error) {
	dict := gvariant.Dict{}
	maps.Copy(dict, s.Other)
	var failed error
	put := func(key, typ string, value any) {
		v, err := gvariant.Encode(typ, value)
		failed = errors.Join(failed, err)
		dict[key] = v
	}
	putTime := func(key string, t time.Time) {
		if !t.IsZero() {
			put(key, "t", bits.ReverseBytes64(uint64(t.Unix())))
		}
	}
	putTime("ostree.summary.last-modified", s.LastModified)
	putTime("ostree.summary.expires", s.Expires)
	if s.Mode != "" {
		put("ostree.summary.mode", "s", s.Mode)
	}
	put("ostree.summary.tombstone-commits", "b", s.Tombstones)
	put("ostree.summary.indexed-deltas", "b", s.IndexedDeltas)
	if s.Collection != "" {
		put("ostree.summary.collection-id", "s", s.Collection)
	}
	if len(s.Collections) > 0 {
		list := gvariant.List{}
		for _, name := range slices.Sorted(maps.Keys(s.Collections)) {
			refs, err := encodeRefs(s.Collections[name])
			failed = errors.Join(failed, err)
			list = append(list, gvariant.Tuple{name, refs})
		}
		put("ostree.summary.collection-map", "a{sa(s(taya{sv}))}", list)
	}
	if len(s.Deltas) > 0 {
		deltas, err := s.Deltas.Encode()
		failed = errors.Join(failed, err)
		dict[delta.DigestsKey] = deltas
	}
	return dict, failed
}

func encodeRefs(refs []Ref) (gvariant.List, error) {
	refs = slices.Clone(refs)
	slices.SortFunc(refs, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	list := gvariant.List{}
	for i, r := range refs {
		if err := CheckRef(r.Name); err != nil {
			return nil, err
		}
		if i > 0 && refs[i-1].Name == r.Name {
			return nil, fmt.Errorf("ref %q: it stands there twice", r.Name)
		}
		dict := gvariant.Dict{}
		maps.Copy(dict, r.Other)
		var err error
		if !r.Timestamp.IsZero() {
			dict["ostree.commit.timestamp"], err = gvariant.Encode("t", bits.ReverseBytes64(uint64(r.Timestamp.Unix())))
		}
		if err == nil && r.Version != "" {
			dict["ostree.commit.version"], err = gvariant.Encode("s", r.Version)
		}
		if err != nil {
			return nil, fmt.Errorf("ref %q: %w", r.Name, err)
		}
		list = append(list, gvariant.Tuple{r.Name, gvariant.Tuple{r.Size, r.Commit[:], dict}})
	}
	return list, nil
}
