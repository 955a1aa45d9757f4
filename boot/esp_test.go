package boot_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

func place(name, content string, loader bool) boot.Place {
	return boot.Place{Path: name, Size: int64(len(content)), Loader: loader,
		Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }}
}

func put(t *testing.T, dir, name, content string) {
	t.Helper()
	name = filepath.Join(dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func systemdBoot(version string) string {
	return "MZ code #### LoaderInfo: systemd-boot " + version + " #### code"
}

// Only our own names are ours: what others have put under a name that they use as well stays.
func TestESPFates(t *testing.T) {
	const loader = "EFI/BOOT/BOOTX64.EFI"
	for _, test := range []struct {
		name, path, there, ours string
		isLoader                bool
		want                    boot.Fate
	}{
		{"new", "EFI/Linux/x/vmlinuz", "", "kernel", false, boot.Write},
		{"same", "EFI/Linux/x/vmlinuz", "kernel", "kernel", false, boot.Same},
		{"same size", "EFI/Linux/x/vmlinuz", "kernel", "kerneL", false, boot.Write},
		{"our damaged file", "EFI/Linux/x/vmlinuz", "kern", "kernel", false, boot.Write},
		{"new loader", loader, "", systemdBoot("257"), true, boot.Write},
		{"same loader", loader, systemdBoot("257"), systemdBoot("257"), true, boot.Same},
		{"older loader", loader, systemdBoot("257.9"), systemdBoot("257.13-1~deb13u1"), true, boot.Write},
		{"newer loader", loader, systemdBoot("262-1"), systemdBoot("257.13-1~deb13u1"), true, boot.Kept},
		{"foreign loader", loader, "MZ shim", systemdBoot("257"), true, boot.Kept},
		{"mark without an end", loader, "#### LoaderInfo: systemd-boot 1" + strings.Repeat("0", 300), systemdBoot("257"), true, boot.Kept},
		{"edited configuration", "loader/loader.conf", "timeout 9\n", "timeout 3\n", true, boot.Kept},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			if test.there != "" {
				put(t, dir, test.path, test.there)
			}
			e, err := boot.Plan{ESP: []boot.Place{place(test.path, test.ours, test.isLoader)}}.PlanESP(dir)
			if err != nil {
				t.Fatal(err)
			}
			if got := e.Files[0].Fate; got != test.want || (e.Need == 0) != (got != boot.Write) {
				t.Errorf("%v, %d bytes needed, want %v", got, e.Need, test.want)
			}
			if err := e.Execute(); err != nil {
				t.Fatal(err)
			}
			want := test.ours
			if test.want == boot.Kept {
				want = test.there
			}
			if got, err := os.ReadFile(filepath.Join(dir, test.path)); err != nil || string(got) != want {
				t.Errorf("%q, %v, want %q", got, err, want)
			}
		})
	}
}

// Whatever is planted under a name is neither followed nor waited for.
func TestESPRefusesWhatIsNoFile(t *testing.T) {
	const name = "EFI/BOOT/BOOTX64.EFI"
	for what, plant := range map[string]func(string) error{
		"symlink":   func(p string) error { return os.Symlink("/etc/passwd", p) },
		"fifo":      func(p string) error { return unix.Mkfifo(p, 0o600) },
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), plant(path)); err != nil {
			t.Fatal(err)
		}
		_, err := boot.Plan{ESP: []boot.Place{place(name, "x", true)}}.PlanESP(dir)
		if err == nil || !strings.Contains(err.Error(), "not a file: move it away") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// Nothing is written if not all of it fits.
