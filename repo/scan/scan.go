// Package scan reads a directory into a file tree.
//
// Directories are read in parallel, and files, once they are found, by whoever is free. Everything is opened relative to
// the descriptor of its directory and never through a symbolic link: what is renamed or replaced while the scan goes on
// gives an error, not a file from somewhere else. The result does not depend on the number of workers.
package scan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Options says what is read.
type Options struct {
	Xattrs   fstree.XattrMode
	NoXattrs bool      // keep none, whatever Xattrs says
	Mounts   bool      // read what is mounted inside of the directory, too; otherwise it is an error
	Progress *Progress // counts along, if it is not nil
	Workers  int       // 0: one for each processor
}

// Progress counts what has been read; other goroutines may look at it while the scan goes on.
type Progress struct {
	Files atomic.Int64 // of any type
	Bytes atomic.Int64 // of file content
}

// ErrCrossesMount tells that something is mounted inside of the directory.
var ErrCrossesMount = errors.New("another file system is mounted here: unmount it, or scan a bind mount of the tree")

// Dir reads the directory at path, itself included, and gives the content of every file that is too large to stay in the
// tree to the sink. The path may be a symbolic link to the directory. Errors name the path relative to the directory.
func Dir(ctx context.Context, path string, sink fstree.Sink, o Options) (*fstree.Tree, error) {
	root, err := os.OpenFile(path, unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	s := &scanner{sink: sink, options: o, links: map[identity]*fstree.Inode{}}
	if s.options.Progress == nil {
		s.options.Progress = &Progress{}
	}
	st, err := statx(root, "")
	if err != nil {
		root.Close()
		return nil, err
	}
	s.device = device(&st)
	tree := &fstree.Tree{Root: inodeOf(&st)}
	if tree.Root.Xattrs, err = s.xattrs(root, ""); err != nil {
		root.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	s.push(func() error { return s.directory(&openDir{f: root, path: ""}, tree.Root) })
	if err := s.run(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	tree.CountLinks()
	return tree, nil
}

type identity struct{ device, ino uint64 }

type scanner struct {
	sink    fstree.Sink
	options Options
	device  uint64 // of the file system that is scanned

	mu      sync.Mutex
	wake    *sync.Cond
	tasks   []func() error // the last one is next: that keeps few directories open
	running int
	err     error
	links   map[identity]*fstree.Inode
}

func (s *scanner) push(task func() error) {
	s.mu.Lock()
	s.tasks = append(s.tasks, task)
	s.mu.Unlock()
	if s.wake != nil {
		s.wake.Signal()
	}
}

// run works until there is nothing left to do, or until the first error.
func (s *scanner) run(ctx context.Context) error {
	s.wake = sync.NewCond(&s.mu)
	stop := context.AfterFunc(ctx, func() { s.fail(ctx.Err()) })
	defer stop()
	workers := s.options.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	var all sync.WaitGroup
	for range workers {
		all.Go(s.work)
	}
	all.Wait()
	return s.err
}

func (s *scanner) work() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for len(s.tasks) == 0 {
			if s.running == 0 {
				s.wake.Broadcast()
				return
			}
			s.wake.Wait()
		}
		task := s.tasks[len(s.tasks)-1]
		s.tasks = s.tasks[:len(s.tasks)-1]
		s.running++
		failed := s.err != nil
		s.mu.Unlock()
		var err error
		if !failed {
			err = task()
		}
		s.mu.Lock()
		s.running--
		if err != nil && s.err == nil {
			s.err = err
		}
		if s.err != nil {
			s.tasks = nil
		}
	}
}

func (s *scanner) fail(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.mu.Unlock()
}

// openDir is a directory that stays open until the last file in it has been read.
type openDir struct {
	f    *os.File
	refs atomic.Int32 // of tasks that read its files, besides the one that reads the directory itself
	path string       // relative to the root, "" for the root itself
}

func (d *openDir) hold() { d.refs.Add(1) }
func (d *openDir) release() {
	if d.refs.Add(-1) < 0 {
		d.f.Close()
	}
}

func (d *openDir) join(name string) string {
	if d.path == "" {
		return name
	}
	return d.path + "/" + name
}

// open opens an entry for reading. Without O_NONBLOCK a pipe that took the file's place would block.
func (d *openDir) open(name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(d.f.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), d.join(name)), nil
}

