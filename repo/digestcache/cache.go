// Package digestcache remembers the digests of files that were read, so that the next scan of the same directory need not
// read them again.
//
// A file is known by its device, inode number, size, modification and change time, in nanoseconds. The kernel sets the change
// time itself: who may not write a file and may not set the clock cannot make another content pass for it. A file that
// changed less than [margin] before the cache was opened is not remembered, since a change in the same tick of the kernel's
// clock would not show.
//
// A cache is believed if nobody but its user can have written it; one that is damaged is an empty one. Nothing that verifies
// asks a cache: bits that rot on a disk change no time.
package digestcache

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

const (
	magic   = "composefs digests 1\n"
	margin  = 2 * time.Second
	keySize = 5 * 8
	maxFile = 1 << 30 // bytes
)

// Key is the identity of a file.
type Key struct {
	Ino, Device, Size uint64
	Mtime, Ctime      int64 // nanoseconds since 1970
}

// KeyOf returns the identity of the file that statx was asked about.
func KeyOf(st *unix.Statx_t) Key {
	ns := func(t unix.StatxTimestamp) int64 { return t.Sec*1e9 + int64(t.Nsec) }
	return Key{Ino: st.Ino, Device: unix.Mkdev(st.Dev_major, st.Dev_minor), Size: st.Size, Mtime: ns(st.Mtime), Ctime: ns(st.Ctime)}
}

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Ino, o.Ino), cmp.Compare(k.Device, o.Device), cmp.Compare(k.Size, o.Size),
		cmp.Compare(k.Mtime, o.Mtime), cmp.Compare(k.Ctime, o.Ctime))
}

// Value is what is known of a file.
type Value struct {
	Digest   fsverity.Digest
	NoXattrs bool // it has no extended attributes of any kind
}

// Cache is the digests of one algorithm. A nil Cache remembers nothing. It may be used from several goroutines.
type Cache struct {
	path   string
	alg    fsverity.Algorithm
	before int64 // files that changed later are not remembered

	old  []byte // records, sorted by their keys
	used []bool // of old, under mu

	mu    sync.Mutex
	added map[Key]Value
}

// Open reads the cache in the file at path, which need not be there.
func Open(path string, a fsverity.Algorithm) *Cache {
	c := &Cache{path: path, alg: a, before: time.Now().Add(-margin).UnixNano(), added: map[Key]Value{}}
	b, err := readOwn(path)
	if err != nil {
		return c
	}
	// The digest of all that comes before it stands at the end.
	n := len(b) - a.Size()
	if n < len(magic)+1 || string(b[:len(magic)]) != magic || b[len(magic)] != byte(a) ||
		!bytes.Equal(fsverity.Of(a, b[:n]).Bytes(), b[n:]) || (n-len(magic)-1)%c.recordSize() != 0 {
		return c
	}
	c.old = b[len(magic)+1 : n]
	c.used = make([]bool, len(c.old)/c.recordSize())
	return c
}

// readOwn reads a file that nobody else can have written. With the home directory of somebody else in the environment, as sudo may
// leave it, their cache would decide what root takes for the content of its files.
func readOwn(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 || st.Size > maxFile {
		return nil, os.ErrPermission
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// ownDirectory makes a directory, and refuses one that belongs to somebody else.
func ownDirectory(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return &os.PathError{Op: "write", Path: path, Err: os.ErrPermission}
	}
	return nil
}

func (c *Cache) recordSize() int { return keySize + 1 + c.alg.Size() }

func (c *Cache) key(k int) Key {
	r := c.old[k*c.recordSize():]
	n := func(i int) uint64 { return binary.BigEndian.Uint64(r[8*i:]) }
	return Key{n(0), n(1), n(2), int64(n(3)), int64(n(4))}
}

func (c *Cache) value(k int) Value {
	r := c.old[k*c.recordSize()+keySize:]
	d, _ := fsverity.MakeDigest(c.alg, r[1:1+c.alg.Size()])
	return Value{d, r[0] != 0}
}

// Get returns what is known of a file.
func (c *Cache) Get(key Key) (Value, bool) {
	if c == nil {
		return Value{}, false
	}
	k := sort.Search(len(c.used), func(k int) bool { return c.key(k).compare(key) >= 0 })
	c.mu.Lock()
	defer c.mu.Unlock()
	if k == len(c.used) || c.key(k) != key {
		v, ok := c.added[key]
		return v, ok
	}
	c.used[k] = true
	return c.value(k), true
}

// Put remembers a file. The key is from before it was read.
func (c *Cache) Put(key Key, v Value) {
	if c == nil || max(key.Ctime, key.Mtime) >= c.before || v.Digest.Algorithm() != c.alg {
		return
	}
	c.mu.Lock()
	c.added[key] = v
	c.mu.Unlock()
}

// Save writes what was asked for or added since Open; what nobody asked for is forgotten. It replaces the file in one step.
func (c *Cache) Save() error {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.added) == 0 && !slices.Contains(c.used, false) {
		return nil
	}
	all := c.added
	for k, used := range c.used {
		if used {
			all[c.key(k)] = c.value(k)
		}
	}
	keys := make([]Key, 0, len(all))
	for k := range all {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, Key.compare)
	b := append([]byte(magic), byte(c.alg))
	for _, k := range keys {
		for _, n := range [...]uint64{k.Ino, k.Device, k.Size, uint64(k.Mtime), uint64(k.Ctime)} {
			b = binary.BigEndian.AppendUint64(b, n)
		}
		v, flag := all[k], byte(0)
		if v.NoXattrs {
			flag = 1
		}
		b, _ = v.Digest.AppendBinary(append(b, flag))
	}
	b, _ = fsverity.Of(c.alg, b).AppendBinary(b)
	if err := ownDirectory(filepath.Dir(c.path)); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(c.path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), c.path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