func TestESPSpace(t *testing.T) {
	dir := t.TempDir()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	var p boot.Plan
	const large = 4<<30 - 1 // the largest that FAT has
	for k := range int64(st.Bavail)*st.Bsize/large + 8 {
		p.ESP = append(p.ESP, place(fmt.Sprintf("EFI/Linux/x/initrd%d", k), "x", false))
		p.ESP[k].Size = large
	}
	e, err := p.PlanESP(dir)
	if err == nil || !strings.Contains(err.Error(), "remove old boot entries") || e.Need <= e.Free {
		t.Errorf("%d of %d: %v", e.Need, e.Free, err)
	}
	if files, _ := os.ReadDir(dir); len(files) != 0 {
		t.Errorf("%v", files)
	}
	// What is removed before makes room.
	p.Freed = e.Need
	if _, err := p.PlanESP(dir); err != nil {
		t.Error(err)
	}
}

// A file that turns out shorter than planned does not get its name, nor does the entry that names it.
func TestESPFileThatChanged(t *testing.T) {
	dir := t.TempDir()
	short := place("EFI/Linux/x/vmlinuz", "kern", false)
	short.Size = 6
	e, err := boot.Plan{ESP: []boot.Place{short, place("loader/entries/x.conf", "title x\n", false)}}.PlanESP(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Execute(); err == nil || !strings.Contains(err.Error(), "4 bytes, 6 were planned") {
		t.Errorf("%v", err)
	}
	filepath.WalkDir(dir, func(p string, d fs.DirEntry, _ error) error {
		if !d.IsDir() {
			t.Errorf("%s was left", p)
		}
		return nil
	})
}

// statePlan is a deployment with a file in /var.
func statePlan() boot.Plan {
	v, lib := fstree.NewDir(0o755), fstree.NewDir(0o750)
	v.Dir().Set("lib", lib)
	lib.Dir().Set("file", &fstree.Inode{Perm: 0o640, Nlink: 1, Content: fstree.Inline("kept")})
	return boot.Plan{State: "state/deploy/abc", Var: v, Files: []boot.Place{place("state/deploy/abc/abc.origin", "[boot]\n", false)}}
}

// State appears when it is whole. What an interrupted install left does not become part of it.
func TestStateIsWholeOrNotThere(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, "state/.abc.new/var/lib/file", "ke")
	put(t, dir, "state/.abc.new/var/other", "left over")
	if err := statePlan().WriteState(dir, nil); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"var/lib/file": "kept", "abc.origin": "[boot]\n"} {
		if got, err := os.ReadFile(filepath.Join(dir, "state/deploy/abc", name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"state/.abc.new", "state/deploy/abc/var/other"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there", name)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, "state/deploy/abc/var/lib")); err != nil || info.Mode().Perm() != 0o750 {
		t.Errorf("%v, %v", info, err)
	}

	// A name that cannot be written leaves nothing.
	failing := statePlan()
	failing.State = "state/deploy/def"
	failing.Files = nil
	failing.Var.Dir().Set("gone", &fstree.Inode{Perm: 0o640, Nlink: 1, Content: &fstree.Object{Size: 100}})
	broken := errors.New("object is not there")
	err := failing.WriteState(dir, func(string, *fstree.Inode) (io.ReadCloser, error) { return nil, broken })
	if !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	for _, name := range []string{"state/.def.new", "state/deploy/def"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there", name)
		}
	}
}

// A machine's own state stays as it is, with what it has removed; a lost origin comes back.
func TestStateOfTheMachineStays(t *testing.T) {
	dir := t.TempDir()
	p := statePlan()
	if err := p.WriteState(dir, nil); err != nil {
		t.Fatal(err)
	}
	deployment := filepath.Join(dir, p.State)
	if err := errors.Join(os.Remove(filepath.Join(deployment, "var/lib/file")), os.Remove(filepath.Join(deployment, "abc.origin"))); err != nil {
		t.Fatal(err)
	}
	put(t, deployment, "etc/mine", "mine")
	if err := p.WriteState(dir, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(deployment, "var/lib/file")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what the machine removed came back")
	}
	for _, name := range []string{"etc/mine", "abc.origin"} {
		if _, err := os.Lstat(filepath.Join(deployment, name)); err != nil {
			t.Error(err)
		}
	}
}
