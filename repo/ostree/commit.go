package ostree

import (
	"errors"
	"fmt"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

const commitType = "(a{sv}aya(say)sstayay)"

// Commit is a parsed commit object.
type Commit struct {
	Metadata gvariant.Value // a{sv}; the zero Value is an empty one
	Parent   Checksum       // zero: none
	Related  gvariant.Value // a(say), which nobody uses; the zero Value is an empty one
	Subject  string
	Body     string
	Time     uint64 // seconds since 1970
	RootTree Checksum
	RootMeta Checksum
}

// ParseCommit parses a commit object.
func ParseCommit(data []byte) (*Commit, error) {
	c, err := parseCommit(data)
	if err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	return c, nil
}

func parseCommit(data []byte) (*Commit, error) {
	v, err := gvariant.New(commitType, data)
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
	c := &Commit{Metadata: m[0], Related: m[2]}
	if len(m[1].Bytes()) > 0 {
		if c.Parent, err = checksumOf(m[1]); err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
	}
	if c.Subject, err = m[3].String(); err != nil {
		return nil, err
	}
	if c.Body, err = m[4].String(); err != nil {
		return nil, err
	}
	if c.Time, err = m[5].BigUint64(); err != nil {
		return nil, err
	}
	if c.RootTree, err = checksumOf(m[6]); err != nil {
		return nil, fmt.Errorf("root tree: %w", err)
	}
	if c.RootMeta, err = checksumOf(m[7]); err != nil {
		return nil, fmt.Errorf("root metadata: %w", err)
	}
	return c, nil
}

// Encode returns the commit object. Its checksum is the commit's.
func (c *Commit) Encode() ([]byte, error) {
	var metadata, related any = c.Metadata, c.Related
	if c.Metadata.Type() == "" {
		metadata = gvariant.Dict{}
	}
	if c.Related.Type() == "" {
		related = gvariant.List{}
	}
	parent := []byte{}
	if !c.Parent.IsZero() {
		parent = c.Parent[:]
	}
	v, err := gvariant.Encode(commitType, gvariant.Tuple{metadata, parent, related, c.Subject, c.Body, big64(c.Time), c.RootTree[:], c.RootMeta[:]})
	if err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	return v.Bytes(), nil
}

// When returns the time of the commit.
func (c *Commit) When() time.Time { return time.Unix(int64(min(c.Time, 1<<40)), 0).UTC() }

// Text returns a value of the metadata that is a string, "" if there is none.
func (c *Commit) Text(key string) string {
	if v, ok, err := c.Metadata.Lookup(key); ok && err == nil {
		if s, err := v.String(); err == nil {
			return s
		}
	}
	return ""
}

// members returns the members of a tuple.
func members(v gvariant.Value) ([]gvariant.Value, error) {
	n, err := v.Len()
	if err != nil {
		return nil, err
	}
	list := make([]gvariant.Value, n)
	for i := range list {
		if list[i], err = v.At(i); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// checksumOf reads an ay of 32 bytes.
func checksumOf(v gvariant.Value) (c Checksum, err error) {
	if len(v.Bytes()) != len(c) {
		return c, fmt.Errorf("a checksum of %d bytes: want %d", len(v.Bytes()), len(c))
	}
	copy(c[:], v.Bytes())
	if c.IsZero() {
		return c, errors.New("a checksum of zeros")
	}
	return c, nil
}
