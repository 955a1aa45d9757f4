package uki_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/uki"
)

// noise is content that looks like nothing in particular and is always the same.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for k := range b {
		x = x*1664525 + 1013904223
		b[k] = byte(x >> 24)
	}
	return b
}

func content(t testing.TB, path string) uki.Content {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return uki.Content{ReaderAt: f, Size: info.Size()}
}

func stub(t testing.TB, path string) *uki.PE {
	t.Helper()
	c := content(t, path)
	p, err := uki.ParsePE(c, c.Size)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return p
}

// build builds into a file and returns its content.
func build(t testing.TB, s *uki.PE, parts uki.Parts, path string) []byte {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, _, err := uki.Build(f, s, parts); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func read(t testing.TB, b []byte) *uki.Image {
	t.Helper()
	m, _, err := uki.Read(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// sameFile compares a file with ukify's, which has no checksum, byte for byte.
func sameFile(t *testing.T, got []byte, path string) {
	t.Helper()
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := int(binary.LittleEndian.Uint32(got[60:])) + 24 + 64
	sum := binary.LittleEndian.Uint32(got[at:])
	got = bytes.Clone(got)
	binary.LittleEndian.PutUint32(got[at:], 0)
	if bytes.Equal(got, want) {
		if sum != peChecksum(got) {
			t.Errorf("checksum 0x%x, want 0x%x", sum, peChecksum(got))
		}
		return
	}
	for k := range min(len(got), len(want)) {
		if got[k] != want[k] {
			t.Fatalf("%d and %d bytes differ first at %d (0x%x): %x, want %x", len(got), len(want), k, k, got[k], want[k])
		}
	}
	t.Fatalf("%d bytes, want %d", len(got), len(want))
}

// peChecksum is the sum as it is defined: word by word.
func peChecksum(b []byte) uint32 {
	sum := uint32(0)
	for k := 0; k < len(b); k += 2 {
		w := uint32(b[k])
		if k+1 < len(b) {
			w |= uint32(b[k+1]) << 8
		}
		sum += w
		sum = sum&0xffff + sum>>16
	}
	return sum + uint32(len(b))
}

const osRelease = "ID=test\nVERSION_ID=1\n"

// A UKI with everything in it is the same as ukify's, byte for byte but for the checksum, and so are its predictions; with
// every kernel that there is and every architecture.
func TestBuildsAsUkify(t *testing.T) {
	kernels := vm.Kernels(t)
	for _, name := range []string{"6.1", "6.12", "7.2"} {
		t.Run(name, func(t *testing.T) {
			u := vm.NewUkify(t)
			kernel, err := os.ReadFile(kernels[name].Image)
			if err != nil {
				t.Fatal(err)
			}
			matrix(t, u, "x64", u.Write("linux", kernel), kernels[name].Version, name == "6.12")
		})
	}
	for _, arch := range []string{"aa64", "riscv64"} {
		t.Run(arch, func(t *testing.T) {
			u := vm.NewUkify(t)
			matrix(t, u, arch, u.Write("linux", fakeKernel(t, u, arch)), "6.12.99-test", arch == "aa64")
		})
	}
}

// fakeKernel is a PE program that says what release it is.
func fakeKernel(t *testing.T, u *vm.Ukify, arch string) []byte {
	b, err := os.ReadFile(u.Stub("systemd-boot" + arch + ".efi"))
	if err != nil {
		t.Fatal(err)
	}
	return append(b, "\x00Linux version x Linux version 6.12.99-test (me@there) #1\x00"...)
}

func matrix(t *testing.T, u *vm.Ukify, arch, linux, release string, all bool) {
	parts := uki.Parts{
		Linux:     content(t, linux),
		Initrd:    []uki.Content{content(t, u.Write("one", noise(1, 100_001))), content(t, u.Write("two", noise(2, 7_000)))},
		Microcode: content(t, u.Write("ucode", noise(3, 5_000))),
		Splash:    content(t, u.Write("splash", noise(4, 700))),
		DTB:       content(t, u.Write("dtb", noise(5, 900))),
		DTBAuto:   []uki.Content{content(t, u.Write("auto1", noise(6, 901))), content(t, u.Write("auto2", noise(7, 902)))},
		Cmdline:   uki.Text("root=x quiet"),
		OSRelease: uki.Text(osRelease),
		PCRPKey:   content(t, u.Write("key", []byte("-----BEGIN PUBLIC KEY-----\n"))),
		Extra:     []uki.Section{uki.NewSection(".sbom", content(t, u.Write("sbom", noise(8, 1234))))},
	}
	u.Write("osrel", []byte(osRelease))
	s := stub(t, u.Stub("linux"+arch+".efi.stub"))
	const parent = "--efi-arch="
	args := []string{"build", parent + arch, "--linux=linux", "--initrd=one", "--initrd=two", "--microcode=ucode", "--splash=splash",
		"--devicetree=dtb", "--devicetree-auto=auto1", "--devicetree-auto=auto2", "--cmdline=root=x  quiet ", "--os-release=@osrel",
		"--pcrpkey=key", "--section=.sbom:@sbom", "--hwids="}
	t.Run("full", func(t *testing.T) {
		u := u.With(t)
		out := u.Ukify(append(args, "--output=full.efi", "--measure")...)
		got := build(t, s, parts, filepath.Join(u.Dir, "ours.efi"))
		sameFile(t, got, filepath.Join(u.Dir, "full.efi"))
		m := read(t, got)
		sections, err := m.Profile(0)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sections {
			if s.Name == ".uname" {
				b := make([]byte, s.Size)
				if s.ReadAt(b, 0); string(b) != release {
					t.Errorf("release %q, want %q", b, release)
				}
			}
		}
		samePredictions(t, m, out)
	})
	if !all {
		return
	}
	t.Run("plain", func(t *testing.T) {
		u := u.With(t)
		out := u.Ukify("build", parent+arch, "--linux=linux", "--initrd=two", "--uname=1.2.3", "--os-release=@osrel", "--hwids=",
			"--sbat=sbat,1,x\nmine,1,a,b,c,d\n", "--output=plain.efi", "--measure")
		got := build(t, s, uki.Parts{Linux: parts.Linux, Initrd: parts.Initrd[1:], Uname: uki.Text("1.2.3"), OSRelease: parts.OSRelease,
			SBAT: []string{"sbat,1,x\nmine,1,a,b,c,d\n"}}, filepath.Join(u.Dir, "ours.efi"))
		sameFile(t, got, filepath.Join(u.Dir, "plain.efi"))
		samePredictions(t, read(t, got), out)
	})
	t.Run("profiles", func(t *testing.T) {
		u := u.With(t)
		var joins []string
		var profiles []*uki.Image
		for k, profile := range []struct {
			args  []string
			parts uki.Parts
		}{
			{[]string{"--cmdline=rescue"}, uki.Parts{Cmdline: uki.Text("rescue")}},
			{[]string{"--initrd=one", "--cmdline=@osrel", "--splash=splash"}, uki.Parts{Initrd: parts.Initrd[:1], Cmdline: uki.Text(osRelease), Splash: parts.Splash}},
			{[]string{"--linux=linux", "--uname=9", "--devicetree=auto1"}, uki.Parts{Linux: parts.Linux, Uname: uki.Text("9"), DTB: parts.DTBAuto[0]}},
			{nil, uki.Parts{}},
		} {
			name := fmt.Sprintf("profile%d.efi", k)
			text := fmt.Sprintf("ID=p%d\nTITLE=Profile %d\n", k, k)
			u.Ukify(append([]string{"build", parent + arch, "--profile=" + text, "--os-release=", "--hwids=", "--output=" + name,
				"--stub=/usr/lib/systemd/boot/efi/addon" + arch + ".efi.stub"}, profile.args...)...)
			profile.parts.Profile = uki.Text(text)
			got := build(t, stub(t, u.Stub("addon"+arch+".efi.stub")), profile.parts, filepath.Join(u.Dir, "ours.efi"))
			sameFile(t, got, filepath.Join(u.Dir, name))
			joins = append(joins, "--join-profile="+name)
			profiles = append(profiles, read(t, got))
		}
		out := u.Ukify(append(append(args, joins...), "--profile=ID=first", "--output=many.efi", "--measure")...)
		parts := parts
		parts.Profile, parts.Join = uki.Text("ID=first"), profiles
		got := build(t, s, parts, filepath.Join(u.Dir, "ours.efi"))
		sameFile(t, got, filepath.Join(u.Dir, "many.efi"))
		samePredictions(t, read(t, got), out)
	})
	t.Run("addon", func(t *testing.T) {
		u := u.With(t)
		u.Ukify("build", parent+arch, "--cmdline=debug", "--devicetree=dtb", "--initrd=one", "--initrd=two", "--microcode=ucode",
			"--uname=1", "--hwids=", "--output=addon.efi")
		got := build(t, stub(t, u.Stub("addon"+arch+".efi.stub")), uki.Parts{Cmdline: uki.Text("debug"), DTB: parts.DTB,
			Initrd: parts.Initrd, Microcode: parts.Microcode, Uname: uki.Text("1")}, filepath.Join(u.Dir, "ours.efi"))
		sameFile(t, got, filepath.Join(u.Dir, "addon.efi"))
		if !read(t, got).IsAddon() {
			t.Error("no addon")
		}
	})
	t.Run("hwids", func(t *testing.T) {
		u := u.With(t)
		const dir = "/usr/lib/systemd/boot/hwids/aa64"
		u.Ukify("build", parent+arch, "--linux=linux", "--hwids="+dir, "--os-release=", "--output=hwids.efi")
		ids, err := uki.HWIDs(os.DirFS(vm.Cache(t, "ukify"+dir)))
		if err != nil {
			t.Fatal(err)
		}
		sameFile(t, build(t, s, uki.Parts{Linux: parts.Linux, HWIDs: ids}, filepath.Join(u.Dir, "ours.efi")), filepath.Join(u.Dir, "hwids.efi"))
	})
}

// samePredictions compares predictions with what ukify --measure prints: for each profile and .dtbauto, phase and bank. For
// the profiles after the first, ukify takes only the first .dtbauto.
func samePredictions(t *testing.T, m *uki.Image, out []byte) {
	t.Helper()
	all, err := uki.Measure(m, uki.Banks, uki.Phases)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, phase := range groups(all) {
		for _, p := range phase {
			if p.Profile == 0 || p.DTB <= 1 {
				got = append(got, fmt.Sprintf("%d:%s=%s", p.PCR, p.Bank, p.Value))
			}
		}
	}
	want := strings.Fields(string(out))
	if len(want) == 0 || strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%d predictions, want %d:\n%s\nwant\n%s", len(got), len(want), strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// groups puts predictions in the order of systemd-measure: by phase first, then by bank.
func groups(all []uki.Prediction) [][]uki.Prediction {
	var groups [][]uki.Prediction
	for n := 0; n < len(all); n += len(uki.Banks) * len(uki.Phases) {
		for phase := range uki.Phases {
			var group []uki.Prediction
			for bank := range uki.Banks {
				group = append(group, all[n+bank*len(uki.Phases)+phase])
			}
			groups = append(groups, group)
		}
	}
	return groups
}

// A kernel that is compressed as a whole is decompressed, and the release is read from what a zboot image has in it.
func TestCompressedKernels(t *testing.T) {
	u := vm.NewUkify(t)
	kernel := fakeKernel(t, u, "aa64")
	s := stub(t, u.Stub("linuxaa64.efi.stub"))
	for name, compress := range map[string]func([]byte) []byte{"gzip": gzipped, "zstd": zstandard, "lz4": lz4Frame, "lzma": lzmaAlone} {
		same := func(t *testing.T, linux []byte) {
			path := u.Write("linux", linux)
			u.Ukify("build", "--efi-arch=aa64", "--linux=linux", "--os-release=", "--hwids=", "--output=out.efi")
			got := build(t, s, uki.Parts{Linux: content(t, path)}, filepath.Join(u.Dir, "ours.efi"))
			sameFile(t, got, filepath.Join(u.Dir, "out.efi"))
			if !bytes.Contains(got, []byte("6.12.99-test\x00\x00\x00\x00")) {
				t.Error("the release is not there")
			}
		}
		t.Run(name, func(t *testing.T) { same(t, compress(kernel)) })
		t.Run("zboot "+name, func(t *testing.T) { same(t, zboot(t, u, name, compress(kernel))) })
	}
	// ukify does not read these.
	for name, linux := range map[string][]byte{"xz": xzStream(kernel), "zboot xz": zboot(t, u, "xzkern", xzStream(kernel)),
		"zboot zstd22": zboot(t, u, "zstd22", zstandard(kernel))} {
		c, err := uki.Kernel(uki.Bytes(linux))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if release, err := uki.Uname(c); err != nil || release != "6.12.99-test" {
			t.Errorf("%s: release %q, %v", name, release, err)
		}
	}
}

// zboot is a PE program with a compressed kernel in it.
func zboot(t *testing.T, u *vm.Ukify, name string, payload []byte) []byte {
	b, err := os.ReadFile(u.Stub("linuxaa64.efi.stub"))
	if err != nil {
		t.Fatal(err)
	}
	clear(b[4:60])
	copy(b[4:], "zimg")
	binary.LittleEndian.PutUint32(b[8:], uint32(len(b)))
	binary.LittleEndian.PutUint32(b[12:], uint32(len(payload)))
	copy(b[24:], name)
	return append(b, payload...)
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zstandard(b []byte) []byte {
	w, _ := zstd.NewWriter(nil)
	return w.EncodeAll(b, nil)
}

func lz4Frame(b []byte) []byte {
	var out bytes.Buffer
	w := lz4.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func lzmaAlone(b []byte) []byte {
	var out bytes.Buffer
	w, _ := lzma.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func xzStream(b []byte) []byte {
	var out bytes.Buffer
	w, _ := xz.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

// systemd-measure itself, for sections that ukify leaves out, and phases of one's own.
func TestMeasuresAsSystemd(t *testing.T) {
	u := vm.NewUkify(t)
	names := []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey", ".profile",
		".dtbauto", ".hwids"}
	m := &uki.Image{Profiles: [][]uki.Section{nil, nil}}
	args := []string{"calculate", "--json=short", "--phase=enter-initrd:shutdown", "--phase=a:b"}
	for k, name := range names {
		b := noise(byte(k), 100*k) // .linux is empty, which is not measured
		if name == ".profile" {
			b = []byte("ID=me\n")
		}
		u.Write(name[1:], b)
		args = append(args, "--"+name[1:]+"="+name[1:])
		where := 0
		if name == ".profile" {
			where = 1
		}
		// The other way round: the order of the file does not count.
		m.Profiles[where] = append([]uki.Section{uki.NewSection(name, uki.Bytes(b))}, m.Profiles[where]...)
	}
	var want map[uki.Bank][]struct{ Phase, Hash string }
	if err := json.Unmarshal(u.Measure(args...), &want); err != nil {
		t.Fatal(err)
	}
	all, err := uki.Measure(m, uki.Banks, []string{"a:b", "enter-initrd:shutdown"})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 8 || len(want) != 4 {
		t.Fatalf("%d predictions, and for %d banks", len(all), len(want))
	}
	for k, p := range all {
		if w := want[p.Bank][k%2]; w.Phase != p.Phase || w.Hash != p.Value || p.ID != "me" {
			t.Errorf("%+v, want %+v", p, w)
		}
	}
}
