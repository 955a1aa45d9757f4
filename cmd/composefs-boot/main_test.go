package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/vm"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"composefs-boot": main, "cfsctl": main, "mkcomposefs": main, "composefs-info": main,
		"mount.composefs": main, "ukify": main})
}

// The scripts run the program as users do. They find the golden trees and repositories in $GOLDEN, the golden OCI layout in
// $LAYOUT, the golden OSTree repositories in $OSTREE and on the web at $WEB, systemd's programs for UEFI in $STUBS, and a kernel in $KERNEL.
func TestScripts(t *testing.T) {
	dir, stubs := t.TempDir(), vm.Cache(t, "ukify/usr/lib/systemd/boot/efi")
	for _, name := range []string{"files", "links", "metadata", "names", "selinux"} {
		if err := os.Rename(golden.Extract(t, "trees/"+name+".tar.gz"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"oci-boot.sha512.v1", "oci-boot.sha256.v2"} {
		if err := os.Rename(filepath.Join(golden.Extract(t, "repos/"+name+".tar.gz"), "repo"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	layout := filepath.Join(dir, "layout")
	if err := os.CopyFS(layout, golden.Files(t, "oci/oci-boot")); err != nil {
		t.Fatal(err)
	}
	ostree := filepath.Join(dir, "ostree")
	web := httptest.NewServer(http.FileServer(http.Dir(ostree)))
	t.Cleanup(web.Close) // when the scripts have ended, which run after this function
	for _, mode := range []string{"archive", "bare-user"} {
		if err := os.MkdirAll(ostree, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(golden.Extract(t, "ostree/"+mode+".tar.gz"), mode), filepath.Join(ostree, mode)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"offline.delta", "vec.gpg"} {
		if err := os.WriteFile(filepath.Join(ostree, name), golden.Read(t, "ostree/"+name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	digests := golden.Load(t)
	kernel := vm.Kernels(t)["6.12"].Image
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Condition: func(c string) (bool, error) {
			if c == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, errors.New("unknown condition " + c)
		},
		Setup: func(e *testscript.Env) error {
			e.Setenv("GOLDEN", dir)
			e.Setenv("KERNEL", kernel)
			e.Setenv("STUBS", stubs)
			e.Setenv("LAYOUT", layout)
			e.Setenv("OSTREE", ostree)
			e.Setenv("WEB", web.URL)
			for name, tree := range digests.Trees {
				for mode, algorithms := range tree.Modes {
					for alg, formats := range algorithms {
						for format, digest := range formats {
							// FILES_AS_IS_SHA512_V1
							key := strings.ToUpper(strings.NewReplacer("-", "_").Replace(strings.Join([]string{name, mode, alg, format}, "_")))
							e.Setenv(key, digest)
						}
					}
				}
			}
			return nil
		},
	})
}

// Every command has an example, and help that says more than its name.
func TestHelp(t *testing.T) {
	root := newRoot("composefs-boot", nil, nil, nil)
	all := root.Commands()
	for _, group := range []string{"uki", "keys", "oci", "ostree"} {
		c, _, err := root.Find([]string{group})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, c.Commands()...)
	}
	for _, c := range all {
		if c.Name() == "help" || c.Name() == "completion" || c.Name() == "transaction" {
			continue
		}
		if c.Example == "" || c.Short == "" {
			t.Errorf("%s: no example", c.Name())
		}
	}
}
