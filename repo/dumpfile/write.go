package dumpfile

import (
	"bufio"
	"io"
	"strconv"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Style says whose dumpfile is written. Both are read the same way.
type Style int

const (
	// Cfsctl is that of composefs-rs (cfsctl create-dumpfile): directories have size 0, a hard link has only its path
	// and its target.
	Cfsctl Style = iota
	// ComposefsInfo is that of the C tools (composefs-info dump): directories have the size they take in an image of
	// V0 or V1, a hard link repeats the fields of its target.
	ComposefsInfo
)

// Write writes the tree, names in the order of fstree.Tree.Walk.
func Write(w io.Writer, t *fstree.Tree, s Style) error {
	out := bufio.NewWriterSize(w, 1<<16)
	first := map[*fstree.Inode]string{}
	var line []byte
	err := t.Walk(func(path string, i *fstree.Inode) error {
		target := first[i]
		if target == "" && i.Nlink != 1 && i.Dir() == nil {
			first[i] = path
		}
		line = appendLine(line[:0], path, i, target, s)
		_, err := out.Write(line)
		return err
	})
	if err != nil {
		return err
	}
	return out.Flush()
}

// AppendEntry appends the line of one file, under a path of the caller's choice, with its newline.
func AppendEntry(b []byte, path string, i *fstree.Inode, s Style) []byte {
	return appendLine(b, path, i, "", s)
}

func appendLine(b []byte, path string, i *fstree.Inode, linkTo string, s Style) []byte {
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
		if s == ComposefsInfo {
			size = imageSize(dir, path == "/")
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
	for _, x := range i.Xattrs {
		b = append(b, ' ')
		b = appendEscaped(b, x.Name, true)
		b = append(b, '=')
		b = appendEscaped(b, string(x.Value), true)
	}
	return append(b, '\n')
}

// imageSize returns the size of a directory in an image of V0 or V1: entries of 12 bytes and a name, packed into blocks of
// 4096, the last one cut off where it ends if it is at most half full.
func imageSize(dir *fstree.Directory, root bool) uint64 {
	names := append([]fstree.Entry{{Name: "."}, {Name: ".."}}, dir.Entries...)
	if root {
		names = withHidden(names, dir)
	}
	// The order decides where blocks end.
	d := &fstree.Directory{}
	for _, e := range names {
		d.Set(e.Name, e.Inode)
	}
	var blocks, used uint64
	for _, e := range d.Entries {
		n := uint64(12 + len(e.Name))
		if used+n > 4096 {
			blocks, used = blocks+1, 0
		}
		used += n
	}
	if used > 2048 {
		blocks, used = blocks+1, 0
	}
	return blocks*4096 + used
}

// withHidden adds the names 00 to ff, which the root directory of an image always has.
func withHidden(names []fstree.Entry, dir *fstree.Directory) []fstree.Entry {
	const digits = "0123456789abcdef"
	for k := range 256 {
		if name := string([]byte{digits[k>>4], digits[k&15]}); dir.Lookup(name) == nil {
			names = append(names, fstree.Entry{Name: name})
		}
	}
	return names
}

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
