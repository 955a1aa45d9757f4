package setuproot_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// rootDisk is a disk whose root has a repository with two images.
type rootDisk struct {
	path   string
	offset int64 // of the root partition
	one    fsverity.Digest
	two    fsverity.Digest
	object fsverity.Digest // of /usr/lib/large in both images
}

// newRootDisk makes the disk. The images have enough files to take several blocks.
func newRootDisk(t *testing.T) rootDisk {
	t.Helper()
	dir := t.TempDir()
	tree := filepath.Join(dir, "tree")
	for _, d := range []string{"usr/lib/many", "etc", "var", "sysroot", "run", "boot"} {
		if err := os.MkdirAll(filepath.Join(tree, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	large := make([]byte, 300_000)
	random := rand.NewChaCha8([32]byte{1})
	random.Read(large)
	write := func(name string, content []byte) {
		if err := os.WriteFile(filepath.Join(tree, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("usr/lib/large", large)
	write("etc/small", []byte("from the image\n"))
	for k := range 300 {
		write(fmt.Sprint("usr/lib/many/", k), fmt.Append(nil, k))
	}
	root := filepath.Join(dir, "root")
	os.Mkdir(root, 0o755)
	path := filepath.Join(root, "composefs")
	if _, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA512, Format: erofs.V1, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	d := rootDisk{path: filepath.Join(dir, "disk.img"), object: fsverity.Of(fsverity.SHA512, large)}
	for n, digest := range []*fsverity.Digest{&d.one, &d.two} {
		write("usr/lib/number", fmt.Append(nil, n))
		i, err := r.Begin(context.Background(), repo.LockOptions{})
		if err != nil {
			t.Fatal(err)
		}
		content, err := scan.Dir(context.Background(), tree, i, scan.Options{})
		if err == nil {
			*digest, err = i.PutImage(content, erofs.V1, fmt.Sprint("os", n))
		}
		if err == nil {
			err = i.Commit()
		}
		i.Abort()
		if err != nil {
			t.Fatal(err)
		}
	}
	out, err := os.Create(d.path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	layout := disk.Layout{Arch: runtime.GOARCH, Seed: []byte("test"), Time: time.Unix(1e9, 0),
		ESP:  disk.ESP{Files: []disk.File{{Path: "README", Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(nil)), nil }}}},
		Root: disk.Root{Dir: root, Overlay: fstree.New(), Free: 8 << 20}}
	plan, err := layout.Plan()
	if err == nil {
		err = plan.Write(context.Background(), out)
	}
	if err != nil {
		t.Fatal(err)
	}
	d.offset = plan.Root.Offset
	return d
}

// copy makes a copy of the disk, in which one byte of a file is changed, if file is not "".
func (d rootDisk) copy(t *testing.T, file string, at int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if out, err := exec.Command("cp", "--sparse=always", d.path, path).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
	if file == "" {
		return path
	}
	// debugfs tells which block of the file system has the file's data.
	out, err := exec.Command("debugfs", "-R", fmt.Sprintf("bmap %s %d", file, at/4096), fmt.Sprintf("%s?offset=%d", path, d.offset)).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	block, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil || block == 0 {
		t.Fatalf("debugfs: %s: %q", file, out)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	where := d.offset + block*4096 + at%4096
	var b [1]byte
	if _, err := f.ReadAt(b[:], where); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], where); err != nil {
		t.Fatal(err)
	}
	return path
}

// guestCase is something that is done to a disk before it is booted from, and what must come of it.
type guestCase struct {
	name    string
	flip    string // file in which a byte is changed, and where
	at      int64
	before  string // shell commands in the guest, with the physical root at /sysroot
	cmdline string
	after   string // shell commands when the root is mounted at /sysroot; "" if it must be refused
	want    string // regular expression for what the console must show
}

func cases(d rootDisk) []guestCase {
	image := "/composefs/objects/" + d.one.ObjectPath()
	object := "/composefs/objects/" + d.object.ObjectPath()
	one, two := karg.Make(d.one, 1, false).String(), karg.Make(d.two, 1, false).String()
	missing := strings.Repeat("0", 128)
	replace := "cp /sysroot" + image + " /run/x; rm /sysroot" + image + "; cp /run/x /sysroot" + image
	sum := fmt.Sprintf("test $(sha256sum < usr/lib/large | cut -c1-4) = $(sha256sum < sysroot%s | cut -c1-4)", object)
	return []guestCase{
		{name: "boots", cmdline: one, want: `overlay ro.*verity=require`, after: `
			grep "/sysroot overlay" /proc/mounts; ` + sum + `
			composefs-boot --quiet --repo sysroot/composefs fsck
			echo changed > etc/small; echo kept > var/file
			test -e sysroot/state/deploy/` + d.one.String() + `/etc/upper/small
			cd /; umount /sysroot/etc /sysroot/var /sysroot/sysroot /sysroot; mount /dev/$DISK /sysroot
			composefs-setup-root --cmdline "` + one + `" --verbose; cd /sysroot
			test "$(cat etc/small var/file)" = "changed
kept"`},
		{name: "state-directory-missing", cmdline: one, before: "rm -rf /sysroot/state", want: "made", after: "test -d sysroot/state/deploy/*/var && echo made"},
		{name: "bit-in-superblock", flip: image, at: 1024 + 16, cmdline: one, want: `composefs-setup-root: mount erofs.*the image cannot be read, its content was changed`},
		{name: "bit-in-image", flip: image, at: 1300, cmdline: one, want: `composefs-setup-root: mount erofs.*the image cannot be read`},
		{name: "bit-in-image-later", flip: image, at: 4096*3 + 5, cmdline: one, want: "unreadable",
			after: "find . -xdev > /dev/null 2>&1 || echo unreadable"},
		{name: "bit-in-object", flip: object, at: 5000, cmdline: one, want: "Input/output error.*\n(.*\n)*the-rest-works",
			after: `! cat usr/lib/large > /dev/null; test "$(cat etc/small)" = "from the image"; test -e usr/lib/many/299; echo the-rest-works`},
		{name: "object-without-verity", cmdline: one, want: "refused-by-overlay", before: "cp /sysroot" + object + " /run/o; rm /sysroot" + object + "; cp /run/o /sysroot" + object,
			after: "cat usr/lib/large > /dev/null 2>&1 || echo refused-by-overlay"},
		{name: "image-without-verity", cmdline: one, before: replace, want: `composefs-setup-root: measure it.*fs-verity is not enabled on the file: it was replaced`},
		{name: "image-missing", cmdline: one, before: "rm /sysroot/composefs/images/" + d.one.String(), want: `composefs-setup-root: refused: image ` + d.one.String()[:8] + `.* is missing on the disk`},
		{name: "digest-of-another-image", cmdline: two, want: `composefs-setup-root: measure it.*has the fs-verity digest ` + d.one.String()[:8],
			before: "rm /sysroot/composefs/objects/" + d.two.ObjectPath() + "; mv /sysroot" + image + " /sysroot/composefs/objects/" + d.two.ObjectPath()},
		{name: "meta-json-deleted", cmdline: one, before: replace + "; rm /sysroot/composefs/meta.json", want: "fs-verity is not enabled on the file"},
		{name: "meta-json-emptied", cmdline: one, before: replace + "; rm /sysroot/composefs/meta.json; : > /sysroot/composefs/meta.json", want: "fs-verity is not enabled on the file"},
		{name: "meta-json-insecure", cmdline: one, want: "fs-verity is not enabled on the file",
			before: replace + "; cd /sysroot/composefs; cp meta.json m; rm meta.json; cp m meta.json; cd /"},
		{name: "second-argument", cmdline: "composefs.digest=v1-sha512-12:" + missing + " " + two, want: `(?s)does not count: another argument of its kind stands before it.*composefs-setup-root: refused: image 00000000.*missing`},
		{name: "weaker-argument-first", cmdline: "composefs=?" + d.two.String() + " composefs.digest=v1-sha512-12:" + missing, want: `composefs-setup-root: refused: image 0000.* is missing.* is weaker`},
		{name: "ref-instead-of-digest", cmdline: "composefs=refs/os0", want: `composefs-setup-root: composefs=refs/os0: digest`},
		{name: "symlink-in-state", cmdline: one, before: "mkdir -p /sysroot/state; ln -s /run /sysroot/state/deploy", want: `composefs-setup-root: .*state/deploy.*a symbolic link`},
		{name: "symlink-in-images", cmdline: one, before: "mv /sysroot/composefs/images /sysroot/composefs/i; ln -s i /sysroot/composefs/images", want: `composefs-setup-root: refused.*images: a symbolic link`},
		{name: "symlink-as-upper", cmdline: one, want: `composefs-setup-root: make /etc writable.*upper: a symbolic link`,
			before: "mkdir -p /sysroot/state/deploy/" + d.one.String() + "/etc; ln -s /run /sysroot/state/deploy/" + d.one.String() + "/etc/upper"},
		{name: "image-name-leads-elsewhere", cmdline: one, want: "the-right-one", after: `test "$(cat usr/lib/number)" = 0 && echo the-right-one`,
			before: "cd /sysroot/composefs/images; ln -sfn ../objects/" + d.two.ObjectPath() + " " + d.one.String() + "; cd /"},
		{name: "image-is-a-fifo", cmdline: one, want: `composefs-setup-root: refused.*not a regular file`,
			before: "rm /sysroot" + image + "; mkfifo /sysroot" + image},
		{name: "ways-of-older-kernels", cmdline: one, want: `(?s)verity=require.*as-float\n.*verity=require.*as-fd\n.*verity=require.*as-float fd file\n`, after: `
			cd /; umount /sysroot/etc /sysroot/var /sysroot/sysroot /sysroot; mount /dev/$DISK /sysroot
			export SETUPROOT_TEST_CHILD=1 SYSROOT=/sysroot TARGET=/sysroot CMDLINE="` + one + `"
			export SCRIPT='grep "/sysroot overlay" /proc/self/mounts; ` + sum + `; echo x > etc/small; echo as-$OLD'
			for OLD in float fd "float fd file"; do export OLD; unshare -m setuproot.test || echo FAILED; done`},
		{name: "repository-made-in-the-guest", cmdline: one, want: `(?s)verity:    required.*status: ok.*the-same`, after: `
			composefs-boot init sysroot/new; composefs-boot -q --repo sysroot/new create-image --no-propagate-usr-to-root usr x
			composefs-boot -q --repo sysroot/new create-image --no-propagate-usr-to-root usr x
			composefs-boot -q --repo sysroot/new --require-verity fsck
			composefs-boot --repo sysroot/new mount refs/x /mnt; cmp /mnt/lib/large usr/lib/large; grep -q "/mnt overlay.*verity=require" /proc/mounts
			umount /mnt; echo the-same`},
		{name: "image-file-anywhere", cmdline: one, want: `(?s)mnt overlay.*verity=require.*the-same.*Image has wrong fs-verity.*Image has no fs-verity.*that-is-all`, after: `
			I=sysroot` + image + ` O=sysroot/composefs/objects
			composefs-boot mount.composefs -o basedir=$O,digest=` + d.one.String() + ` $I /mnt
			grep "/mnt overlay" /proc/mounts; cmp /mnt/usr/lib/large usr/lib/large; umount /mnt; echo the-same
			! composefs-boot mount.composefs -o basedir=$O,digest=` + d.two.String() + ` $I /mnt
			cp $I /run/x; ! composefs-boot mount.composefs -o basedir=$O,digest=` + d.one.String() + ` /run/x /mnt
			composefs-boot mount.composefs -nsv -o verity -o basedir=/run:$O /run/x /mnt
			cmp /mnt/usr/lib/large usr/lib/large; umount /mnt; ! grep /mnt /proc/mounts; echo that-is-all`},
		{name: "no-verity-refused", cmdline: one, before: "cp -a /sysroot/composefs /run/c; umount /sysroot; mount -t tmpfs none /sysroot; mv /run/c /sysroot/composefs",
			want: `composefs-setup-root: measure it.*fs-verity is not supported`},
		{name: "no-verity-allowed", cmdline: karg.Make(d.one, 1, true).String(), want: `(?s)composefs-setup-root: image .* is NOT verified.*booted`, after: sum + "; echo booted",
			before: "cp -a /sysroot/composefs /run/c; umount /sysroot; mount -t tmpfs none /sysroot; mv /run/c /sysroot/composefs"},
	}
}

// script runs the cases one after the other, each from a disk of its own.
func script(list []guestCase) string {
	var b strings.Builder
	for n, c := range list {
		fmt.Fprintf(&b, "echo BEGIN %s; DISK=vd%c2\n(\nset -e\nmount /dev/$DISK /sysroot\n%s\n", c.name, 'a'+n, c.before)
		// What is said on the kernel log is enough: that is what the console shows at boot.
		fmt.Fprintf(&b, "composefs-setup-root --cmdline '%s' 2>/dev/null || { test -z '%s' && grep -c /sysroot /proc/mounts | sed 's/^/refused, mounts at sysroot: /'; exit 7; }\n",
			c.cmdline, strings.Repeat("x", min(len(c.after), 1)))
		fmt.Fprintf(&b, "cd /sysroot\n%s\n)\necho END %s $?\ncd /\n", c.after, c.name)
		b.WriteString("for m in /sysroot/etc /sysroot/var /sysroot/sysroot /sysroot /sysroot; do umount $m 2>/dev/null; done; rm -rf /run/c /run/x /run/o\n")
	}
	return b.String()
}

// judge compares what the console shows of the case with what it must show.
func (c guestCase) judge(t *testing.T, console string) {
	part := regexp.MustCompile(`(?s)BEGIN ` + c.name + `\n(.*)END ` + c.name + ` (\d+)`).FindStringSubmatch(console)
	switch {
	case part == nil:
		t.Errorf("not run:\n%s", console)
	case c.after == "" && part[2] != "7" || c.after != "" && part[2] != "0":
		t.Errorf("ended with %s:\n%s", part[2], part[1])
	case !regexp.MustCompile(c.want).MatchString(part[1]):
		t.Errorf("want %q:\n%s", c.want, part[1])
	case c.after == "" && !strings.Contains(part[1], "refused, mounts at sysroot: 1"):
		t.Errorf("the refusal left something mounted:\n%s", part[1])
	}
}

// Everything that needs fs-verity, on real kernels. A kernel boots once; each case has its own disk.
func TestGuests(t *testing.T) {
	d := newRootDisk(t)
	bin := vm.Programs(t)
	// This test's own program does it in the ways of older kernels.
	cmd := exec.Command("go", "test", "-c", "-ldflags=-s -w", "-o", filepath.Join(bin, "setuproot.test"), ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	files := map[string]string{}
	for _, program := range []string{"composefs-setup-root", "composefs-boot", "setuproot.test"} {
		files["bin/"+program] = filepath.Join(bin, program)
	}
	kernels := vm.Kernels(t)
	for _, version := range []string{"6.12", "7.2"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			list := cases(d)
			var disks []string
			for _, c := range list {
				disks = append(disks, d.copy(t, c.flip, c.at))
			}
			k := kernels[version]
			m := vm.Start(t, vm.Config{Kernel: k.Image, Initrd: vm.Initrd(t, k, files, script(list)), Disks: disks})
			m.Expect("SCRIPT ENDED 0", "Kernel panic")
			console := m.Console()
			for _, c := range list {
				t.Run(c.name, func(t *testing.T) { c.judge(t, console) })
			}
			if version == "6.12" {
				t.Logf("steps on %s:\n%s", k.Version, strings.Join(regexp.MustCompile(`(?m)^ *\d+ us  .*$`).FindAllString(console, -1), "\n"))
			}
		})
	}
	t.Run("6.1", func(t *testing.T) {
		t.Parallel()
		list := cases(d)[:1]
		list[0].after = ""
		k := kernels["6.1"]
		m := vm.Start(t, vm.Config{Kernel: k.Image, Initrd: vm.Initrd(t, k, files, script(list)), Disks: []string{d.copy(t, "", 0)}})
		m.Expect(`composefs-setup-root: refused: this kernel \(6\.1\.\S+\) lacks data-only layers of overlayfs`, "Kernel panic")
		m.Expect("END boots 7", "")
	})
}
