// Package dumpfile reads and writes file trees as composefs dumpfiles.
//
// A dumpfile has one line for each name of the tree, a directory before what is in it. A line has eleven fields,
// separated by single spaces, and then any number of extended attributes:
//
//	PATH SIZE MODE NLINK UID GID RDEV MTIME PAYLOAD CONTENT DIGEST [KEY=VALUE]...
//
// Numbers are decimal, MODE (file type and permissions) is octal, MTIME is seconds, a dot, nanoseconds. PAYLOAD is the
// target of a symlink, or the path of a regular file's object. CONTENT is that of a file kept in the image. DIGEST is
// the fs-verity digest of the object in hexadecimal. "-" stands for a field that is not there. A MODE that begins with "@"
// is that of a hard link: PAYLOAD is the path of another line, and the other fields do not count. Bytes that are not
// printable, blanks, backslashes and, in attributes, "=" are escaped: \\ \n \r \t \xHH.
//
// The format is defined by composefs-dump(5) and by what the tools of composefs and composefs-rs read and write. They
// write some fields differently, see [Style].
package dumpfile

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Limits of a line.
const (
	maxLine   = 1 << 20 // bytes
	maxInline = 5000    // bytes of content
	maxXattrs = 65535   // bytes of all attributes as written
	maxPath   = 4096    // bytes, unescaped
)

const (
	fieldPath = iota
	fieldSize
	fieldMode
	fieldNlink
	fieldUID
	fieldGID
	fieldRdev
	fieldMtime
	fieldPayload
	fieldContent
	fieldDigest
	fieldCount
)

var fieldNames = [...]string{"PATH", "SIZE", "MODE", "NLINK", "UID", "GID", "RDEV", "MTIME", "PAYLOAD", "CONTENT", "DIGEST"}

// Read reads a dumpfile to its end. Errors name the line, counted from 1, and the field. A file larger than 0 bytes that
// has neither content nor payload nor digest is read as an object without a name. Memory grows with the tree alone.
func Read(r io.Reader) (*fstree.Tree, error) { return ReadWith(r, Options{}) }

// Options says how a dumpfile is read.
type Options struct {
	// Strict refuses what is let pass otherwise because people write it: the last line must end with a newline, the SIZE
	// of a symlink must be that of its target, a symlink has no CONTENT, and what is no device has RDEV 0. With the C tools
	// it is the environment variable CFS_PARSE_STRICT that asks for it.
	Strict bool
	// Homes fills fstree.Tree.Home: the path of the line that a hard link leads to. mkcomposefs goes by it.
	Homes bool
}

// ReadWith is Read with options.
func ReadWith(r io.Reader, o Options) (*fstree.Tree, error) {
	p := parser{strict: o.Strict, xattrs: map[string][]fstree.Xattr{}}
	if o.Homes {
		p.homes = map[*fstree.Inode]string{}
	}
	in := bufio.NewReaderSize(r, 1<<16)
	for number := 1; ; number++ {
		line, err := readLine(in)
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("dumpfile: line %d: %w", number, err)
		}
		if err == io.EOF && len(line) == 0 {
			break
		}
		if err == io.EOF && o.Strict {
			return nil, fmt.Errorf("dumpfile: line %d: no newline at its end", number)
		}
		if err := p.line(line); err != nil {
			return nil, fmt.Errorf("dumpfile: line %d: %w", number, err)
		}
	}
	if p.root == nil {
		return nil, errors.New("dumpfile: no line for the root directory")
	}
	if err := p.resolveLinks(); err != nil {
		return nil, fmt.Errorf("dumpfile: %w", err)
	}
	return &fstree.Tree{Root: p.root, Home: p.homes}, nil
}

// readLine returns the next line without its newline; io.EOF comes with the last one, if that has no newline.
func readLine(in *bufio.Reader) ([]byte, error) {
	line, err := in.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		whole := append([]byte(nil), line...)
		for err == bufio.ErrBufferFull {
			line, err = in.ReadSlice('\n')
			if whole = append(whole, line...); len(whole) > maxLine {
				return nil, fmt.Errorf("longer than %d bytes", maxLine)
			}
		}
		line = whole
	}
	return bytes.TrimSuffix(line, []byte("\n")), err
}

