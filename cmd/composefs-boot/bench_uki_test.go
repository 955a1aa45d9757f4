//go:build bench

package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// TestBenchUKI compares the building of a UKI with ukify: kernel and initramfs are 35 MB together.
func TestBenchUKI(t *testing.T) {
	ours := filepath.Join(vm.Top(t), "bin/composefs-boot")
	u := vm.NewUkify(t)
	kernel, err := os.ReadFile(vm.Kernels(t)["6.12"].Image)
	if err != nil {
		t.Fatal(err)
	}
	u.Write("linux", kernel)
	initrd := bytes.Repeat([]byte("initramfs"), (35_000_000-len(kernel))/9)
	u.Write("initrd", initrd)
	u.Write("osrel", []byte("ID=x\n"))
	fmt.Printf("peer: %s", u.Ukify("--version"))
	common := []string{"build", "--cmdline=quiet", "--hwids="}
	for _, more := range [][]string{{}, {"--measure"}} {
		args := append(append([]string{ours, "-q", "uki"}, common...), "--linux="+u.Dir+"/linux", "--initrd="+u.Dir+"/initrd",
			"--os-release=@"+u.Dir+"/osrel", "--stub="+u.Stub("linuxx64.efi.stub"), "--output="+u.Dir+"/ours.efi")
		peer := u.Args(append(append(common, "--linux=DIR/linux", "--initrd=DIR/initrd", "--os-release=@DIR/osrel", "--output=DIR/theirs.efi"), more...)...)
		peer = append([]string{"/bin/sh", "-c", `exec "$@" > /dev/null`, "sh"}, peer...)
		args = append(append([]string{"/bin/sh", "-c", `exec "$@" > /dev/null`, "sh"}, args...), more...)
		run := func(name string, args []string) func() sample {
			return func() sample { return measure(t, func() { os.Remove(filepath.Join(u.Dir, name)) }, "", args...) }
		}
		pair(t, fmt.Sprintf("UKI of 35 MB %v", more), run("ours.efi", args), run("theirs.efi", peer))
	}
}
