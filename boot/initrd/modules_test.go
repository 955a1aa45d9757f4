package initrd

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// depmodDir makes the files that depmod writes, without modules.
func depmodDir(t *testing.T, files map[string]string) fs.FS {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root.FS()
}

const someDep = `k/virtio_blk.ko.xz:
k/erofs.ko.xz: k/lib/libcrc32c.ko.xz k/lib/lz4.ko.xz
k/lib/libcrc32c.ko.xz:
k/lib/lz4.ko.xz:
k/btrfs.ko.xz: k/xor.ko.xz k/lib/libcrc32c.ko.xz
k/xfs.ko.xz: k/lib/libcrc32c.ko.xz k/xor.ko.xz
k/xor.ko.xz:
k/xxhash_generic.ko.xz:
k/usb-storage.ko.xz: k/scsi_mod.ko.xz
k/scsi_mod.ko.xz:
k/one.ko: k/scsi_mod.ko.xz
k/two.ko:
k/late.ko:
k/other.ko:
`

// Modules come after what they need; those of a root's file system in a list of their own; soft dependencies by alias, in a
// circle, and after.
func TestClosure(t *testing.T) {
	d, err := readDepmod(depmodDir(t, map[string]string{
		"modules.dep": someDep,
		"modules.softdep": "# x\nsoftdep libcrc32c pre: crc32c\nsoftdep btrfs pre: xxhash64\nsoftdep one pre: two post: late missing\n" +
			"softdep two pre: one\nsoftdep usb_storage other\n",
		"modules.weakdep": "weakdep two xor\n",
		"modules.alias":   "alias xxhash64 xxhash_generic\nalias pci:v*d* other\nalias crc32c crc32c_generic\n",
		"modules.builtin": "kernel/fs/ext4/ext4.ko\nkernel/crypto/crc32c-generic.ko\n",
	}))
	if err != nil {
		t.Fatal(err)
	}
	list, err := d.choose([]string{"one", "ext4", "crc32c"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range list {
		stem, _ := cutCompression(m.file)
		got = append(got, m.when+":"+strings.TrimSuffix(filepath.Base(stem), ".ko"))
	}
	want := "boot:virtio_blk boot:scsi_mod boot:usb-storage boot:lz4 boot:libcrc32c boot:erofs boot:xor boot:two boot:one boot:late " +
		"btrfs:xxhash_generic btrfs:btrfs xfs:xfs"
	if strings.Join(got, " ") != want {
		t.Errorf("%s\nwant %s", strings.Join(got, " "), want)
	}
	if _, err := d.choose([]string{"nonesuch"}); err == nil || !strings.Contains(err.Error(), "module nonesuch: this kernel has none") {
		t.Error(err)
	}
}

func TestHostileDepmod(t *testing.T) {
	for text, want := range map[string]string{
		"k/a.ko":                             "modules.dep: line 1: ",
		"k/a.ko:\n../../etc/shadow:":         "modules.dep: line 2: ",
		"/etc/shadow.ko:":                    "want a path below",
		"k/a.ko: k/../../b.ko":               "want a path below",
		"k/./a.ko:":                          "want a path below",
		"k/a.ko: \x00":                       "want a path below",
		"softdep":                            "",
		strings.Repeat("k/a.ko:\n", 9) + ":": "want a path below",
	} {
		if _, err := readDepmod(depmodDir(t, map[string]string{"modules.dep": text})); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if _, err := readDepmod(depmodDir(t, nil)); err == nil || !strings.Contains(err.Error(), "run depmod") {
		t.Error(err)
	}
	if _, err := readDepmod(depmodDir(t, map[string]string{"modules.dep": "", "modules.softdep": "softdep\n"})); err == nil {
		t.Error("a softdep of nothing is accepted")
	}
}

func FuzzDepmod(f *testing.F) {
	f.Add(someDep, "softdep btrfs pre: xor\n", "alias a b\n")
	f.Fuzz(func(t *testing.T, dep, soft, alias string) {
		d := &depmod{file: map[string]string{}, needs: map[string][]string{}, before: map[string][]string{}, after: map[string][]string{},
			alias: map[string][]string{}, builtin: map[string]bool{}}
		for line := range strings.Lines(dep) {
			if d.dep(strings.TrimSpace(line)) != nil {
				return
			}
		}
		for line := range strings.Lines(soft) {
			if d.softdep(line) != nil {
				return
			}
		}
		for line := range strings.Lines(alias) {
			d.aliases(line)
		}
		list, err := d.choose(nil)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, m := range list {
			if seen[m.when+m.file] || !filepath.IsLocal(m.file) {
				t.Errorf("%+v", list)
			}
			seen[m.when+m.file] = true
		}
	})
}
