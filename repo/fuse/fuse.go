// Package fuse serves a composefs image read-only over FUSE, for users who may not mount one with the kernel's EROFS and
// overlayfs. What is seen is the same: names, metadata, extended attributes, hard links and contents.
//
// Contents are objects, of which nothing is trusted. When a file is opened and nobody has its object open yet, the object is
// opened and checked: either the kernel measures the digest, and then checks every block that is read from it (fs-verity), or
// the whole content is hashed, from the descriptor that is read from later. Only after that the reader gets the first
// byte. An object that is missing or has another digest or size is EIO, and a line to [Image.Errors] says which one and where.
//
// What this does not give: a content that was hashed, without fs-verity, is as it was when it was opened. Who can write to
// the object may change it while it is being hashed or afterwards, and readers that have it open then see the change. The
// kernel's page cache is dropped when it has been hashed anew, so the change does not outlive the file being open. Where
// others can write to the objects, use a file system with fs-verity.
//
// An image never changes, so the kernel may keep all names and metadata, and contents as long as the check holds. A user's
// mount is seen by that user alone, who may read all of it, whatever owners and modes say, as the objects are theirs. Root's is
// seen by everybody, with the usual checks of permissions. Devices and set-user-ID bits are shown and have no effect.
//
// The node number of FUSE and the inode number are the same: the place of the inode in the tree, names in their order,
// directories before their entries. So the numbers of an image are the same in every mount of it.
package fuse

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"sync"
	"sync/atomic"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Image is what is served.
type Image struct {
	Tree   *fstree.Tree                            // must not change while it is served
	Open   func(fsverity.Digest) (*os.File, error) // opens an object for reading, whatever its content; an error names the digest
	Source string                                  // what the table of mounts shows as the source
	Errors io.Writer                               // gets a line for every file that cannot be opened
}

// forever is how long the kernel may believe what it was told.
const forever = 365 * 24 * time.Hour

// files answers the kernel's requests. All but the objects stays as newFiles made it.
type files struct {
	gofuse.RawFileSystem // answers what a read-only file system need not know
	image                Image
	nodes                []node // the node with number n is nodes[n-1]
	numbers              map[*fstree.Inode]uint64
	bytes                uint64 // sum of all sizes

	server        *gofuse.Server
	noPassthrough atomic.Bool // the kernel does not read objects by itself
	digesters     [fsverity.SHA512 + 1]sync.Pool
	report        sync.Mutex // for Image.Errors
}

// node is an inode with what the tree does not say about it.
type node struct {
	inode  *fstree.Inode
	parent uint64 // number of the directory of its first name
	name   string
	nlink  uint32
	object *object // nil if the content is not an object
}

// object is a content outside of the image. All inodes that have it share it.
type object struct {
	objectID
	mu       sync.Mutex // held while it is checked
	opens    int        // files that are open; the rest is meaningful only if there are any
	file     *os.File
	size     uint64
	measured bool  // the kernel checks what is read
	backing  int32 // number by which the kernel reads it without asking, 0 for none
}

// objectID says which object it is: its name and the digest that it must have, which an image may tell apart.
type objectID struct{ name, want fsverity.Digest }

func newFiles(image Image) *files {
	f := &files{RawFileSystem: gofuse.NewDefaultRawFileSystem(), image: image, numbers: map[*fstree.Inode]uint64{}}
	f.add(1, "/", image.Tree.Root, map[objectID]*object{})
	return f
}

