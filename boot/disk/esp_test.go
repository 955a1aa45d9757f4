package disk_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot/disk"
)

func checkFAT(t *testing.T, partition string) {
	t.Helper()
	// fsck.vfat answers 0 also for what it would only mention, such as a wrong count of free clusters.
	out := run(t, "fsck.vfat", "-n", "-v", partition)
	for _, complaint := range []string{"rong", "differ", "nvalid", "uninitialized", "Start", "Dirty", "Bad", "Reclaim"} {
		for line := range strings.Lines(out) {
			if strings.Contains(line, complaint) && !strings.Contains(line, "Starting check/repair pass") {
				t.Errorf("fsck.vfat: %s", line)
			}
		}
	}
}

func TestESP(t *testing.T) {
	files := []disk.File{
		espFile("EFI/BOOT/BOOTX64.EFI", 123_457),
		espFile("EFI/Linux/an-os-6.12.0+3.efi", 9<<20+1),
		espFile("EFI/Linux/an-os-6.12.1+3.efi", 4<<20),
		espFile("loader/loader.conf", 17),
		espFile("loader/entries.srel", 6),
		espFile("empty", 0),
		espFile("EFI/empty.too", 0),
		espFile("UPPER.TXT", 512),
		{Path: "loader/entries/"},
	}
	for i := range 300 { // directories of many clusters
		files = append(files, espFile(fmt.Sprintf("loader/keys/a-name-of-thirty-nine-bytes-is-%04d.auth", i), i))
	}
	for _, size := range []int64{0, 64 << 20, 128 << 20, 260 << 20, 261 << 20, 4 << 30, 9 << 30} {
		t.Run(fmt.Sprint(size>>20), func(t *testing.T) {
			l := layout(t)
			files := files
			if size > 1<<30 {
				files = files[:20]
			}
			l.ESP = disk.ESP{Size: size, Files: files, Label: "MYESP", Free: 1 << 20}
			image, p := write(t, l)
			checkGPT(t, image)
			part := extract(t, image, p.ESP)
			checkFAT(t, part)
			for _, f := range files {
				if f.Open == nil {
					continue
				}
				if got := run(t, "mtype", "-i", part, "::"+f.Path); got != string(content(f.Path, int(f.Size))) {
					t.Fatalf("%s: other content", f.Path)
				}
			}
			out := run(t, "mdir", "-i", part, "::/loader")
			for _, want := range []string{"MYESP", disk.ESPSerial(l.Seed), "2024-02-29  12:34", "entries"} {
				if !strings.Contains(out, want) {
					t.Errorf("no %q in\n%s", want, out)
				}
			}
			var free int64
			for line := range strings.Lines(out) {
				if strings.HasSuffix(line, "bytes free\n") {
					fmt.Sscan(strings.ReplaceAll(strings.TrimSuffix(line, "bytes free\n"), " ", ""), &free)
				}
			}
			// Three files are empty, for which a cluster each is planned.
			if free < p.ESP.Free || free > p.ESP.Free+3*p.ClusterSize() || free < l.ESP.Free {
				t.Errorf("%d bytes free, planned %d", free, p.ESP.Free)
			}
		})
	}
}

// A driver that goes by the specification takes fewer clusters for FAT16.
func TestSmallestESPIsFAT32(t *testing.T) {
	for _, content := range []int{0, 30 << 20, 34 << 20, 258 << 20, 260 << 20, 270 << 20} {
		l := layout(t)
		l.ESP.Files = append(l.ESP.Files, disk.File{Path: "large", Size: int64(content)})
		p, err := l.Plan()
		if err != nil {
			t.Fatal(err)
		}
		if c := p.Clusters(); c < 65525 || p.ESP.Size < int64(content) || p.ESP.Size > max(36<<20, int64(content)*103/100) {
			t.Errorf("for %d bytes: partition of %d, %d clusters", content, p.ESP.Size, c)
		}
	}
}

func TestRefusedESP(t *testing.T) {
	large := disk.File{Path: "large", Size: 60 << 20}
	for _, c := range []struct {
		name string
		esp  disk.ESP
		want string
	}{
		{"too small", disk.ESP{Size: 32 << 20}, "too small for FAT32"},
		{"does not fit", disk.ESP{Size: 60 << 20, Files: []disk.File{large}},
			"the files need 62915072 bytes (60.0 MiB) and 0 bytes (0.0 MiB) shall stay free, but a partition of 62914560"},
		{"nothing left free", disk.ESP{Size: 64 << 20, Files: []disk.File{large}, Free: 10 << 20}, "10485760 bytes"},
		{"file too large", disk.ESP{Files: []disk.File{{Path: "a/b", Size: 1 << 32}}}, "a/b: 4294967296 bytes"},
		{"too large", disk.ESP{Size: 33 << 30}, "FAT32 ends at"},
		{"free too large", disk.ESP{Free: 33 << 30}, "FAT32 ends at"},
		{"label", disk.ESP{Label: "twelve chars"}, "at most 11"},
		{"case", disk.ESP{Files: []disk.File{espFile("EFI/a", 1), espFile("efi/b", 1)}}, "ignores case"},
		{"twice", disk.ESP{Files: []disk.File{espFile("a", 1), espFile("a", 1)}}, "one name for FAT"},
		{"file as directory", disk.ESP{Files: []disk.File{espFile("a", 1), espFile("a/b", 1)}}, "one name for FAT"},
		{"short name", disk.ESP{Files: []disk.File{espFile("a+b.efi", 1), espFile("a_b.efi", 1)}}, "short name A_B.EFI"},
		{"dots in stem", disk.ESP{Files: []disk.File{espFile("a.b.conf", 1), espFile("ab.con", 1)}}, "short name AB.CON"},
		{"absolute", disk.ESP{Files: []disk.File{espFile("/a", 1)}}, "relative to its root"},
		{"dot dot", disk.ESP{Files: []disk.File{espFile("a/../b", 1)}}, "dot"},
		{"not ASCII", disk.ESP{Files: []disk.File{espFile("Łódź", 1)}}, "printable ASCII"},
		{"colon", disk.ESP{Files: []disk.File{espFile("a:b", 1)}}, "printable ASCII"},
		{"tilde", disk.ESP{Files: []disk.File{espFile("FOOBAR~1.EFI", 1)}}, "printable ASCII"},
		{"no name", disk.ESP{Files: []disk.File{espFile("", 1)}}, "1 to 255 characters"},
		{"long name", disk.ESP{Files: []disk.File{espFile(strings.Repeat("x", 256), 1)}}, "1 to 255 characters"},
	} {
		l := layout(t)
		l.ESP = c.esp
		_, err := l.Plan()
		if err == nil || !strings.HasPrefix(err.Error(), "EFI system partition: ") || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// What changed between plan and write is an error, not another file system than planned.
func TestESPFileThatChanges(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		open func() (io.ReadCloser, error)
		want string
	}{
		{func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("123456")), nil }, "more than the planned 5"},
		{func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("1234")), nil }, "has 4 instead of the planned 5"},
		{func() (io.ReadCloser, error) { return nil, broken }, "broken"},
	} {
		l := layout(t)
		l.ESP.Files = []disk.File{{Path: "EFI/x.efi", Size: 5, Open: c.open}}
		out, err := os.Create(t.TempDir() + "/disk.img")
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		err = disk.Write(t.Context(), out, l)
		if err == nil || !strings.Contains(err.Error(), "EFI/x.efi: ") || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}
