package chain_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/boot/chain"
	"github.com/composefs-boot/composefs-boot/boot/initrd"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
	"github.com/composefs-boot/composefs-boot/uki"
)

// identity is a key with its certificate.
type identity struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

func newIdentity(t *testing.T, name string) identity {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Unix(1<<31, 0)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return identity{key, cert}
}

// memory is a file in memory.
type memory struct{ b []byte }

func (m *memory) WriteAt(b []byte, off int64) (int, error) {
	if grow := int(off) + len(b) - len(m.b); grow > 0 {
		m.b = append(m.b, make([]byte, grow)...)
	}
	return copy(m.b[off:], b), nil
}

func parse(t *testing.T, b []byte) *uki.PE {
	t.Helper()
	p, err := uki.ParsePE(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (i identity) sign(t *testing.T, b []byte) []byte {
	t.Helper()
	out := &memory{}
	if err := uki.Sign(out, parse(t, b), i.key, i.cert); err != nil {
		t.Fatal(err)
	}
	return out.b
}

// program makes a PE file with one section: a stub, or with a release the head of a bzImage.
func program(release string) []byte {
	b := make([]byte, 1536)
	le := binary.LittleEndian
	copy(b, "MZ")
	le.PutUint32(b[60:], 64)
	copy(b[64:], "PE\x00\x00")
	le.PutUint16(b[68:], uint16(uki.X64))
	le.PutUint16(b[70:], 1)
	le.PutUint16(b[84:], 240)
	le.PutUint16(b[88:], 0x20b)
	le.PutUint32(b[88+32:], 4096)
	le.PutUint32(b[88+36:], 512)
	le.PutUint32(b[88+56:], 8192)
	le.PutUint32(b[88+60:], 1024)
	le.PutUint32(b[88+108:], 16)
	copy(b[328:], ".text")
	for k, v := range []uint32{512, 4096, 512, 1024} {
		le.PutUint32(b[336+4*k:], v)
	}
	if release != "" {
		copy(b[0x202:], "HdrS")
		le.PutUint16(b[0x20e:], 0x100)
		copy(b[0x300:], release+" (builder) #1")
	}
	return b
}

// archive makes an initramfs of empty files.
func archive(names ...string) []byte {
	var b bytes.Buffer
	for _, name := range append(names, "TRAILER!!!") {
		h := fmt.Sprintf("070701%08x%08x%s%08x00000000%s\x00", 1, 0o100755, strings.Repeat("0", 72), len(name)+1, name)
		b.WriteString(h + strings.Repeat("\x00", (4-len(h)%4)%4))
	}
	return b.Bytes()
}

const release = "6.1.0-test"

// system is a small system in a repository, what its UKI is made of, and the keys of its owner.
type system struct {
	owner identity
	dir   string // of the repository
	image fsverity.Digest
	parts uki.Parts
	files map[string]fsverity.Digest // objects by their paths in the image
}

func newSystem(t *testing.T) *system {
	t.Helper()
	s := &system{owner: newIdentity(t, "owner"), dir: filepath.Join(t.TempDir(), "repo"), files: map[string]fsverity.Digest{}}
	tree := t.TempDir()
	kernel := program(release)
	for name, data := range map[string][]byte{
		"usr/lib/modules/" + release + "/vmlinuz": kernel,
		"usr/lib/modules/6.0.0/modules.dep":       nil,
		"usr/lib/os-release":                      []byte("NAME=Test\nID=test\n"),
		"usr/bin/program":                         bytes.Repeat([]byte("program"), 100),
	} {
		name = filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := repo.Init(s.dir, repo.Config{Algorithm: fsverity.SHA256, Format: erofs.V1, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	r := s.open(t)
	ctx := context.Background()
	i, err := r.Begin(ctx, repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Abort()
	root, err := scan.Dir(ctx, tree, i, scan.Options{})
	if err == nil {
		err = root.MakeContainerRoot(fstree.XattrsAllowlist)
	}
	if err == nil {
		err = boot.Transform(root, scan.Files(tree))
	}
	if err == nil {
		s.image, err = i.PutImage(root, erofs.V1, "os")
	}
	if err == nil {
		err = i.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	root.Walk(func(path string, i *fstree.Inode) error {
		if o, ok := i.Content.(*fstree.Object); ok {
			s.files[path] = o.Digest
		}
		return nil
	})
	s.parts = uki.Parts{Linux: uki.Bytes(kernel), Initrd: []uki.Content{uki.Bytes(archive("init", "usr/bin/composefs-setup-root"))},
		OSRelease: uki.Text("ID=test\n"), Cmdline: uki.Text(s.karg() + " root=UUID=x quiet")}
	return s
}

func (s *system) karg() string { return karg.Make(s.image, 1, false).String() }

func (s *system) open(t *testing.T) *repo.Repo {
	t.Helper()
	r, err := repo.Open(s.dir, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// damage changes an object of the repository.
func (s *system) damage(t *testing.T, d fsverity.Digest) {
	t.Helper()
	name := filepath.Join(s.dir, "objects", d.ObjectPath())
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	write(t, name, b)
}

func (s *system) build(t *testing.T) []byte { return made(t, s.parts) }

func made(t *testing.T, parts uki.Parts) []byte {
	t.Helper()
	out := &memory{}
	if _, _, err := uki.Build(out, parse(t, program("")), parts); err != nil {
		t.Fatal(err)
	}
	return out.b
}

func write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// esp is a copy of a partition in a directory.
type esp struct {
	t   *testing.T
	dir string
}

func (e esp) put(name string, b []byte) { write(e.t, filepath.Join(e.dir, name), b) }

func (e esp) remove(name string) {
	if err := os.RemoveAll(filepath.Join(e.dir, name)); err != nil {
		e.t.Fatal(err)
	}
}

const (
	loader = "EFI/systemd/systemd-bootx64.efi"
	entry  = "EFI/Linux/os+3.efi"
)

// good is a partition with nothing wrong.
func (s *system) good(t *testing.T) (esp, chain.Options) {
	t.Helper()
	e := esp{t, t.TempDir()}
	sdboot := made(t, uki.Parts{Extra: []uki.Section{uki.NewSection(".sdmagic", uki.Text("x"))},
		SBAT: []string{"sbat,1,x,x,1,x\nsystemd-boot,1,x,x,1,x\n"}})
	e.put(loader, s.owner.sign(t, sdboot))
	e.put("loader/loader.conf", []byte("timeout 3\neditor no\n"))
	e.put(entry, s.owner.sign(t, s.build(t)))
	return e, chain.Options{Trust: &uki.Trust{Certificates: []*x509.Certificate{s.owner.cert}}, SBATLevel: "sbat,1,2024\nuki,1\n", Repo: s.open(t)}
}

func verify(t *testing.T, e esp, o chain.Options) chain.Report {
	t.Helper()
	r, err := chain.ESP(context.Background(), os.DirFS(e.dir), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// With nothing broken every link is checked, and each one is there.
func TestWholeChain(t *testing.T) {
	s := newSystem(t)
	e, o := s.good(t)
	r := verify(t, e, o)
	var kinds []string
	for _, l := range append(r.Loader, r.Entries[0].Links...) {
		kinds = append(kinds, string(l.Kind))
		if l.Status != chain.OK {
			t.Errorf("%s: %s", l.Status, l)
		}
	}
	want := "boot loader, boot loader, loader.conf, signature, SBAT, command line, initramfs, image, objects, kernel, os-release"
	if got := strings.Join(kinds, ", "); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	// Without anything to check it with, nothing is said to be right that was not looked at.
	r = verify(t, e, chain.Options{})
	unchecked := map[chain.Kind]bool{}
	for _, l := range append(r.Loader, r.Entries[0].Links...) {
		if l.Status == chain.Broken {
			t.Errorf("nothing given: %s", l)
		}
		if l.Status == chain.Unchecked {
			unchecked[l.Kind] = true
		}
	}
	for _, k := range []chain.Kind{chain.Loader, chain.Signature, chain.SBAT, chain.Image, chain.Objects} {
		if !unchecked[k] {
			t.Errorf("nothing given: %s counts as checked", k)
		}
	}
}

// Each link, broken on purpose, is the first one that is named.
func TestFirstBrokenLink(t *testing.T) {
	whole := newSystem(t)
	stranger := newIdentity(t, "stranger")
	section := func(name, text string) uki.Section { return uki.NewSection(name, uki.Text(text)) }
	profile := func(sections ...uki.Section) *uki.Image {
		return &uki.Image{Profiles: [][]uki.Section{nil, append([]uki.Section{section(".profile", "ID=more")}, sections...)}}
	}
	// damaged is a system of its own, as its repository is changed.
	damaged := func(damage func(s *system)) func(*testing.T, *system, esp, *chain.Options) {
		return func(t *testing.T, _ *system, e esp, o *chain.Options) {
			s := newSystem(t)
			damage(s)
			e.put(entry, whole.owner.sign(t, s.build(t)))
			o.Repo = s.open(t)
		}
	}
	parts := func(change func(p *uki.Parts)) func(*testing.T, *system, esp, *chain.Options) {
		return func(t *testing.T, s *system, e esp, _ *chain.Options) {
			p := s.parts
			change(&p)
			e.put(entry, s.owner.sign(t, made(t, p)))
		}
	}
	line := func(format string) func(*testing.T, *system, esp, *chain.Options) {
		return parts(func(p *uki.Parts) { p.Cmdline = uki.Text(strings.ReplaceAll(format, "IMAGE", whole.karg())) })
	}
	addon := func(name, cmdline string, by *identity) func(*testing.T, *system, esp, *chain.Options) {
		return func(t *testing.T, s *system, e esp, _ *chain.Options) {
			b := made(t, uki.Parts{Cmdline: uki.Text(cmdline)})
			if by != nil {
				b = by.sign(t, b)
			}
			e.put(name, b)
		}
	}
	flip := func(name string, of func(p *uki.PE) int64) func(*testing.T, *system, esp, *chain.Options) {
		return func(t *testing.T, _ *system, e esp, _ *chain.Options) {
			b, err := os.ReadFile(filepath.Join(e.dir, name))
			if err != nil {
				t.Fatal(err)
			}
			b[of(parse(t, b))] ^= 1
			e.put(name, b)
		}
	}
	in := func(name string) func(p *uki.PE) int64 {
		return func(p *uki.PE) int64 {
			for _, h := range p.Sections {
				if h.Name == name {
					return int64(h.Raw.Offset)
				}
			}
			return -1
		}
	}
	other := karg.Make(fsverity.NewDigester(fsverity.SHA256).Sum(), 1, false)
	sha512 := karg.Make(fsverity.NewDigester(fsverity.SHA512).Sum(), 1, false)
	hex := whole.image.String()
	for name, c := range map[string]struct {
		change func(t *testing.T, s *system, e esp, o *chain.Options)
		kind   chain.Kind // "" if nothing is to be broken
		want   string
	}{
		"loader unsigned": {func(t *testing.T, s *system, e esp, _ *chain.Options) {
			e.put("EFI/BOOT/BOOTX64.EFI", made(t, uki.Parts{Extra: []uki.Section{section(".x", "x")}}))
		}, chain.Loader, "BOOTX64.EFI: not signed"},
		"loader by a stranger": {func(t *testing.T, s *system, e esp, _ *chain.Options) {
			e.put(loader, stranger.sign(t, made(t, uki.Parts{Extra: []uki.Section{section(".x", "x")}})))
		}, chain.Loader, "not signed by a key that is trusted: signed by CN=stranger"},
		"loader revoked": {func(_ *testing.T, _ *system, _ esp, o *chain.Options) { o.SBATLevel = "sbat,1,2024\nsystemd-boot,2\n" }, chain.Loader, "revoked: systemd-boot has generation 1, the list wants 2"},
		"loader no PE":   {func(_ *testing.T, _ *system, e esp, _ *chain.Options) { e.put(loader, []byte("x")) }, chain.Loader, "cannot be read: offset 0"},
		"no loader":      {func(_ *testing.T, _ *system, e esp, _ *chain.Options) { e.remove("EFI/systemd") }, "", ""},
		"editor": {func(_ *testing.T, _ *system, e esp, _ *chain.Options) {
			e.put("loader/loader.conf", []byte("editor yes\n"))
		}, "", ""},
		"unsigned":        {func(t *testing.T, s *system, e esp, _ *chain.Options) { e.put(entry, s.build(t)) }, chain.Signature, "not signed"},
		"another key":     {func(t *testing.T, s *system, e esp, _ *chain.Options) { e.put(entry, stranger.sign(t, s.build(t))) }, chain.Signature, "CN=stranger"},
		"flipped .linux":  {flip(entry, in(".linux")), chain.Signature, "changed after it had been signed"},
		"flipped .initrd": {flip(entry, in(".initrd")), chain.Signature, "changed after it had been signed"},
		"flipped line":    {flip(entry, in(".cmdline")), chain.Signature, "changed after it had been signed"},
		"flipped, no trust": {func(t *testing.T, s *system, e esp, o *chain.Options) {
			flip(entry, in(".linux"))(t, s, e, o)
			o.Trust = nil
		}, chain.Signature, "changed after it had been signed"},
		"revoked by dbx": {func(t *testing.T, s *system, e esp, o *chain.Options) {
			d, err := parse(t, s.build(t)).Authenticode()
			if err != nil {
				t.Fatal(err)
			}
			o.Trust.Revoked.Hashes = append(o.Trust.Revoked.Hashes, d)
		}, chain.Signature, "revoked: dbx has the hash"},
		"not a UKI":      {func(_ *testing.T, _ *system, e esp, _ *chain.Options) { e.put(entry, []byte("nothing")) }, chain.Signature, "cannot be read: offset 0"},
		"SBAT revoked":   {func(_ *testing.T, _ *system, _ esp, o *chain.Options) { o.SBATLevel = "sbat,1\nuki,2\n" }, chain.SBAT, "revoked: uki has generation 1, the list wants 2"},
		"SBAT short":     {parts(func(p *uki.Parts) { p.SBAT = []string{"sbat,1\nfoo,1,x\n"} }), chain.SBAT, ".sbat: line 2: 3 fields, want 6"},
		"SBAT no number": {parts(func(p *uki.Parts) { p.SBAT = []string{"sbat,1\nfoo,x,x,x,x,x\n"} }), chain.SBAT, "line 2: want a component and its generation"},
		"no SBAT": {func(t *testing.T, s *system, e esp, _ *chain.Options) {
			e.put(entry, s.owner.sign(t, without(t, s.build(t), ".sbat")))
		}, chain.SBAT, "no .sbat"},
		"no command line":    {parts(func(p *uki.Parts) { p.Cmdline = uki.Content{} }), chain.Cmdline, "none: whoever starts it"},
		"no image":           {line("quiet"), chain.Cmdline, "no composefs argument"},
		"malformed":          {line("composefs=xyz"), chain.Cmdline, "composefs=xyz"},
		"insecure":           {line("composefs.digest=?v1-sha256-12:" + hex), chain.Cmdline, `with "?"`},
		"two of a kind":      {line("IMAGE IMAGE"), chain.Cmdline, "another argument of its kind"},
		"two kinds":          {line("IMAGE composefs=" + hex), chain.Cmdline, "composefs=" + hex + ": a second image"},
		"image after --":     {line("-- IMAGE"), chain.Cmdline, "no composefs argument"},
		"init":               {line("IMAGE init=/bin/sh"), chain.Cmdline, "init=/bin/sh: starts this program"},
		"init, quoted":       {line(`IMAGE "init=/bin/sh -x"`), chain.Cmdline, "init=/bin/sh"},
		"init in a value":    {line(`IMAGE foo="a init=/bin/sh"`), chain.Cmdline, "init=/bin/sh"},
		"init after --":      {line("IMAGE -- rd.break"), chain.Cmdline, "rd.break: stops in the initramfs"},
		"init after a0":      {line("IMAGE \u00e0init=/x"), chain.Cmdline, "init=/x"},
		"debug shell, named": {line("IMAGE systemd.debug-shell"), chain.Cmdline, "root shell without a password"},
		"second root":        {line("IMAGE root=UUID=x root=LABEL=y"), chain.Cmdline, "programs disagree"},
		"profile": {parts(func(p *uki.Parts) { p.Join = []*uki.Image{profile(section(".cmdline", "rescue"))} }), chain.Cmdline,
			"profile @1 more: no composefs argument"},
		"profile's argument": {parts(func(p *uki.Parts) {
			p.Join = []*uki.Image{profile(section(".cmdline", whole.karg()+" systemd.unit=rescue.target"))}
		}), chain.Cmdline, "profile @1 more: systemd.unit=rescue.target"},
		"addon, image":      {addon(entry+".extra.d/a.addon.efi", "composefs="+hex, &whole.owner), chain.Addon, "a.addon.efi: composefs="},
		"addon, bare name":  {addon("EFI/Linux/os.efi.extra.d/a.addon.efi", "rd.shell", &whole.owner), chain.Addon, "rd.shell"},
		"addon for all":     {addon("loader/addons/a.addon.efi", "single", &whole.owner), chain.Addon, "single"},
		"addon unsigned":    {addon("loader/addons/a.addon.efi", "single", nil), "", ""},
		"addon, stranger":   {addon("loader/addons/a.addon.efi", "single", &stranger), "", ""},
		"addon, harmless":   {addon("loader/addons/a.addon.efi", "quiet", &whole.owner), "", ""},
		"no initramfs":      {parts(func(p *uki.Parts) { p.Initrd = nil }), chain.Initramfs, "none: nothing verifies"},
		"initramfs without": {parts(func(p *uki.Parts) { p.Initrd = []uki.Content{uki.Bytes(archive("init", "bin/sh"))} }), chain.Initramfs, "no composefs-setup-root"},
		"initramfs odd":     {parts(func(p *uki.Parts) { p.Initrd = []uki.Content{uki.Text("\x89LZO")} }), "", ""},
		"profile's initramfs": {parts(func(p *uki.Parts) {
			p.Join = []*uki.Image{profile(section(".initrd", string(archive("init"))))}
		}), chain.Initramfs, "profile @1 more: no composefs-setup-root"},
		"another image":     {line(other.String()), chain.Image, "not in the repository"},
		"another algorithm": {line(sha512.String()), chain.Image, "its digest is sha512"},
		"image damaged":     {damaged(func(s *system) { s.damage(t, s.image) }), chain.Image, "another digest than the name"},
		"object damaged":    {damaged(func(s *system) { s.damage(t, s.files["/usr/bin/program"]) }), chain.Objects, "/usr/bin/program in the image"},
		"object missing": {damaged(func(s *system) {
			os.Remove(filepath.Join(s.dir, "objects", s.files["/usr/bin/program"].ObjectPath()))
		}), chain.Objects, "not found in the repository"},
		"other release":    {parts(func(p *uki.Parts) { p.Linux = uki.Bytes(program("5.0")) }), chain.Kernel, `"5.0", the image has modules for 6.0.0, ` + release},
		"release with ../": {parts(func(p *uki.Parts) { p.Linux, p.Uname = uki.Bytes(program("")), uki.Text("../modules/6.0.0") }), chain.Kernel, "the image has modules for"},
		"wrong .uname":     {parts(func(p *uki.Parts) { p.Uname = uki.Text("6.0.0") }), chain.Kernel, `but .uname says "6.0.0"`},
		"other bytes": {parts(func(p *uki.Parts) {
			b := program(release)
			b[len(b)-1] = 1
			p.Linux = uki.Bytes(b)
		}), chain.Kernel, "other bytes than the image's vmlinuz"},
		"kernel without vmlinuz": {parts(func(p *uki.Parts) { p.Linux = uki.Bytes(program("6.0.0")) }), "", ""},
		"kernel signed":          {parts(func(p *uki.Parts) { p.Linux = uki.Bytes(whole.owner.sign(t, program(release))) }), "", ""},
		"other system":           {parts(func(p *uki.Parts) { p.OSRelease = uki.Text("ID=other\n") }), chain.OSRelease, "ID=other, the image has ID=test"},
		"type 1": {func(t *testing.T, s *system, e esp, _ *chain.Options) {
			e.remove("EFI/Linux")
			e.put("linux", program(release))
			e.put("initrd", archive("composefs-setup-root"))
			e.put("loader/entries/a.conf", []byte("linux /linux\ninitrd /initrd\noptions "+s.karg()+"\n"))
		}, chain.Signature, "a type 1 entry: nothing signs"},
		"type 1 of a UKI": {func(t *testing.T, s *system, e esp, _ *chain.Options) {
			e.put("loader/entries/a.conf", []byte("uki /EFI/Linux/os+3.efi\n"))
		}, "", ""},
		"type 1 of no UKI": {func(t *testing.T, s *system, e esp, _ *chain.Options) {
			e.put("loader/entries/a.conf", []byte("sort-key a\nefi /none.efi\n"))
		}, chain.Signature, "cannot be read"},
		"odd file": {func(_ *testing.T, _ *system, e esp, _ *chain.Options) { e.put("EFI/Linux/README", nil) }, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			e, o := whole.good(t)
			c.change(t, whole, e, &o)
			r := verify(t, e, o)
			_, link := r.First()
			switch {
			case link == nil && c.kind != "":
				t.Errorf("nothing is broken, want %s: %s", c.kind, c.want)
			case link != nil && (link.Kind != c.kind || !strings.Contains(link.String(), c.want) || c.want == ""):
				t.Errorf("%s, want %s: %s", link, c.kind, c.want)
			case link != nil && link.WayOut == "":
				t.Errorf("%s: no way out", link)
			}
		})
	}
}

// without renames a section, so that nobody finds it.
func without(t *testing.T, b []byte, name string) []byte {
	t.Helper()
	at := bytes.Index(b[:1024], []byte(name))
	if at < 0 {
		t.Fatal("no section ", name)
	}
	b[at+1] = 'X'
	return b
}

// A type 1 entry is checked to its end, too.
func TestType1(t *testing.T) {
	s := newSystem(t)
	e, o := s.good(t)
	e.put("linux", program("5.0"))
	e.put("loader/entries/a.conf", []byte("linux /linux\ninitrd /none\noptions "+s.karg()+" init=/bin/sh\n"))
	var found []string
	for _, entry := range verify(t, e, o).Entries {
		if entry.Type == chain.Type1 {
			for _, l := range entry.Links {
				if l.Status == chain.Broken {
					found = append(found, string(l.Kind))
				}
			}
		}
	}
	if got, want := strings.Join(found, ", "), "signature, command line, initramfs, initramfs, kernel"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// One UKI is verified with the addons beside it; what is no partition is an error.
func TestUKI(t *testing.T) {
	s := newSystem(t)
	e, o := s.good(t)
	dir := os.DirFS(filepath.Join(e.dir, "EFI/Linux"))
	r, err := chain.UKI(context.Background(), dir, "os+3.efi", o)
	if _, link := r.First(); err != nil || link != nil {
		t.Errorf("%v, %v", link, err)
	}
	e.put("EFI/Linux/os+3.efi.extra.d/x.addon.efi", s.owner.sign(t, made(t, uki.Parts{Cmdline: uki.Text("rdinit=/x")})))
	r, err = chain.UKI(context.Background(), dir, "os+3.efi", o)
	if _, link := r.First(); err != nil || link == nil || link.Kind != chain.Addon {
		t.Errorf("%v, %v", link, err)
	}
	if _, err := chain.ESP(context.Background(), dir, o); err == nil || !strings.Contains(err.Error(), "nothing to boot") {
		t.Errorf("no partition: %v", err)
	}
	o.SBATLevel = "x"
	if _, err := chain.ESP(context.Background(), fs.FS(dir), o); err == nil || !strings.Contains(err.Error(), "SBAT level") {
		t.Errorf("no revocation list: %v", err)
	}
}

// The native initramfs has the program as /init, which is known by what Go writes into its programs.
func TestNativeInitramfs(t *testing.T) {
	program := filepath.Join(t.TempDir(), "setup")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "../../cmd/composefs-setup-root")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := newSystem(t)
	var b bytes.Buffer
	if err := initrd.Write(context.Background(), &b, initrd.Config{SetupRoot: program, Compression: initrd.Zstd}); err != nil {
		t.Fatal(err)
	}
	e, o := s.good(t)
	s.parts.Initrd = []uki.Content{uki.Bytes(b.Bytes())}
	e.put(entry, s.owner.sign(t, s.build(t)))
	for _, l := range verify(t, e, o).Entries[0].Links {
		if l.Kind == chain.Initramfs && (l.Status != chain.OK || l.Found != "composefs-setup-root is /init") {
			t.Errorf("%s: %s", l.Status, l)
		}
	}
}
