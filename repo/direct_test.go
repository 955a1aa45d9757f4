package repo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func directRepo(t *testing.T, o Options) *Repo {
	t.Helper()
	path := filepath.Join(t.TempDir(), "repository")
	if _, err := Init(path, Config{Algorithm: fsverity.SHA256, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	r, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// slowly gives a content in pieces of any size.
type slowly struct {
	rest   []byte
	random *rand.Rand
}

func (s *slowly) Read(p []byte) (int, error) {
	if len(s.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 1+s.random.IntN(100_000))], s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// TestSizes stores contents of sizes around every limit of the ways to the disk.
func TestSizes(t *testing.T) {
	r := directRepo(t, Options{})
	i, err := r.Begin(context.Background(), LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Abort()
	random := rand.New(rand.NewPCG(1, 2))
	want := map[fsverity.Digest][]byte{}
	for _, limit := range []int{512, 4096, directSize, blockBuffer, 2 * blockBuffer, inMemory, inMemory + blockBuffer, 5 << 20} {
		for _, more := range []int{-4097, -4096, -513, -512, -1, 0, 1, 511, 512, 4095, 4096, 5000} {
			if limit+more <= 0 {
				continue
			}
			content := make([]byte, limit+more)
			for k := range content {
				content[k] = byte(random.Uint32())
			}
			var d fsverity.Digest
			if more%2 == 0 {
				d, err = i.Put(&slowly{content, random}, int64(len(content)))
			} else {
				var list []fsverity.Digest
				if list, err = i.PutAll([][]byte{content}); err == nil {
					d = list[0]
				}
			}
			if err != nil {
				t.Fatalf("%d bytes: %v", len(content), err)
			}
			want[d] = content
		}
	}
	if err := i.Commit(); err != nil {
		t.Fatal(err)
	}
	for d, content := range want {
		f, err := r.OpenVerified(d)
		if err != nil {
			t.Fatalf("%d bytes: %v", len(content), err)
		}
		got, err := io.ReadAll(f)
		f.Close()
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes: %d came back, %v", len(content), len(got), err)
		}
	}
}

// TestPageCache asks the kernel what it keeps of an object that was written just now.
func TestPageCache(t *testing.T) {
	for _, keep := range []bool{false, true} {
		r := directRepo(t, Options{KeepCached: keep})
		i, err := r.Begin(context.Background(), LockOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer i.Abort()
		content := bytes.Repeat([]byte("page"), 1<<20)
		d, err := i.Put(bytes.NewReader(content), int64(len(content)))
		if err == nil {
			err = i.Commit()
		}
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(filepath.Join(r.path, "objects", d.ObjectPath()))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		mapped, err := unix.Mmap(int(f.Fd()), 0, len(content), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mapped)
		pages := make([]byte, len(content)/os.Getpagesize())
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, address(mapped), uintptr(len(mapped)), address(pages)); errno != 0 {
			t.Fatal(errno)
		}
		cached := 0
		for _, p := range pages {
			cached += int(p & 1)
		}
		direct := !keep && directAlign(int(f.Fd())) > 0
		if direct != (cached == 0) {
			t.Errorf("KeepCached %v, direct %v: %d of %d pages are in memory", keep, direct, cached, len(pages))
		}
	}
}

// TestWriteFails has the disk refuse a content after Put has returned.
func TestWriteFails(t *testing.T) {
	r := directRepo(t, Options{})
	i, err := r.Begin(context.Background(), LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Abort()
	content := make([]byte, directSize)
	fd, err := unix.Open(filepath.Join(r.path, "meta.json"), unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	broken := &temp{fd: fd, blocks: &blocks{align: 512, writes: i.writes}}
	if _, err := broken.Write(content); err != nil {
		t.Fatal(err)
	}
	d := fsverity.OfAll(fsverity.SHA256, [][]byte{content})[0]
	if err := i.add(d, broken, int64(len(content))); err != nil {
		t.Fatal(err)
	}
	if err := i.Commit(); !errors.Is(err, unix.EBADF) {
		t.Errorf("Commit returns %v", err)
	}
	if _, err := r.OpenObject(d); !errors.Is(err, ErrNotFound) {
		t.Errorf("the object is there: %v", err)
	}
}

// TestReplacedNames replaces names, of which nothing but the name itself is ever to be seen beside others.
func TestReplacedNames(t *testing.T) {
	r := directRepo(t, Options{})
	dir, err := r.mkdir("images")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for k := range 3000 {
			if err := r.symlink(dir, strings.Repeat("x", 1+k%2), "name"); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	for {
		names, err := os.ReadDir(filepath.Join(r.path, "images"))
		if err != nil || len(names) > 1 || len(names) == 1 && names[0].Name() != "name" {
			t.Fatalf("%v, %v", names, err)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }
