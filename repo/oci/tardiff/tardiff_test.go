package tardiff_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/composefs-boot/composefs-boot/repo/oci/tardiff"
)

// An op is one operation, as it is written.
type op []byte

const (
	data = iota
	open
	copied
	added
	seek
	dict
)

// with is an operation with data.
func with(code byte, b string) op {
	return append(binary.AppendUvarint([]byte{code}, uint64(len(b))), b...)
}

// number is an operation with a number alone.
func number(code byte, n uint64) op { return binary.AppendUvarint([]byte{code}, n) }

// deltaOf writes a delta of a version.
func deltaOf(version int, ops ...op) []byte {
	z, _ := zstd.NewWriter(nil)
	return z.EncodeAll(bytes.Join(asBytes(ops), nil), fmt.Appendf(nil, "tardf%d\n\x00", version))
}

func asBytes(ops []op) (list [][]byte) {
	for _, o := range ops {
		list = append(list, o)
	}
	return list
}

type file struct{ *bytes.Reader }

func (file) Close() error { return nil }

type tree map[string]string

func (t tree) open(path string) (tardiff.File, error) {
	content, ok := t[path]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return file{bytes.NewReader([]byte(content))}, nil
}

func apply(t tree, delta []byte) (string, error) {
	var out bytes.Buffer
	err := tardiff.Apply(&out, bytes.NewReader(delta), t.open, 1<<20)
	return out.String(), err
}

// patchFrom is a zstd frame with the old content as its dictionary, by the reference implementation.
func patchFrom(t *testing.T, old, to string, arguments ...string) string {
	t.Helper()
	dir := t.TempDir()
	in := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	out, err := exec.Command("zstd", append(arguments, "-q", "-c", "--patch-from="+in("old", old), in("new", to))...).Output()
	if err != nil {
		t.Fatalf("zstd --patch-from, of the package zstd, see internal/setup packages: %v", err)
	}
	return string(out)
}

func noise(seed byte, n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return string(b)
}

func TestApply(t *testing.T) {
	old := tree{"a/b": "0123456789", "empty": "", "noise": noise(1, 300_000)}
	changed := old["noise"][:1000] + "something else" + old["noise"][2000:] + "the end"
	for name, c := range map[string]struct {
		version int
		ops     []op
		want    string
	}{
		"nothing":      {1, nil, ""},
		"data":         {1, []op{with(data, "header"), with(data, ""), with(data, "more")}, "headermore"},
		"copy":         {1, []op{with(open, "a/b"), number(copied, 3), with(data, "-"), number(copied, 2), number(copied, 0)}, "012-34"},
		"leading":      {1, []op{with(open, "/a/b"), number(copied, 10)}, "0123456789"},
		"seek":         {1, []op{with(open, "a/b"), number(seek, 8), number(copied, 2), number(seek, 0), number(copied, 1), number(seek, 10)}, "890"},
		"open-again":   {1, []op{with(open, "a/b"), number(copied, 3), with(open, "empty"), with(open, "a/b"), number(copied, 3)}, "012012"},
		"add":          {1, []op{with(open, "a/b"), number(seek, 1), with(added, "\x00\x01\xff"), number(copied, 1)}, "1324"},
		"add-large":    {1, []op{with(open, "noise"), with(added, strings.Repeat("\x00", 300_000))}, old["noise"]},
		"version-2":    {2, []op{with(open, "a/b"), number(copied, 3)}, "012"},
		"dictionary":   {2, []op{with(open, "noise"), with(dict, patchFrom(t, old["noise"], changed)), with(data, "!")}, changed + "!"},
		"window":       {2, []op{with(open, "noise"), with(dict, patchFrom(t, old["noise"], changed, "-19", "--long=29"))}, changed},
		"dict-of-none": {2, []op{with(open, "empty"), with(dict, patchFrom(t, "x", "plain"))}, "plain"},
		"dict-leaves-the-file-at-its-end": {2, []op{with(open, "noise"), with(dict, patchFrom(t, old["noise"], changed)), number(copied, 0),
			number(seek, 0), number(copied, 1)}, changed + old["noise"][:1]},
	} {
		if got, err := apply(old, deltaOf(c.version, c.ops...)); err != nil || got != c.want {
			t.Errorf("%s: %d bytes, want %d, %v", name, len(got), len(c.want), err)
		}
	}
	if n := len(patchFrom(t, old["noise"], changed)); n > 1000 {
		t.Errorf("a patch has %d bytes: the dictionary was not used", n)
	}
}

