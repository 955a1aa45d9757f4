package ostree

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// Description is what a commit says besides its tree.
type Description struct {
	Subject, Body string
	Parent        Checksum // zero: none
	Time          uint64   // seconds since 1970
	// Metadata are the first entries of the dictionary, in this order. A key is there once.
	Metadata []MetadataEntry
	// Refs are those that the commit is meant for, and Collection that of the repository which publishes it: ostree.ref-binding and
	// ostree.collection-binding. Nil and "" are for commits that say nothing about it.
	Refs       []string
	Collection string
	// Bootable says that there is a kernel in /usr/lib/modules, and which: ostree.bootable and ostree.linux.
	Bootable bool
}

// MetadataEntry is an entry of a dictionary a{sv}.
type MetadataEntry struct {
	Key   string
	Value gvariant.Value
}

// ErrSpecial tells of a file that OSTree cannot hold.
var ErrSpecial = errors.New("OSTree holds directories, files and symbolic links only")

// Compose makes the objects of a commit; nothing has a name yet, see [Store]. Open opens the contents of the tree, which are compared with their digests; the sink takes those
// that are inline in the tree and too large for it in a commit.
func Compose(ctx context.Context, tree *fstree.Tree, open fstree.Open, sink fstree.Sink, a fsverity.Algorithm, d Description) (*Objects, error) {
	metadata, err := d.metadata(tree)
	if err != nil {
		return nil, err
	}
	c := &composer{ctx: ctx, open: open, sink: sink, o: newObjects(a, Checksum{}), files: map[*fstree.Inode]Checksum{}}
	if err := c.contents(tree); err != nil {
		return nil, err
	}
	commit := &Commit{Metadata: metadata, Parent: d.Parent, Subject: d.Subject, Body: d.Body, Time: d.Time}
	if commit.RootTree, commit.RootMeta, err = c.dir(tree.Root); err != nil {
		return nil, err
	}
	data, err := commit.Encode()
	if err != nil {
		return nil, err
	}
	c.o.Commit = c.add(data)
	return c.o, nil
}

type composer struct {
	ctx  context.Context
	open fstree.Open
	sink fstree.Sink

	mu    sync.Mutex
	o     *Objects
	files map[*fstree.Inode]Checksum // of all that are no directories
}

// contents makes the content objects of a tree.
func (c *composer) contents(tree *fstree.Tree) error {
	type file struct {
		path  string
		inode *fstree.Inode
	}
	var files []file
	seen := map[*fstree.Inode]bool{}
	err := tree.Walk(func(path string, inode *fstree.Inode) error {
		switch inode.Content.(type) {
		case *fstree.Directory:
		case fstree.Inline, *fstree.Object, fstree.Symlink:
			if !seen[inode] {
				seen[inode] = true
				files = append(files, file{path, inode})
			}
		default:
			return fmt.Errorf("%s: a %s: %w", fstree.Printable(path), fstree.TypeName(inode.Type()), ErrSpecial)
		}
		return nil
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(c.ctx)
	defer stop(nil)
	queue := make(chan file)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for f := range queue {
				if err := c.file(f.path, f.inode); err != nil {
					stop(fmt.Errorf("%s: %w", fstree.Printable(f.path), err))
				}
			}
		})
	}
	for _, f := range files {
		if ctx.Err() != nil {
			break
		}
		queue <- f
	}
	close(queue)
	workers.Wait()
	return context.Cause(ctx)
}

