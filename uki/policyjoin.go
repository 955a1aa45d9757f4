package uki

import (
	"crypto/rsa"
	"encoding/binary"
	"fmt"
	"slices"
)

// JoinPolicies lays out a UKI with signatures in its .pcrsig that were made elsewhere, for the policies that AddPolicies left
// unsigned; sections keep their places. A signature is for the policy that has the same to be signed, or the same digest and
// reference, and is checked if .pcrpkey has the policy's key. Signatures of the file no longer hold and are left out. It
// returns how many policies still have no signature.
func JoinPolicies(p *PE, signed Policies) (l *Layout, unsigned int, err error) {
	key, err := p.image().PolicyKey()
	if err != nil {
		return nil, 0, err
	}
	end := p.Size
	if c := p.CertificateTable; c.Size > 0 {
		if c.end() != p.Size {
			return nil, 0, fmt.Errorf("certificate table ends at %d, want the end of the file at %d", c.end(), p.Size)
		}
		end = int64(c.Offset)
	}
	head := slices.Clone(p.head)
	put := func(at int, v uint32) { binary.LittleEndian.PutUint32(head[at:], v) }
	var replaced []piece
	joined, memory := 0, int64(0)
	for k, h := range p.Sections {
		size := int64(h.VirtualSize)
		if h.Name == sectionPolicies {
			if int64(h.Raw.Offset) < int64(len(head)) || h.Raw.end() > end {
				return nil, 0, fmt.Errorf("section %s: its data from %d to %d is in the headers or the signatures", sectionPolicies, h.Raw.Offset, h.Raw.end())
			}
			s := p.section(k)
			policies, err := s.policies()
			if err != nil {
				return nil, 0, err
			}
			n, missing, err := policies.join(signed, key)
			if err != nil {
				return nil, 0, fmt.Errorf("section %s: %w", sectionPolicies, err)
			}
			joined, unsigned = joined+n, unsigned+missing
			text := policies.Text()
			room := (&layouter{stub: p}).room(h)
			if size = int64(len(text)); size > room {
				return nil, 0, fmt.Errorf("section %s: %d bytes, there is room for %d: build it with --policy-digest", sectionPolicies, size, room)
			}
			put(p.table+k*headerSize+8, uint32(size))
			replaced = append(replaced, piece{int64(h.Raw.Offset), h.Raw.end(), Text(text)})
		}
		memory = max(memory, int64(h.VirtualAddress)+size)
	}
	switch {
	case len(replaced) == 0:
		return nil, 0, fmt.Errorf("there is no %s: build the UKI with --policy-digest", sectionPolicies)
	case joined == 0:
		return nil, 0, fmt.Errorf("section %s: none of the signatures is for a policy in it", sectionPolicies)
	}
	put(p.optional+offSizeOfImage, uint32(alignUp(memory, int64(p.SectionAlignment))))
	check := p.optional + offCheckSum
	put(check, 0)
	if p.CertificateTable.Size > 0 {
		clear(head[p.security():][:8])
	}
	return &Layout{end, head, check, p.replace(head, replaced, end)}, unsigned, nil
}

// piece is new content for a part of a file, with zeros up to its end.
type piece struct {
	from, to int64
	content  Content
}

// replace returns what the file consists of when its head and other parts are replaced.
func (p *PE) replace(head []byte, replaced []piece, end int64) []Content {
	slices.SortFunc(replaced, func(a, b piece) int { return int(a.from - b.from) })
	l := &layouter{stub: p}
	l.add(Bytes(head))
	for _, r := range replaced {
		l.copy(l.end, r.from)
		l.add(r.content)
		l.pad(r.to)
	}
	l.copy(l.end, end)
	return l.pieces
}

// join puts signatures into the policies that they are for. It returns how many, and how many policies still have none.
func (p Policies) join(signed Policies, key *rsa.PublicKey) (joined, missing int, err error) {
	for _, b := range p {
		for k := range b.Policies {
			policy := &b.Policies[k]
			for _, from := range signed.of(b.Bank) {
				if !policy.sameAs(from) {
					continue
				}
				if from.Signature == "" {
					return 0, 0, fmt.Errorf("bank %s: policy %s: the one to be joined is not signed", b.Bank, policy.Digest)
				}
				policy.Signature = from.Signature
				if policy.isOf(key) {
					if err := policy.verify(key); err != nil {
						return 0, 0, fmt.Errorf("bank %s: policy %s: %w with the key in .pcrpkey", b.Bank, policy.Digest, err)
					}
				}
				joined++
			}
			if policy.Signature == "" {
				missing++
			}
		}
	}
	return joined, missing, nil
}

// of returns the policies of a bank.
func (p Policies) of(bank Bank) []Policy {
	for _, b := range p {
		if b.Bank == bank {
			return b.Policies
		}
	}
	return nil
}

// sameAs tells whether the same is signed.
func (p Policy) sameAs(other Policy) bool {
	if p.ToSign != "" && other.ToSign != "" {
		return p.ToSign == other.ToSign
	}
	return p.Digest == other.Digest && p.Ref == other.Ref
}
