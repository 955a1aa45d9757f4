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

	"github.com/composefs-boot/composefs-boot/repo/digestcache"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Options says what is read.
type Options struct {
	Xattrs   fstree.XattrMode
	NoXattrs bool               // keep none, whatever Xattrs says
	Mounts   bool               // read what is mounted inside of the directory, too; otherwise it is an error
	Progress *Progress          // counts along, if it is not nil
	Workers  int                // 0: one for each processor
	Cache    *digestcache.Cache // of digests; nil: every file is read
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
	root, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	s := &scanner{sink: sink, options: o, links: map[identity]*fstree.Inode{}}
	s.buffers.New = func() any { return &buffers{content: make([]byte, 0, batchBytes)} }
	if s.options.Progress == nil {
		s.options.Progress = &Progress{}
	}
	st, err := statx(root, "")
	if err != nil {
		unix.Close(root)
		return nil, err
	}
	s.device = device(&st)
	tree := &fstree.Tree{Root: inodeOf(&st)}
	if tree.Root.Xattrs, _, err = s.xattrs(root, ""); err != nil {
		unix.Close(root)
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	s.push(func() error { return s.directory(&openDir{fd: root, path: ""}, tree.Root) })
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
	buffers sync.Pool

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

// openDir is a directory that stays open until the last file in it has been read. Descriptors are plain numbers here: an
// os.File costs four more system calls a file.
type openDir struct {
	fd   int
	refs atomic.Int32 // of tasks that read its files, besides the one that reads the directory itself
	path string       // relative to the root, "" for the root itself
}

func (d *openDir) hold() { d.refs.Add(1) }
func (d *openDir) release() {
	if d.refs.Add(-1) < 0 {
		unix.Close(d.fd)
	}
}

func (d *openDir) join(name string) string {
	if d.path == "" {
		return name
	}
	return d.path + "/" + name
}

// Files of up to smallFile bytes are read in batches.
const (
	smallFile  = 64 << 10
	batchBytes = 512 << 10
	batchFiles = 64
)

// file is a regular file that is to be read.
type file struct {
	name  string
	inode *fstree.Inode
	key   digestcache.Key
	mode  uint16
}

// buffers is what a batch works with.
type buffers struct {
	content  []byte
	contents [][]byte
	files    []*file
	plain    []bool // no attributes
}

func (s *scanner) directory(d *openDir, inode *fstree.Inode) error {
	defer d.release()
	names, err := readNames(d.fd)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	sort.Strings(names)
	dir := inode.Dir()
	dir.Entries = make([]fstree.Entry, 0, len(names))
	var batch []file
	var size uint64
	flush := func() {
		if len(batch) > 0 {
			files := batch
			d.hold()
			s.push(func() error { return s.files(d, files) })
			batch, size = nil, 0
		}
	}
	for _, name := range names {
		child, f, err := s.entry(d, name)
		if err != nil {
			return fmt.Errorf("%s: %w", d.join(name), err)
		}
		switch {
		case f.inode == nil:
		case f.key.Size > smallFile:
			one := f
			d.hold()
			s.push(func() error { return s.large(d, &one) })
		default:
			if size+f.key.Size > batchBytes || len(batch) == batchFiles {
				flush()
			}
			batch, size = append(batch, f), size+f.key.Size
		}
		dir.Entries = append(dir.Entries, fstree.Entry{Name: name, Inode: child})
		s.options.Progress.Files.Add(1)
	}
	flush()
	return nil
}

// readNames returns the names in a directory, in any order.
func readNames(fd int) (names []string, err error) {
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return names, err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// entry makes the inode of a directory entry. A regular file with content is returned to be read later.
func (s *scanner) entry(d *openDir, name string) (*fstree.Inode, file, error) {
	st, err := statx(d.fd, name)
	if err != nil {
		return nil, file{}, err
	}
	isDir := uint32(st.Mode)&fstree.TypeMask == fstree.TypeDir
	if !s.options.Mounts && (st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 || isDir && device(&st) != s.device) {
		return nil, file{}, ErrCrossesMount
	}
	inode := inodeOf(&st)
	if !isDir && st.Nlink > 1 {
		// The first of several names is the one that reads the file.
		id := identity{device(&st), st.Ino}
		s.mu.Lock()
		known := s.links[id]
		if known == nil {
			s.links[id] = inode
		}
		s.mu.Unlock()
		if known != nil {
			return known, file{}, nil
		}
	}
	switch uint32(st.Mode) & fstree.TypeMask {
	case fstree.TypeDir:
		fd, err := openSame(d.fd, name, digestcache.KeyOf(&st), st.Mode, unix.O_DIRECTORY)
		if err != nil {
			return nil, file{}, err
		}
		if inode.Xattrs, _, err = s.xattrs(fd, ""); err != nil {
			unix.Close(fd)
			return nil, file{}, err
		}
		sub := &openDir{fd: fd, path: d.join(name)}
		s.push(func() error { return s.directory(sub, inode) })
		return inode, file{}, nil
	case fstree.TypeRegular:
		if st.Size > 0 {
			return inode, file{name, inode, digestcache.KeyOf(&st), st.Mode}, nil
		}
		inode.Content = fstree.Inline(nil)
	case fstree.TypeSymlink:
		var buf [fstree.MaxSymlink + 1]byte
		n, err := unix.Readlinkat(d.fd, name, buf[:])
		if err != nil {
			return nil, file{}, err
		}
		if n == 0 || n > fstree.MaxSymlink {
			return nil, file{}, fmt.Errorf("symlink target of more than %d bytes", fstree.MaxSymlink)
		}
		inode.Content = fstree.Symlink(buf[:n])
	}
	inode.Xattrs, _, err = s.xattrs(d.fd, name)
	return inode, file{}, err
}

// openSame opens what was seen under a name, and nothing that took its place since. Without O_NONBLOCK a pipe there would
// block.
func openSame(dir int, name string, key digestcache.Key, mode uint16, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|flags, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, err
		}
		now, err := statx(fd, "")
		if err == nil && (now.Ino != key.Ino || device(&now) != key.Device || now.Mode != mode) {
			err = errors.New("replaced while it was read")
		}
		if err != nil {
			unix.Close(fd)
			return -1, err
		}
		return fd, nil
	}
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
