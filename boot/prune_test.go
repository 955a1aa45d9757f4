package boot_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/uki"
)

// oldHost is a machine that has been upgraded often. Systems are numbers; the larger come first in the menu.
type oldHost struct {
	t         *testing.T
	root, esp string
	r         *repo.Repo
}

func newOldHost(t *testing.T) *oldHost {
	t.Helper()
	h := &oldHost{t: t, root: t.TempDir(), esp: t.TempDir()}
	path := filepath.Join(h.root, "composefs")
	_, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA512, Format: erofs.V1, Insecure: true})
	check(t, err)
	h.r, err = repo.Open(path, repo.Options{})
	check(t, err)
	t.Cleanup(func() { h.r.Close() })
	put(t, h.root, "state/os/default/var/lib/file", "of the machine")
	return h
}

// kernelSum is what a kernel is called, which is a letter.
func kernelSum(kernel string) string { return strings.Repeat(kernel, 64) }

func entryName(d fsverity.Digest) string { return "composefs-" + d.String()[:32] }

// state makes what a system has besides files on the ESP.
func (h *oldHost) state(n int, bootType, sum string) fsverity.Digest {
	h.t.Helper()
	d := hostDigest(h.t, n)
	dir := "state/deploy/" + d.String()
	put(h.t, h.root, dir+"/"+d.String()+".origin", "[boot]\nboot_type="+bootType+"\ndigest="+sum+"\n")
	put(h.t, h.root, dir+"/etc/upper/file", "")
	check(h.t, os.Symlink("../../os/default/var", filepath.Join(h.root, dir, "var")))
	i, err := h.r.Begin(context.Background(), repo.LockOptions{})
	check(h.t, err)
	check(h.t, i.Name(d, boot.DeployRef(d)))
	check(h.t, i.Commit())
	return d
}

func cmdlineOf(d fsverity.Digest) string {
	return "quiet composefs.digest=v1-sha512-12:" + d.String() + " root=LABEL=x"
}

// install installs a system with a type 1 entry that has this counter, or "".
func (h *oldHost) install(n int, kernel, counter string) {
	h.t.Helper()
	d := h.state(n, "bls", kernelSum(kernel))
	dir := "EFI/Linux/bootc_composefs-" + kernelSum(kernel)
	put(h.t, h.esp, dir+"/vmlinuz", "kernel")
	put(h.t, h.esp, dir+"/initrd", "initramfs")
	put(h.t, h.esp, "loader/entries/"+entryName(d)+counter+".conf", fmt.Sprintf("title x\nsort-key os\nversion %d\nlinux /%s/vmlinuz\n"+
		"initrd /%[2]s/initrd\noptions %s\n", n, dir, cmdlineOf(d)))
}

// installUKI installs one with a UKI and an addon.
func (h *oldHost) installUKI(n int, counter string) {
	h.t.Helper()
	d := h.state(n, "uki", kernelSum("0"))
	program := readFile(h.t, vm.Cache(h.t, "os/trixie/usr/lib/systemd/boot/efi/linuxx64.efi.stub"))
	b := buildPE(h.t, parsePE(h.t, program), uki.Parts{Linux: uki.Bytes(program), Cmdline: uki.Text(cmdlineOf(d)),
		OSRelease: uki.Text(fmt.Sprintf("ID=os\nIMAGE_VERSION=%d\n", n))})
	put(h.t, h.esp, "EFI/Linux/"+entryName(d)+counter+".efi", string(b))
	put(h.t, h.esp, "EFI/Linux/"+entryName(d)+".efi.extra.d/a.addon.efi", "addon")
}

func (h *oldHost) plan(o boot.PruneOptions) boot.PrunePlan {
	h.t.Helper()
	p, err := readHost(h.t, h.root, h.esp).PlanPrune(o)
	check(h.t, err)
	return p
}

// files lists all that a machine has, without the repository's own.
func (h *oldHost) files() []string {
	var list []string
	for _, dir := range []string{h.root, h.esp} {
		filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
			check(h.t, err)
			name, _ := filepath.Rel(dir, p)
			if !strings.HasPrefix(name, "composefs") || strings.Contains(name, "refs/deploy/") {
				list = append(list, name)
			}
			return nil
		})
	}
	return list
}

