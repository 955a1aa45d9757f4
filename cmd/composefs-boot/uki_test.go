package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// ukifyHere runs this program as ukify, in the directory.
func ukifyHere(t *testing.T, dir string, args ...string) (out, errOut string, code int) {
	t.Helper()
	t.Chdir(dir)
	var o, e bytes.Buffer
	code = run(context.Background(), append([]string{"ukify"}, args...), nil, &o, &e)
	return o.String(), e.String(), code
}

// The program answers to the name ukify: files, what --measure and inspect print and configuration files are the same.
func TestUkify(t *testing.T) {
	u := vm.NewUkify(t)
	kernel, err := os.ReadFile(vm.Kernels(t)["6.12"].Image)
	if err != nil {
		t.Fatal(err)
	}
	u.Write("linux", kernel)
	u.Write("initrd", []byte("initrd"))
	u.Write("osrel", []byte("ID=x\n"))
	u.Write("dtb1", []byte("device tree 1"))
	u.Write("dtb2", []byte("device tree 2"))
	u.Write("hwids/a.json", []byte(`{"type": "devicetree", "name": "A", "compatible": "b,c", "hwids": ["01234567-89ab-cdef-0123-456789abcdef"]}`))
	u.Write("one.efi", nil)
	u.Write("ukify.conf", []byte(`# a comment
[UKI]
Initrd = initrd osrel
Cmdline = from   the file   # a comment
DeviceTreeAuto=dtb1
  dtb2
SBAT=sbat,1,x
  more,1,a,b,c,d
OSRelease=@osrel
HWIDs=hwids
Unknown=1
[Other]
Linux=not-this
`))
	stub := "--stub=" + u.Stub("linuxx64.efi.stub")
	theirs := "--stub=/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
	addon := strings.ReplaceAll(stub, "linuxx64", "addonx64")
	for name, args := range map[string][]string{
		"options":     {"build", "--linux", "linux", "--initrd=initrd", "--cmdline", " a  b ", "--os-release", "@osrel", "--hwids=", "--section=.x:@dtb1", "--section=.y:text", "--measure"},
		"config file": {"-c", "ukify.conf", "build", "--linux=linux", "--initrd=dtb1", "--measure", "--pcr-banks=sha256,sha1"},
		"over config": {"--config=ukify.conf", "build", "--linux=linux", "--cmdline=@osrel", "--uname=7", "--hwids=", "--measure", "--json", "short"},
		"addon":       {"build", "--cmdline=x", "--output=addon.efi", "--hwids="},
		"profile":     {"build", "--profile=@osrel", "--cmdline=x", "--hwids=", "--output=p.efi"},
		"joined":      {"build", "--linux=linux", "--os-release=", "--join-profile=p0.efi", "--hwids=", "--measure", "--json=short"},
		"no verb":     {"linux", "initrd", "--os-release=", "--hwids=", "--cmdline="},
	} {
		t.Run(name, func(t *testing.T) {
			u := u.With(t)
			stub, theirs := stub, theirs
			if name == "addon" || name == "profile" {
				stub, theirs = addon, strings.ReplaceAll(theirs, "linuxx64", "addonx64")
			}
			if name == "joined" {
				u.Ukify("build", "--profile=ID=p0", "--cmdline=x", "--output=p0.efi")
			}
			want := u.Ukify(append(args, theirs, "--output=theirs.efi")...)
			out, errOut, code := ukifyHere(t, u.Dir, append(args, stub, "--output=ours.efi")...)
			if code != 0 {
				t.Fatal(errOut)
			}
			if name == "config file" && !strings.Contains(errOut, "line 11: [UKI] Unknown: not known") {
				t.Errorf("notes: %s", errOut)
			}
			if normal(out) != normal(string(want)) {
				t.Errorf("prints\n%s\nwant\n%s", out, want)
			}
			sameUKI(t, u.Dir)
			for _, how := range [][]string{{}, {"--all"}, {"--json=short"}, {"--json=pretty", "--all"}, {"--section=.cmdline:binary"}, {"-j", "--section=.cmdline:text@saved"}} {
				inspect := append([]string{"inspect", "theirs.efi"}, how...)
				os.Remove(filepath.Join(u.Dir, "saved"))
				want := u.Ukify(inspect...)
				saved, _ := os.ReadFile(filepath.Join(u.Dir, "saved"))
				os.Remove(filepath.Join(u.Dir, "saved"))
				out, errOut, code := ukifyHere(t, u.Dir, inspect...)
				if code != 0 {
					t.Fatal(errOut)
				}
				if again, _ := os.ReadFile(filepath.Join(u.Dir, "saved")); !bytes.Equal(saved, again) {
					t.Errorf("inspect %q saves %q, want %q", how, again, saved)
				}
				if strings.Contains(strings.Join(how, ""), "j") {
					var a, b any
					if err := json.Unmarshal([]byte(out), &a); err != nil {
						t.Fatal(err)
					}
					if err := json.Unmarshal(want, &b); err != nil {
						t.Fatal(err)
					}
					if !reflect.DeepEqual(a, b) {
						t.Errorf("inspect %q: %s, want %s", how, out, want)
					}
				} else if out != string(want) {
					t.Errorf("inspect %q:\n%s\nwant\n%s", how, out, want)
				}
			}
		})
	}
}

// normal is JSON without white space, and other text as it is but for that at its end.
func normal(s string) string {
	var b bytes.Buffer
	if json.Compact(&b, []byte(s)) == nil {
		return b.String()
	}
	return strings.Join(strings.Fields(s), "\n")
}

// sameUKI compares ours.efi with theirs.efi, which has no checksum.
func sameUKI(t *testing.T, dir string) {
	t.Helper()
	ours, err := os.ReadFile(filepath.Join(dir, "ours.efi"))
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.ReadFile(filepath.Join(dir, "theirs.efi"))
	if err != nil {
		t.Fatal(err)
	}
	clear(ours[binary.LittleEndian.Uint32(ours[60:])+24+64:][:4])
	if !bytes.Equal(ours, theirs) {
		t.Errorf("the files differ: %d and %d bytes", len(ours), len(theirs))
	}
}
