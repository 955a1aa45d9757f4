package dumpfile

import (
	"bufio"
	"io"
	"strconv"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Style says whose dumpfile is written. Both are read the same way.
type Style int

const (
	// Cfsctl is that of composefs-rs (cfsctl create-dumpfile): directories have size 0, a hard link has only its path
	// and its target.
	Cfsctl Style = iota
	// InfoV0, InfoV1 and InfoV2 are those of the C tools (composefs-info dump) for an image of V0, V1 or V2: directories
	// have the size they take in the image, attributes the order of the image, a hard link repeats the fields of its
	// target. Whiteouts are left out of a V2, which has no way to tell them from those that hide the object store.
	InfoV0
	InfoV1
	InfoV2
)

// Write writes the tree, names in the order of fstree.Tree.Walk.
func Write(w io.Writer, t *fstree.Tree, s Style) error { return WriteSome(w, t, s, nil) }

// WriteSome is Write for some entries of the root directory only: those whose names keep wants. The root itself is written
// as it is in the whole tree.
func WriteSome(w io.Writer, t *fstree.Tree, s Style, keep func(name string) bool) error {
	out := bufio.NewWriterSize(w, 1<<16)
	first := map[*fstree.Inode]string{}
	xattrs := func(i *fstree.Inode) []fstree.Xattr { return i.Xattrs }
	if s != Cfsctl {
		xattrs = newImageOrder(t, s).xattrs
	}
	var line []byte
	err := t.Walk(func(path string, i *fstree.Inode) error {
		if top, _, _ := strings.Cut(path[1:], "/"); keep != nil && top != "" && !keep(top) || s == InfoV2 && isWhiteout(i) {
			return nil
		}
		target := first[i]
		if target == "" && (i.Nlink != 1 || s != Cfsctl) && i.Dir() == nil {
			first[i] = path
		}
		line = appendLine(line[:0], path, i, xattrs(i), target, s)
		_, err := out.Write(line)
		return err
	})
	if err != nil {
		return err
	}
	return out.Flush()
}

// AppendEntry appends the line that cfsctl writes for one file, under a path of the caller's choice. If linkTo is not "", it
// is that of a hard link to this path.
func AppendEntry(b []byte, path string, i *fstree.Inode, linkTo string) []byte {
	return appendLine(b, path, i, i.Xattrs, linkTo, Cfsctl)
}

func appendLine(b []byte, path string, i *fstree.Inode, xattrs []fstree.Xattr, linkTo string, s Style) []byte {
	b = appendEscaped(b, path, false)
	if linkTo != "" && s == Cfsctl {
		b = append(b, " 0 @120000 - - - - 0.0 "...)
		b = appendOptional(b, linkTo)
		return append(b, " - -\n"...)
	}
	size, nlink, rdev := i.Size(), i.Nlink, uint32(0)
	if dir := i.Dir(); dir != nil {
		nlink = 2
		for _, e := range dir.Entries {
			if e.Inode.Dir() != nil {
				nlink++
			}
		}
		if s != Cfsctl {
			size = imageSize(dir, path == "/" && s != InfoV2)
		}
	}
	payload, content, digest := "", "", ""
	switch c := i.Content.(type) {
	case fstree.Inline:
		content = string(c)
	case *fstree.Object:
		payload, digest = c.Payload(), c.Digest.String()
	case fstree.Symlink:
		payload = string(c)
	case fstree.Device:
		rdev = c.Rdev
	}
	b = append(b, ' ')
	b = strconv.AppendUint(b, size, 10)
	b = append(b, ' ')
	if linkTo != "" {
		b = append(b, '@')
		payload = linkTo
	}
	b = strconv.AppendUint(b, uint64(i.Mode()), 8)
	for _, n := range [...]uint32{nlink, i.UID, i.GID, rdev} {
		b = append(b, ' ')
		b = strconv.AppendUint(b, uint64(n), 10)
	}
	b = append(b, ' ')
	b = strconv.AppendInt(b, i.Mtime.Sec, 10)
	b = append(b, '.')
	b = strconv.AppendUint(b, uint64(i.Mtime.Nsec), 10)
	for _, field := range [...]string{payload, content, digest} {
		b = append(b, ' ')
		b = appendOptional(b, field)
	}
	for _, x := range xattrs {
		b = append(b, ' ')
		b = appendEscaped(b, x.Name, true)
		b = append(b, '=')
		b = appendEscaped(b, string(x.Value), true)
	}
	return append(b, '\n')
}

// AppendEscaped appends a string as the fields of a dumpfile have it.
func AppendEscaped(b []byte, s string) []byte { return appendEscaped(b, s, false) }

func appendOptional(b []byte, s string) []byte {
	switch s {
	case "":
		return append(b, '-')
	case "-":
		return append(b, `\x2d`...)
	}
	return appendEscaped(b, s, false)
}

func appendEscaped(b []byte, s string, equals bool) []byte {
	const digits = "0123456789abcdef"
	for k := range len(s) {
		switch c := s[k]; {
		case c == '\\':
			b = append(b, `\\`...)
		case c == '\n':
			b = append(b, `\n`...)
		case c == '\r':
			b = append(b, `\r`...)
		case c == '\t':
			b = append(b, `\t`...)
		case c <= ' ' || c >= 0x7f || c == '=' && equals:
			b = append(b, '\\', 'x', digits[c>>4], digits[c&15])
		default:
			b = append(b, c)
		}
	}
	return b
}