// espUsage returns how many bytes of the disk the ESP has.
func (h *oldHost) espUsage() (n int64) {
	filepath.WalkDir(h.esp, func(p string, _ fs.DirEntry, err error) error {
		check(h.t, err)
		var st unix.Stat_t
		check(h.t, unix.Lstat(p, &st))
		n += st.Blocks * 512
		return nil
	})
	return n
}

// boots checks that every system in the menu has what it boots with.
func (h *oldHost) boots(where string) {
	h.t.Helper()
	host := readHost(h.t, h.root, h.esp)
	for _, e := range host.Entries {
		d := e.Image.Digest
		var missing []string
		need := map[string]string{"image": filepath.Join(h.root, "composefs/images/refs", boot.DeployRef(d)),
			"state": filepath.Join(h.root, "state/deploy", d.String(), "etc/upper/file")}
		if e.Item.Entry != nil {
			need["kernel"] = filepath.Join(h.esp, e.Item.Entry.Get("linux"))
			need["initramfs"] = filepath.Join(h.esp, e.Item.Entry.Get("initrd"))
		} else {
			need["addon"] = filepath.Join(h.esp, "EFI/Linux", e.Name.ID+".efi.extra.d/a.addon.efi")
		}
		for what, name := range need {
			if _, err := os.Lstat(name); err != nil {
				missing = append(missing, what)
			}
		}
		if missing != nil {
			h.t.Errorf("%s: %s has lost its %s", where, e.Path, strings.Join(missing, " and "))
		}
	}
	if _, err := os.Stat(filepath.Join(h.root, "state/os/default/var/lib/file")); err != nil {
		h.t.Errorf("%s: %v", where, err)
	}
}

