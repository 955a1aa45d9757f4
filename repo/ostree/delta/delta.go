// Package delta reads and writes OSTree's static deltas: what makes the objects of one commit, out of nothing or out of those of another
// commit, in one or a few files.
//
// A delta is a superblock and parts. In a repository it is a directory, named by both checksums or by that of the target alone, in base64
// without padding and with "_" for "/"; the first two characters are a directory of their own:
//
//	deltas/FF/FF...-TTTT...   superblock, 0, 1, 2...
//	delta-indexes/TT/TTT....index   the deltas that lead to a commit, see [Index]
//
// A file by itself is a superblock with the parts inside. All of it is GVariant; numbers are big endian, but see below.
//
//	superblock   (a{sv} t ay ay COMMIT ay a(uayttay) a(yaytt))
//	             metadata, time of making, from (or empty), to, the commit object of to, deltas to apply before (always empty), parts,
//	             fallbacks
//	signed       (t ay a{sv}): "OSTSGNDT", a superblock, signatures of its bytes by "ostree.sign.TYPE"
//	part entry   version 0, SHA-256 of the part, its size, size of what it makes, objects: kind (1 byte) and checksum (32 bytes) of each
//	fallback     kind, checksum, compressed size, size of an object that is not in the parts and has to be fetched by itself
//	metadata     "ostree.endianness": y 'l' or 'B'; "deltas/.../N": (yay) part N; "deltas/.../commitmeta": a{sv} detached metadata of to;
//	             and what who makes the delta adds
//	part         (y ay): 0 or 'x' (a .xz file), payload
//	payload      (a(uuu) aa(ayay) ay ay): modes (uid, gid, mode), extended attributes, blob, operations
//
// The version, the sizes of parts and those of fallbacks have the byte order of the machine that made the delta; that is what
// ostree.endianness tells. It is missing in deltas of before 2016: then sizes that cannot be are taken for sizes in the other order.
//
// Operations are a byte and its operands, which are varints: 7 bits in each byte, the lowest first, the highest bit says that more come.
//
//	S  splice        size offset (metadata), mode xattrs size offset (files): the next object is this range of the blob
//	o  open          mode xattrs size: the next object is a file of this size, made by what follows
//	w  write         size offset: a range of the blob, or of the source if one is set
//	r  set source    offset: where in the blob is the checksum of a file object, of the commit from
//	R  unset source
//	B  patch         offset size: the whole file is the source patched with this range of the blob, see bspatch.go
//	c  close         the file is complete; no source is set any more
//
// The content of a symbolic link is its target. Objects are made in the order of the part's entry, and parts do not depend on each other.
//
// [Open] reads a superblock, [Delta.Apply] makes the objects and gives them to a [Store], [Generate] makes a delta of what is in a
// repository.
//
// Nothing in a delta is trusted. The store checks each object against its checksum; a part has its checksum and does not make more than
// it says; what is large lies in a file and streams. A patch is never held in memory, nor is the file that it makes.
//
// The format is that of ostree (ostree-repo-static-delta-private.h).
package delta

import (
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// known reports whether objects of this kind can be in a delta.
func known(k ostree.Kind) bool { return k >= ostree.KindFile && k <= ostree.KindCommit }

// Name names a delta by the commits that it is between. From is zero if it needs none.
type Name struct{ From, To ostree.Checksum }

// String returns the name as users and summaries write it: TO, or FROM-TO, in hex.
func (n Name) String() string {
	if n.From.IsZero() {
		return n.To.String()
	}
	return n.From.String() + "-" + n.To.String()
}

// ParseName reads what String writes.
func ParseName(s string) (n Name, err error) {
	from, to, two := strings.Cut(s, "-")
	if !two {
		from, to = "", from
	}
	if n.To, err = ostree.ParseChecksum(to); err == nil && two {
		n.From, err = ostree.ParseChecksum(from)
	}
	if err != nil {
		return Name{}, fmt.Errorf("delta %.140q: no name of a delta: want TO or FROM-TO, checksums of commits", s)
	}
	return n, nil
}

// alphabet is base64 with a sign for "/" that file names can have.
var alphabet = base64.NewEncoding("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+_").WithPadding(base64.NoPadding).Strict()

// Path returns the directory of the delta in a repository, "deltas/XX/...".
func (n Name) Path() string {
	s := alphabet.EncodeToString(n.To[:])
	if !n.From.IsZero() {
		s = alphabet.EncodeToString(n.From[:]) + "-" + s
	}
	return "deltas/" + s[:2] + "/" + s[2:]
}

// ParsePath returns the name of the delta that is in this directory of a repository.
func ParsePath(path string) (Name, error) {
	fail := fmt.Errorf("delta %.140q: no directory of a delta", path)
	dir, base, ok := strings.Cut(strings.TrimPrefix(path, "deltas/"), "/")
	if !ok || len(dir) != 2 || !strings.HasPrefix(path, "deltas/") {
		return Name{}, fail
	}
	from, to, two := strings.Cut(dir+base, "-")
	if !two {
		from, to = "", from
	}
	var n Name
	if k, err := alphabet.Decode(n.To[:], []byte(to[:min(43, len(to))])); err != nil || k != 32 || len(to) != 43 {
		return Name{}, fail
	}
	if k, err := alphabet.Decode(n.From[:], []byte(from[:min(43, len(from))])); two && (err != nil || k != 32 || len(from) != 43) {
		return Name{}, fail
	}
	return n, nil
}