// file makes one content object.
func (c *composer) file(path string, inode *fstree.Inode) error {
	m, err := metaOf(inode)
	if err != nil {
		return err
	}
	h := &FileHeader{Meta: m}
	var inline []byte
	var object fsverity.Digest
	switch content := inode.Content.(type) {
	case fstree.Symlink:
		h.Target = string(content)
	case fstree.Inline:
		h.Size, inline = int64(len(content)), content
	case *fstree.Object:
		h.Size, object = int64(content.Size), content.Digest
		if object.Algorithm() != c.o.alg {
			return fmt.Errorf("its content is known by the digest %q: want one of %v", object, c.o.alg)
		}
	}
	if err := h.check(); err != nil {
		return err
	}
	sum, err := h.NewHash()
	if err != nil {
		return err
	}
	if !object.IsZero() {
		if inline, err = c.read(path, inode, h.Size, sum); err != nil {
			return err
		}
		if inline != nil {
			object = fsverity.Digest{}
		}
	} else {
		sum.Write(inline)
		if h.Size > maxInline(c.o.alg) {
			d, err := c.sink.PutAll([][]byte{inline})
			if err != nil {
				return err
			}
			inline, object = nil, d[0]
		}
	}
	e, err := newEntry(h, inline, object)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	name := Checksum(sum.Sum(nil))
	c.o.entries[name] = e
	c.files[inode] = name
	return nil
}

// read reads the content of an object into the hash, and returns it if it is small. The content must still be the one that the digest is
// of: the checksum would be that of another one.
func (c *composer) read(path string, inode *fstree.Inode, size int64, sum io.Writer) ([]byte, error) {
	f, err := c.open(path, inode)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	digest := fsverity.NewDigester(c.o.alg)
	var small bytes.Buffer
	to := io.MultiWriter(sum, digest)
	if size <= maxInline(c.o.alg) {
		to = io.MultiWriter(sum, digest, &small)
	}
	n, err := io.Copy(to, &interruptible{c.ctx, io.LimitReader(f, size+1)})
	if err != nil {
		return nil, err
	}
	if n != size || digest.Sum() != inode.Content.(*fstree.Object).Digest {
		return nil, fmt.Errorf("it has changed: %w", repo.ErrCorrupt)
	}
	return small.Bytes(), nil
}

// dir makes the dirtree and the dirmeta of a directory, and of those below it.
func (c *composer) dir(inode *fstree.Inode) (tree, meta Checksum, err error) {
	var t DirTree
	for _, e := range inode.Dir().Entries {
		if e.Inode.Dir() == nil {
			t.Files = append(t.Files, TreeFile{e.Name, c.files[e.Inode]})
			continue
		}
		tree, meta, err := c.dir(e.Inode)
		if err != nil {
			return tree, meta, fmt.Errorf("%s: %w", fstree.Printable(e.Name), err)
		}
		t.Dirs = append(t.Dirs, TreeDir{e.Name, tree, meta})
	}
	data, err := t.Encode()
	if err != nil {
		return tree, meta, err
	}
	m, err := metaOf(inode)
	if err != nil {
		return tree, meta, err
	}
	metaData, err := m.EncodeDirMeta()
	if err != nil {
		return tree, meta, err
	}
	return c.add(data), c.add(metaData), nil
}

// add takes a metadata object.
func (c *composer) add(data []byte) Checksum {
	name := Checksum(sha256.Sum256(data))
	c.o.entries[name] = entry{data: data}
	return name
}

