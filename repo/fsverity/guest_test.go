package fsverity_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// The kernel's half needs a file system with fs-verity: this test starts itself again in a guest.
func TestEnableAndMeasure(t *testing.T) {
	vm.WithVerity(t, "TestEnableAndMeasure", func(dir string) { enableAndMeasure(t, dir) })
}

// unnamed makes a file without a name; the descriptor that can write is the second one.
func unnamed(t *testing.T, dir string, content []byte) (reader, writer *os.File) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	writer = os.NewFile(uintptr(fd), "unnamed")
	if _, err := writer.Write(content); err != nil {
		t.Fatal(err)
	}
	if reader, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
		t.Fatal(err)
	}
	return reader, writer
}

func enableAndMeasure(t *testing.T, dir string) {
	for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		for _, size := range []int{0, 1, 4096, 4097, 128 * 4096, 129*4096 + 7, 3 << 20} {
			content := bytes.Repeat([]byte{byte(size), 7}, size/2+1)[:size]
			f, w := unnamed(t, dir, content)
			if _, err := fsverity.Measure(f); !errors.Is(err, fsverity.ErrNotEnabled) {
				t.Errorf("measuring before: %v", err)
			}
			w.Close()
			if err := fsverity.Enable(f, alg); err != nil {
				t.Fatalf("%v, %d bytes: %v", alg, size, err)
			}
			got, err := fsverity.Measure(f)
			if want := fsverity.Of(alg, content); err != nil || got != want {
				t.Errorf("%v, %d bytes: the kernel says %v, %v, want %v", alg, size, got, err, want)
			}
			if err := fsverity.Enable(f, alg); !errors.Is(err, fsverity.ErrAlreadyEnabled) {
				t.Errorf("enabling again: %v", err)
			}
			f.Close()
		}
	}
	content := bytes.Repeat([]byte("busy"), 5000)
	want := fsverity.Of(fsverity.SHA512, content)

	// A descriptor that can write goes away while Enable waits, as that of a forked child does.
	f, w := unnamed(t, dir, content)
	go func() {
		time.Sleep(20 * time.Millisecond)
		w.Close()
	}()
	if err := fsverity.Enable(f, fsverity.SHA512); err != nil {
		t.Errorf("a descriptor that goes away: %v", err)
	}

	// One that stays makes a copy necessary.
	f, w = unnamed(t, dir, content)
	defer w.Close()
	if err := fsverity.Enable(f, fsverity.SHA512); !errors.Is(err, unix.ETXTBSY) {
		t.Errorf("a descriptor that stays: %v", err)
	}
	parent, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	copied, err := fsverity.EnableOrCopy(f, parent, fsverity.SHA512)
	if err != nil || copied == f {
		t.Fatalf("no copy: %v", err)
	}
	if got, err := fsverity.Measure(copied); err != nil || got != want {
		t.Errorf("the copy measures %v, %v, want %v", got, err, want)
	}
}
