package extract

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Without privilege no owner, device, set-id bit or privileged attribute is made, and what is left out is counted.
func TestExtractWithoutPrivilege(t *testing.T) {
	tree := fstree.New()
	root := tree.Root.Dir()
	add := func(name string, i *fstree.Inode) { i.UID = 12345; root.Set(name, i) }
	add("device", &fstree.Inode{Content: fstree.Device{Rdev: 0x103}})
	root.Set("device2", root.Lookup("device"))
	add("file", &fstree.Inode{Perm: 0o6755, Content: fstree.Inline("x"), Mtime: fstree.Time{Sec: 1, Nsec: 2},
		Xattrs: []fstree.Xattr{{Name: "security.x"}, {Name: "trusted.x"}, {Name: "user.x", Value: []byte("y")}}})
	add("whiteout", &fstree.Inode{Content: fstree.Device{}})
	dir := t.TempDir()
	x := &Extraction{Objects: &Objects{}}
	if err := x.Run(t.Context(), tree, dir); err != nil {
		t.Fatal(err)
	}
	got := [4]int64{x.Owners.Load(), x.SetID.Load(), x.Devices.Load(), x.Xattrs.Load()}
	// The root directory has an owner, too: that of the test, if that is root.
	want := [4]int64{2, 1, 1, 2}
	if os.Geteuid() != 0 {
		want[0]++
	}
	if got != want {
		t.Errorf("left out: %v, want %v", got, want)
	}
	info, err := os.Lstat(filepath.Join(dir, "file"))
	if err != nil || info.Mode() != 0o755 || !info.ModTime().Equal(time.Unix(1, 2)) {
		t.Errorf("%v, %v, %v", info.Mode(), info.ModTime(), err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "device2")); !os.IsNotExist(err) {
		t.Errorf("another name of a device that was left out: %v", err)
	}
}
