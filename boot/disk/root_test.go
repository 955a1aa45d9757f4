package disk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

const metaJSON = `{"version":1,"algorithm":"fsverity-sha512-12"}`

// put writes a file below dir with its directories.
func put(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// putObject writes an object of a repository and returns its path in the file system.
func putObject(t *testing.T, dir string, alg fsverity.Algorithm, data []byte) string {
	t.Helper()
	name := "/composefs/objects/" + fsverity.Of(alg, data).ObjectPath()
	put(t, dir, name, data)
	return name
}

// withZeros is content that has blocks of zeros: they become holes, which fs-verity covers like all else.
func withZeros(size int) []byte {
	b := content("zeros", size)
	clear(b[min(4096, size):min(5*4096, size)])
	clear(b[max(0, size-5000):])
	return b
}

// sampleRepository fills dir with objects of all shapes that matter, and returns their contents by path.
func sampleRepository(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	objects := map[string][]byte{}
	for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
		perBlock := 4096 / alg.Size()
		for _, size := range []int{0, 1, 65, 4095, 4096, 4097, 65535, 65536, 65537, 4096 * perBlock, 4096*perBlock + 1,
			4096*perBlock*perBlock/16 + 77} {
			for _, data := range [][]byte{content(fmt.Sprint(alg, size), size), withZeros(size)} {
				objects[putObject(t, dir, alg, data)] = data
			}
		}
	}
	put(t, dir, "composefs/meta.json", []byte(metaJSON))
	objects["/composefs/meta.json"] = []byte(metaJSON)
	for _, sub := range []string{"composefs/images/refs", "composefs/streams/refs"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(dir, "composefs/images", strings.Repeat("ab", 64))
	if err := os.Symlink("../objects/ab/"+strings.Repeat("ab", 63), image); err != nil {
		t.Fatal(err)
	}
	return objects
}

// debugfs asks debugfs about a partition.
func debugfs(t *testing.T, partition, request string) string {
	t.Helper()
	out := run(t, "debugfs", "-R", request, partition)
	return strings.TrimPrefix(out, strings.SplitAfterN(out, "\n", 2)[0]) // its version
}

func checkExt4(t *testing.T, partition string, p *disk.Plan) {
	t.Helper()
	run(t, "e2fsck", "-f", "-n", partition)
	super := run(t, "dumpe2fs", "-h", partition)
	if !regexp.MustCompile(`Filesystem features:.* verity`).MatchString(super) {
		t.Errorf("no verity in\n%s", super)
	}
	var free int64
	fmt.Sscan(regexp.MustCompile(`Free blocks: *(\d+)`).FindStringSubmatch(super)[1], &free)
	if free*4096 < p.Root.Free {
		t.Errorf("%d bytes free, planned %d", free*4096, p.Root.Free)
	}
}

// checkVerity reads an object the way the kernel does: data, then tree and descriptor after the end.
func checkVerity(t *testing.T, partition, name string, data []byte) {
	t.Helper()
	stat := debugfs(t, partition, "stat "+name)
	for _, want := range []string{"Flags: 0x180000", "User:     0   Group:     0", fmt.Sprintf("Size: %d\n", len(data)), "Mode:  0644"} {
		if !strings.Contains(stat, want) {
			t.Errorf("%s: no %q in\n%s", name, want, stat)
		}
	}
	image, err := os.Open(partition)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	read := func(logical int) []byte {
		block := make([]byte, 4096)
		var physical int64
		fmt.Sscan(debugfs(t, partition, fmt.Sprintf("bmap %s %d", name, logical)), &physical)
		if physical == 0 {
			return block // a hole
		}
		if _, err := image.ReadAt(block, physical*4096); err != nil {
			t.Fatal(err)
		}
		return block
	}
	alg := fsverity.SHA512
	if d, err := fsverity.ParseObjectPath(strings.TrimPrefix(name, "/composefs/objects/")); err == nil {
		alg = d.Algorithm()
	}
	want, _, err := fsverity.MetadataOf(alg, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	blocks := (len(data) + 4095) / 4096
	for k := 0; k < blocks; k += max(1, blocks-1) { // the first and the last
		if got := read(k); !bytes.HasPrefix(got, data[k*4096:min(len(data), k*4096+4096)]) {
			t.Errorf("%s: block %d has other content", name, k)
		}
	}
	next := (len(data) + 65535) / 65536 * 16
	for tree := want.Tree; len(tree) > 0; tree = tree[4096:] {
		if !bytes.Equal(read(next), tree[:4096]) {
			t.Errorf("%s: block %d is not that of the Merkle tree", name, next)
		}
		next++
	}
	tail := read(next)
	if n := binary.LittleEndian.Uint32(tail[4092:]); n != 256 || !bytes.Equal(tail[:256], want.Descriptor) {
		t.Errorf("%s: descriptor of %d bytes: %x", name, n, tail[:80])
	}
}

// The smallest file systems have no journal; where it begins, it must not take the place of the content.
func TestRootJournal(t *testing.T) {
	l := layout(t)
	putObject(t, l.Root.Dir, fsverity.SHA512, content("large", 5<<20))
	_, least := write(t, l)
	for size, want := range map[int64]bool{0: false, 8 << 20: false, 12 << 20: true, 16 << 20: true} {
		l.Size = 0
		if size > 0 {
			l.Size = least.Root.Offset + size + 1<<20
		}
		_, err := l.Plan()
		if size == 8<<20 {
			if err == nil || !strings.Contains(err.Error(), "does not fit") {
				t.Errorf("a journal and 5 MiB in 8 MiB: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		image, p := write(t, l)
		part := extract(t, image, p.Root)
		checkExt4(t, part, p)
		if got := strings.Contains(run(t, "dumpe2fs", "-h", part), "has_journal"); got != want {
			t.Errorf("%d bytes: journal %v, want %v", p.Root.Size, got, want)
		}
	}
}

func TestRootObjectsHaveVerity(t *testing.T) {
	l := layout(t)
	objects := sampleRepository(t, l.Root.Dir)
	l.Root.Free = 5 << 20
	var last, total int64
	l.Progress = func(done, all int64) { last, total = done, all }
	image, p := write(t, l)
	checkGPT(t, image)
	part := extract(t, image, p.Root)
	checkExt4(t, part, p)
	for name, data := range objects {
		checkVerity(t, part, name, data)
	}
	if last != total || total == 0 {
		t.Errorf("progress ends at %d of %d", last, total)
	}
	if out := run(t, "dumpe2fs", "-h", part); !strings.Contains(out, disk.ID(l.Seed, disk.RootFilesystem)) {
		t.Errorf("no UUID in\n%s", out)
	}
	if out := debugfs(t, part, "stat /composefs/images/"+strings.Repeat("ab", 64)); !strings.Contains(out, "Type: symlink") {
		t.Error(out)
	}
}

// What the host's user cannot have in a directory comes from the overlay.
func TestOverlay(t *testing.T) {
	l := layout(t)
	put(t, l.Root.Dir, "state/os/abc/origin", []byte("from Dir"))
	put(t, l.Root.Dir, "state/replaced", []byte("from Dir"))
	tree := fstree.New()
	dir := func(parent *fstree.Inode, name string, perm uint32) *fstree.Inode {
		d := fstree.NewDir(perm)
		parent.Dir().Set(name, d)
		return d
	}
	state := dir(tree.Root, "state", 0o750)
	abc := dir(dir(state, "os", 0o755), "abc", 0o755)
	odd := dir(abc, `odd "names" <12>`, 0o1777)
	odd.UID, odd.GID = 100000, 4000000000
	odd.Mtime = fstree.Time{Sec: 1_000_000_000, Nsec: 999_999_999}
	long := make([]byte, 200<<10)
	copy(long, "long")
	set := func(name string, i *fstree.Inode) *fstree.Inode {
		odd.Dir().Set(name, i)
		return i
	}
	file := set(" lead and trail ", &fstree.Inode{Perm: 0o4755, UID: 7, GID: 8, Content: fstree.Inline("inline"),
		Xattrs: []fstree.Xattr{{Name: "security.capability", Value: []byte("\x00\x01\"\\ \n\xff")}, {Name: "user.empty"}}})
	set("!hard", file)
	set("-f", &fstree.Inode{Perm: 0o600, Content: &fstree.Object{Size: uint64(len(long))}})
	set("#comment", &fstree.Inode{Perm: 0o777, Content: fstree.Symlink(`a "quoted" <target>`)})
	set("<13>", &fstree.Inode{Perm: 0o777, Content: fstree.Symlink(strings.Repeat("t", 1024))})
	set("\xff\xfe", &fstree.Inode{Perm: 0o644, Content: fstree.Inline("")})
	set(strings.Repeat("n", 255), &fstree.Inode{Perm: 0o644, Content: fstree.Inline("x")})
	set("white out", &fstree.Inode{Perm: 0, Content: fstree.Device{}})
	set("block", &fstree.Inode{Perm: 0o660, GID: 6, Content: fstree.Device{Block: true, Rdev: 8<<8 | 1}})
	set("fifo", &fstree.Inode{Perm: 0o600, Content: fstree.Fifo{}})
	state.Dir().Set("replaced", &fstree.Inode{Perm: 0o644, Mtime: fstree.Time{Sec: 1 << 40}, Content: fstree.Inline("overlay")})
	l.Root.Overlay = tree
	l.Root.Open = func(string, *fstree.Inode) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(long)), nil }

	image, p := write(t, l)
	part := extract(t, image, p.Root)
	checkExt4(t, part, p)
	base := `/state/os/abc/odd ""names"" <12>/`
	for _, c := range []struct {
		request string
		want    []string
	}{
		{"cat /state/os/abc/origin", []string{"from Dir"}},
		{"cat /state/replaced", []string{"overlay"}},
		{"stat /state/replaced", []string{"mtime: 0x65e079f0:00000000"}},
		{"stat /state", []string{"Mode:  0750"}},
		{"stat /state/os/abc/origin", []string{"Mode:  0600", "User:     0   Group:     0 "}},
		{`stat "` + base + `."`, []string{"Mode:  01777", "User: 100000   Group: -294967296", "mtime: 0x3b9aca00:ee6b27fc"}},
		{`stat "` + base + ` lead and trail "`, []string{"Mode:  04755", "User:     7   Group:     8", "Links: 2", "Size: 6\n",
			"security.capability (7) = 00 01 22 5c 20 0a ff ", `user.empty (0)`}},
		{`cat "` + base + `!hard"`, []string{"inline"}},
		{`stat "` + base + `-f"`, []string{"Size: 204800\n", "Blockcount: 8\n"}},
		{`stat "` + base + `#comment"`, []string{`Fast link dest: "a "quoted" <target>"`}},
		{`stat "` + base + `<13>"`, []string{"Type: symlink", "Size: 1024\n"}},
		{`stat "` + base + "\xff\xfe\"", []string{"Type: regular", "Size: 0\n"}},
		{`stat "` + base + strings.Repeat("n", 255) + `"`, []string{"Type: regular", "Size: 1\n"}},
		{`stat "` + base + `white out"`, []string{"Type: character special", "Mode:  0000", "0:0"}},
		{`stat "` + base + `block"`, []string{"Type: block special", "08:01", "Group:     6"}},
		{`stat "` + base + `fifo"`, []string{"Type: FIFO"}},
	} {
		out := debugfs(t, part, c.request)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: no %q in\n%s", c.request, want, out)
			}
		}
	}
}

func TestRefusedRoots(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, l *disk.Layout)
		want    string
	}{
		{"flipped bit", func(t *testing.T, l *disk.Layout) {
			name := putObject(t, l.Root.Dir, fsverity.SHA512, []byte("some content"))
			put(t, l.Root.Dir, name, []byte("some c0ntent"))
		}, "damaged object"},
		{"odd file in objects", func(t *testing.T, l *disk.Layout) {
			put(t, l.Root.Dir, "composefs/objects/00/readme", nil)
		}, "/composefs/objects/00/readme: not an object"},
		{"symlink in objects", func(t *testing.T, l *disk.Layout) {
			name := putObject(t, l.Root.Dir, fsverity.SHA512, []byte("some content"))
			if err := os.Remove(filepath.Join(l.Root.Dir, name)); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("/etc/passwd", filepath.Join(l.Root.Dir, name)); err != nil {
				t.Fatal(err)
			}
		}, "not an object"},
		{"unknown algorithm", func(t *testing.T, l *disk.Layout) {
			put(t, l.Root.Dir, "composefs/meta.json", []byte(`{"algorithm":"md5"}`))
		}, `meta.json: unknown fs-verity algorithm "md5"`},
		{"line break", func(t *testing.T, l *disk.Layout) {
			put(t, l.Root.Dir, "a\nrm b", nil)
		}, "line breaks"},
		{"free space", func(t *testing.T, l *disk.Layout) {
			l.Size, l.Root.Free = 100<<20, 80<<20
		}, "of which 83886080 bytes (80.0 MiB) shall stay free"},
		{"label", func(t *testing.T, l *disk.Layout) { l.Root.Label = strings.Repeat("x", 17) }, "at most 16"},
		{"directory over file", func(t *testing.T, l *disk.Layout) {
			put(t, l.Root.Dir, "state", nil)
			l.Root.Overlay = fstree.New()
			l.Root.Overlay.Root.Dir().Set("state", fstree.NewDir(0o755))
		}, "/state: a directory in Dir or in the overlay"},
		{"socket", func(t *testing.T, l *disk.Layout) {
			l.Root.Overlay = fstree.New()
			l.Root.Overlay.Root.Dir().Set("s", &fstree.Inode{Content: fstree.Socket{}})
		}, "/s: a socket"},
		{"unreadable content", func(t *testing.T, l *disk.Layout) {
			l.Root.Overlay = fstree.New()
			l.Root.Overlay.Root.Dir().Set("f", &fstree.Inode{Content: &fstree.Object{Size: 5}})
			l.Root.Open = func(string, *fstree.Inode) (io.ReadCloser, error) {
				return io.NopCloser(strings.NewReader("123456")), nil
			}
		}, "/f: has another size than the planned 5 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := layout(t)
			c.prepare(t, &l)
			out, err := os.Create(t.TempDir() + "/disk.img")
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			err = disk.Write(t.Context(), out, l)
			if err == nil || !strings.HasPrefix(err.Error(), "root partition: ") || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			left, _ := os.ReadDir(filepath.Dir(out.Name()))
			if len(left) != 1 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestMissingTools(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if _, err := layout(t).Plan(); err != nil {
		t.Errorf("with tools in /usr/sbin and an empty PATH: %v", err)
	}
	disk.SetToolDirs(t, t.TempDir())
	_, err := layout(t).Plan()
	if want := "root partition: mke2fs: not found: install e2fsprogs (apt install e2fsprogs)"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// The smallest root partition must hold what it was planned for, whatever its shape.
func TestSmallestRootFits(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(dir *fstree.Directory)
		free    int64
	}{
		{"nothing", func(*fstree.Directory) {}, 0},
		{"much free", func(*fstree.Directory) {}, 20 << 30},
		{"many long names", func(dir *fstree.Directory) {
			for k := range 1000 {
				dir.Set(fmt.Sprintf("%s%05d", strings.Repeat("n", 250), k), &fstree.Inode{Perm: 0o644, Content: fstree.Inline("x")})
			}
		}, 0},
		{"many directories", func(dir *fstree.Directory) {
			for k := range 3000 {
				dir.Set(fmt.Sprint("d", k), fstree.NewDir(0o755))
			}
		}, 0},
		{"long symlinks", func(dir *fstree.Directory) {
			for k := range 1000 {
				dir.Set(fmt.Sprint("l", k), &fstree.Inode{Perm: 0o777, Content: fstree.Symlink(strings.Repeat("x", 1024))})
			}
		}, 0},
		{"attributes", func(dir *fstree.Directory) {
			for k := range 1000 {
				dir.Set(fmt.Sprint("a", k), &fstree.Inode{Content: fstree.Inline(""),
					Xattrs: []fstree.Xattr{{Name: "user.x", Value: content(fmt.Sprint(k), 1000)}}})
			}
		}, 0},
		{"large file", func(dir *fstree.Directory) {
			dir.Set("large", &fstree.Inode{Content: &fstree.Object{Size: 300 << 20}})
		}, 1 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := layout(t)
			l.Root.Free = c.free
			l.Root.Overlay = fstree.New()
			c.prepare(l.Root.Overlay.Root.Dir())
			block := content("block", 1<<20)
			l.Root.Open = func(_ string, i *fstree.Inode) (io.ReadCloser, error) {
				r, w := io.Pipe()
				go func() {
					for range i.Size() >> 20 {
						w.Write(block)
					}
					w.Close()
				}()
				return r, nil
			}
			image, p := write(t, l)
			checkExt4(t, extract(t, image, p.Root), p)
		})
	}
}

// Cancelling ends the writing soon and leaves nothing behind but the unfinished image.
func TestCancel(t *testing.T) {
	l := layout(t)
	for k := range 50 {
		putObject(t, l.Root.Dir, fsverity.SHA512, content(fmt.Sprint(k), 50000))
	}
	ctx, cancel := context.WithCancel(t.Context())
	l.Progress = func(done, total int64) {
		if done > total/2 {
			cancel()
		}
	}
	out, err := os.Create(t.TempDir() + "/disk.img")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := disk.Write(ctx, out, l); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(out.Name())); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}