func (s *scanner) directory(d *openDir, inode *fstree.Inode) error {
	defer d.release()
	names, err := d.f.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	sort.Strings(names)
	dir := inode.Dir()
	dir.Entries = make([]fstree.Entry, 0, len(names))
	for _, name := range names {
		child, err := s.entry(d, name)
		if err != nil {
			return fmt.Errorf("%s: %w", d.join(name), err)
		}
		dir.Entries = append(dir.Entries, fstree.Entry{Name: name, Inode: child})
		s.options.Progress.Files.Add(1)
	}
	return nil
}

// entry makes the inode of a directory entry. What is large is left to another task.
func (s *scanner) entry(d *openDir, name string) (*fstree.Inode, error) {
	st, err := statx(d.f, name)
	if err != nil {
		return nil, err
	}
	isDir := uint32(st.Mode)&fstree.TypeMask == fstree.TypeDir
	if !s.options.Mounts && (st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 || isDir && device(&st) != s.device) {
		return nil, ErrCrossesMount
	}
	if !isDir && st.Nlink > 1 {
		// The lock makes the first of several names the one that reads the file.
		s.mu.Lock()
		defer s.mu.Unlock()
		id := identity{device(&st), st.Ino}
		if inode := s.links[id]; inode != nil {
			return inode, nil
		}
		inode, task, err := s.newInode(d, name, &st)
		if err != nil {
			return nil, err
		}
		s.links[id] = inode
		if task != nil {
			s.tasks = append(s.tasks, task)
			s.wake.Signal()
		}
		return inode, nil
	}
	inode, task, err := s.newInode(d, name, &st)
	if err == nil && task != nil {
		s.push(task)
	}
	return inode, err
}

// newInode makes an inode and, for a directory or a file with content, the task that reads it.
func (s *scanner) newInode(d *openDir, name string, st *unix.Statx_t) (*fstree.Inode, func() error, error) {
	inode := inodeOf(st)
	switch uint32(st.Mode) & fstree.TypeMask {
	case fstree.TypeDir:
		f, err := s.openSame(d, name, st, unix.O_DIRECTORY)
		if err != nil {
			return nil, nil, err
		}
		if inode.Xattrs, err = s.xattrs(f, ""); err != nil {
			f.Close()
			return nil, nil, err
		}
		sub := &openDir{f: f, path: d.join(name)}
		return inode, func() error { return s.directory(sub, inode) }, nil
	case fstree.TypeRegular:
		if st.Size > 0 {
			d.hold()
			size := int64(st.Size)
			same := *st
			return inode, func() error {
				defer d.release()
				if err := s.file(d, name, &same, inode, size); err != nil {
					return fmt.Errorf("%s: %w", d.join(name), err)
				}
				return nil
			}, nil
		}
		inode.Content = fstree.Inline(nil)
	case fstree.TypeSymlink:
		buf := make([]byte, fstree.MaxSymlink+1)
		n, err := unix.Readlinkat(int(d.f.Fd()), name, buf)
		if err != nil {
			return nil, nil, err
		}
		if n == 0 || n > fstree.MaxSymlink {
			return nil, nil, fmt.Errorf("symlink target of more than %d bytes", fstree.MaxSymlink)
		}
		inode.Content = fstree.Symlink(buf[:n])
	}
	var err error
	inode.Xattrs, err = s.xattrs(d.f, name)
	return inode, nil, err
}

