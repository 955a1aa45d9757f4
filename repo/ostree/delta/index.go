package delta

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// DigestsKey is the key of the digests of deltas, in a summary and in an index.
const DigestsKey = "ostree.static-deltas"

// Digests are SHA-256 of the superblock files of deltas.
type Digests map[Name]ostree.Checksum

// Encode returns the digests as an a{sv}, sorted by name: "FROM-TO" or "TO" has an ay.
func (d Digests) Encode() (gvariant.Value, error) {
	byName := gvariant.Dict{}
	for name, sum := range d {
		v, err := gvariant.Encode("ay", sum[:])
		if err != nil {
			return v, err
		}
		byName[name.String()] = v
	}
	return gvariant.Encode("a{sv}", byName)
}

// ParseDigests reads what Encode writes.
func ParseDigests(v gvariant.Value) (Digests, error) {
	n, err := v.Len()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", DigestsKey, err)
	}
	d := Digests{}
	for i := range n {
		key, sum, err := v.Entry(i)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", DigestsKey, err)
		}
		name, err := ParseName(key)
		if err == nil && (sum.Type() != "ay" || len(sum.Bytes()) != len(ostree.Checksum{})) {
			err = fmt.Errorf("delta %s: a digest %s of %d bytes", name, sum.Type(), len(sum.Bytes()))
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", DigestsKey, err)
		}
		d[name] = ostree.Checksum(sum.Bytes())
	}
	return d, nil
}

// Names returns the names, those that need no commit first.
func (d Digests) Names() []Name {
	return slices.SortedFunc(maps.Keys(d), func(a, b Name) int {
		if c := bytes.Compare(a.From[:], b.From[:]); c != 0 {
			return c
		}
		return bytes.Compare(a.To[:], b.To[:])
	})
}

// IndexPath returns where a repository tells of the deltas that lead to a commit.
func IndexPath(to ostree.Checksum) string {
	s := alphabet.EncodeToString(to[:])
	return "delta-indexes/" + s[:2] + "/" + s[2:] + ".index"
}

// Index returns the content of such a file: an a{sv} that has the digests under their key.
func (d Digests) Index() ([]byte, error) {
	v, err := d.Encode()
	if err != nil {
		return nil, err
	}
	v, err = gvariant.Encode("a{sv}", gvariant.Dict{DigestsKey: v})
	return v.Bytes(), err
}

// ParseIndex reads what Index writes.
func ParseIndex(b []byte) (Digests, error) {
	v, err := gvariant.New("a{sv}", b)
	if err != nil {
		return nil, fmt.Errorf("index of deltas: %w", err)
	}
	v, ok, err := v.Lookup(DigestsKey)
	switch {
	case err != nil:
		return nil, fmt.Errorf("index of deltas: %w", err)
	case !ok:
		return Digests{}, nil
	case v.Type() != "a{sv}":
		return nil, fmt.Errorf("index of deltas: %s is of type %s", DigestsKey, v.Type())
	}
	return ParseDigests(v)
}
