package setuproot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func TestPlanImageMount(t *testing.T) {
	digest, err := fsverity.ParseHex(weak)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		mount ImageMount
		a     Abilities
		want  string // the plan, or what the error says
	}{
		{ImageMount{Image: "i", Objects: []string{"o"}}, newest, `
open image i, unverified
mount erofs from the file
mount overlay: the image over o, without verity, layers as descriptors
attach the new root at m`},
		{ImageMount{Image: "i", Objects: []string{"o", "p"}, Digest: digest, Verity: RequireVerity, IDMap: "ns"}, linux612, `
work in a private mount namespace
open image i and measure it: its fs-verity digest must be ` + weak + `
mount erofs from the file, owners mapped by ns
mount overlay: the image over o:p, verity=require, layers as paths
attach the new root at m`},
		{ImageMount{Image: "i", Objects: []string{"o"}, Verity: TryVerity, Upper: "u", Work: "w", Writable: true}, newest, `
open image i, unverified
mount erofs from the file
mount overlay: the image over o, verity=require, layers as descriptors, changes to u, writable
attach the new root at m`},
		{ImageMount{Image: "i", Objects: []string{"o"}, Verity: TryVerity, Upper: "u", Work: "w"}, without(newest, func(a *Abilities) { a.Verity = false }), `
open image i, unverified
mount erofs from the file
mount overlay: the image over o, without verity, layers as descriptors, changes to u
attach the new root at m`},
		{ImageMount{Image: "i", Objects: []string{"o"}, Verity: RequireVerity}, without(newest, func(a *Abilities) { a.Verity = false }), "lacks verity=require"},
		{ImageMount{Image: "i", Objects: []string{"o"}}, linux61, "lacks data-only layers"},
		{ImageMount{Image: "i", Objects: []string{"o"}}, Abilities{NotAllowed: true}, "not permitted"},
		{ImageMount{Image: "i"}, newest, "want one directory or more"},
		{ImageMount{Image: "i", Objects: []string{"o:p"}}, newest, `without ":"`},
		{ImageMount{Image: "i", Objects: []string{"o"}, Upper: "u"}, newest, "go together"},
		{ImageMount{Image: "i", Objects: []string{"o"}, Writable: true}, newest, "go together"},
	} {
		steps, err := test.mount.Plan(test.a, "m")
		if err != nil && strings.Contains(err.Error(), test.want) {
			continue
		}
		if got := "\n" + strings.TrimSuffix(Format(steps), "\n"); err != nil || got != test.want {
			t.Errorf("%+v: %v%s\nwant%s", test.mount, err, got, test.want)
		}
	}
}

func without(a Abilities, change func(*Abilities)) Abilities {
	change(&a)
	return a
}

// What cannot be an image is not shown to the kernel.
func TestLookAtNoImage(t *testing.T) {
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "short"), []byte("ab"), 0o644)
	os.WriteFile(filepath.Join(dir, "other"), make([]byte, 8192), 0o644)
	unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644)
	for name, want := range map[string]string{
		"short": "not a composefs image", "other": "not a composefs image", "fifo": "not a regular file", ".": "not a regular file",
		"nowhere": "no such file",
	} {
		path := filepath.Join(dir, name)
		if _, err := (ImageMount{Image: path}).Look(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (ImageMount{Image: filepath.Join(dir, "other"), Digest: fsverity.Of(fsverity.SHA256, nil)}).Look(); err == nil ||
		!strings.Contains(err.Error(), "Image has no fs-verity") {
		t.Errorf("%v", err)
	}
}