type parser struct {
	strict  bool
	homes   map[*fstree.Inode]string
	root    *fstree.Inode
	links   []link
	dir     *fstree.Directory // where the last line put its name: mostly it is the parent of the next one, too
	dirPath []byte
	scratch []byte
	texts   []byte                    // for names: many in one allocation
	xattrs  map[string][]fstree.Xattr // what occurs again and again, by how it is written
	inodes  []fstree.Inode            // not used yet, allocated many at a time
	objects []fstree.Object
}

// link is a name that is to point to the inode of another name.
type link struct {
	dir    *fstree.Directory
	name   string
	path   string
	target string
	inode  *fstree.Inode // what the name points to until then
}

func (p *parser) line(line []byte) error {
	if bytes.IndexByte(line, 0) >= 0 {
		return errors.New("a NUL byte")
	}
	var fields [fieldCount][]byte
	rest := line
	for k := range fields {
		var found bool
		if fields[k], rest, found = bytes.Cut(rest, []byte(" ")); !found && k < fieldCount-1 {
			return fmt.Errorf("only %d of %d fields", k+1, int(fieldCount))
		}
	}
	path, err := p.unescape(fields[fieldPath])
	if err != nil {
		return inField(fieldPath, err)
	}
	mode, isLink := bytes.CutPrefix(fields[fieldMode], []byte("@"))
	if isLink {
		return p.addLink(path, mode, fields[fieldPayload])
	}
	inode := p.newInode()
	dir, name, err := p.place(path)
	if err != nil {
		return inField(fieldPath, err)
	}
	if err := p.inode(inode, &fields, rest); err != nil {
		return err
	}
	if dir == nil {
		if inode.Dir() == nil {
			return inField(fieldMode, errors.New("the root is not a directory"))
		}
		p.root = inode
		return nil
	}
	dir.Set(name, inode)
	return nil
}

func inField(k int, err error) error { return fmt.Errorf("%s: %w", fieldNames[k], err) }

func (p *parser) newInode() *fstree.Inode {
	if len(p.inodes) == 0 {
		p.inodes = make([]fstree.Inode, 128)
	}
	i := &p.inodes[0]
	p.inodes = p.inodes[1:]
	return i
}

func (p *parser) newObject() *fstree.Object {
	if len(p.objects) == 0 {
		p.objects = make([]fstree.Object, 128)
	}
	o := &p.objects[0]
	p.objects = p.objects[1:]
	return o
}

// text returns a string of these bytes, which shares its memory with others.
func (p *parser) text(b []byte) string {
	if cap(p.texts)-len(p.texts) < len(b) {
		p.texts = make([]byte, 0, max(1<<14, len(b)))
	}
	start := len(p.texts)
	p.texts = append(p.texts, b...)
	return unsafe.String(unsafe.SliceData(p.texts[start:]), len(b)) // these bytes are never written again
}

// place finds the directory and the name of a path; the directory is nil for the root.
func (p *parser) place(path []byte) (*fstree.Directory, string, error) {
	if len(path) == 0 || path[0] != '/' || len(path) > maxPath {
		return nil, "", fmt.Errorf("%.80q: want an absolute path of at most %d bytes", path, maxPath)
	}
	if len(path) == 1 {
		if p.root != nil {
			return nil, "", errors.New("a second root directory")
		}
		return nil, "", nil
	}
	if p.root == nil {
		return nil, "", errors.New("the first line is not that of the root directory")
	}
	slash := bytes.LastIndexByte(path, '/')
	parent, name := path[:slash], p.text(path[slash+1:])
	if err := fstree.CheckName(name); err != nil {
		return nil, "", fmt.Errorf("%.80q: %w", path, err)
	}
	if p.dir == nil || !bytes.Equal(parent, p.dirPath) {
		inode := (&fstree.Tree{Root: p.root}).Lookup(string(parent))
		if inode == nil || inode.Dir() == nil || bytes.Contains(parent, []byte("//")) {
			return nil, "", fmt.Errorf("%.80q: no directory %.80q before it", path, parent)
		}
		p.dir, p.dirPath = inode.Dir(), append(p.dirPath[:0], parent...)
	}
	if n := len(p.dir.Entries); n > 0 && p.dir.Entries[n-1].Name >= name && p.dir.Lookup(name) != nil {
		return nil, "", fmt.Errorf("%.80q: there already", path)
	}
	return p.dir, name, nil
}

