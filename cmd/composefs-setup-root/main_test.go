package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const module = "github.com/composefs-boot/composefs-boot/"

// What runs in the initramfs is small, static, and links nothing but what is listed here.
func TestProgramIsSmallAndStatic(t *testing.T) {
	file := filepath.Join(t.TempDir(), "composefs-setup-root")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > 3<<20 {
		t.Errorf("%d bytes, at most 3 MiB", info.Size())
	}
	program, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(program, []byte("ld-linux")) {
		t.Error("not static: it names a dynamic linker")
	}
	for _, dep := range deps(t, ".") {
		switch path, ours := strings.CutPrefix(dep, module); {
		case ours && path != "boot/karg" && path != "boot/setuproot" && path != "boot/pid1" && path != "repo/fsverity" &&
			path != "cmd/composefs-setup-root":
			t.Errorf("links %s", dep)
		case !ours && strings.Contains(strings.Split(dep, "/")[0], ".") && dep != "golang.org/x/sys/unix":
			t.Errorf("links %s", dep)
		case dep == "net" || dep == "encoding/json" || dep == "os/exec":
			t.Errorf("links %s", dep)
		}
	}
}

func deps(t *testing.T, pattern string) []string {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", pattern)
	cmd.Dir = "."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Fields(string(out))
}

// Who may know whom: the format packages know no repository, the repository knows nothing of booting.
func TestRoomsKnowOnlyWhomTheyMay(t *testing.T) {
	for _, rule := range []struct {
		room   string
		mayNot []string
	}{
		{"repo/...", []string{"boot", "uki", "bls", "cmd"}},
		{"bls", []string{"repo", "boot"}},
		{"uki/...", []string{"repo", "boot", "bls", "cmd"}},
		{"repo/fsverity", []string{"repo/fstree", "repo/erofs"}},
		{"repo/fstree", []string{"repo/erofs", "repo/dumpfile", "repo/scan"}},
		{"repo/erofs", []string{"repo/scan", "repo/dumpfile", "repo/splitstream"}},
		{"repo/dumpfile", []string{"repo/scan", "repo/erofs", "repo/splitstream"}},
		{"repo/splitstream", []string{"repo/scan", "repo/erofs"}},
	} {
		if _, err := os.Stat("../../" + strings.TrimSuffix(rule.room, "/...")); err != nil {
			continue // a room that is not built yet
		}
		for _, dep := range deps(t, "../../"+rule.room) {
			path, ours := strings.CutPrefix(dep, module)
			for _, no := range rule.mayNot {
				if ours && (path == no || strings.HasPrefix(path, no+"/")) {
					t.Errorf("%s knows %s", rule.room, path)
				}
			}
			// The repository itself is a package that the formats in it must not know.
			if ours && path == "repo" && rule.room != "repo/..." {
				t.Errorf("%s knows the repository", rule.room)
			}
		}
	}
}

func TestMessagesAreOneHarmlessLine(t *testing.T) {
	if got, want := oneLine("a\x1b[2Jb\r\nc\u202e\xff\x00 \u00e9"), "a?[2Jb?; c?\ufffd? \u00e9"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestRootIsToldByNumber(t *testing.T) {
	dir := t.TempDir()
	device, link := filepath.Join(dir, "gpt-auto-root"), filepath.Join(dir, "systemd/volatile-root")
	btrfs := unix.Stat_t{Dev: unix.Mkdev(0, 31)}
	tellRoot(btrfs, device, link) // not there
	if _, err := os.Lstat(link); err == nil {
		t.Error("a link without a device")
	}
	if err := unix.Mknod(device, unix.S_IFBLK|0o600, int(unix.Mkdev(259, 1000))); err != nil {
		t.Fatal(err)
	}
	for want, st := range map[string]unix.Stat_t{"/dev/block/259:1000": btrfs, "/dev/block/254:2": {Dev: unix.Mkdev(254, 2)}} {
		os.Remove(link)
		tellRoot(st, device, link)
		if got, err := os.Readlink(link); got != want {
			t.Errorf("%q, %v, want %s", got, err, want)
		}
	}
}

func TestOptions(t *testing.T) {
	o, done, err := parse([]string{"--sysroot", "/a", "--cmdline=x y=z", "--config=/c", "--root-fs", "/r", "--dry-run", "--verbose"}, nil)
	want := options{sysroot: "/a", target: "/a", config: "/c", cmdline: "x y=z", rootFS: "/r", hasCmdline: true, hasConfig: true,
		dryRun: true, verbose: true}
	if o != want || done || err != nil {
		t.Errorf("%+v, %v, %v", o, done, err)
	}
	for _, bad := range [][]string{{"--nope"}, {"--sysroot"}, {"--dry-run=1"}, {"positional"}} {
		if _, _, err := parse(bad, nil); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	var out bytes.Buffer
	if _, done, err := parse([]string{"--help"}, &out); !done || err != nil || !strings.Contains(out.String(), "--dry-run") {
		t.Errorf("%v, %v", done, err)
	}
}