// metaOf returns the metadata of an inode as objects have it.
func metaOf(inode *fstree.Inode) (Meta, error) {
	m := Meta{UID: inode.UID, GID: inode.GID, Mode: inode.Mode()}
	for _, x := range inode.Xattrs {
		name := strings.TrimSuffix(x.Name, "\x00") // an image of a commit, with CfsctlNames
		if name == "" || strings.Contains(name, "\x00") {
			return m, fmt.Errorf("extended attribute %q: not a name", x.Name)
		}
		if len(x.Value) > 0 {
			m.Xattrs = append(m.Xattrs, fstree.Xattr{Name: name, Value: x.Value})
		}
	}
	slices.SortFunc(m.Xattrs, func(a, b fstree.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return m, nil
}

// metadata makes the dictionary of a commit.
func (d *Description) metadata(tree *fstree.Tree) (gvariant.Value, error) {
	if len(d.Metadata) > maxMetadata-4 {
		return gvariant.Value{}, fmt.Errorf("metadata: %d keys: at most %d are possible", len(d.Metadata), maxMetadata-4)
	}
	entries := slices.Clone(d.Metadata)
	add := func(key, typ string, value any) error {
		v, err := gvariant.Encode(typ, value)
		if err != nil {
			return fmt.Errorf("metadata %q: %w", key, err)
		}
		entries = append(entries, MetadataEntry{key, v})
		return nil
	}
	has := func(key string) bool {
		return slices.ContainsFunc(entries, func(e MetadataEntry) bool { return e.Key == key })
	}
	if d.Refs != nil {
		refs := slices.Sorted(slices.Values(d.Refs))
		if err := add(refBinding, "as", refs); err != nil {
			return gvariant.Value{}, err
		}
	}
	if d.Collection != "" && !has(collectionBinding) {
		if err := add(collectionBinding, "s", d.Collection); err != nil {
			return gvariant.Value{}, err
		}
	}
	if d.Bootable {
		release, err := kernelRelease(tree)
		if err == nil {
			err = add("ostree.bootable", "b", true)
		}
		if err == nil {
			err = add("ostree.linux", "s", release)
		}
		if err != nil {
			return gvariant.Value{}, err
		}
		entries = glibOrder(entries)
	}
	list := gvariant.List{}
	seen := map[string]bool{}
	for _, e := range entries {
		if seen[e.Key] {
			return gvariant.Value{}, fmt.Errorf("metadata %q: the key is there twice", e.Key)
		}
		seen[e.Key] = true
		list = append(list, gvariant.Tuple{e.Key, e.Value})
	}
	return gvariant.Encode("a{sv}", list)
}

// kernelRelease returns the release of the one kernel in /usr/lib/modules.
func kernelRelease(tree *fstree.Tree) (release string, err error) {
	modules := tree.Lookup("usr/lib/modules")
	if modules == nil || modules.Dir() == nil {
		return "", errors.New("not bootable: no directory /usr/lib/modules in the tree")
	}
	for _, e := range modules.Dir().Entries {
		if dir := e.Inode.Dir(); dir == nil || dir.Lookup("vmlinuz") == nil {
			continue
		}
		if release != "" {
			return "", fmt.Errorf("not bootable: both %s and %s in /usr/lib/modules have a vmlinuz: OSTree boots a tree with one kernel", release, e.Name)
		}
		release = e.Name
	}
	if release == "" {
		return "", errors.New("not bootable: no /usr/lib/modules/RELEASE/vmlinuz in the tree")
	}
	return release, nil
}

// StoreOptions says what is made of a commit that is kept.
type StoreOptions struct {
	Formats   []erofs.Format // as in PullOptions
	Transform func(*fstree.Tree, fstree.Open) error
	Detached  []byte // detached metadata: signatures. Nil: none
	Tag       string // "": none
}

// Store keeps a commit that is complete, with its composefs images, as a pull would. Contents have been put into the import, which the
// caller commits.
func Store(ctx context.Context, r *repo.Repo, i *repo.Import, objects *Objects, o StoreOptions) (*Stored, error) {
	if o.Tag != "" {
		if err := CheckTag(o.Tag); err != nil {
			return nil, err
		}
	}
	if len(o.Formats) == 0 {
		o.Formats = r.Formats()
	}
	p := &pull{r: r, i: i, o: PullOptions{Formats: o.Formats, Transform: o.Transform}}
	c := objects.Commit
	s, err := open(r, c)
	if lost(err) {
		s, err = &Stored{Checksum: c}, nil
	}
	if err == nil {
		err = p.complete(ctx, s, link{c: c, detached: o.Detached}, nil, objects)
	}
	if err != nil {
		return nil, fmt.Errorf("commit %v: %w", c, err)
	}
	var tags []string
	if o.Tag != "" {
		tags = append(tags, TagRef(o.Tag))
	}
	return s, i.NameStream(commitStream+c.String(), s.stream, tags...)
}
