package pid1

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// device is a device with texts at offsets.
func device(size int, at map[int]string) []byte {
	b := make([]byte, size)
	for offset, text := range at {
		copy(b[offset:], text)
	}
	return b
}

const raw = "\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef"

func TestIdentify(t *testing.T) {
	const uuid = "01234567-89ab-cdef-0123-456789abcdef"
	ext4 := map[int]string{1024 + 56: "\x53\xef", 1024 + 104: raw, 1024 + 120: "root"}
	for name, c := range map[string]struct {
		device []byte
		want   Filesystem
		err    string
	}{
		"ext4":  {device(8192, ext4), Filesystem{"ext4", uuid, "root"}, ""},
		"xfs":   {device(4096, map[int]string{0: "XFSB", 32: raw, 108: "twelve bytes"}), Filesystem{"xfs", uuid, "twelve bytes"}, ""},
		"btrfs": {device(1<<17, map[int]string{65600: "_BHRfS_M", 65568: raw, 65835: "data"}), Filesystem{"btrfs", uuid, "data"}, ""},
		"luks":  {device(4096, map[int]string{0: "LUKS\xba\xbe\x00\x02"}), Filesystem{Type: "LUKS"}, ""},

		"empty":                  {nil, Filesystem{}, "no ext4"},
		"zeros":                  {make([]byte, 1<<17), Filesystem{}, "no ext4"},
		"cut-in-magic":           {device(8192, ext4)[:1024+57], Filesystem{}, "no ext4"},
		"cut-in-label":           {device(8192, ext4)[:1024+130], Filesystem{}, "no ext4"},
		"label-without-nul":      {device(1<<17, map[int]string{65600: "_BHRfS_M", 65835: strings.Repeat("x", 256)}), Filesystem{"btrfs", "00000000-0000-0000-0000-000000000000", strings.Repeat("x", 256)}, ""},
		"two-file-systems":       {device(8192, map[int]string{0: "XFSB", 1024 + 56: "\x53\xef"}), Filesystem{}, "signatures of ext4 and xfs"},
		"luks-header-over-btrfs": {device(1<<17, map[int]string{0: "LUKS\xba\xbe", 65600: "_BHRfS_M"}), Filesystem{Type: "LUKS"}, ""},
	} {
		got, err := Identify(bytes.NewReader(c.device))
		if got != c.want || c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if _, err := Identify(broken{}); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("a device that cannot be read: %v", err)
	}
}

type broken struct{}

func (broken) ReadAt([]byte, int64) (int, error) { return 0, io.ErrClosedPipe }

// What mke2fs writes is the judge.
func TestIdentifyRealExt4(t *testing.T) {
	file := filepath.Join(t.TempDir(), "fs")
	const uuid = "c0ffee00-1234-4321-8765-00000000abcd"
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-U", uuid, "-L", "sixteen bytes !!", file, "4M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got, err := Identify(f); err != nil || got != (Filesystem{"ext4", uuid, "sixteen bytes !!"}) {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add([]byte("XFSB"), uint32(0))
	f.Add([]byte("_BHRfS_M"), uint32(65600))
	f.Add([]byte("\x53\xef"), uint32(1080))
	f.Fuzz(func(t *testing.T, b []byte, at uint32) {
		d := make([]byte, 70000)
		copy(d[min(int(at), len(d)):], b)
		if got, err := Identify(bytes.NewReader(d)); err == nil && len(got.Label) > 256 {
			t.Errorf("%+v", got)
		}
		Identify(bytes.NewReader(b))
	})
}
