package fuse

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Objects with fs-verity need a file system that has it: this test starts itself again in a guest.
// The kernel there is new enough to read such objects by itself.
func TestMeasuredObjects(t *testing.T) {
	vm.WithVerity(t, "TestMeasuredObjects", func(dir string) { measuredObjects(t, dir) })
}

func measuredObjects(t *testing.T, dir string) {
	text := strings.Repeat("the content of a file\n", 10_000)
	r, tree := importDir(t, dir, writeFiles(t, t.TempDir(), map[string]string{"file": text, "copy": text, "plain": "x" + text, "changed": "y" + text}), false)
	if !r.RequiresVerity() {
		t.Fatal("no fs-verity here")
	}
	// Without fs-verity, but right: hashed. And wrong.
	change(t, r, tree, "plain", []byte("x"+text))
	change(t, r, tree, "changed", flip("y"+text))
	errs := &lines{}
	served := newFiles(Image{Tree: tree, Open: r.OpenObject, Errors: errs})
	m, err := serve(served, t.TempDir())
	if err == nil {
		err = m.server.WaitMount() // this process reads from its own mount, see there
	}
	if err != nil {
		t.Fatal(err)
	}
	object := func(name string) *object { return served.node(served.numbers[tree.Lookup(name)]).object }
	open := func(name string) *os.File {
		f, err := os.Open(filepath.Join(m.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	for range 2 {
		one, two := open("file"), open("copy")
		o := object("file")
		o.mu.Lock()
		if o != object("copy") || o.opens != 2 || !o.measured || o.backing == 0 {
			t.Errorf("the kernel does not read the object by itself: %+v", o)
		}
		o.mu.Unlock()
		for _, f := range []*os.File{one, two} {
			b := make([]byte, len(text)+1)
			if n, err := f.ReadAt(b, 0); string(b[:n]) != text {
				t.Errorf("%d bytes, %v", n, err)
			}
			memory, err := unix.Mmap(int(f.Fd()), 0, len(text), unix.PROT_READ, unix.MAP_PRIVATE)
			if err != nil || string(memory) != text {
				t.Errorf("mapped: %d bytes, %v", len(memory), err)
			}
			unix.Munmap(memory)
			f.Close()
		}
		served.waitClosed()
		if o.backing != 0 || o.file != nil {
			t.Errorf("stays open: %+v", o)
		}
	}
	plain := open("plain")
	if o := object("plain"); o.measured || o.backing != 0 {
		t.Errorf("not measured by the kernel: %+v", o)
	}
	plain.Close()
	if b, err := os.ReadFile(filepath.Join(m.Dir, "plain")); err != nil || string(b) != "x"+text {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if _, err := os.ReadFile(filepath.Join(m.Dir, "changed")); !errors.Is(err, unix.EIO) || !strings.HasPrefix(errs.take(), `"/changed": object `) {
		t.Error(err)
	}

	served.waitClosed()

	// A digest of the other algorithm tells nothing: the content is hashed.
	change(t, r, tree, "plain", []byte("x"+text))
	f, err := r.OpenObject(object("plain").name)
	if err == nil {
		err = fsverity.Enable(f, fsverity.SHA256)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(m.Dir, "plain")); err != nil || string(b) != "x"+text {
		t.Errorf("%d bytes, %v", len(b), err)
	}

	if inUse, err := m.Unmount(); err != nil || inUse {
		t.Errorf("in use: %v, %v", inUse, err)
	}
	m.Wait()
}