// add gives an inode and what is below it their numbers.
func (f *files) add(parent uint64, name string, inode *fstree.Inode, objects map[objectID]*object) {
	number := uint64(len(f.nodes) + 1)
	f.numbers[inode] = number
	f.nodes = append(f.nodes, node{inode: inode, parent: parent, name: name, nlink: inode.Nlink})
	f.bytes += inode.Size()
	switch c := inode.Content.(type) {
	case *fstree.Object:
		id := objectID{c.Digest, c.Digest}
		if c.Path != "" {
			id.name, _ = fsverity.ParseObjectPath(c.Path)
		}
		if id.want.IsZero() {
			id.want = id.name // the name of an object is its digest
		}
		if objects[id] == nil {
			objects[id] = &object{objectID: id}
		}
		f.nodes[number-1].object = objects[id]
	case *fstree.Directory:
		links := uint32(2)
		for _, e := range c.Entries {
			if e.Inode.Dir() != nil {
				links++
			}
			if f.numbers[e.Inode] == 0 {
				f.add(number, e.Name, e.Inode, objects)
			}
		}
		f.nodes[number-1].nlink = links
	}
}

func (f *files) node(number uint64) *node { return &f.nodes[number-1] }

// path returns the first name of a node.
func (f *files) path(n *node) string {
	if n == &f.nodes[0] {
		return "/"
	}
	return path.Join(f.path(f.node(n.parent)), n.name)
}

// Init is called when the mount is there.
func (f *files) Init(s *gofuse.Server) { f.server = s }

func (f *files) attributes(number uint64, out *gofuse.Attr) {
	n := f.node(number)
	i := n.inode
	*out = gofuse.Attr{Ino: number, Size: i.Size(), Blocks: (i.Size() + 511) / 512, Blksize: fsverity.BlockSize,
		Mode: i.Mode(), Nlink: n.nlink, Owner: gofuse.Owner{Uid: i.UID, Gid: i.GID}}
	out.Mtime, out.Mtimensec = uint64(i.Mtime.Sec), i.Mtime.Nsec
	out.Atime, out.Atimensec = out.Mtime, out.Mtimensec
	out.Ctime, out.Ctimensec = out.Mtime, out.Mtimensec
	if d, ok := i.Content.(fstree.Device); ok {
		out.Rdev = d.Rdev
	}
}

func (f *files) entry(number uint64, out *gofuse.EntryOut) {
	out.NodeId = number
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(forever)
	f.attributes(number, &out.Attr)
}

// Lookup finds a name in a directory. That there is none is an answer, too, which the kernel keeps.
func (f *files) Lookup(_ <-chan struct{}, in *gofuse.InHeader, name string, out *gofuse.EntryOut) gofuse.Status {
	if len(name) > fstree.MaxName {
		return gofuse.Status(unix.ENAMETOOLONG)
	}
	dir := f.node(in.NodeId).inode.Dir()
	if dir == nil {
		return gofuse.ENOTDIR
	}
	if inode := dir.Lookup(name); inode != nil {
		f.entry(f.numbers[inode], out)
		return gofuse.OK
	}
	out.SetEntryTimeout(forever)
	return gofuse.OK
}

// GetAttr tells the metadata.
func (f *files) GetAttr(_ <-chan struct{}, in *gofuse.GetAttrIn, out *gofuse.AttrOut) gofuse.Status {
	f.attributes(in.NodeId, &out.Attr)
	out.SetTimeout(forever)
	return gofuse.OK
}

// Readlink tells the target of a symbolic link.
func (f *files) Readlink(_ <-chan struct{}, in *gofuse.InHeader) ([]byte, gofuse.Status) {
	target, ok := f.node(in.NodeId).inode.Content.(fstree.Symlink)
	if !ok {
		return nil, gofuse.EINVAL
	}
	return []byte(target), gofuse.OK
}

// StatFs tells what all is as large as, with nothing free.
func (f *files) StatFs(_ <-chan struct{}, _ *gofuse.InHeader, out *gofuse.StatfsOut) gofuse.Status {
	*out = gofuse.StatfsOut{Blocks: (f.bytes + fsverity.BlockSize - 1) / fsverity.BlockSize, Files: uint64(len(f.nodes)),
		Bsize: fsverity.BlockSize, Frsize: fsverity.BlockSize, NameLen: fstree.MaxName}
	return gofuse.OK
}

