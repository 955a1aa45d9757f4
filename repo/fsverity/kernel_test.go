package fsverity_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// tmpfs and proc never have fs-verity, whatever the kernel: the answer must be the one error that callers may tolerate.
// What an ext4 with fs-verity answers is tested in the guests.
func TestNotSupportedIsToldApart(t *testing.T) {
	for _, path := range []string{"/dev/shm/fsverity-test", "/proc/self/cmdline"} {
		if filepath.Dir(path) == "/dev/shm" {
			if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
				t.Fatal(err)
			}
			defer os.Remove(path)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := fsverity.Enable(f, fsverity.SHA256); !errors.Is(err, fsverity.ErrNotSupported) {
			t.Errorf("Enable %s: %v", path, err)
		}
		if _, err := fsverity.Measure(f); !errors.Is(err, fsverity.ErrNotSupported) {
			t.Errorf("Measure %s: %v", path, err)
		}
	}
}

func TestOtherErrorsAreNotTolerated(t *testing.T) {
	f, err := os.Open("/dev/shm")
	if err != nil {
		t.Fatal(err)
	}
	f.Close() // a closed file is a bad descriptor, not a missing ability
	if err := fsverity.Enable(f, fsverity.SHA512); err == nil || errors.Is(err, fsverity.ErrNotSupported) {
		t.Errorf("Enable: %v", err)
	}
	if _, err := fsverity.Measure(f); err == nil || errors.Is(err, fsverity.ErrNotSupported) {
		t.Errorf("Measure: %v", err)
	}
}