// inode fills an inode from the fields of a line and the attributes that follow them.
func (p *parser) inode(i *fstree.Inode, fields *[fieldCount][]byte, xattrs []byte) error {
	var err error
	number := func(k, base, bits int) uint64 {
		n, e := parseUint(fields[k], base, bits)
		if e != nil && err == nil {
			err = inField(k, e)
		}
		return n
	}
	size := number(fieldSize, 10, 64)
	mode := uint32(number(fieldMode, 8, 32))
	i.Nlink = uint32(number(fieldNlink, 10, 32))
	i.UID = uint32(number(fieldUID, 10, 32))
	i.GID = uint32(number(fieldGID, 10, 32))
	rdev := uint32(number(fieldRdev, 10, 32))
	if err != nil {
		return err
	}
	if i.Mtime, err = parseTime(fields[fieldMtime]); err != nil {
		return inField(fieldMtime, err)
	}
	if err := p.unused(mode, size, fields); err != nil {
		return err
	}
	i.Perm = mode & 0o7777
	switch mode &^ 0o7777 {
	case fstree.TypeDir:
		i.Content = &fstree.Directory{}
	case fstree.TypeRegular:
		if i.Content, err = p.regular(size, fields); err != nil {
			return err
		}
	case fstree.TypeSymlink:
		target, err := p.unescape(fields[fieldPayload])
		if err != nil {
			return inField(fieldPayload, err)
		}
		if string(fields[fieldPayload]) == "-" || len(target) == 0 || len(target) > fstree.MaxSymlink ||
			bytes.IndexByte(target, 0) >= 0 {
			return inField(fieldPayload, fmt.Errorf("symlink target %.80q: want 1 to %d bytes and no NUL",
				target, fstree.MaxSymlink))
		}
		if p.strict && size != uint64(len(target)) {
			return inField(fieldSize, fmt.Errorf("%d, but the symlink's target has %d bytes", size, len(target)))
		}
		i.Content = fstree.Symlink(target)
	case fstree.TypeBlock, fstree.TypeChar:
		i.Content = fstree.Device{Block: mode&fstree.TypeMask == fstree.TypeBlock, Rdev: rdev}
	case fstree.TypeFifo:
		i.Content = fstree.Fifo{}
	case fstree.TypeSocket:
		i.Content = fstree.Socket{}
	default:
		return inField(fieldMode, fmt.Errorf("%o: no file type that there is", mode))
	}
	i.Xattrs, err = p.attributes(xattrs)
	return err
}

// unused checks the fields that do not count for a file of this type: they must be readable all the same, and not say
// something that nothing would come of.
func (p *parser) unused(mode uint32, size uint64, fields *[fieldCount][]byte) error {
	for _, k := range [...]int{fieldPayload, fieldContent, fieldDigest} {
		if _, err := p.unescape(fields[k]); err != nil {
			return inField(k, err)
		}
	}
	kind := mode & fstree.TypeMask
	hasContent := string(fields[fieldContent]) != "-"
	switch kind {
	case fstree.TypeRegular:
		hasContent = false // and read later
	case fstree.TypeSymlink:
		// It is let pass if its size is right.
		content, _ := p.unescape(fields[fieldContent])
		hasContent = hasContent && (uint64(len(content)) != size || p.strict && size > 0)
	case fstree.TypeBlock, fstree.TypeChar, fstree.TypeFifo, fstree.TypeSocket:
		if size != 0 {
			return inField(fieldSize, fmt.Errorf("%d: neither a regular file nor a directory nor a symlink", size))
		}
	}
	if hasContent {
		return inField(fieldContent, errors.New("only a regular file has content"))
	}
	if rdev := fields[fieldRdev]; p.strict && kind != fstree.TypeBlock && kind != fstree.TypeChar && string(rdev) != "0" {
		return inField(fieldRdev, fmt.Errorf("%.40q: only a device has a number", rdev))
	}
	return nil
}