// Those systems go that nobody needs.
func TestPruneChooses(t *testing.T) {
	digest := func(n int) fsverity.Digest { return hostDigest(t, n) }
	for name, test := range map[string]struct {
		counters map[int]string // of the systems that are there, with 1 to 4 being all
		change   func(h *oldHost)
		o        boot.PruneOptions // Keep is 2 if nothing is said
		booted   int
		removed  []int
		stay     map[int]string // with these reasons
	}{
		"old ones":             {booted: 4, removed: []int{2, 1}},
		"keep three":           {booted: 4, o: boot.PruneOptions{Keep: 3}, removed: []int{1}},
		"keep one":             {booted: 4, o: boot.PruneOptions{Keep: 1}, removed: []int{3, 2, 1}},
		"keep more than there": {booted: 4, o: boot.PruneOptions{Keep: 9}},
		"before the reboot":    {booted: 3, removed: []int{2, 1}},
		"before, keep one":     {booted: 3, o: boot.PruneOptions{Keep: 1}, removed: []int{2, 1}},
		"rolled back":          {booted: 3, counters: map[int]string{4: "+0-1"}, removed: []int{1, 4}},
		"new one":              {booted: 4, o: boot.PruneOptions{New: &boot.Plan{Digest: digest(5)}}, removed: []int{3, 2, 1}},
		"new one, keep three":  {booted: 4, o: boot.PruneOptions{Keep: 3, New: &boot.Plan{Digest: digest(5)}}, removed: []int{2, 1}},
		"new one in place of what boots next": {booted: 3, o: boot.PruneOptions{New: &boot.Plan{Digest: digest(5)}},
			removed: []int{4, 2, 1}},
		"new one is there": {booted: 4, o: boot.PruneOptions{New: &boot.Plan{Digest: digest(2)}}, removed: []int{3, 1}},
		"pinned": {booted: 4, change: func(h *oldHost) {
			check(t, readHost(t, h.root, h.esp).Pin(digest(1), true))
		}, removed: []int{2}},
		// What runs has not been seen to come up: the one that has stays until it is.
		"on trial":              {booted: 4, counters: map[int]string{4: "+2-1", 3: "+1-2"}, removed: []int{1}},
		"on trial, and a new":   {booted: 4, counters: map[int]string{4: "+2-1"}, o: boot.PruneOptions{New: &boot.Plan{Digest: digest(5)}}, removed: []int{2, 1}},
		"none seen to come up":  {booted: 4, counters: map[int]string{4: "+2-1", 3: "+3", 2: "+3", 1: "+0-3"}, removed: []int{2, 1}},
		"default of the loader": {booted: 4, o: boot.PruneOptions{Chosen: []string{"nothing*", entryName(digest(1)) + "*"}}, removed: []int{3, 2}},
		"pattern for all":       {booted: 4, o: boot.PruneOptions{Chosen: []string{"*", "["}}, removed: []int{2, 1}},
		"half removed": {booted: 4, change: func(h *oldHost) {
			check(t, os.Remove(filepath.Join(h.esp, "loader/entries", entryName(digest(3))+".conf")))
		}, removed: []int{1, 3}},
		"entry of somebody": {booted: 4, change: func(h *oldHost) {
			put(t, h.esp, "vmlinuz", "")
			put(t, h.esp, "loader/entries/my.conf", "title mine\nlinux /vmlinuz\ninitrd /vmlinuz\noptions "+cmdlineOf(digest(1))+"\n")
		}, removed: []int{2}, stay: map[int]string{1: "loader/entries/my.conf boots it"}},
		"staged by bootc": {booted: 4, change: func(h *oldHost) {
			put(t, h.esp, "loader/entries.staged/bootc_x.conf", "title x\nefi /EFI/Linux/bootc/bootc_composefs-"+digest(1).String()+".efi\n")
		}, removed: []int{2}, stay: map[int]string{1: "entries.staged/bootc_x.conf names it"}},
		"named by what is no entry": {booted: 4, change: func(h *oldHost) {
			put(t, h.esp, "loader/entries/odd", "\x00"+strings.ToUpper(digest(1).String()))
		}, removed: []int{2}, stay: map[int]string{1: "loader/entries/odd names it"}},
		"own var": {booted: 4, change: func(h *oldHost) {
			v := filepath.Join(h.root, "state/deploy", digest(1).String(), "var")
			check(t, errors.Join(os.Remove(v), os.Mkdir(v, 0o755)))
		}, removed: []int{2}, stay: map[int]string{1: "/var is its own"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newOldHost(t)
			for n := 1; n <= 4; n++ {
				h.install(n, fmt.Sprint(n), test.counters[n])
			}
			if test.change != nil {
				test.change(h)
			}
			test.o.Booted = digest(test.booted)
			if test.o.Keep == 0 {
				test.o.Keep = 2
			}
			p := h.plan(test.o)
			var want []fsverity.Digest
			for _, n := range test.removed {
				want = append(want, digest(n))
			}
			var got []fsverity.Digest
			for _, r := range p.Remove {
				got = append(got, r.Digest)
				if want := []string{"EFI/Linux/bootc_composefs-" + kernelSum(r.Digest.String()[:1])}; !slices.Equal(r.Files, want) {
					t.Errorf("%v: %q, want %q", r.Digest, r.Files, want)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("removes %v, want %v", got, want)
			}
			for n, why := range test.stay {
				if !slices.ContainsFunc(p.Stay, func(s boot.Stay) bool { return s.Digest == digest(n) && strings.Contains(s.Why, why) }) {
					t.Errorf("%+v, want %d: %s", p.Stay, n, why)
				}
			}
			if len(p.Stay) != len(test.stay) {
				t.Errorf("%+v", p.Stay)
			}
			check(t, p.Execute(context.Background(), h.r, repo.LockOptions{}))
			h.boots("after")
			host := readHost(t, h.root, h.esp)
			for _, n := range test.removed {
				if host.Find(digest(n)) != nil || slices.ContainsFunc(h.files(), func(name string) bool { return strings.Contains(name, digest(n).String()[:32]) }) {
					t.Errorf("%d is still there: %s", n, strings.Join(h.files(), "\n"))
				}
			}
		})
	}
}

// Without an entry for what runs, it is not known what else is booted, and how.
func TestPruneForeignLoader(t *testing.T) {
	h := newOldHost(t)
	h.install(1, "a", "")
	h.state(2, "bls", kernelSum("b"))
	for _, n := range []int{2, 3} {
		if _, err := readHost(t, h.root, h.esp).PlanPrune(boot.PruneOptions{Booted: hostDigest(t, n)}); !errors.Is(err, boot.ErrForeignLoader) {
			t.Errorf("%d: %v", n, err)
		}
	}
}

// A kernel stays as long as somebody names it.
func TestPruneSharedKernels(t *testing.T) {
	dir := "EFI/Linux/bootc_composefs-" + kernelSum("a")
	for name, test := range map[string]struct {
		change func(t *testing.T, h *oldHost, o *boot.PruneOptions)
		stays  bool
	}{
		"of two that go": {func(t *testing.T, h *oldHost, _ *boot.PruneOptions) { h.install(1, "a", "") }, false},
		"of another":     {func(t *testing.T, h *oldHost, _ *boot.PruneOptions) { h.install(5, "a", "") }, true},
		"of the new one": {func(t *testing.T, h *oldHost, o *boot.PruneOptions) {
			o.New = &boot.Plan{Digest: hostDigest(t, 6), ESP: []boot.Place{place(dir+"/vmlinuz", "kernel", false)}}
		}, true},
		"of somebody": {func(t *testing.T, h *oldHost, _ *boot.PruneOptions) {
			put(t, h.esp, "loader/entries/mine.conf", "title x\nlinux /"+strings.ToUpper(dir)+"/VMLINUZ\n")
		}, true},
		"of what cannot be read": {func(t *testing.T, h *oldHost, _ *boot.PruneOptions) {
			put(t, h.esp, "loader/entries/odd.conf", "\x00 linux /"+dir+"/vmlinuz\n")
		}, true},
		"hostile origin": {func(t *testing.T, h *oldHost, _ *boot.PruneOptions) {
			d := hostDigest(t, 2).String()
			put(t, h.root, "state/deploy/"+d+"/"+d+".origin", "[boot]\nboot_type=bls\ndigest=../../../x\n")
			put(t, h.esp, "EFI/Linux/bootc_composefs-..", "")
			put(t, h.esp, "loader/entries/"+entryName(hostDigest(t, 2))+".conf", "linux /../x\noptions "+cmdlineOf(hostDigest(t, 2))+"\n")
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			h := newOldHost(t)
			h.install(2, "a", "")
			h.install(3, "b", "")
			h.install(4, "c", "")
			o := boot.PruneOptions{Keep: 2, Booted: hostDigest(t, 4)}
			test.change(t, h, &o)
			if name == "of another" {
				o.Keep = 3
			}
			p := h.plan(o)
			check(t, p.Execute(context.Background(), h.r, repo.LockOptions{}))
			if readHost(t, h.root, h.esp).Find(hostDigest(t, 2)) != nil {
				t.Error("2 is still there")
			}
			if _, err := os.Stat(filepath.Join(h.esp, dir, "vmlinuz")); (err == nil) != test.stays {
				t.Error(err)
			}
		})
	}
}

// What lies beside a UKI that cannot be read is not known to be of no use.
func TestPruneBesideUKI(t *testing.T) {
	for damaged, stays := range map[bool]bool{false: false, true: true} {
		h := newOldHost(t)
		h.installUKI(2, "")
		h.install(3, "b", "")
		h.install(4, "c", "")
		name := "EFI/Linux/" + entryName(hostDigest(t, 2)) + ".efi"
		if damaged {
			put(t, h.esp, name, "MZ")
		}
		check(t, h.plan(boot.PruneOptions{Keep: 2, Booted: hostDigest(t, 4)}).Execute(context.Background(), h.r, repo.LockOptions{}))
		for _, name := range []string{name, name + ".extra.d/a.addon.efi"} {
			if _, err := os.Stat(filepath.Join(h.esp, name)); (err == nil) != stays {
				t.Errorf("damaged is %v: %v", damaged, err)
			}
		}
	}
}

// Whenever the power fails, what is in the menu boots, and the next run removes all that the first one would have.
func TestPrunePowerCut(t *testing.T) {
	machine := func(t *testing.T) (*oldHost, boot.PruneOptions) {
		h := newOldHost(t)
		h.install(1, "a", "")
		h.installUKI(2, "+0-3")
		h.install(3, "a", "+0-1") // the kernel of 1
		h.install(4, "b", "")
		h.installUKI(5, "")
		// A state that an interrupted install has left, and one of a system that is there again.
		put(t, h.root, "state/."+hostDigest(t, 6).String()+".new/etc/rest", "")
		put(t, h.root, "state/."+hostDigest(t, 5).String()+".old/etc/rest", "")
		// Files that have not got their names, and some that others call so.
		for _, dir := range []string{"EFI/Linux/", "EFI/BOOT/", "loader/entries/", "EFI/Linux/bootc_composefs-" + kernelSum("b") + "/"} {
			put(t, h.esp, dir+".ABCDEFGH2345.tmp", "")
			put(t, h.esp, dir+".abcdefgh2345.tmp", "")
			put(t, h.esp, dir+"ABCDEFGH2345.tmp", "")
		}
		return h, boot.PruneOptions{Keep: 2, Booted: hostDigest(t, 5)}
	}
	h, o := machine(t)
	before, p := h.espUsage(), h.plan(o)
	check(t, p.Execute(context.Background(), h.r, repo.LockOptions{}))
	h.boots("whole")
	if freed := before - h.espUsage(); p.Bytes != freed || freed == 0 {
		t.Errorf("%d bytes are free, %d were planned", freed, p.Bytes)
	}
	want := h.files()
	if n := strings.Count(strings.Join(want, "\n"), "h2345.tmp"); n != 4 || strings.Contains(strings.Join(want, "\n"), "/.ABCDEFGH2345.tmp") {
		t.Errorf("temporary files: %q", want)
	}
	host := readHost(t, h.root, h.esp)
	if len(host.Deployments) != 2 || len(host.Entries) != 2 || host.Find(hostDigest(t, 5)) == nil || host.Find(hostDigest(t, 4)) == nil {
		t.Fatalf("%+v", host)
	}
	for more, n := true, 0; more; n++ {
		h, o := machine(t)
		var err error
		more, err = h.plan(o).ExecuteUntil(n, h.r)
		check(t, err)
		where := fmt.Sprintf("after %d steps", n)
		h.boots(where)
		// A directory may be half removed.
		for _, name := range []string{h.esp + "/EFI/Linux/bootc_composefs-" + kernelSum("a") + "/vmlinuz",
			h.root + "/state/." + hostDigest(t, 1).String() + ".old/etc/upper/file"} {
			if readHost(t, h.root, h.esp).Find(hostDigest(t, 1)) == nil || strings.HasPrefix(name, h.root) {
				os.Remove(name)
			}
		}
		check(t, h.plan(o).Execute(context.Background(), h.r, repo.LockOptions{}))
		if got := h.files(); !slices.Equal(got, want) {
			t.Errorf("%s and another run: %q, want %q", where, got, want)
		}
	}
}

// One at a time.
func TestLock(t *testing.T) {
	h := newOldHost(t)
	release, err := boot.Lock(h.root)
	check(t, err)
	if _, err := boot.Lock(h.root); !errors.Is(err, boot.ErrBusy) {
		t.Errorf("%v", err)
	}
	release()
	release, err = boot.Lock(h.root)
	check(t, err)
	release()
}

// What is pinned can be let go of, more than once.
func TestPin(t *testing.T) {
	h := newOldHost(t)
	h.install(1, "a", "")
	for _, pinned := range []bool{true, true, false, false} {
		check(t, readHost(t, h.root, h.esp).Pin(hostDigest(t, 1), pinned))
		if got := readHost(t, h.root, h.esp).Next().Pinned; got != pinned {
			t.Errorf("%v, want %v", got, pinned)
		}
	}
}
