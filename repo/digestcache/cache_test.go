package digestcache_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/digestcache"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

func key(t *testing.T, path string) digestcache.Key {
	t.Helper()
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS, &st); err != nil {
		t.Fatal(err)
	}
	return digestcache.KeyOf(&st)
}

func old(k digestcache.Key) digestcache.Key {
	k.Ctime -= int64(time.Hour)
	k.Mtime -= int64(time.Hour)
	return k
}

func TestWhatIsSavedIsFound(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub/cache")
	one, two := old(key(t, dir)), old(key(t, "/"))
	d := fsverity.Of(fsverity.SHA512, []byte("content"))
	c := digestcache.Open(path, fsverity.SHA512)
	c.Put(one, digestcache.Value{Digest: d, NoXattrs: true})
	c.Put(two, digestcache.Value{Digest: d})
	if err := c.Save(); err != nil {
		t.Fatal(err)
	}
	c = digestcache.Open(path, fsverity.SHA512)
	if v, ok := c.Get(one); !ok || v.Digest != d || !v.NoXattrs {
		t.Errorf("got %+v, %v", v, ok)
	}
	for name, change := range map[string]func(*digestcache.Key){
		"inode": func(k *digestcache.Key) { k.Ino++ }, "device": func(k *digestcache.Key) { k.Device++ }, "size": func(k *digestcache.Key) { k.Size++ },
		"mtime": func(k *digestcache.Key) { k.Mtime++ }, "ctime": func(k *digestcache.Key) { k.Ctime++ },
	} {
		other := one
		change(&other)
		if _, ok := c.Get(other); ok {
			t.Errorf("a file with another %s is taken for the same", name)
		}
	}
	// What nobody asked for is forgotten.
	if err := c.Save(); err != nil {
		t.Fatal(err)
	}
	c = digestcache.Open(path, fsverity.SHA512)
	if _, ok := c.Get(two); ok {
		t.Error("a file that is not there any more is remembered")
	}
	if _, ok := c.Get(one); !ok {
		t.Error("a file that was asked for is forgotten")
	}
	if _, ok := digestcache.Open(path, fsverity.SHA256).Get(one); ok {
		t.Error("a digest of another algorithm is found")
	}
	// Written by somebody else.
	for _, spoil := range []func(){func() { os.Chown(path, 1, 1) }, func() { os.Chmod(path, 0o666) }} {
		spoil()
		if _, ok := digestcache.Open(path, fsverity.SHA512).Get(one); ok {
			t.Error("a cache that others can have written is believed")
		}
		os.Chown(path, os.Geteuid(), os.Getegid())
		os.Chmod(path, 0o600)
	}
	if _, ok := digestcache.Open(path, fsverity.SHA512).Get(one); !ok {
		t.Error("our own is not believed")
	}
	// One wrong bit anywhere, or a shorter file, is no cache.
	b, _ := os.ReadFile(path)
	for k := range b {
		bad := append([]byte{}, b...)
		bad[k] ^= 1
		os.WriteFile(path, bad, 0o600)
		if _, ok := digestcache.Open(path, fsverity.SHA512).Get(one); ok {
			t.Fatalf("byte %d may be wrong", k)
		}
		os.WriteFile(path, b[:k], 0o600)
		if _, ok := digestcache.Open(path, fsverity.SHA512).Get(one); ok {
			t.Fatalf("%d bytes are enough", k)
		}
	}
}

func TestFreshFilesAreNotRemembered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	os.WriteFile(path, []byte("x"), 0o600)
	c := digestcache.Open(filepath.Join(t.TempDir(), "cache"), fsverity.SHA256)
	k := key(t, path)
	c.Put(k, digestcache.Value{Digest: fsverity.Of(fsverity.SHA256, []byte("x"))})
	if _, ok := c.Get(k); ok {
		t.Error("a file that may change in the same tick is remembered")
	}
}

// A scan with a cache sees every change that a scan without one sees, also when size and mtime are made to look the same.
func TestScanSeesChanges(t *testing.T) {
	dir, cachePath := t.TempDir(), filepath.Join(t.TempDir(), "cache")
	path := filepath.Join(dir, "file")
	at := time.Now().Add(-time.Hour)
	write := func(content string) {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		os.Chtimes(path, at, at)
	}
	read := func() fsverity.Digest {
		t.Helper()
		c := digestcache.Open(cachePath, fsverity.SHA256)
		tree, err := scan.Dir(context.Background(), dir, scan.Digests(fsverity.SHA256), scan.Options{Cache: c})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Save(); err != nil {
			t.Fatal(err)
		}
		plain, err := scan.Dir(context.Background(), dir, scan.Digests(fsverity.SHA256), scan.Options{})
		if err != nil {
			t.Fatal(err)
		}
		one, two := tree.Lookup("file").Content, plain.Lookup("file").Content
		if objectOf(one) != objectOf(two) {
			t.Fatalf("with the cache %v, without %v", one, two)
		}
		return objectOf(one)
	}
	write(strings.Repeat("a", 1000))
	time.Sleep(2100 * time.Millisecond) // until it may be remembered
	first := read()
	if info, err := os.Stat(cachePath); err != nil || info.Size() < 80 {
		t.Fatalf("nothing was remembered: %v", err)
	}
	if read() != first {
		t.Error("another digest the second time")
	}
	write(strings.Repeat("b", 1000))
	if read() == first {
		t.Error("a change was not seen")
	}
}

func objectOf(c fstree.Content) fsverity.Digest {
	o, ok := c.(*fstree.Object)
	if !ok {
		return fsverity.Digest{}
	}
	return o.Digest
}
