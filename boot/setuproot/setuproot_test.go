package setuproot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

func TestParseConfig(t *testing.T) {
	for text, want := range map[string]Config{
		"":                                                 DefaultConfig,
		"# nothing\n\n[etc]\n[var]\n":                      DefaultConfig,
		"[etc]\nmount = \"transient\"":                     {Etc: Transient, Var: Bind},
		"[etc]\ntransient = true # yes":                    {Etc: Transient, Var: Bind},
		"[etc]\ntransient=true\nmount='none'":              {Etc: None, Var: Bind},
		"[var]\r\nmount = \"overlay\"\r\n":                 {Etc: Overlay, Var: Overlay},
		"[root]\ntransient = true\n[ var ]":                {Etc: Overlay, Var: Bind, TransientRoot: true},
		"[root]\ntransient = false\n":                      DefaultConfig,
		"[init]\nsigned-cmdline = true":                    {Etc: Overlay, Var: Bind, SignedCmdline: true},
		"[etc]\nmount = \"bind\"\n[var]\nmount = \"none\"": {Etc: Bind, Var: None},
	} {
		if got, err := ParseConfig([]byte(text)); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for text, want := range map[string]string{
		"[usr]":                                 `line 1: table "[usr]"`,
		"[etc":                                  "line 1: table",
		"mount = \"none\"":                      "line 1:",
		"\n[etc]\nmount = none":                 "line 3: mount = none",
		"[etc]\nmount = \"rw\"":                 "line 2:",
		"[etc]\nmount":                          "line 2:",
		"[etc]\ntransient = yes":                "want true or false",
		"[etc]\nverity = false":                 "unknown key verity in [etc]",
		"[root]\nmount = \"bind\"":              "unknown key mount in [root]",
		"[init]\ntransient = true":              "unknown key transient in [init]",
		"[init]\nsigned-cmdline = 1":            "want true or false",
		"[var]\nsigned-cmdline = true":          "unknown key signed-cmdline in [var]",
		"[etc]\n[etc]":                          "a second table",
		"[etc]\nmount=\"none\"\nmount=\"bind\"": "given twice",
		strings.Repeat("#", maxConfig+1):        "larger than",
	} {
		if _, err := ParseConfig([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("[etc]\nmount = \"none\"\n[root]\ntransient = true"))
	f.Add([]byte("[[etc]]\n= =\n\"\"\"\n\x00"))
	f.Fuzz(func(t *testing.T, b []byte) { ParseConfig(b) })
}

var (
	strong   = strings.Repeat("a", 128)
	weak     = strings.Repeat("b", 64)
	newest   = Abilities{Erofs: true, Overlay: true, Verity: true, DataLayers: true, LayerFD: true, FileErofs: true, FloatTrees: true}
	linux612 = Abilities{Erofs: true, Overlay: true, Verity: true, DataLayers: true, FileErofs: true}
	linux61  = Abilities{Erofs: true, Overlay: true, Explanation: " (6.1.0)"}
)

func world(t *testing.T, cmdline string, a Abilities, there ...bool) World {
	t.Helper()
	c, err := karg.Parse(cmdline)
	if err != nil {
		t.Fatal(err)
	}
	return World{Choice: c, Config: DefaultConfig, Abilities: a, There: there, Sysroot: "/sysroot", Target: "/sysroot"}
}

// short makes digests readable.
func short(s string) string {
	return strings.NewReplacer(strong, "STRONG", weak, "WEAK").Replace(s)
}

func TestPlan(t *testing.T) {
	transient := world(t, "composefs=?"+weak, linux612, true)
	transient.Config = Config{Etc: Transient, Var: None, TransientRoot: true}
	transient.Target = "/mnt"
	bound := world(t, "composefs="+weak, newest, false)
	bound.RootFS = "/some/root"
	noFile := world(t, "composefs="+weak, newest, true)
	noFile.Abilities.FileErofs = false
	noFile.Config = Config{Etc: Bind, Var: Overlay}
	for name, c := range map[string]struct {
		w    World
		want string
	}{
		"newest kernel": {world(t, "composefs.digest=v1-sha512-12:"+strong, newest, true), `open the physical root at /sysroot
open the repository composefs in it
open image STRONG
measure it: sha512 must be its fs-verity digest
mount erofs from the file
mount overlay: the image over objects, verity=require, layers as descriptors
make /etc writable in state/deploy/STRONG/etc, layers as descriptors
mount state/deploy/STRONG/var at /var
mount the physical root at /sysroot
replace /sysroot by the new root
`},
		"6.12, transient, unverified": {transient, `work in a private mount namespace
open the physical root at /sysroot
open the repository composefs in it
open image WEAK
do not require fs-verity, as "?" in the argument asks for
mount erofs from the file
mount overlay: the image over objects, without verity, layers as paths
make / writable in memory, layers as paths
make /etc writable in memory, layers as paths
mount the physical root at /sysroot
attach the new root at /mnt
`},
		"a directory instead of an image": {bound, `take /some/root as the root, unverified
open the physical root at /sysroot
make /etc writable in state/deploy/WEAK/etc, layers as descriptors
mount state/deploy/WEAK/var at /var
mount the physical root at /sysroot
replace /sysroot by the new root
`},
		"loop device": {noFile, `open the physical root at /sysroot
open the repository composefs in it
open image WEAK
measure it: sha256 must be its fs-verity digest
mount erofs through a loop device
mount overlay: the image over objects, verity=require, layers as descriptors
mount state/deploy/WEAK/etc at /etc
make /var writable in state/deploy/WEAK/var, layers as descriptors
mount the physical root at /sysroot
replace /sysroot by the new root
`},
	} {
		steps, err := c.w.Plan()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := short(Format(steps)); got != c.want {
			t.Errorf("%s:\n%swant\n%s", name, got, c.want)
		}
	}
}

func TestChoice(t *testing.T) {
	v1 := "composefs.digest=v1-sha512-12:" + strong
	for _, c := range []struct {
		cmdline string
		there   []bool
		want    string // part of the plan, or of the refusal
	}{
		{v1 + " composefs=" + strings.Repeat("c", 128), []bool{false, true}, "open image " + strings.Repeat("c", 128)},
		{v1 + " composefs=" + weak, []bool{true, true}, "open image STRONG"},
		{v1 + " composefs=" + weak, []bool{false, true}, "STRONG is missing on the disk, and composefs=WEAK is weaker"},
		{v1 + " composefs=?" + weak, []bool{false, true}, "is weaker"},
		{"composefs=?" + weak + " " + v1, []bool{false, true}, "is weaker"}, // the choice has v1 first
		{"composefs=?" + weak + " " + v1, []bool{true, true}, "open image STRONG"},
		{v1, []bool{false}, "STRONG is missing on the disk"},
		{v1 + " composefs=" + weak, []bool{false, false}, "STRONG is missing on the disk"},
	} {
		steps, err := world(t, c.cmdline, newest, c.there...).Plan()
		got := short(Format(steps))
		if err != nil {
			got = short(err.Error())
			if !errors.Is(err, ErrRefused) {
				t.Errorf("%s: %v is no refusal", short(c.cmdline), err)
			}
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%s %v: %s, want %s", short(c.cmdline), c.there, got, c.want)
		}
	}
}

func TestKernelsThatLackSomething(t *testing.T) {
	without := func(change func(*Abilities)) Abilities {
		a := newest
		change(&a)
		return a
	}
	for _, c := range []struct {
		cmdline string
		a       Abilities
		want    string
	}{
		{"composefs=" + weak, linux61, "this kernel (6.1.0) lacks data-only layers of overlayfs (Linux 6.7)"},
		{"composefs=?" + weak, linux61, "lacks data-only layers"},
		{"composefs=" + weak, without(func(a *Abilities) { a.Verity = false }), "lacks verity=require"},
		{"composefs=?" + weak, without(func(a *Abilities) { a.Verity = false }), ""},
		{"composefs=" + weak, without(func(a *Abilities) { a.Erofs = false }), "module erofs"},
		{"composefs=" + weak, without(func(a *Abilities) { a.Overlay = false }), "module overlay"},
		{"composefs=" + weak, Abilities{NotAllowed: true}, "needs root"},
	} {
		_, err := world(t, c.cmdline, c.a, true).Plan()
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", short(c.cmdline), err, c.want)
		}
	}
}

// TestMain is also the program that runs in a mount namespace of its own, where it may mount what it likes.
func TestMain(m *testing.M) {
	if os.Getenv("SETUPROOT_TEST_CHILD") == "" {
		os.Exit(m.Run())
	}
	fail := func(err error) {
		if err != nil {
			fmt.Println("ERROR", err)
			os.Exit(1)
		}
	}
	fail(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	if dir := os.Getenv("DIR"); dir != "" {
		fail(os.Chdir(dir))
	}
	config, err := ParseConfig([]byte(os.Getenv("CONFIG")))
	fail(err)
	w := World{Config: config, Sysroot: os.Getenv("SYSROOT"), Target: os.Getenv("TARGET"), RootFS: os.Getenv("ROOTFS")}
	// That /sysroot is a mount is what a target that is replaced relies on.
	fail(unix.Mount(w.Sysroot, w.Sysroot, "", unix.MS_BIND, ""))
	if os.Getenv("RO") != "" {
		fail(unix.Mount("", w.Sysroot, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""))
	}
	w.Choice, err = karg.Parse(os.Getenv("CMDLINE"))
	fail(err)
	fail(w.Look())
	w.Abilities.FloatTrees = w.Abilities.FloatTrees && !strings.Contains(os.Getenv("OLD"), "float")
	w.Abilities.LayerFD = w.Abilities.LayerFD && !strings.Contains(os.Getenv("OLD"), "fd")
	w.Abilities.FileErofs = w.Abilities.FileErofs && !strings.Contains(os.Getenv("OLD"), "file")
	steps, err := w.Plan()
	fail(err)
	before, _ := os.ReadFile("/proc/self/mountinfo")
	result, err := Execute(steps)
	for _, warning := range result.Warnings {
		fmt.Println("WARNING", warning)
	}
	if after, _ := os.ReadFile("/proc/self/mountinfo"); err != nil && !bytes.Equal(before, after) {
		fmt.Println("LEFT BEHIND", string(after))
	}
	fail(err)
	cmd := exec.Command("sh", "-euc", os.Getenv("SCRIPT"))
	cmd.Dir = w.Target
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	fail(cmd.Run())
	os.Exit(0)
}

// machine is a physical root with a repository and one image, for a file system without fs-verity.
type machine struct {
	sysroot string
	digest  fsverity.Digest
}

func newMachine(t *testing.T) machine {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	for _, d := range []string{"usr/lib", "etc", "var", "sysroot"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(filepath.Join(tree, "var"), 0o750)
	os.Chown(filepath.Join(tree, "var"), 7, 7)
	os.WriteFile(filepath.Join(tree, "usr/lib/large"), bytes.Repeat([]byte("content "), 1000), 0o644)
	os.WriteFile(filepath.Join(tree, "etc/small"), []byte("from the image\n"), 0o644)
	sysroot := filepath.Join(dir, "sysroot")
	os.Mkdir(sysroot, 0o755)
	path := filepath.Join(sysroot, "composefs")
	if _, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA512, Format: erofs.V1, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	i, err := r.Begin(context.Background(), repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Abort()
	root, err := scan.Dir(context.Background(), tree, i, scan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	digest, err := i.PutImage(root, erofs.V1, "")
	if err == nil {
		err = i.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	return machine{sysroot, digest}
}

// run runs the child and returns what it printed.
func (m machine) run(t *testing.T, env ...string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SETUPROOT_TEST_CHILD=1", "SYSROOT="+m.sysroot, "TARGET="+m.sysroot,
		"CMDLINE="+karg.Make(m.digest, 1, true).String(), "SCRIPT=true")
	cmd.Env = append(cmd.Env, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v (mounting needs root)", err)
	}
	return string(out)
}

// The root is mounted in all the ways that kernels make necessary. Only what needs fs-verity is left to the guests.
func TestExecute(t *testing.T) {
	for _, old := range []string{"", "float", "fd", "float fd"} {
		m := newMachine(t)
		state := filepath.Join(m.sysroot, "state/deploy", m.digest.String())
		out := m.run(t, "OLD="+old, `SCRIPT=
			test $(wc -c < usr/lib/large) = 8000
			test "$(cat etc/small)" = "from the image"
			echo changed > etc/small
			echo new > var/file
			! touch usr/new 2>/dev/null
			test -d sysroot/composefs/objects
			test -e sysroot/state/deploy/*/etc/upper/small
			grep -q "overlay .*metacopy=on" /proc/self/mounts
			test "$(stat -c %a etc)" = 755
			test $(grep -c " $PWD[ /]" /proc/self/mounts) = 4
			echo fine`)
		if !strings.HasSuffix(out, "fine\n") || !strings.Contains(out, "NOT verified") {
			t.Errorf("without %q: %s", old, out)
		}
		if b, _ := os.ReadFile(filepath.Join(state, "etc/upper/small")); string(b) != "changed\n" {
			t.Errorf("without %q: /etc is not kept: %q", old, b)
		}
		// A reboot: the state is there.
		out = m.run(t, "OLD="+old, `SCRIPT=test "$(cat etc/small var/file)" = "changed
new"; echo fine`)
		if !strings.HasSuffix(out, "fine\n") {
			t.Errorf("without %q: after a reboot: %s", old, out)
		}
		out = m.run(t, "OLD="+old, "CONFIG=[root]\ntransient = true\n[etc]\nmount = \"transient\"\n[var]\nmount = \"none\"", `SCRIPT=
			test "$(cat etc/small)" = "from the image"
			echo x > etc/small; echo x > usr/lib/new; echo x > var/x
			test $(wc -c < usr/lib/large) = 8000
			echo fine`)
		if !strings.HasSuffix(out, "fine\n") {
			t.Errorf("without %q: transient: %s", old, out)
		}
		other := t.TempDir()
		out = m.run(t, "OLD="+old, "TARGET="+other, "SCRIPT=test -e usr/lib/large; test -d "+m.sysroot+"/composefs; echo fine")
		if !strings.HasSuffix(out, "fine\n") {
			t.Errorf("without %q: at another place: %s", old, out)
		}
		// Relative to a working directory, which has to be the same when the root is attached.
		out = m.run(t, "OLD="+old, "DIR="+filepath.Dir(other), "TARGET="+filepath.Base(other), "SCRIPT=test -e usr/lib/large; pwd")
		if !strings.HasSuffix(out, other+"\n") {
			t.Errorf("without %q: at a relative place: %s", old, out)
		}
	}
}

// What is mounted from the state instead of the image's directory: an empty /var is made, with the looks of the image's; an
// empty /etc is not, since it would have no accounts.
func TestBind(t *testing.T) {
	m := newMachine(t)
	state := filepath.Join(m.sysroot, "state/deploy", m.digest.String())
	const config = "CONFIG=[etc]\nmount = \"bind\""
	for range 2 {
		out := m.run(t, config)
		if !strings.Contains(out, "ERROR") || !strings.Contains(out, `with mount = "bind" it must be there`) || strings.Contains(out, "LEFT BEHIND") {
			t.Error(out)
		}
	}
	if err := os.MkdirAll(filepath.Join(state, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if out := m.run(t, config, "SCRIPT=echo x > etc/new; stat -c '%a %u' var"); !strings.HasSuffix(out, "\n750 7\n") {
		t.Error(out)
	}
	if _, err := os.Stat(filepath.Join(state, "etc/new")); err != nil {
		t.Error(err)
	}
}

// The kernel's EROFS reads only what the plan will not refuse: whether it mounts files is not tried on a replaced image.
func TestReplacedImageIsNotShownToTheKernel(t *testing.T) {
	m := newMachine(t)
	for insecure, want := range map[bool]bool{true: true, false: false} {
		w := World{Choice: karg.Choice{Images: []karg.Image{karg.Make(m.digest, 1, insecure)}}, Sysroot: m.sysroot, Target: m.sysroot}
		if err := w.Look(); err != nil || !w.There[0] || w.Abilities.FileErofs != want {
			t.Errorf("insecure %v: %+v, %v", insecure, w, err)
		}
	}
}

func TestRootFS(t *testing.T) {
	m := newMachine(t)
	root := filepath.Join(filepath.Dir(m.sysroot), "tree")
	out := m.run(t, "ROOTFS="+root, `SCRIPT=cat etc/small; echo x > etc/small; echo fine`)
	if out != "from the image\nfine\n" {
		t.Error(out)
	}
}

// What somebody planted on the disk is refused, and a refusal leaves nothing mounted.
func TestRefusals(t *testing.T) {
	elsewhere := t.TempDir()
	for name, c := range map[string]struct {
		plant func(m machine, state string) error
		want  string
	}{
		"state is a symlink": {func(m machine, state string) error {
			return os.Symlink(elsewhere, filepath.Join(m.sysroot, "state"))
		}, "state: a symbolic link"},
		"deployment is a symlink": {func(m machine, state string) error {
			os.MkdirAll(filepath.Dir(state), 0o755)
			return os.Symlink(elsewhere, state)
		}, "a symbolic link"},
		"etc is a symlink": {func(m machine, state string) error {
			os.MkdirAll(state, 0o755)
			return os.Symlink(elsewhere, filepath.Join(state, "etc"))
		}, "etc: a symbolic link"},
		"upper is a symlink": {func(m machine, state string) error {
			os.MkdirAll(filepath.Join(state, "etc"), 0o755)
			return os.Symlink(elsewhere, filepath.Join(state, "etc/upper"))
		}, "upper: a symbolic link"},
		"var is a symlink": {func(m machine, state string) error {
			os.MkdirAll(state, 0o755)
			return os.Symlink(elsewhere, filepath.Join(state, "var"))
		}, "var: a symbolic link"},
		"var is a symlink out of the state": {func(m machine, state string) error {
			os.MkdirAll(state, 0o755)
			return os.Symlink("../../os/../var", filepath.Join(state, "var"))
		}, "var: a symbolic link"},
		"var is bootc's, and leads to a symlink": {func(m machine, state string) error {
			os.MkdirAll(state, 0o755)
			os.MkdirAll(filepath.Join(m.sysroot, "state/os/default"), 0o755)
			return errors.Join(os.Symlink("../../os/default/var", filepath.Join(state, "var")),
				os.Symlink(elsewhere, filepath.Join(m.sysroot, "state/os/default/var")))
		}, "a symbolic link"},
		"images is a symlink": {func(m machine, state string) error {
			images := filepath.Join(m.sysroot, "composefs/images")
			return errors.Join(os.Rename(images, images+"2"), os.Symlink("images2", images))
		}, "images: a symbolic link"},
		"objects is a symlink": {func(m machine, state string) error {
			objects := filepath.Join(m.sysroot, "composefs/objects")
			return errors.Join(os.Rename(objects, objects+"2"), os.Symlink("objects2", objects))
		}, "a symbolic link"},
		"image is missing": {func(m machine, state string) error {
			return os.RemoveAll(filepath.Join(m.sysroot, "composefs/images"))
		}, "is missing on the disk"},
		"image object is missing": {func(m machine, state string) error {
			return os.Remove(filepath.Join(m.sysroot, "composefs/objects", m.digest.ObjectPath()))
		}, "is missing on the disk"},
		"image is a fifo": {func(m machine, state string) error {
			path := filepath.Join(m.sysroot, "composefs/objects", m.digest.ObjectPath())
			return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o644))
		}, "not a regular file"},
		"image is a device": {func(m machine, state string) error {
			path := filepath.Join(m.sysroot, "composefs/objects", m.digest.ObjectPath())
			return errors.Join(os.Remove(path), unix.Mknod(path, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))))
		}, "not a regular file"},
		"image is a symlink": {func(m machine, state string) error {
			path := filepath.Join(m.sysroot, "composefs/objects", m.digest.ObjectPath())
			return errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path))
		}, "not a regular file"},
		"image is a directory": {func(m machine, state string) error {
			path := filepath.Join(m.sysroot, "composefs/objects", m.digest.ObjectPath())
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o755))
		}, "not a regular file"},
		"image is junk": {func(m machine, state string) error {
			return os.WriteFile(filepath.Join(m.sysroot, "composefs/objects", m.digest.ObjectPath()), make([]byte, 8192), 0o644)
		}, "its content was changed"},
	} {
		for _, old := range []string{"", "float fd"} {
			m := newMachine(t)
			if err := c.plant(m, filepath.Join(m.sysroot, "state/deploy", m.digest.String())); err != nil {
				t.Fatal(err)
			}
			out := m.run(t, "OLD="+old)
			if !strings.Contains(out, "ERROR") || !strings.Contains(out, c.want) || strings.Contains(out, "LEFT BEHIND") {
				t.Errorf("%s, without %q: %s", name, old, out)
			}
		}
	}
	// Without "?", a file system without fs-verity is refused.
	m := newMachine(t)
	if out := m.run(t, "CMDLINE="+karg.Make(m.digest, 1, false).String()); !strings.Contains(out, "ERROR") ||
		!strings.Contains(out, "replaced, or installed without fs-verity") {
		t.Error(out)
	}
	if left, _ := os.ReadDir(elsewhere); len(left) != 0 {
		t.Errorf("something was written through a planted link: %v", left)
	}
}