// Whatever the operations are, they do what the format says.
func TestRandomOperations(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		old := tree{"a": noise(2, random.IntN(100_000)), "b": noise(3, 10+random.IntN(10))}
		var ops []op
		var want strings.Builder
		path, at := "", 0
		for range random.IntN(50) {
			if path == "" {
				path = []string{"a", "b"}[random.IntN(2)]
				ops, at = append(ops, with(open, path)), 0
			}
			content := old[path]
			n := random.IntN(len(content) - at + 1)
			switch random.IntN(5) {
			case 0:
				text := noise(4, n)
				ops = append(ops, with(data, text))
				want.WriteString(text)
			case 1:
				ops = append(ops, number(copied, uint64(n)))
				want.WriteString(content[at : at+n])
				at += n
			case 2:
				text := []byte(noise(5, n))
				ops = append(ops, with(added, string(text)))
				for k := range text {
					want.WriteByte(text[k] + content[at+k])
				}
				at += n
			case 3:
				at = random.IntN(len(content) + 1)
				ops = append(ops, number(seek, uint64(at)))
			case 4:
				path = ""
			}
		}
		var out bytes.Buffer
		if err := tardiff.Apply(&out, bytes.NewReader(deltaOf(1, ops...)), old.open, 1<<30); err != nil || out.String() != want.String() {
			t.Fatalf("%d bytes, want %d, %v", out.Len(), want.Len(), err)
		}
	}
}

// hostile deltas, by what is wrong with them.
var hostile = map[string]struct {
	delta []byte
	err   string
}{
	"empty":                {nil, "it begins with"},
	"short":                {[]byte("tardf"), "it begins with"},
	"version-3":            {deltaOf(3, with(data, "a")), "it begins with"},
	"not-compressed":       {append([]byte("tardf1\n\x00"), with(data, "abcdefgh")...), "magic number mismatch"},
	"cut":                  {deltaOf(1, with(data, noise(1, 5000)))[:2000], "unexpected EOF"},
	"unknown":              {deltaOf(2, number(6, 0)), "operation 0, after 0 bytes: unknown operation 6"},
	"no-size":              {deltaOf(1, op{data}), "unexpected EOF"},
	"size-lies":            {deltaOf(1, append(number(data, 5), "four"...)), "unexpected EOF"},
	"size-65-bits":         {deltaOf(1, append(op{data}, bytes.Repeat([]byte{0xff}, 10)...)), "overflows"},
	"size-64-bits":         {deltaOf(1, number(data, math.MaxUint64)), "too large"},
	"size-63-bits":         {deltaOf(1, number(data, math.MaxInt64)), "unexpected EOF"},
	"path-parent":          {deltaOf(1, with(open, "../etc/passwd")), `path "../etc/passwd": not one of a file`},
	"path-parent-within":   {deltaOf(1, with(open, "a/../a/b")), "not one of a file"},
	"path-dot":             {deltaOf(1, with(open, "./a")), "not one of a file"},
	"path-absolute-twice":  {deltaOf(1, with(open, "//a/b")), "not one of a file"},
	"path-root":            {deltaOf(1, with(open, ".")), "not one of a file"},
	"path-empty":           {deltaOf(1, with(open, "")), "not one of a file"},
	"path-nul":             {deltaOf(1, with(open, "a\x00b")), "not one of a file"},
	"path-long":            {deltaOf(1, with(open, strings.Repeat("a", 4097))), "4097 bytes"},
	"path-huge":            {deltaOf(1, number(open, 1<<60)), "at most 4096"},
	"path-missing":         {deltaOf(1, with(open, "c")), "file does not exist"},
	"copy-none-open":       {deltaOf(1, number(copied, 0)), "none is open"},
	"seek-none-open":       {deltaOf(1, number(seek, 0)), "none is open"},
	"dict-none-open":       {deltaOf(2, number(dict, 0)), "none is open"},
	"none-open-after-fail": {deltaOf(1, with(open, "c"), number(copied, 1)), "file does not exist"},
	"copy-past-end":        {deltaOf(1, with(open, "a/b"), number(copied, 11)), "unexpected EOF"},
	"copy-huge":            {deltaOf(1, with(open, "a/b"), number(seek, 5), number(copied, math.MaxInt64)), "unexpected EOF"},
	"add-past-end":         {deltaOf(1, with(open, "a/b"), with(added, strings.Repeat("a", 11))), "unexpected EOF"},
	"add-at-end":           {deltaOf(1, with(open, "a/b"), number(seek, 10), with(added, "a")), "EOF"},
	"add-huge":             {deltaOf(1, with(open, "a/b"), number(added, 1<<60)), "unexpected EOF"},
	"seek-past-end":        {deltaOf(1, with(open, "a/b"), number(seek, 11)), "position 11, it has 10 bytes"},
	"dict-in-version-1":    {deltaOf(1, with(open, "a/b"), with(dict, "x")), "tardf1 does not know"},
	"dict-no-frame":        {deltaOf(2, with(open, "a/b"), with(dict, "something")), "magic number mismatch"},
	"dict-cut":             {deltaOf(2, with(open, "a/b"), append(number(dict, 1000), "\x28\xb5\x2f\xfd"...)), "unexpected EOF"},
	"dict-copy-after":      {deltaOf(2, with(open, "a/b"), with(dict, "\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00"), number(copied, 1)), "after 0 bytes: unexpected EOF"},
	"bomb":                 {deltaOf(1, with(data, strings.Repeat("a", 2<<20))), "larger than the limit"},
	"idle-bomb":            {deltaOf(1, with(open, "a/b"), bytes.Repeat(number(seek, 1), 1<<19)), "larger than the limit"},
}