// regular returns the content of a regular file.
func (p *parser) regular(size uint64, fields *[fieldCount][]byte) (fstree.Content, error) {
	if string(fields[fieldContent]) != "-" {
		content, err := p.unescape(fields[fieldContent])
		if err != nil {
			return nil, inField(fieldContent, err)
		}
		if uint64(len(content)) != size {
			return nil, inField(fieldContent, fmt.Errorf("%d bytes, but SIZE is %d", len(content), size))
		}
		if len(content) > maxInline {
			return nil, inField(fieldContent, fmt.Errorf("%d bytes, at most %d fit", len(content), maxInline))
		}
		return fstree.Inline(bytes.Clone(content)), nil
	}
	if size == 0 {
		return fstree.Inline(nil), nil
	}
	o := p.newObject()
	o.Size = size
	var err error
	if digest := fields[fieldDigest]; string(digest) != "-" {
		if o.Digest, err = fsverity.ParseHex(digest); err != nil {
			return nil, inField(fieldDigest, err)
		}
	}
	if string(fields[fieldPayload]) == "-" {
		if !o.Digest.IsZero() {
			return nil, inField(fieldPayload, errors.New("none, but there is a DIGEST"))
		}
		return o, nil
	}
	path, err := p.unescape(fields[fieldPayload])
	if err != nil {
		return nil, inField(fieldPayload, err)
	}
	if len(path) == 0 || len(path) > maxPath || bytes.IndexByte(path, 0) >= 0 {
		return nil, inField(fieldPayload, fmt.Errorf("%.80q: not a path", path))
	}
	if !isPathOf(path, o.Digest) {
		o.Path = string(path)
	}
	return o, nil
}

// isPathOf tells whether a path is that of the object with this digest: two digits, a slash and the rest.
func isPathOf(path []byte, d fsverity.Digest) bool {
	var room [2 * 64]byte
	digits, _ := d.AppendText(room[:0])
	return len(digits) > 0 && len(path) == len(digits)+1 && string(path[:2]) == string(digits[:2]) && path[2] == '/' &&
		string(path[3:]) == string(digits[2:])
}

// Limits of what is remembered.
const (
	mostKnown    = 1 << 14
	longestKnown = 1 << 10 // bytes
)

