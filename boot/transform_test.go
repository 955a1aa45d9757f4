package boot_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// bootTree scans a directory and makes it bootable.
func bootTree(t *testing.T, dir string, alg fsverity.Algorithm) *fstree.Tree {
	t.Helper()
	tree, err := scan.Dir(context.Background(), dir, scan.Digests(alg), scan.Options{})
	if err == nil {
		err = tree.MakeContainerRoot(fstree.XattrsAllowlist)
	}
	if err == nil {
		err = boot.Transform(tree, scan.Files(dir))
	}
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// The golden trees, made bootable, give the digests, the kernel arguments and the dumps of cfsctl.
func TestGoldenTrees(t *testing.T) {
	for name, vectors := range golden.Load(t).Trees {
		dir := golden.Extract(t, "trees/"+name+".tar.gz")
		for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
			tree := bootTree(t, dir, alg)
			if alg == fsverity.SHA256 {
				var b bytes.Buffer
				dumpfile.Write(&b, tree, dumpfile.Cfsctl)
				want := golden.Read(t, "trees/"+name+".boot.sha256.dump.gz")
				if !bytes.Equal(b.Bytes(), want) {
					t.Errorf("%s: %s", name, firstDifference(b.String(), string(want)))
				}
			}
			for format, want := range vectors.Modes["boot"][alg.String()] {
				f, _ := erofs.ParseFormat(format)
				d := fsverity.NewDigester(alg)
				if err := erofs.Write(d, tree, f); err != nil {
					t.Fatal(err)
				}
				got := d.Sum()
				if got.String() != want {
					t.Errorf("%s %v %s: %v, want %s", name, alg, format, got, want)
				}
				version := map[string]int{"v0": 1, "v1": 1, "v2": 2}[format]
				if arg := vectors.Karg[alg.String()+" "+format]; arg != "" && karg.Make(got, version, false).String() != arg {
					t.Errorf("%s %v %s: argument %v, want %s", name, alg, format, karg.Make(got, version, false), arg)
				}
			}
		}
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for k := range g {
		if k >= len(w) || g[k] != w[k] {
			return fmt.Sprintf("line %d: %s, want %s", k+1, g[k], w[min(k, len(w)-1)])
		}
	}
	return fmt.Sprintf("%d lines, want %d", len(g), len(w))
}

func none(path string, _ *fstree.Inode) (io.ReadCloser, error) {
	return nil, fmt.Errorf("%s was opened", path)
}

func TestMissingDirectoriesAreMade(t *testing.T) {
	tree := fstree.New()
	usr := fstree.NewDir(0o755)
	usr.Mtime = fstree.Time{Sec: 9, Nsec: 8}
	tree.Root.Dir().Set("usr", usr)
	if err := boot.Transform(tree, none); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"boot", "run", "sysroot"} {
		if d := tree.Lookup(name); d == nil || d.Dir() == nil || d.Mtime != usr.Mtime {
			t.Errorf("/%s: %+v", name, d)
		}
	}
}

func TestTransformRefuses(t *testing.T) {
	file := &fstree.Inode{Content: fstree.Inline("x")}
	for want, change := range map[string]func(*fstree.Directory){
		"no directory /usr":         func(d *fstree.Directory) { d.Remove("usr") },
		"/sysroot: not a directory": func(d *fstree.Directory) { d.Set("sysroot", file) },
		"/boot: not a directory":    func(d *fstree.Directory) { d.Set("boot", &fstree.Inode{Content: fstree.Symlink("usr/boot")}) },
		"/run: not a directory":     func(d *fstree.Directory) { d.Set("run", file) },
		"file_contexts: missing":    func(d *fstree.Directory) { d.Set("etc", selinuxConfig("SELINUXTYPE = strict\n")) },
		"SELINUXTYPE: file name":    func(d *fstree.Directory) { d.Set("etc", selinuxConfig("SELINUXTYPE=../..\n")) },
	} {
		tree := fstree.New()
		tree.Root.Dir().Set("usr", fstree.NewDir(0o755))
		change(tree.Root.Dir())
		if err := boot.Transform(tree, none); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func selinuxConfig(text string) *fstree.Inode {
	etc, selinux := fstree.NewDir(0o755), fstree.NewDir(0o755)
	etc.Dir().Set("selinux", selinux)
	selinux.Dir().Set("config", &fstree.Inode{Content: fstree.Inline(text)})
	return etc
}