var oldTree = tree{"a/b": "0123456789"}

func TestHostile(t *testing.T) {
	for name, c := range hostile {
		if _, err := apply(oldTree, c.delta); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A window that nobody needs, and dictionaries that are asked for again and again.
	window := "\x28\xb5\x2f\xfd\x00\x98\x19\x00\x00\x00\x01a" // 512 MiB, one block of three bytes
	if _, err := apply(oldTree, []byte("tardf1\n\x00"+window)); err == nil || !strings.Contains(err.Error(), "window size exceeded") {
		t.Error(err)
	}
	large := tree{"large": noise(1, 300_000)}
	frame := with(dict, patchFrom(t, large["large"], "a"))
	if _, err := apply(large, deltaOf(2, with(open, "large"), frame, frame, frame)); err != nil {
		t.Error(err)
	}
	if _, err := apply(large, deltaOf(2, with(open, "large"), frame, frame, frame, frame)); !errors.Is(err, tardiff.ErrTooLarge) {
		t.Error(err)
	}
	// Much out of little is for the writer to stop.
	many := deltaOf(1, with(open, "large"), bytes.Repeat(append(number(copied, 300_000), number(seek, 0)...), 100_000))
	stopped := errors.New("enough")
	if err := tardiff.Apply(&upTo{10 << 20, stopped}, bytes.NewReader(many), large.open, 1<<30); !errors.Is(err, stopped) {
		t.Error(err)
	}
}

// upTo takes a number of bytes.
type upTo struct {
	left int
	err  error
}

func (u *upTo) Write(b []byte) (int, error) {
	if u.left -= len(b); u.left < 0 {
		return 0, u.err
	}
	return len(b), nil
}

// Whatever it is, it ends.
func FuzzApply(f *testing.F) {
	for _, c := range hostile {
		if len(c.delta) < 1<<12 {
			f.Add(c.delta)
		}
	}
	f.Add(deltaOf(1, with(open, "a/b"), number(copied, 3), with(added, "abc"), number(seek, 1), with(data, "d")))
	z, _ := zstd.NewWriter(nil, zstd.WithEncoderDictRaw(0, []byte(oldTree["a/b"])))
	f.Add(deltaOf(2, with(open, "a/b"), with(dict, string(z.EncodeAll([]byte("0123456789ab"), nil)))))
	f.Fuzz(func(t *testing.T, delta []byte) {
		tardiff.Apply(&upTo{1 << 20, errors.New("enough")}, bytes.NewReader(delta), oldTree.open, 1<<20)
	})
}

// Operations are what fuzzing should change, rather than compressed bytes.
func FuzzOperations(f *testing.F) {
	f.Add(byte(1), []byte(with(data, "abc")))
	f.Add(byte(2), bytes.Join([][]byte{with(open, "a/b"), number(copied, 3), with(added, "abc"), number(seek, 1), with(dict, "x")}, nil))
	f.Fuzz(func(t *testing.T, version byte, ops []byte) {
		tardiff.Apply(&upTo{1 << 20, errors.New("enough")}, bytes.NewReader(deltaOf(int(version%2+1), ops)), oldTree.open, 1<<20)
	})
}