// A physical root that is mounted read-only has no place for changes, and the way out is said.
func TestReadOnlyPhysicalRoot(t *testing.T) {
	for _, old := range []string{"", "float fd"} {
		m := newMachine(t)
		for name, c := range map[string]struct{ config, want string }{
			"no state":  {"", "is missing, and the physical root is mounted read-only: add \"rw\""},
			"in memory": {"[etc]\nmount = \"transient\"\n[var]\nmount = \"none\"", "fine\n"},
		} {
			out := m.run(t, "RO=1", "OLD="+old, "CONFIG="+c.config, "SCRIPT=echo x > etc/new; ! touch sysroot/x 2>/dev/null; echo fine")
			if !strings.Contains(out, c.want) || strings.Contains(out, "LEFT BEHIND") {
				t.Errorf("%s, without %q: %s", name, old, out)
			}
		}
		m.run(t) // makes the state
		out := m.run(t, "RO=1", "OLD="+old)
		if !strings.Contains(out, "ERROR") || !strings.Contains(out, "read-only: add \"rw\"") {
			t.Errorf("with state, without %q: %s", old, out)
		}
	}
}

// The one link that belongs in a deployment is followed.
func TestSharedVar(t *testing.T) {
	m := newMachine(t)
	state := filepath.Join(m.sysroot, "state/deploy", m.digest.String())
	shared := filepath.Join(m.sysroot, "state/os/default/var")
	os.MkdirAll(state, 0o755)
	os.MkdirAll(shared, 0o755)
	os.Symlink("../../os/default/var", filepath.Join(state, "var"))
	if out := m.run(t, "SCRIPT=echo here > var/file"); strings.Contains(out, "ERROR") {
		t.Error(out)
	}
	if b, _ := os.ReadFile(filepath.Join(shared, "file")); string(b) != "here\n" {
		t.Errorf("%q", b)
	}
}
