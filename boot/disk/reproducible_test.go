package disk_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// nobody is who makes images in the test, beside root.
const nobody = 65534

func reproducibleLayout(dir string) disk.Layout { return reproducibleLayoutOf(dir, 96<<20) }

func reproducibleLayoutOf(dir string, size int64) disk.Layout {
	return disk.Layout{
		Arch: "amd64",
		Seed: []byte("a seed"),
		Time: epoch,
		Size: size,
		ESP:  disk.ESP{Size: 40 << 20, Files: []disk.File{espFile("EFI/Linux/os.efi", 1<<20), espFile("loader/loader.conf", 5)}},
		Root: disk.Root{Dir: dir},
	}
}

// TestMain makes this binary write an image if it is started by [asNobody].
func TestMain(m *testing.M) {
	dir := os.Getenv("DISK_TEST_DIR")
	if dir == "" {
		os.Exit(m.Run())
	}
	out, err := os.Create(filepath.Join(dir, "disk.img"))
	if err == nil {
		err = writeAll(out, reproducibleLayout(filepath.Join(dir, "root")))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// asNobody runs this binary as nobody, with another environment.
func asNobody(t *testing.T, dir string) {
	t.Helper()
	self, err := os.Open("/proc/self/exe") // by descriptor: nobody may not pass the directory that go test made
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	var text bytes.Buffer
	cmd := exec.Cmd{
		Path:        "/proc/self/fd/3",
		Args:        []string{"disk.test"},
		Env:         []string{"DISK_TEST_DIR=" + dir, "TZ=Pacific/Kiritimati", "SOURCE_DATE_EPOCH=1", "MKE2FS_SYNC=1"},
		ExtraFiles:  []*os.File{self},
		Stdout:      &text,
		Stderr:      &text,
		SysProcAttr: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}},
	}
	if err := cmd.Run(); err != nil {
		t.Fatalf("as nobody: %v\n%s", err, &text)
	}
}

// The same content, but written by another user, in another order, at another time, gives the same bytes; and making the
// image needs no privilege.
func TestReproducible(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("becoming nobody needs root: run the tests with sudo")
	}
	objects := map[string][]byte{}
	for k := range 120 {
		data := content(fmt.Sprint(k), 1+k*k*9)
		objects["composefs/objects/"+fsverity.Of(fsverity.SHA512, data).ObjectPath()] = data
	}
	objects["composefs/meta.json"] = []byte(metaJSON)
	names := slices.Sorted(maps.Keys(objects))

	var sums [2][sha256.Size]byte
	for k := range sums {
		base, err := os.MkdirTemp("", "disk-test-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(base)
		root := filepath.Join(base, "root")
		for _, name := range names {
			put(t, root, name, objects[name])
			if err := os.Chmod(filepath.Join(root, name), os.FileMode(0o600|k*0o44)); err != nil {
				t.Fatal(err)
			}
		}
		slices.Reverse(names)
		if k == 0 {
			out, err := os.Create(filepath.Join(base, "disk.img"))
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			if err := writeAll(out, reproducibleLayout(root)); err != nil {
				t.Fatal(err)
			}
		} else {
			err := filepath.Walk(base, func(name string, _ os.FileInfo, err error) error {
				if err != nil {
					return err
				}
				return os.Lchown(name, nobody, nobody)
			})
			if err != nil {
				t.Fatal(err)
			}
			asNobody(t, base)
		}
		image, err := os.Open(filepath.Join(base, "disk.img"))
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		hash := sha256.New()
		if _, err := io.Copy(hash, image); err != nil {
			t.Fatal(err)
		}
		hash.Sum(sums[k][:0])
	}
	if sums[0] != sums[1] {
		t.Errorf("root's image: %x\nnobody's image: %x", sums[0], sums[1])
	}
}

// What the seed and the time are for: they change the identifiers and the times.
func TestSeedAndTimeShow(t *testing.T) {
	sum := func(change func(*disk.Layout)) [sha256.Size]byte {
		l := layout(t)
		change(&l)
		image, _ := write(t, l)
		b, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		return sha256.Sum256(b)
	}
	same := sum(func(*disk.Layout) {})
	if sum(func(*disk.Layout) {}) != same {
		t.Error("two runs differ")
	}
	if sum(func(l *disk.Layout) { l.Seed = []byte("another") }) == same {
		t.Error("another seed gives the same image")
	}
	if sum(func(l *disk.Layout) { l.Time = epoch.AddDate(0, 0, 1) }) == same {
		t.Error("another time gives the same image")
	}
}
