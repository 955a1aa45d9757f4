package disk_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/disk"
)

var epoch = time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)

// content is a file's content, made from its name; no block of it is all zeros.
func content(name string, size int) []byte {
	b := make([]byte, 0, size+32)
	for sum := sha256.Sum256([]byte(name)); len(b) < size; sum = sha256.Sum256(sum[:]) {
		b = append(b, sum[:]...)
	}
	return b[:size]
}

func espFile(path string, size int) disk.File {
	return disk.File{Path: path, Size: int64(size), Open: func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(content(path, size))), nil
	}}
}

// layout returns a small layout with everything that must be there.
func layout(t *testing.T) disk.Layout {
	return disk.Layout{
		Arch: "amd64",
		Seed: []byte("a seed"),
		Time: epoch,
		ESP:  disk.ESP{Files: []disk.File{espFile("EFI/BOOT/BOOTX64.EFI", 100_000)}},
		Root: disk.Root{Dir: t.TempDir()},
	}
}

// write makes a disk and returns the path of its image and its plan.
func write(t *testing.T, l disk.Layout) (string, *disk.Plan) {
	t.Helper()
	p, err := l.Plan()
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := p.Write(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	return out.Name(), p
}

// writeAll is what a program does: it plans and writes.
func writeAll(out *os.File, l disk.Layout) error {
	return disk.Write(context.Background(), out, l)
}

// run runs a tool that must succeed and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// extract copies a partition to a file of its own.
func extract(t *testing.T, image string, part disk.Partition) string {
	t.Helper()
	in, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(filepath.Join(t.TempDir(), "partition.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Truncate(part.Size); err != nil {
		t.Fatal(err)
	}
	for at, end := part.Offset, part.Offset+part.Size; at < end; {
		data, err := in.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || data >= end {
			break
		}
		hole, err := in.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		at = min(hole, end)
		section := io.NewSectionReader(in, data, at-data)
		if _, err := io.Copy(io.NewOffsetWriter(out, data-part.Offset), section); err != nil {
			t.Fatal(err)
		}
	}
	return out.Name()
}

func checkGPT(t *testing.T, image string) {
	t.Helper()
	if out := run(t, "sgdisk", "-v", image); !strings.Contains(out, "No problems found") || strings.Contains(out, "Caution") {
		t.Errorf("sgdisk -v:\n%s", out)
	}
}

func TestPartitionTable(t *testing.T) {
	for arch, typ := range map[string]string{
		"amd64":   "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
		"arm64":   "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
		"riscv64": "72EC70A6-CF74-40E6-BD49-4BDA08E8F224",
	} {
		l := layout(t)
		l.Arch = arch
		image, p := write(t, l)
		checkGPT(t, image)
		info, err := os.Stat(image)
		if err != nil || info.Size() != p.Size {
			t.Errorf("%s: size %d, planned %d, %v", arch, info.Size(), p.Size, err)
		}
		esp, root := run(t, "sgdisk", "-i", "1", image), run(t, "sgdisk", "-i", "2", image)
		for _, want := range []string{"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "First sector: 2048 ", "'esp'",
			strings.ToUpper(disk.ID(l.Seed, disk.ESPPartition))} {
			if !strings.Contains(esp, want) {
				t.Errorf("%s: no %s in\n%s", arch, want, esp)
			}
		}
		for _, want := range []string{typ, "'root'", strings.ToUpper(disk.ID(l.Seed, disk.RootPartition))} {
			if !strings.Contains(root, want) {
				t.Errorf("%s: no %s in\n%s", arch, want, root)
			}
		}
		if disk := run(t, "sgdisk", "-p", image); !strings.Contains(disk, "GUID") {
			t.Error(disk)
		}
	}
}

func TestRefusedLayouts(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*disk.Layout)
		want   string
	}{
		{"architecture", func(l *disk.Layout) { l.Arch = "x86_64" }, `architecture "x86_64" has no partition type: want one of 386`},
		{"time", func(l *disk.Layout) { l.Time = time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC) }, "before 2038-01-19"},
		{"no root directory", func(l *disk.Layout) { l.Root.Dir = "/nonexistent" }, "/nonexistent"},
		{"disk too small", func(l *disk.Layout) { l.Size = 35 << 20 }, "does not fit"},
	} {
		l := layout(t)
		c.change(&l)
		if _, err := l.Plan(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestIDs(t *testing.T) {
	seen := map[string]bool{}
	for _, seed := range []string{"", "a", "b"} {
		for _, role := range []disk.Role{disk.DiskID, disk.ESPPartition, disk.RootPartition, disk.RootFilesystem} {
			id := disk.ID([]byte(seed), role)
			if len(id) != 36 || id[14] != '8' || !strings.ContainsRune("89ab", rune(id[19])) || seen[id] {
				t.Errorf("%q, %s: %s", seed, role, id)
			}
			seen[id] = true
		}
	}
}
