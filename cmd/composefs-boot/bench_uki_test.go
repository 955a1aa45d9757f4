//go:build bench

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// uki compares the building of a unified kernel image with ukify: kernel and initramfs are 35 MB together.
func (b *bench) uki(t *testing.T) {
	u := vm.NewUkify(t)
	kernel, err := os.ReadFile(vm.Kernels(t)["6.12"].Image)
	if err != nil {
		t.Fatal(err)
	}
	u.Write("linux", kernel)
	u.Write("initrd", bytes.Repeat([]byte("initramfs"), (35_000_000-len(kernel))/9))
	u.Write("osrel", []byte("ID=x\n"))
	writeKey(t, u, "db")
	writeKey(t, u, "pcr")
	for _, c := range []struct {
		what   string
		more   []string
		target float64
	}{
		{"UKI of 35 MB", nil, 0.1},
		{"UKI of 35 MB, measured", []string{"--measure"}, 0.25},
		{"UKI of 35 MB, signed, measured, PCR signatures", []string{"--measure", "--pcr-private-key=DIR/pcr.key",
			"--secureboot-private-key=DIR/db.key", "--secureboot-certificate=DIR/db.crt"}, 0.25},
	} {
		common := []string{"build", "--cmdline=quiet", "--hwids="}
		ours := b.us(append(append([]string{"uki"}, common...), append([]string{"--linux=" + u.Dir + "/linux", "--initrd=" + u.Dir + "/initrd",
			"--os-release=@" + u.Dir + "/osrel", "--stub=" + u.Stub("linuxx64.efi.stub"), "--output=" + u.Dir + "/ours.efi"}, in(u.Dir, c.more)...)...)...)
		theirs := invocation{args: u.Args(append(append(common, "--linux=DIR/linux", "--initrd=DIR/initrd", "--os-release=@DIR/osrel",
			"--output=DIR/theirs.efi"), c.more...)...)}
		fresh := func(i invocation, name string) func(int) sample {
			return func(int) sample {
				os.Remove(filepath.Join(u.Dir, name))
				return i.measure(t)
			}
		}
		b.compare(c.what, 0, 7, fresh(ours, "ours.efi"), rival{name: "ukify", run: fresh(theirs, "theirs.efi")}.atMost(c.target, 0.3))
	}
}

// in returns arguments with a directory in place of DIR.
func in(dir string, args []string) []string {
	var list []string
	for _, a := range args {
		list = append(list, strings.ReplaceAll(a, "DIR", dir))
	}
	return list
}
