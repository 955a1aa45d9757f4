package delta

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// generate makes a delta in a new directory.
func generate(t testing.TB, l *ostree.Local, opts Options) string {
	t.Helper()
	dir := t.TempDir()
	generateIn(t, l, opts, dir)
	return dir
}

func generateIn(t testing.TB, l *ostree.Local, opts Options, dir string) {
	t.Helper()
	err := Generate(context.Background(), l, opts, func(name string, r io.Reader) error {
		b, err := io.ReadAll(r)
		return errors.Join(err, os.WriteFile(filepath.Join(dir, name), b, 0o644))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestGenerate(t *testing.T) {
	l := vectors(t)
	one := Name{To: checksum(t, first)}
	two := Name{From: checksum(t, first), To: checksum(t, second)}
	for _, test := range []struct {
		name  string
		opts  Options
		parts int
	}{
		{"from nothing", Options{Name: one}, 1},
		{"from a commit", Options{Name: two, MaxDiff: DefaultMaxDiff}, 1},
		{"without changes described", Options{Name: two}, 1},
		{"inline", Options{Name: two, MaxDiff: DefaultMaxDiff, Inline: true}, 1},
		{"small parts", Options{Name: one, MaxPart: 200_000, Inline: true}, 4},
		{"to itself", Options{Name: Name{From: one.To, To: one.To}}, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := generate(t, l, test.opts)
			d := applied(t, l, filepath.Join(dir, "superblock"))
			if d.Name != test.opts.Name || len(d.Parts) != test.parts || len(d.Fallbacks) > 0 {
				t.Errorf("%s with %d parts and %d fallbacks", d.Name, len(d.Parts), len(d.Fallbacks))
			}
			b, _ := os.ReadFile(filepath.Join(dir, "superblock"))
			again, _ := os.ReadFile(filepath.Join(generate(t, l, test.opts), "superblock"))
			if !bytes.Equal(b, again) {
				t.Error("the second delta differs from the first")
			}
		})
	}
}

func TestFallbacks(t *testing.T) {
	l := vectors(t)
	dir := generate(t, l, Options{Name: Name{To: checksum(t, first)}, MinFallback: 100_000})
	d := applied(t, l, filepath.Join(dir, "superblock"))
	if len(d.Fallbacks) == 0 {
		t.Fatal("no fallbacks")
	}
	for _, f := range d.Fallbacks {
		info, err := os.Stat(filepath.Join(l.Path, f.ObjectName.Path(true)))
		if err != nil {
			t.Fatal(err)
		}
		if f.FileSize < 100_000 || f.Size != uint64(info.Size()) {
			t.Errorf("object %s: %d bytes, stored in %d", f.ObjectName, f.FileSize, f.Size)
		}
	}
}

// TestDiff patches one file into another that is like it in some way.
func TestDiff(t *testing.T) {
	r := rand.New(rand.NewChaCha8([32]byte{1}))
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		return b
	}
	join := func(b ...[]byte) []byte { return bytes.Join(b, nil) }
	base := random(50_000)
	moved := bytes.Clone(base)
	for i := 0; i < len(moved); i += 40 {
		moved[i]++
	}
	zeros := make([]byte, 30_000)
	for _, test := range []struct {
		name     string
		old, new []byte
		cost     int // at most
	}{
		{"same", base, base, 100},
		{"empty old", nil, base[:100], 200},
		{"empty new", base, nil, 0},
		{"short", base[:7], base[:5], 20},
		{"inserted", base, join(base[:20_000], random(10), base[20_000:]), 150},
		{"removed", base, join(base[:20_000], base[20_100:]), 150},
		{"swapped", base, join(base[25_000:], base[:25_000]), 150},
		{"a byte in 40", base, moved, 2000},
		{"a byte in 40, and shifted", base, join(random(13), moved), 2000},
		{"zeros", zeros, join(zeros, zeros), 100},
		{"zeros and more", join(base, zeros), join(zeros, base), 200},
		{"other", base, random(50_000), 60_000},
		{"repeated", base[:100], bytes.Repeat(base[:100], 300), 10_000},
	} {
		t.Run(test.name, func(t *testing.T) {
			runs := diff(test.old, test.new)
			if cost := patchCost(runs, test.old, test.new); cost > test.cost {
				t.Errorf("it costs %d, want at most %d", cost, test.cost)
			}
			describeAndMake(t, test.old, test.new)
		})
	}
}

// describeAndMake describes a file by another, and makes it again in both ways.
func describeAndMake(t *testing.T, old, new []byte) {
	t.Helper()
	runs := diff(old, new)
	got, err := io.ReadAll(newPatched(bytes.NewReader(patch(runs, old, new)), bytes.NewReader(old), int64(len(old)), int64(len(new))))
	if err != nil || !bytes.Equal(got, new) {
		t.Errorf("the patch makes another file: %v", err)
	}
	at := 0
	for _, p := range pieces(runs, old, new) {
		if p.old >= 0 && !bytes.Equal(old[p.old:p.old+p.size], new[at:at+p.size]) {
			t.Errorf("piece %+v at %d is another one", p, at)
		}
		at += p.size
	}
	if at != len(new) {
		t.Errorf("pieces of %d bytes, want %d", at, len(new))
	}
}

func TestIndex(t *testing.T) {
	l := vectors(t)
	for _, to := range []string{first, second} {
		b, err := os.ReadFile(filepath.Join(l.Path, IndexPath(checksum(t, to))))
		if err != nil {
			t.Fatal(err)
		}
		d, err := ParseIndex(b)
		if err != nil {
			t.Fatal(err)
		}
		if len(d) != 1 {
			t.Fatalf("%d deltas", len(d))
		}
		for name, sum := range d {
			b, err := os.ReadFile(filepath.Join(l.Path, name.Path(), "superblock"))
			if err != nil || sha256.Sum256(b) != sum {
				t.Errorf("%s: %s, %v", name, sum, err)
			}
		}
		if again, err := d.Index(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("the index is written in another way: %v", err)
		}
	}
}

// TestPeer has ostree apply what Generate makes.
func TestPeer(t *testing.T) {
	run := func(args ...string) {
		t.Helper()
		if out, err := vm.Ostree(t, args...).CombinedOutput(); err != nil {
			t.Fatalf("ostree %v: %v\n%s", args, err, out)
		}
	}
	l := vectors(t)
	one := Name{To: checksum(t, first)}
	two := Name{From: checksum(t, first), To: checksum(t, second)}
	for _, inline := range []bool{false, true} {
		dir := t.TempDir()
		run("--repo="+dir, "init", "--mode=bare-user")
		for _, name := range []Name{one, two} {
			opts := Options{Name: name, MaxDiff: DefaultMaxDiff, MaxPart: 150_000, Inline: inline}
			run("--repo="+dir, "static-delta", "apply-offline", filepath.Join(generate(t, l, opts), "superblock"))
		}
		run("--repo="+dir, "refs", "--create=first", first)
		run("--repo="+dir, "refs", "--create=second", second)
		run("--repo="+dir, "fsck")
	}
}

// TestPeerPull has ostree pull from a repository with our deltas.
func TestPeerPull(t *testing.T) {
	run := func(args ...string) string {
		t.Helper()
		out, err := vm.Ostree(t, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("ostree %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	l := vectors(t)
	os.RemoveAll(filepath.Join(l.Path, "deltas"))
	for _, name := range []Name{{To: checksum(t, first)}, {From: checksum(t, first), To: checksum(t, second)}} {
		dir := filepath.Join(l.Path, name.Path())
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		generateIn(t, l, Options{Name: name, MaxDiff: DefaultMaxDiff, MaxPart: 150_000, MinFallback: 150_000}, dir)
		run("--repo="+l.Path, "static-delta", "show", name.String())
	}
	run("--repo="+l.Path, "summary", "-u")
	dir := t.TempDir()
	run("--repo="+dir, "init", "--mode=bare-user")
	run("--repo="+dir, "remote", "add", "--no-gpg-verify", "origin", "file://"+l.Path)
	for _, commit := range []string{first, second} {
		run("--repo="+dir, "pull", "--require-static-deltas", "origin", "vec/x86_64/one@"+commit)
	}
	run("--repo="+dir, "fsck")
}

// TestSave makes a delta in a repository twice, and removes it.
func TestSave(t *testing.T) {
	l := vectors(t)
	root, err := os.OpenRoot(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	name := Name{From: checksum(t, first), To: checksum(t, second)}
	for _, max := range []int64{DefaultMaxPart, 20_000} {
		if err := Save(context.Background(), root, l, Options{Name: name, MaxPart: max}); err != nil {
			t.Fatal(err)
		}
		d := applied(t, l, filepath.Join(l.Path, name.Path()))
		if several := max < DefaultMaxPart; several != (len(d.Parts) > 1) {
			t.Errorf("%d parts", len(d.Parts))
		}
	}
	scratch := Name{To: checksum(t, first)}
	if names, err := List(root); err != nil || len(names) != 2 || names[0] != scratch || names[1] != name {
		t.Errorf("deltas %v, %v", names, err)
	}
	if left, err := filepath.Glob(filepath.Join(l.Path, "tmp", "static-delta-*")); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
	if err := Remove(root, name); err != nil {
		t.Fatal(err)
	}
	if err := Remove(root, name); !errors.Is(err, ostree.ErrNotFound) {
		t.Errorf("removed again: %v", err)
	}
	if names, err := List(root); err != nil || len(names) != 1 {
		t.Errorf("deltas %v, %v", names, err)
	}
}

// TestDamagedSource makes no delta of objects that are not what they are called.
func TestDamagedSource(t *testing.T) {
	l := vectors(t)
	n := 0
	for o := range objects(t, l, checksum(t, first)) {
		path := filepath.Join(l.Path, o.Path(true))
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if n++; n%10 > 0 {
			continue
		}
		flipped := bytes.Clone(b)
		flipped[len(b)-1] ^= 1
		os.Chmod(path, 0o644)
		if err := os.WriteFile(path, flipped, 0o644); err != nil {
			t.Fatal(err)
		}
		err = Generate(context.Background(), l, Options{Name: Name{To: checksum(t, first)}}, func(string, io.Reader) error { return nil })
		if err == nil {
			t.Errorf("object %s is damaged, and no error", o)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