// openSame opens what st describes, and nothing that took its place since.
func (s *scanner) openSame(d *openDir, name string, st *unix.Statx_t, flags int) (*os.File, error) {
	f, err := d.open(name, flags)
	if err != nil {
		return nil, err
	}
	now, err := statx(f, "")
	if err == nil && (now.Ino != st.Ino || device(&now) != device(st) || now.Mode != st.Mode) {
		err = errors.New("replaced while it was read")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *scanner) file(d *openDir, name string, st *unix.Statx_t, inode *fstree.Inode, size int64) error {
	f, err := s.openSame(d, name, st, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if inode.Xattrs, err = s.xattrs(f, ""); err != nil {
		return err
	}
	defer s.options.Progress.Bytes.Add(size)
	if size > fstree.MaxInline {
		object := &fstree.Object{Size: uint64(size)}
		if object.Digest, err = s.sink.Put(f, size); err != nil {
			return err
		}
		inode.Content = object
		return nil
	}
	content := make([]byte, size+1)
	n, err := io.ReadFull(f, content)
	if err != io.ErrUnexpectedEOF || int64(n) != size {
		return fmt.Errorf("changed while it was read: %d bytes were expected", size)
	}
	inode.Content = fstree.Inline(content[:n])
	return nil
}

func statx(dir *os.File, name string) (unix.Statx_t, error) {
	var st unix.Statx_t
	flags := unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	err := unix.Statx(int(dir.Fd()), name, flags, unix.STATX_BASIC_STATS, &st)
	return st, err
}

func device(st *unix.Statx_t) uint64 { return unix.Mkdev(st.Dev_major, st.Dev_minor) }

func inodeOf(st *unix.Statx_t) *fstree.Inode {
	i := &fstree.Inode{
		Perm:  uint32(st.Mode) &^ fstree.TypeMask,
		UID:   st.Uid,
		GID:   st.Gid,
		Mtime: fstree.Time{Sec: st.Mtime.Sec, Nsec: st.Mtime.Nsec},
	}
	switch uint32(st.Mode) & fstree.TypeMask {
	case fstree.TypeDir:
		i.Content = &fstree.Directory{}
	case fstree.TypeBlock, fstree.TypeChar:
		i.Content = fstree.Device{
			Block: uint32(st.Mode)&fstree.TypeMask == fstree.TypeBlock,
			Rdev:  uint32(unix.Mkdev(st.Rdev_major, st.Rdev_minor)),
		}
	case fstree.TypeFifo:
		i.Content = fstree.Fifo{}
	case fstree.TypeSocket:
		i.Content = fstree.Socket{}
	}
	return i
}

// xattrs reads the attributes that are kept, of f itself or of the entry of the directory f. The second way goes through
// /proc, since symlinks and devices cannot be opened without side effects.
func (s *scanner) xattrs(f *os.File, name string) ([]fstree.Xattr, error) {
	if s.options.NoXattrs {
		return nil, nil
	}
	fd := int(f.Fd())
	list := func(b []byte) (int, error) { return unix.Flistxattr(fd, b) }
	get := func(attr string, b []byte) (int, error) { return unix.Fgetxattr(fd, attr, b) }
	if name != "" {
		path := fmt.Sprintf("/proc/self/fd/%d/%s", fd, name)
		list = func(b []byte) (int, error) { return unix.Llistxattr(path, b) }
		get = func(attr string, b []byte) (int, error) { return unix.Lgetxattr(path, attr, b) }
	}
	var small [512]byte
	names, err := readGrowing(small[:], list)
	if errors.Is(err, unix.EOPNOTSUPP) || len(names) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, os.NewSyscallError("listxattr", err)
	}
	var xattrs []fstree.Xattr
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if !s.options.Xattrs.Keeps(attr) {
			continue
		}
		value, err := readGrowing(make([]byte, 256), func(b []byte) (int, error) { return get(attr, b) })
		if errors.Is(err, unix.ENODATA) {
			continue // removed since it was listed
		}
		if err != nil {
			return nil, fmt.Errorf("xattr %s: %w", attr, err)
		}
		xattrs = append(xattrs, fstree.Xattr{Name: attr, Value: value})
	}
	sort.Slice(xattrs, func(a, b int) bool { return xattrs[a].Name < xattrs[b].Name })
	return xattrs, nil
}

// readGrowing calls read with a buffer that is large enough; the kernel's limit for either kind is 64 KiB.
func readGrowing(buf []byte, read func([]byte) (int, error)) ([]byte, error) {
	n, err := read(buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 1<<16)
		n, err = read(buf)
	}
	if err != nil {
		return nil, err
	}
	return buf[:n:n], nil
}

// Files returns a function that opens the files of a tree that came from this directory.
func Files(path string) fstree.Open {
	return func(name string, inode *fstree.Inode) (io.ReadCloser, error) {
		root, err := os.OpenRoot(path)
		if err != nil {
			return nil, err
		}
		defer root.Close()
		name = strings.TrimPrefix(name, "/")
		// The tree knows what is a regular file; a symbolic link in the directory has taken its place since.
		if st, err := root.Lstat(name); err != nil || !st.Mode().IsRegular() {
			return nil, &fs.PathError{Op: "open", Path: name, Err: errors.Join(err, errors.New("not a regular file any more"))}
		}
		return root.Open(name)
	}
}
