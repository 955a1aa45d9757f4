package ostree

import (
	"errors"
	"fmt"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

const (
	dirTreeType = "(a(say)a(sayay))"
	dirMetaType = "(uuua(ayay))"
	xattrsType  = "a(ayay)"
)

// DirTree is a parsed dirtree object. Both lists are sorted by the bytes of the names, and no name is there twice.
type DirTree struct {
	Files []TreeFile
	Dirs  []TreeDir
}

// TreeFile is an entry of a directory that is no directory.
type TreeFile struct {
	Name string
	File Checksum
}

// TreeDir is an entry of a directory that is one, too.
type TreeDir struct {
	Name       string
	Tree, Meta Checksum
}

// ParseDirTree parses a dirtree object.
func ParseDirTree(data []byte) (*DirTree, error) {
	t, err := parseDirTree(data)
	if err != nil {
		return nil, fmt.Errorf("dirtree: %w", err)
	}
	return t, nil
}

func parseDirTree(data []byte) (*DirTree, error) {
	v, err := gvariant.New(dirTreeType, data)
	if err != nil {
		return nil, err
	}
	if err := v.Check(); err != nil {
		return nil, err
	}
	lists, err := members(v)
	if err != nil {
		return nil, err
	}
	t := &DirTree{}
	last := ""
	err = eachTuple(lists[0], func(m []gvariant.Value) error {
		name, err := entryName(m[0], &last)
		if err != nil {
			return err
		}
		file, err := checksumOf(m[1])
		t.Files = append(t.Files, TreeFile{name, file})
		return err
	})
	if err != nil {
		return nil, err
	}
	last = ""
	err = eachTuple(lists[1], func(m []gvariant.Value) error {
		name, err := entryName(m[0], &last)
		if err != nil {
			return err
		}
		tree, err := checksumOf(m[1])
		if err != nil {
			return err
		}
		meta, err := checksumOf(m[2])
		t.Dirs = append(t.Dirs, TreeDir{name, tree, meta})
		return err
	})
	if err != nil {
		return nil, err
	}
	for f, d := 0, 0; f < len(t.Files) && d < len(t.Dirs); {
		switch strings.Compare(t.Files[f].Name, t.Dirs[d].Name) {
		case -1:
			f++
		case 1:
			d++
		default:
			return nil, fmt.Errorf("the name %q is there twice", t.Files[f].Name)
		}
	}
	return t, nil
}

// entryName reads the name of an entry, which comes after the last one.
func entryName(v gvariant.Value, last *string) (string, error) {
	name, err := v.String()
	if err == nil {
		err = fstree.CheckName(name)
	}
	if err == nil && name <= *last {
		err = fmt.Errorf("the name %.100q comes after %.100q: they are not sorted, or the same", name, *last)
	}
	*last = name
	return name, err
}

// eachTuple calls f with the members of every element of an array of tuples.
func eachTuple(v gvariant.Value, f func([]gvariant.Value) error) error {
	n, err := v.Len()
	if err != nil {
		return err
	}
	for i := range n {
		e, err := v.At(i)
		if err != nil {
			return err
		}
		m, err := members(e)
		if err == nil {
			err = f(m)
		}
		if err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
	}
	return nil
}

// Encode returns the dirtree object. The lists must be sorted.
func (t *DirTree) Encode() ([]byte, error) {
	files, dirs := gvariant.List{}, gvariant.List{}
	for _, f := range t.Files {
		files = append(files, gvariant.Tuple{f.Name, f.File[:]})
	}
	for _, d := range t.Dirs {
		dirs = append(dirs, gvariant.Tuple{d.Name, d.Tree[:], d.Meta[:]})
	}
	v, err := gvariant.Encode(dirTreeType, gvariant.Tuple{files, dirs})
	if err != nil {
		return nil, fmt.Errorf("dirtree: %w", err)
	}
	return v.Bytes(), nil
}

// Meta is the metadata of a file or directory. Mode is an st_mode, Xattrs are sorted by name, whose NUL is not part of them.
type Meta struct {
	UID, GID, Mode uint32
	Xattrs         []fstree.Xattr
}

// ParseDirMeta parses a dirmeta object.
func ParseDirMeta(data []byte) (Meta, error) {
	m, err := parseMeta(data)
	if err == nil && m.Mode&^0o7777 != fstree.TypeDir {
		err = fmt.Errorf("mode %#o is not that of a directory", m.Mode)
	}
	if err != nil {
		return m, fmt.Errorf("dirmeta: %w", err)
	}
	return m, nil
}

// parseMeta parses the form of a dirmeta, which bare-user repositories use for files, too.
func parseMeta(data []byte) (m Meta, err error) {
	v, err := gvariant.New(dirMetaType, data)
	if err != nil {
		return m, err
	}
	if err := v.Check(); err != nil {
		return m, err
	}
	list, err := members(v)
	if err != nil {
		return m, err
	}
	for i, to := range []*uint32{&m.UID, &m.GID, &m.Mode} {
		if *to, err = list[i].BigUint32(); err != nil {
			return m, err
		}
	}
	m.Xattrs, err = parseXattrs(list[3])
	return m, err
}

// EncodeDirMeta returns the metadata in the form of a dirmeta object.
func (m Meta) EncodeDirMeta() ([]byte, error) {
	v, err := gvariant.Encode(dirMetaType, gvariant.Tuple{big32(m.UID), big32(m.GID), big32(m.Mode), xattrList(m.Xattrs)})
	if err != nil {
		return nil, fmt.Errorf("dirmeta: %w", err)
	}
	return v.Bytes(), nil
}

// parseXattrs reads an a(ayay).
func parseXattrs(v gvariant.Value) (list []fstree.Xattr, err error) {
	err = eachTuple(v, func(m []gvariant.Value) error {
		name, err := m[0].ByteString()
		if err != nil {
			return fmt.Errorf("name of an extended attribute: %w", err)
		}
		if len(name) == 0 || len(name) > fstree.MaxName {
			return fmt.Errorf("name of an extended attribute: %d bytes", len(name))
		}
		if len(m[1].Bytes()) > 1<<16 {
			return fmt.Errorf("extended attribute %q: %d bytes, at most 65536 are possible", name, len(m[1].Bytes()))
		}
		if n := len(list); n > 0 && list[n-1].Name >= string(name) {
			return errors.New("extended attributes are not sorted, or one is there twice")
		}
		list = append(list, fstree.Xattr{Name: string(name), Value: m[1].Bytes()})
		return nil
	})
	return list, err
}

// xattrList is the inverse of parseXattrs.
func xattrList(xattrs []fstree.Xattr) gvariant.List {
	list := gvariant.List{}
	for _, x := range xattrs {
		list = append(list, gvariant.Tuple{append([]byte(x.Name), 0), x.Value})
	}
	return list
}
