// Package ostree keeps OSTree commits in a repository, and makes composefs images of them.
//
// An OSTree repository has objects, named by SHA-256. A commit names a tree and its parent; a dirtree lists the files and directories
// of one directory, a dirmeta has a directory's metadata, a content object is a file: its metadata and its content, hashed together.
// They are GVariants (repo/ostree/gvariant), in which most numbers are big endian:
//
//	commit   (a{sv}aya(say)sstayay)  metadata, parent, related objects, subject, body, time, root dirtree, root dirmeta
//	dirtree  (a(say)a(sayay))        files: name, content object; directories: name, dirtree, dirmeta; each sorted by name
//	dirmeta  (uuua(ayay))            uid, gid, mode, extended attributes
//	file     u32 big endian: size of the header, 4 zeros, header, content; header:
//	         (uuuusa(ayay))          uid, gid, mode, 0, target of a symbolic link, extended attributes
//
// A file's name is not part of it, and there are no times: files that are alike are one object, and become hard links of each other
// here. How a repository keeps content objects is its mode: compressed with the size in the header (archive, for web servers), or as
// files that can be linked into place (bare and its kin), see [Local].
//
// # How commits are kept here
//
//	streams/refs/ostree/REF         -> ostree-commit-CHECKSUM     % and / of the ref are written %25 and %2F
//	streams/ostree-commit-CHECKSUM  all objects of the commit in one splitstream, see [Objects]; "composefs.image" -> image
//
// This is the form of composefs-rs 0.9: either program reads, checks and extends what the other has written. See stream.go for the
// bytes. Commits share the contents of files, which are objects of the repository. "composefs.image" is the plain image in the
// repository's format, "composefs.image.v1", ".v2" and "composefs.image.boot.v1", ".boot.v2" are those of that format; the ones
// with boot are to be booted: /usr/etc is /etc there. "parent:CHECKSUM" leads to the commit before it if more than one was asked for.
//
// composefs-rs 0.9.4 takes the names of extended attributes with the NUL that ends them in OSTree. The plain images have them so, too,
// since an image is known by its digest; the kernel does not find attributes by such names. Images to boot have the right names.
//
// # How they come here
//
// [Pull] brings commits from a [Source]: a repository on this machine of any mode, or a web server. Every object is checked against
// its checksum while it comes. Several are on their way at a time. What other commits have, the parent, the one that the ref led to until
// now, is not fetched again. A journal beside the repository tells which objects a pull has brought that did not end; the next one
// goes on from there. Nothing is named before it is complete and durable.
//
// # How others are made
//
// [Compose] makes a commit of any tree: the one that ostree commit makes of the same tree and the same description, bit for bit. OSTree
// holds directories, regular files and symbolic links, with owner, mode and extended attributes, and names in UTF-8. It has no times: they
// are lost. Files that are alike become one. Extended attributes without a value are left out, since ostree does not see them. Devices,
// pipes and sockets are an error. [Store] keeps the commit as a pull would. Package publish writes commits into OSTree repositories.
//
// # Trust
//
// All that comes from a source is untrusted: sizes are limited, names must be names of files, and a checksum that does not fit ends
// the pull. That a commit is the right one is for the caller to know, by its checksum or its signature.
package ostree

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// Errors that callers decide on.
var (
	// ErrNotFound: a source has no such object or ref.
	ErrNotFound = errors.New("not found")
	// ErrChecksum: an object's content is not what its name says.
	ErrChecksum = errors.New("the content has another checksum")
)

// MaxMetadata limits a commit, dirtree, dirmeta or detached metadata, in bytes, as OSTree does.
const MaxMetadata = 128 << 20

// Checksum is the SHA-256 by which an object is known.
type Checksum [sha256.Size]byte

// ParseChecksum reads 64 hexadecimal digits.
func ParseChecksum(s string) (Checksum, error) {
	var c Checksum
	if !IsChecksum(s) {
		return c, fmt.Errorf("%.100q is not a checksum: want 64 hexadecimal digits", s)
	}
	_, err := hex.Decode(c[:], []byte(s))
	return c, err
}

// IsChecksum reports whether a string is 64 hexadecimal digits, in lower case, and so names a commit and not a ref.
func IsChecksum(s string) bool { return len(s) == 2*sha256.Size && isHex(s) }

func isHex(s string) bool { return s != "" && strings.Trim(s, "0123456789abcdef") == "" }

func (c Checksum) String() string { return hex.EncodeToString(c[:]) }

// IsZero reports whether there is no checksum.
func (c Checksum) IsZero() bool { return c == Checksum{} }

// MarshalText returns the hexadecimal digits.
func (c Checksum) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// Kind is the type of an object.
type Kind int

// The kinds of objects, with the numbers that OSTree gives them.
const (
	KindFile    Kind = 1
	KindDirTree Kind = 2
	KindDirMeta Kind = 3
	KindCommit  Kind = 4
	// KindCommitMeta is detached metadata, signatures for example: not checked, and named by the commit it belongs to.
	KindCommitMeta Kind = 6
)

var kindNames = map[Kind]string{KindFile: "file", KindDirTree: "dirtree", KindDirMeta: "dirmeta", KindCommit: "commit",
	KindCommitMeta: "commitmeta"}

func (k Kind) String() string { return kindNames[k] }

// ObjectName names an object.
type ObjectName struct {
	Checksum Checksum
	Kind     Kind
}

// String is the name as OSTree prints it: "CHECKSUM.dirtree".
func (n ObjectName) String() string { return n.Checksum.String() + "." + n.Kind.String() }

// Path returns the path of the object below a repository: "objects/xx/yyy.dirtree". In the archive mode, content objects end with z.
func (n ObjectName) Path(archive bool) string {
	digits := n.Checksum.String()
	path := "objects/" + digits[:2] + "/" + digits[2:] + "." + n.Kind.String()
	if archive && n.Kind == KindFile {
		path += "z"
	}
	return path
}

// Verify tells whether a commit, dirtree or dirmeta has its checksum. Detached metadata has none.
func (n ObjectName) Verify(data []byte) error {
	if got := Checksum(sha256.Sum256(data)); got != n.Checksum && n.Kind != KindCommitMeta {
		return fmt.Errorf("object %v: %w: %v", n, ErrChecksum, got)
	}
	return nil
}