// attributes returns the attributes that the rest of a line says.
func (p *parser) attributes(text []byte) ([]fstree.Xattr, error) {
	if len(text) == 0 {
		return nil, nil
	}
	if known := p.xattrs[string(text)]; known != nil {
		return known, nil
	}
	if len(text) > maxXattrs {
		return nil, fmt.Errorf("%d bytes of extended attributes, at most %d fit", len(text), maxXattrs)
	}
	list := make([]fstree.Xattr, 0, bytes.Count(text, []byte(" "))+1)
	for rest := text; len(rest) > 0; {
		var field []byte
		field, rest, _ = bytes.Cut(rest, []byte(" "))
		key, value, ok := bytes.Cut(field, []byte("="))
		if !ok {
			return nil, fmt.Errorf("xattr %.80q: no '='", field)
		}
		name, err := p.unescape(key)
		if err != nil {
			return nil, fmt.Errorf("xattr %.80q: %w", field, err)
		}
		if len(name) == 0 || len(name) > 255 || bytes.IndexByte(name, 0) >= 0 {
			return nil, fmt.Errorf("xattr %.80q: the name is empty, has a NUL or is longer than 255 bytes", field)
		}
		x := fstree.Xattr{Name: string(name)}
		if value, err = p.unescape(value); err != nil {
			return nil, fmt.Errorf("xattr %.80q: %w", field, err)
		}
		x.Value = bytes.Clone(value)
		// The last one of a name counts.
		k, again := slices.BinarySearchFunc(list, x, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
		if again {
			list[k] = x
		} else {
			list = slices.Insert(list, k, x)
		}
	}
	if len(p.xattrs) < mostKnown && len(text) <= longestKnown {
		p.xattrs[string(text)] = list
	}
	return list, nil
}

func (p *parser) addLink(path, mode, payload []byte) error {
	m, err := parseUint(mode, 8, 32)
	if err != nil {
		return inField(fieldMode, err)
	}
	switch m &^ 0o7777 {
	case fstree.TypeDir:
		return inField(fieldMode, errors.New("a hard link to a directory"))
	case fstree.TypeRegular, fstree.TypeSymlink, fstree.TypeBlock, fstree.TypeChar, fstree.TypeFifo, fstree.TypeSocket:
	default:
		return inField(fieldMode, fmt.Errorf("%o: no file type that there is", m))
	}
	dir, name, err := p.place(path)
	if err == nil && dir == nil {
		err = errors.New("the root is a hard link")
	}
	if err != nil {
		return inField(fieldPath, err)
	}
	l := link{dir: dir, name: name, path: string(path), inode: &fstree.Inode{Content: fstree.Inline(nil)}}
	target, err := p.unescape(payload)
	if err != nil {
		return inField(fieldPayload, err)
	}
	if string(payload) == "-" {
		return inField(fieldPayload, errors.New("a hard link without target"))
	}
	l.target = string(target)
	dir.Set(name, l.inode)
	p.links = append(p.links, l)
	return nil
}

// resolveLinks makes the names of hard links point to the inodes of their targets, which may be hard links themselves.
func (p *parser) resolveLinks() error {
	if len(p.links) == 0 {
		return nil
	}
	byInode := make(map[*fstree.Inode]*link, len(p.links))
	for k := range p.links {
		byInode[p.links[k].inode] = &p.links[k]
	}
	tree := &fstree.Tree{Root: p.root}
	final := make(map[*fstree.Inode]*fstree.Inode, len(p.links))
	for k := range p.links {
		// Follow to an inode that is no link, or that an earlier turn has resolved; then all on the way lead there.
		var way []*link
		l := &p.links[k]
		inode := l.inode
		for byInode[inode] != nil && final[inode] == nil {
			next := byInode[inode]
			if way = append(way, next); len(way) > len(p.links) {
				return fmt.Errorf("hard link %.80q: its target leads back to it", l.path)
			}
			if inode = tree.Lookup(next.target); inode == nil {
				return fmt.Errorf("hard link %.80q: no target %.80q", next.path, next.target)
			}
		}
		if end := final[inode]; end != nil {
			inode = end
		}
		if inode.Dir() != nil {
			return fmt.Errorf("hard link %.80q: its target is a directory", l.path)
		}
		if last := len(way) - 1; p.homes != nil && last >= 0 && p.homes[inode] == "" {
			p.homes[inode] = path.Clean("/" + way[last].target)
		}
		for _, w := range way {
			final[w.inode] = inode
		}
	}
	for _, l := range p.links {
		l.dir.Set(l.name, final[l.inode])
	}
	return nil
}

// unescape returns a field's bytes: the field itself, or p.scratch, which the next call uses again.
func (p *parser) unescape(field []byte) ([]byte, error) {
	k := bytes.IndexByte(field, '\\')
	if k < 0 {
		return field, nil
	}
	out := append(p.scratch[:0], field[:k]...)
	for ; k < len(field); k++ {
		if field[k] != '\\' {
			out = append(out, field[k])
			continue
		}
		k++
		if k == len(field) {
			return nil, errors.New("nothing after a backslash")
		}
		switch field[k] {
		case '\\':
			out = append(out, '\\')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'x':
			if k+2 >= len(field) {
				return nil, errors.New(`no two hexadecimal digits after \x`)
			}
			var n [1]byte
			if _, err := hex.Decode(n[:], field[k+1:k+3]); err != nil {
				return nil, errors.New(`no two hexadecimal digits after \x`)
			}
			out = append(out, n[0])
			k += 2
		default:
			return nil, fmt.Errorf("unknown escape %q", field[k-1:k+1])
		}
	}
	p.scratch = out
	return out, nil
}

func parseUint(b []byte, base, bits int) (uint64, error) {
	var n uint64
	ok := len(b) > 0
	for _, c := range b {
		digit := uint64(c - '0')
		ok = ok && digit < uint64(base) && n <= (math.MaxUint64-digit)/uint64(base)
		n = n*uint64(base) + digit
	}
	if !ok || n > 1<<bits-1 {
		return 0, fmt.Errorf("%.40q: not a number in base %d of at most %d bits", b, base, bits)
	}
	return n, nil
}

func parseTime(b []byte) (fstree.Time, error) {
	sec, nsec, ok := bytes.Cut(b, []byte("."))
	if !ok {
		return fstree.Time{}, fmt.Errorf("%.40q: want seconds, a dot and nanoseconds", b)
	}
	s, err := strconv.ParseInt(string(sec), 10, 64)
	if err != nil {
		return fstree.Time{}, fmt.Errorf("%.40q: not a number of seconds", sec)
	}
	n, err := strconv.ParseUint(string(nsec), 10, 32)
	if err != nil || n > 999_999_999 {
		return fstree.Time{}, fmt.Errorf("%.40q: not a number of nanoseconds", nsec)
	}
	return fstree.Time{Sec: s, Nsec: uint32(n)}, nil
}