// OpenDir lets the kernel keep the entries of the directory.
func (f *files) OpenDir(_ <-chan struct{}, _ *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	out.OpenFlags = gofuse.FOPEN_KEEP_CACHE | gofuse.FOPEN_CACHE_DIR
	return gofuse.OK
}

// entries calls add for the entries of a directory from an offset on, "." and ".." being the first two, until it is false.
func (f *files) entries(in *gofuse.ReadIn, add func(number uint64, e gofuse.DirEntry) bool) gofuse.Status {
	n := f.node(in.NodeId)
	dir := n.inode.Dir()
	if dir == nil {
		return gofuse.ENOTDIR
	}
	for at := in.Offset; at < uint64(len(dir.Entries))+2; at++ {
		e := gofuse.DirEntry{Name: ".", Ino: in.NodeId, Mode: fstree.TypeDir, Off: at + 1}
		number := uint64(0)
		switch at {
		case 0:
		case 1:
			e.Name, e.Ino = "..", n.parent
		default:
			child := dir.Entries[at-2]
			number = f.numbers[child.Inode]
			e.Name, e.Ino, e.Mode = child.Name, number, child.Inode.Type()
		}
		if !add(number, e) {
			break
		}
	}
	return gofuse.OK
}

// ReadDir lists a directory.
func (f *files) ReadDir(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	return f.entries(in, func(_ uint64, e gofuse.DirEntry) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus lists a directory and looks its entries up.
func (f *files) ReadDirPlus(_ <-chan struct{}, in *gofuse.ReadIn, out *gofuse.DirEntryList) gofuse.Status {
	return f.entries(in, func(number uint64, e gofuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(e)
		if entry != nil && number != 0 {
			f.entry(number, entry)
		}
		return entry != nil
	})
}

// GetXAttr tells the value of an extended attribute.
func (f *files) GetXAttr(_ <-chan struct{}, in *gofuse.InHeader, name string, to []byte) (uint32, gofuse.Status) {
	value, ok := f.node(in.NodeId).inode.Xattr(name)
	if !ok {
		return 0, gofuse.ENOATTR
	}
	return fill(to, value)
}

// ListXAttr tells the names of the extended attributes: of those that start with "trusted." to root only, who alone may
// read them.
func (f *files) ListXAttr(_ <-chan struct{}, in *gofuse.InHeader, to []byte) (uint32, gofuse.Status) {
	var list []byte
	for _, x := range f.node(in.NodeId).inode.Xattrs {
		if in.Uid == 0 || len(x.Name) < 8 || x.Name[:8] != "trusted." {
			list = append(append(list, x.Name...), 0)
		}
	}
	return fill(to, list)
}

// fill copies an answer of which a caller without room wants to know only the size.
func fill(to, from []byte) (uint32, gofuse.Status) {
	if len(to) < len(from) {
		return uint32(len(from)), gofuse.ERANGE
	}
	return uint32(copy(to, from)), gofuse.OK
}

// Open opens a file. Its object is checked, unless it is open already.
func (f *files) Open(_ <-chan struct{}, in *gofuse.OpenIn, out *gofuse.OpenOut) gofuse.Status {
	if in.Flags&unix.O_ACCMODE != unix.O_RDONLY {
		return gofuse.EROFS
	}
	n := f.node(in.NodeId)
	out.OpenFlags = gofuse.FOPEN_KEEP_CACHE
	o := n.object
	if o == nil {
		return gofuse.OK
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := f.open(o, n.inode.Size()); err != nil {
		f.report.Lock()
		defer f.report.Unlock()
		fmt.Fprintf(f.image.Errors, "%q: %v\n", f.path(n), err)
		return gofuse.EIO
	}
	o.opens++
	switch {
	case o.backing != 0:
		out.OpenFlags, out.BackingID = gofuse.FOPEN_PASSTHROUGH, o.backing
	case o.opens == 1 && !o.measured:
		out.OpenFlags = 0 // what the kernel has kept was checked another time
	}
	return gofuse.OK
}

// Errors that a file's opening may end with, but for those of the object's opening and reading.
var (
	errNoDigest = errors.New("the image names no digest, so that nothing tells which content is right: make the image anew")
	errChanged  = errors.New("the content is not that of the digest: somebody changed it; import the image again")
)

// open opens an object and checks it, if it is not open. The caller holds its lock.
func (f *files) open(o *object, size uint64) error {
	if o.opens > 0 {
		if o.size != size {
			return fmt.Errorf("object %v: it has %d bytes, and %d in the image: make the image anew", o.want, o.size, size)
		}
		return nil
	}
	if o.want.IsZero() || o.name.IsZero() {
		return errNoDigest
	}
	file, err := f.image.Open(o.name)
	if err != nil {
		return err
	}
	if o.measured, err = f.check(file, o.want, size); err != nil {
		file.Close()
		return fmt.Errorf("object %v: %w", o.want, err)
	}
	o.file, o.size = file, size
	if o.measured && f.server != nil && !f.noPassthrough.Load() {
		var errno error
		if o.backing, errno = f.register(file); errno != nil {
			f.noPassthrough.Store(true) // it is old, or we are not root
		}
	}
	return nil
}

func (f *files) register(file *os.File) (int32, error) {
	number, errno := f.server.RegisterBackingFd(&gofuse.BackingMap{Fd: int32(file.Fd())})
	if errno != 0 {
		return 0, errno
	}
	return number, nil
}

// check makes sure that a file has this digest and size, and tells whether the kernel will check every read.
func (f *files) check(file *os.File, want fsverity.Digest, size uint64) (measured bool, err error) {
	info, err := file.Stat()
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() || uint64(info.Size()) != size {
		return false, errChanged
	}
	if got, err := fsverity.Measure(file); err == nil && got == want {
		return true, nil
	}
	// No digest, or one of another algorithm. What is wrong with the file, reading will show.
	pool := &f.digesters[want.Algorithm()]
	d, _ := pool.Get().(*fsverity.Digester)
	if d == nil {
		d = fsverity.NewDigester(want.Algorithm())
	}
	defer pool.Put(d)
	d.Reset()
	if _, err := d.ReadFrom(io.NewSectionReader(file, 0, info.Size())); err != nil {
		return false, err
	}
	if d.Sum() != want {
		return false, errChanged
	}
	return false, nil
}

// Flush is not needed: once it is not answered, the kernel stops to ask at every close.
func (f *files) Flush(<-chan struct{}, *gofuse.FlushIn) gofuse.Status { return gofuse.ENOSYS }

// Read reads a file that is open.
func (f *files) Read(_ <-chan struct{}, in *gofuse.ReadIn, buf []byte) (gofuse.ReadResult, gofuse.Status) {
	n := f.node(in.NodeId)
	if o := n.object; o != nil {
		o.mu.Lock()
		file := o.file
		o.mu.Unlock()
		if file == nil {
			return nil, gofuse.EBADF
		}
		// Splicing the bytes through a pipe is not faster, most files being small.
		size, err := file.ReadAt(buf, int64(in.Offset))
		if err != nil && err != io.EOF {
			return nil, gofuse.EIO
		}
		return gofuse.ReadResultData(buf[:size]), gofuse.OK
	}
	content, ok := n.inode.Content.(fstree.Inline)
	if !ok {
		return nil, gofuse.EINVAL
	}
	content = content[min(in.Offset, uint64(len(content))):]
	return gofuse.ReadResultData(content[:min(len(buf), len(content))]), gofuse.OK
}

// Release closes a file, and its object with the last one. The kernel waits for its reads before.
func (f *files) Release(_ <-chan struct{}, in *gofuse.ReleaseIn) {
	o := f.node(in.NodeId).object
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.opens--; o.opens > 0 {
		return
	}
	if o.backing != 0 {
		f.server.UnregisterBackingFd(o.backing)
		o.backing = 0
	}
	o.file.Close()
	o.file = nil
}
