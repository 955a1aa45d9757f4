package boot_test

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/secureboot"
)

// loaderSystem is a system that brings these files as its boot loader, by their names.
func loaderSystem(t *testing.T, content files) boot.System {
	t.Helper()
	tree := fstree.New()
	dir := tree.Root.Dir()
	for _, name := range []string{"usr", "lib", "systemd", "boot", "efi"} {
		next := fstree.NewDir(0o755)
		dir.Set(name, next)
		dir = next.Dir()
	}
	for name, b := range content {
		dir.Set(name, &fstree.Inode{Perm: 0o644, Nlink: 1, Content: fstree.Inline(b)})
	}
	return boot.System{Tree: tree}
}

const (
	loaderInSystemd = "EFI/systemd/systemd-bootx64.efi"
	loaderInBoot    = "EFI/BOOT/BOOTX64.EFI"
)

// updateLoader plans an update, carries it out, and returns what is there then.
func updateLoader(t *testing.T, s boot.System, d boot.Deployment, there files) (boot.LoaderUpdate, files) {
	t.Helper()
	esp := t.TempDir()
	for name, b := range there {
		put(t, esp, name, string(b))
	}
	d.Arch, d.Scratch = "amd64", &boot.Scratch{}
	defer d.Scratch.Close()
	p := boot.Plan{ESP: []boot.Place{place("loader/entries/new.conf", "title new\n", false)}}
	u, err := p.UpdateLoader(esp, s, d)
	check(t, err)
	e, err := p.PlanESP(esp)
	check(t, err)
	check(t, e.Execute())
	after := files{}
	for _, name := range []string{loaderInSystemd, loaderInBoot} {
		if b, err := os.ReadFile(filepath.Join(esp, name)); err == nil {
			after[name] = b
		}
		if written := slices.ContainsFunc(e.Files, func(f boot.ESPFile) bool { return f.Path == name && f.Fate == boot.Write }); written != slices.Contains(u.Files, name) {
			t.Errorf("%s: written is %v, of %v", name, written, u.Files)
		}
	}
	return u, after
}

// A newer systemd-boot takes the place of older ones, and of nothing else.
func TestUpdateLoader(t *testing.T) {
	const brought = "257.13-1"
	for name, test := range map[string]struct {
		systemd, boot string // what is there: a version, or something else with blanks
		brings        string
		replaced      []string
		left          string
	}{
		"older":           {"257.9-1", "257.9-1", brought, []string{loaderInSystemd, loaderInBoot}, ""},
		"one older":       {brought, "252.1", brought, []string{loaderInBoot}, ""},
		"same":            {brought, brought, brought, nil, ""},
		"newer":           {"258~rc1", "260", brought, nil, ""},
		"GRUB":            {"", "MZ GRUB code", brought, nil, "not systemd-boot"},
		"shim in front":   {"256", "MZ shim code", brought, []string{loaderInSystemd}, ""},
		"only in boot":    {"", "256", brought, []string{loaderInBoot}, ""},
		"only in systemd": {"256", "", brought, []string{loaderInSystemd}, ""},
		"nothing":         {"", "", brought, nil, "not systemd-boot"},
		"none brought":    {"256", "256", "", nil, ""},
		"odd one brought": {"256", "256", "MZ other code", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			content := func(s string) []byte {
				if s == "" || strings.Contains(s, " ") {
					return []byte(s)
				}
				return []byte(systemdBoot(s))
			}
			there, tree := files{}, files{}
			for name, s := range map[string]string{loaderInSystemd: test.systemd, loaderInBoot: test.boot} {
				if s != "" {
					there[name] = content(s)
				}
			}
			if test.brings != "" {
				tree["systemd-bootx64.efi"] = content(test.brings)
			}
			u, after := updateLoader(t, loaderSystem(t, tree), boot.Deployment{}, there)
			if !slices.Equal(u.Files, test.replaced) || (test.left == "") != (u.Left == "") || !strings.Contains(u.Left, test.left) {
				t.Errorf("%+v", u)
			}
			for name, b := range there {
				if slices.Contains(test.replaced, name) {
					b = content(test.brings)
				}
				if !bytes.Equal(after[name], b) {
					t.Errorf("%s: %q", name, after[name])
				}
			}
			if len(after) != len(there) {
				t.Errorf("%d files, were %d", len(after), len(there))
			}
		})
	}
}

// A boot loader that is signed gives way only to one that firmware starts as well.
func TestUpdateSignedLoader(t *testing.T) {
	w := &world{key: map[string]identity{}}
	options := secureboot.Options{Bits: 2048, Days: 3650, Time: time.Now().Add(-time.Hour)}
	for _, name := range []string{"db", "stranger"} {
		key, err := options.GenerateKey()
		check(t, err)
		cert, err := options.Certificate("test "+name, key)
		check(t, err)
		w.key[name] = identity{key, cert}
	}
	newer := readFile(t, vm.Cache(t, "os/trixie/usr/lib/systemd/boot/efi/systemd-bootx64.efi"))
	older := bytes.Replace(newer, []byte("LoaderInfo: systemd-boot 257"), []byte("LoaderInfo: systemd-boot 157"), 1)
	if bytes.Equal(newer, older) {
		t.Fatal("the version of systemd-boot is not 257 any more")
	}
	there := files{loaderInBoot: w.sign(t, older, "db")}
	sign := boot.Deployment{Sign: &boot.Signing{Key: w.key["db"].key, Certificate: w.key["db"].cert}}
	for name, test := range map[string]struct {
		tree    files
		d       boot.Deployment
		updated bool
	}{
		"unsigned":                 {files{"systemd-bootx64.efi": newer}, boot.Deployment{}, false},
		"signed here":              {files{"systemd-bootx64.efi": newer}, sign, true},
		"signed by the same":       {files{"systemd-bootx64.efi.signed": w.sign(t, newer, "db")}, boot.Deployment{}, true},
		"signed by a stranger":     {files{"systemd-bootx64.efi.signed": w.sign(t, newer, "stranger")}, boot.Deployment{}, false},
		"signed here, brings both": {files{"systemd-bootx64.efi": newer, "systemd-bootx64.efi.signed": w.sign(t, newer, "stranger")}, sign, true},
	} {
		u, after := updateLoader(t, loaderSystem(t, test.tree), test.d, there)
		if (len(u.Files) == 1) != test.updated || (u.Left == "") != test.updated || bytes.Equal(after[loaderInBoot], there[loaderInBoot]) == test.updated {
			t.Errorf("%s: %+v", name, u)
		}
		if _, err := parsePE(t, after[loaderInBoot]).Verify(uki.Trust{Certificates: []*x509.Certificate{w.key["db"].cert}}); err != nil {
			t.Errorf("%s: firmware does not start what is there now: %v", name, err)
		}
	}
}
