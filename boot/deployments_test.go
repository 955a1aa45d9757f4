package boot_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// hostDigest is the digest of a system of these tests.
func hostDigest(t *testing.T, n int) fsverity.Digest {
	t.Helper()
	d, err := fsverity.ParseHex(strings.Repeat(fmt.Sprint(n), 128))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// newHost makes a machine whose systems have these entries, by name: the number of the system and a version.
func newHost(t *testing.T, entries map[string][2]int) (root, esp string) {
	t.Helper()
	root, esp = t.TempDir(), t.TempDir()
	for name, e := range entries {
		options := ""
		if e[0] > 0 {
			d := hostDigest(t, e[0])
			put(t, root, "state/deploy/"+d.String()+"/"+d.String()+".origin", "[boot]\nboot_type=bls\ndigest=00\n")
			options = "options quiet composefs.digest=v1-sha512-12:" + d.String() + " root=LABEL=x word=\"two words\" -- single\n"
		}
		put(t, esp, "loader/entries/"+name+".conf", fmt.Sprintf("title x\nsort-key os\nversion %d\nlinux /vmlinuz\n%s", e[1], options))
	}
	return root, esp
}

func readHost(t *testing.T, root, esp string) *boot.Host {
	t.Helper()
	h, err := boot.ReadHost(root, esp)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Whichever system is to come first, it does, and after each single rename a system comes first that has tries left.
func TestPlanFirst(t *testing.T) {
	for name, c := range map[string]struct {
		entries map[string][2]int
		foreign string
	}{
		"by version":        {map[string][2]int{"a": {1, 1}, "b": {2, 2}, "c": {3, 3}}, ""},
		"one rolled back":   {map[string][2]int{"a": {1, 1}, "b+0-1": {2, 2}, "c": {3, 3}}, ""},
		"all bad":           {map[string][2]int{"a+0-3": {1, 1}, "b+0": {2, 2}, "c+0-1": {3, 3}}, ""},
		"counted":           {map[string][2]int{"a": {1, 1}, "b+2-1": {2, 2}, "c+3": {3, 3}}, ""},
		"two entries":       {map[string][2]int{"a": {1, 1}, "a2+0-1": {1, 9}, "b": {2, 2}, "c": {3, 3}}, ""},
		"foreign, in front": {map[string][2]int{"a": {1, 1}, "b": {2, 2}, "c": {3, 3}, "z": {0, 9}}, "loader/entries/z.conf"},
		"foreign, behind":   {map[string][2]int{"a": {1, 2}, "b": {2, 3}, "c": {3, 4}, "z": {0, 1}}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			for n := 1; n <= 3; n++ {
				root, esp := newHost(t, c.entries)
				want := hostDigest(t, n)
				plan, first, err := readHost(t, root, esp).PlanFirst(want)
				if err != nil || first != c.foreign {
					t.Fatalf("%d: first %q, %v", n, first, err)
				}
				for _, r := range plan {
					if err := boot.ExecuteRenames(esp, []boot.Rename{r}); err != nil {
						t.Fatal(err)
					}
					if h := readHost(t, root, esp); h.Entries[0].Name.Bad() {
						t.Errorf("%d: after %v, %s boots", n, r, h.Entries[0].Path)
					}
				}
				h := readHost(t, root, esp)
				if next := h.Next(); c.foreign == "" && (next == nil || next.Digest != want || next.Bad()) {
					t.Errorf("%d: next is %v", n, next)
				}
				if again, _, err := h.PlanFirst(want); err != nil || len(again) > 0 {
					t.Errorf("%d: once more: %v, %v", n, again, err)
				}
			}
		})
	}
	root, esp := newHost(t, map[string][2]int{"a": {1, 1}})
	if _, _, err := readHost(t, root, esp).PlanFirst(hostDigest(t, 2)); err == nil {
		t.Error("a system without an entry comes first")
	}
	put(t, esp, "loader/entries/b.conf", "")
	if err := boot.ExecuteRenames(esp, []boot.Rename{{From: "loader/entries/a.conf", To: "loader/entries/b.conf"}}); err == nil {
		t.Error("an entry has taken the place of another one")
	}
}

func TestDeploymentArguments(t *testing.T) {
	root, esp := newHost(t, map[string][2]int{"a": {1, 1}})
	got := readHost(t, root, esp).Next().Arguments()
	if want := []string{"quiet", "root=LABEL=x", `word="two words"`, "-- single"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// Origins as bootc writes them are read, and those that are malformed are named.
func TestOrigin(t *testing.T) {
	root, esp := newHost(t, map[string][2]int{"a": {1, 1}})
	path := "state/deploy/" + hostDigest(t, 1).String() + "/" + hostDigest(t, 1).String() + ".origin"
	for text, want := range map[string]boot.Origin{
		"": {},
		"[origin]\ncontainer-image-reference = ostree-unverified-image:docker://registry.example/os:1\n\n; more\n[boot]\nboot_type=uki\n" +
			"digest=ab\ninitramfs=native\n[image]\nmanifest_digest=sha256:cd\n[other]\ndigest=ef\n": {Image: "docker://registry.example/os:1",
			Manifest: "sha256:cd", BootType: "uki", BootDigest: "ab", Native: true},
		"[origin]\nrefspec=my-os:os/stable\n[boot]\nboot_type=bls\n[ostree]\ncommit=ab\n":      {Refspec: "my-os:os/stable", BootType: "bls", Commit: "ab"},
		"[origin]\ncontainer-image-reference=ostree-unverified-registry:registry.example/os\n": {Image: "docker://registry.example/os"},
	} {
		put(t, root, path, text)
		if got := readHost(t, root, esp).Next().Origin; got != want {
			t.Errorf("%q: %+v", text, got)
		}
	}
	put(t, root, path, "[boot]\nword\n")
	if _, err := boot.ReadHost(root, esp); err == nil || !strings.Contains(err.Error(), path+": line 2: neither a section") {
		t.Errorf("%v", err)
	}
}

// A new deployment goes on with the state of the other one, whenever it is interrupted.
func TestCarry(t *testing.T) {
	one, two := hostDigest(t, 1), hostDigest(t, 2)
	state := func(d fsverity.Digest) string { return "state/deploy/" + d.String() }
	carry := func(dir string) error {
		p := boot.Plan{Digest: two, State: state(two)}
		if err := p.PlanCarry(context.Background(), dir, one, nil); err != nil {
			return err
		}
		return p.WriteState(dir, nil)
	}
	for name, before := range map[string]func(dir string) error{
		"as installed": func(string) error { return nil },
		// The link is made before it is exchanged with the directory.
		"interrupted": func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, "state/os/default"), 0o755),
				os.Symlink("../../os/default/var", filepath.Join(dir, "state/os/default/var")))
		},
		"shared under another name": func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Join(dir, "state/os/x"), 0o755),
				os.Rename(filepath.Join(dir, state(one), "var"), filepath.Join(dir, "state/os/x/var")),
				os.Symlink("../../os/x/var", filepath.Join(dir, state(one), "var")))
		},
	} {
		dir := t.TempDir()
		put(t, dir, state(one)+"/var/lib/file", "of the machine")
		large := strings.Repeat("changed", 100)
		put(t, dir, state(one)+"/etc/upper/a/b", large)
		put(t, dir, filepath.Join(state(one), "etc", "work", "rest"), "")
		if err := errors.Join(before(dir), carry(dir)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, d := range []fsverity.Digest{one, two} {
			for file, want := range map[string]string{"etc/upper/a/b": large} {
				if got, err := os.ReadFile(filepath.Join(dir, state(d), file)); err != nil || string(got) != want {
					t.Errorf("%s: %s: %q, %v", name, file, got, err)
				}
			}
			// Links of the state are read from where it is.
			link, err := os.Readlink(filepath.Join(dir, state(d), "var"))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got, err := os.ReadFile(filepath.Join(dir, state(d), link, "lib/file")); err != nil || string(got) != "of the machine" {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		if _, err := os.Lstat(filepath.Join(dir, state(two), "etc/work")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: overlayfs' own directory was carried", name)
		}
	}
	dir := t.TempDir()
	put(t, dir, state(one)+"/etc/passwd", "all of it")
	if err := carry(dir); err == nil || !strings.Contains(err.Error(), "the new system does not say") {
		t.Errorf("%v", err)
	}
	dir = t.TempDir()
	put(t, dir, state(one)+"/var/lib/file", "")
	put(t, dir, "state/os/default/var/lib/other", "")
	if err := carry(dir); err == nil || !strings.Contains(err.Error(), "move it away") {
		t.Errorf("%v", err)
	}
}
