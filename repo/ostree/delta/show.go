package delta

import (
	"context"
	"fmt"
	"io"

	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
)

// Operations counts those of a part.
type Operations struct {
	Splice      int `json:"splice"`
	Open        int `json:"open"`
	Write       int `json:"write"`
	SetSource   int `json:"set_source"`
	UnsetSource int `json:"unset_source"`
	Patch       int `json:"patch"`
	Close       int `json:"close"`
}

func (o *Operations) add(op byte) {
	switch op {
	case opSplice:
		o.Splice++
	case opOpen:
		o.Open++
	case opWrite:
		o.Write++
	case opSetSource:
		o.SetSource++
	case opUnsetSource:
		o.UnsetSource++
	case opPatch:
		o.Patch++
	case opClose:
		o.Close++
	}
}

// Count reads a part and its operations, compares it with its checksum, and makes nothing.
func (d *Delta) Count(ctx context.Context, i int, open func(context.Context, int) (io.ReadCloser, error)) (Operations, error) {
	p, err := d.loadPart(ctx, open, i)
	if err == nil {
		defer p.Close()
		m := newMachine(p, &d.Parts[i], nil)
		for err == nil {
			_, _, err = m.next()
		}
		if err == io.EOF {
			return m.counts, nil
		}
	}
	return Operations{}, fmt.Errorf("delta %s: part %d: %w", d.Name, i, err)
}

// Signers returns who has signed the commit, or the superblock that it is in, of those that are trusted.
func (d *Delta) Signers(trusted sign.Policy) ([]string, error) {
	s, err := signatures(d.CommitMeta)
	if err != nil {
		return nil, err
	}
	who, err := trusted.Verify(d.Commit, s)
	if err == nil || d.Signed == nil {
		return who, err
	}
	if s, err = signatures(d.Signatures); err != nil {
		return nil, err
	}
	b, err := load(d.Signed, 0, d.Signed.Size(), maxSigned)
	if err != nil {
		return nil, err
	}
	return trusted.Verify(b, s)
}

// maxSigned limits a superblock whose signature is verified, in bytes: it is in memory for that.
const maxSigned = 1 << 30

func signatures(dictionary []byte) (sign.Signatures, error) {
	if dictionary == nil {
		return nil, nil
	}
	return sign.Parse(dictionary)
}
