package boot_test

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/boot/disk"
	"github.com/composefs-boot/composefs-boot/boot/initrd"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
	"github.com/composefs-boot/composefs-boot/uki"
	"github.com/composefs-boot/composefs-boot/uki/secureboot"
)

// world is everything that the machines of these tests are made of: keys of its own, an operating system of one program
// (internal/vm/guest) as two composefs images, and what its UKIs are built from.
type world struct {
	dir, bin string              // working files; the programs
	key      map[string]identity // PK, KEK, db; revoked and late, which are revoked; stranger
	pcr      *rsa.PrivateKey
	pcrKey   []byte // its public key, PEM
	root     string // directory with the repository
	one, two fsverity.Digest
	parts    uki.Parts // of a UKI, but for the command line
	stub     *uki.PE
	addon    *uki.PE
	loader   []byte // systemd-boot, unsigned
	trust    uki.Trust
}

// identity is a key with its certificate.
type identity struct {
	key  *rsa.PrivateKey
	cert *x509.Certificate
}

// files are files on the ESP, by their paths.
type files map[string][]byte

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), key: map[string]identity{}}
	options := secureboot.Options{Bits: 2048, Days: 3650, Time: time.Now().Add(-time.Hour)}
	for _, name := range []string{"PK", "KEK", "db", "revoked", "late", "stranger"} {
		key, err := options.GenerateKey()
		check(t, err)
		cert, err := options.Certificate("test "+name, key)
		check(t, err)
		w.key[name] = identity{key, cert}
	}
	var err error
	w.pcr, err = options.GenerateKey()
	check(t, err)
	der, err := x509.MarshalPKIXPublicKey(w.pcr.Public())
	check(t, err)
	w.pcrKey = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})

	w.bin = vm.Programs(t, "./internal/vm/guest")
	w.makeImages(t)

	efi := vm.Cache(t, "os/trixie/usr/lib/systemd/boot/efi")
	w.loader = readFile(t, filepath.Join(efi, "systemd-bootx64.efi"))
	for name, to := range map[string]**uki.PE{"linuxx64.efi.stub": &w.stub, "addonx64.efi.stub": &w.addon} {
		*to = parsePE(t, readFile(t, filepath.Join(efi, name)))
	}
	kernel := vm.Kernels(t)["6.12"]
	var initramfs bytes.Buffer
	check(t, initrd.Write(context.Background(), &initramfs, initrd.Config{SetupRoot: filepath.Join(w.bin, "composefs-setup-root"),
		ModulesDir: filepath.Join(vm.Cache(t, "os/trixie/usr/lib/modules"), kernel.Version)}))
	w.parts = uki.Parts{Linux: uki.Bytes(readFile(t, kernel.Image)), Initrd: []uki.Content{uki.Bytes(initramfs.Bytes())},
		OSRelease: uki.Text("ID=test\nNAME=Test\nVERSION_ID=1\nPRETTY_NAME=Test\n"), PCRPKey: uki.Bytes(w.pcrKey)}
	return w
}

// dbxFile is the file of the firmware's variable.
const dbxFile = "dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f"

// makeImages makes a repository with two images, which tell who they are.
func (w *world) makeImages(t *testing.T) {
	t.Helper()
	tree := filepath.Join(w.dir, "tree")
	for _, d := range []string{"usr/lib", "sbin", "etc", "var", "sysroot", "run", "boot", "proc", "sys", "dev"} {
		check(t, os.MkdirAll(filepath.Join(tree, d), 0o755))
	}
	check(t, os.WriteFile(filepath.Join(tree, "sbin/init"), readFile(t, filepath.Join(w.bin, "guest")), 0o755))
	// An update of dbx that revokes a key, and one that nobody may make.
	revoked := secureboot.Database{secureboot.CertificateEntry(secureboot.NewGUID(), w.key["late"].cert)}
	for dir, by := range map[string]string{"usr/lib/guest": "KEK", "usr/lib/guest/wrong": "stranger"} {
		check(t, os.MkdirAll(filepath.Join(tree, dir), 0o755))
		b, err := secureboot.Sign(secureboot.DBX, true, time.Now(), revoked, w.key[by].key, w.key[by].cert)
		check(t, err)
		const attributes = 0x67 // kept, boot services, running system, signed with a time, appended
		b = append(binary.LittleEndian.AppendUint32(nil, attributes), b...)
		check(t, os.WriteFile(filepath.Join(tree, dir, dbxFile), b, 0o644))
	}
	w.root = filepath.Join(w.dir, "root")
	check(t, os.Mkdir(w.root, 0o755))
	path := filepath.Join(w.root, "composefs")
	_, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA512, Format: erofs.V1, Insecure: true})
	check(t, err)
	r, err := repo.Open(path, repo.Options{})
	check(t, err)
	defer r.Close()
	for name, digest := range map[string]*fsverity.Digest{"one": &w.one, "two": &w.two} {
		check(t, os.WriteFile(filepath.Join(tree, "usr/lib/os-release"), []byte("ID="+name+"\n"), 0o644))
		i, err := r.Begin(context.Background(), repo.LockOptions{})
		check(t, err)
		content, err := scan.Dir(context.Background(), tree, i, scan.Options{})
		if err == nil {
			*digest, err = i.PutImage(content, erofs.V1, name)
		}
		if err == nil {
			err = i.Commit()
		}
		i.Abort()
		check(t, err)
	}
}

// cmdline is a command line that boots the image.
func cmdline(image fsverity.Digest, more string) string {
	return strings.TrimSpace("console=ttyS0 quiet panic=-1 " + karg.Make(image, 1, false).String() + " " + more)
}

// build builds a UKI, with signed policies for its first profile if it is to have them. It is not signed yet.
func (w *world) build(t *testing.T, cmdline string, policies bool, profiles ...*uki.Image) []byte {
	t.Helper()
	parts := w.parts
	parts.Cmdline, parts.Join = uki.Text(cmdline), profiles
	image, err := parts.Image(w.stub)
	check(t, err)
	if policies {
		behind, err := image.Behind(w.stub)
		check(t, err)
		hashes, err := uki.HashSections(behind, []uki.Bank{"sha256"})
		check(t, err)
		_, err = image.AddPolicies(hashes, []uki.PolicyKey{{Signer: w.pcr}}, []string{image.ID(0)})
		check(t, err)
	}
	layout, err := uki.Append(w.stub, image)
	check(t, err)
	var b buffer
	check(t, layout.Write(&b))
	return b
}

func buildPE(t *testing.T, stub *uki.PE, parts uki.Parts) []byte {
	t.Helper()
	var b buffer
	_, _, err := uki.Build(&b, stub, parts)
	check(t, err)
	return b
}

func readImage(t *testing.T, b []byte) *uki.Image {
	t.Helper()
	m, _, err := uki.Read(bytes.NewReader(b), int64(len(b)))
	check(t, err)
	return m
}

// sign signs a PE file.
func (w *world) sign(t *testing.T, b []byte, by string) []byte {
	t.Helper()
	var out buffer
	check(t, uki.Sign(&out, parsePE(t, b), w.key[by].key, w.key[by].cert))
	return out
}

// enrolment is what systemd-boot enrols at the first boot: the own keys, one of which is revoked, and the revoked files.
func (w *world) enrolment(t *testing.T, revoked ...[]byte) files {
	t.Helper()
	owner := secureboot.NewGUID()
	list := map[secureboot.Variable]secureboot.Database{secureboot.DB: nil, secureboot.DBX: nil}
	for _, name := range []string{"db", "revoked", "late"} {
		w.trust.Certificates = append(w.trust.Certificates, w.key[name].cert)
		list[secureboot.DB] = append(list[secureboot.DB], secureboot.CertificateEntry(owner, w.key[name].cert))
	}
	list[secureboot.PK] = secureboot.Database{secureboot.CertificateEntry(owner, w.key["PK"].cert)}
	list[secureboot.KEK] = secureboot.Database{secureboot.CertificateEntry(owner, w.key["KEK"].cert)}
	w.trust.Revoked.Certificates = []*x509.Certificate{w.key["revoked"].cert, w.key["late"].cert}
	list[secureboot.DBX] = secureboot.Database{secureboot.CertificateEntry(owner, w.key["revoked"].cert)}
	for _, b := range revoked {
		hash, err := parsePE(t, b).Authenticode()
		check(t, err)
		w.trust.Revoked.Hashes = append(w.trust.Revoked.Hashes, hash)
		list[secureboot.DBX] = append(list[secureboot.DBX], secureboot.HashEntry(owner, hash))
	}
	made := files{}
	for v, d := range list {
		by := w.key["KEK"]
		if v == secureboot.PK || v == secureboot.KEK {
			by = w.key["PK"]
		}
		b, err := secureboot.Sign(v, false, time.Now(), d, by.key, by.cert)
		check(t, err)
		made["loader/keys/auto/"+v.Name+".auth"] = b
	}
	return made
}

// machine is a machine that keeps its disk, its firmware's variables and its TPM.
type machine struct {
	w                    *world
	disk, variables, tpm string
	plan                 *disk.Plan
}

// newMachine makes a machine whose ESP has these files, systemd-boot and its configuration.
func (w *world) newMachine(t *testing.T, more files) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{w, filepath.Join(dir, "disk"), filepath.Join(dir, "variables"), filepath.Join(dir, "tpm"), nil}
	content := files{"EFI/BOOT/BOOTX64.EFI": w.sign(t, w.loader, "db"), "loader/loader.conf": nil}
	maps.Copy(content, more)
	esp := disk.ESP{Free: 64 << 20}
	for _, path := range slices.Sorted(maps.Keys(content)) {
		b := content[path]
		esp.Files = append(esp.Files, disk.File{Path: path, Size: int64(len(b)),
			Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }})
	}
	layout := disk.Layout{Arch: runtime.GOARCH, Seed: []byte("test"), Time: time.Unix(1e9, 0), ESP: esp,
		Root: disk.Root{Dir: w.root, Overlay: fstree.New(), Free: 8 << 20}}
	var err error
	m.plan, err = layout.Plan()
	check(t, err)
	out, err := os.Create(m.disk)
	check(t, err)
	defer out.Close()
	check(t, m.plan.Write(context.Background(), out))
	return m
}

// put writes files to the ESP.
func (m *machine) put(t *testing.T, content files) {
	t.Helper()
	esp := fmt.Sprintf("%s@@%d", m.disk, m.plan.ESP.Offset)
	for path, b := range content {
		for k, c := range path {
			if c == '/' {
				exec.Command("mmd", "-i", esp, "::/"+path[:k]).Run() // it may be there
			}
		}
		cmd := exec.Command("mcopy", "-o", "-i", esp, "-", "::/"+path)
		cmd.Stdin = bytes.NewReader(b)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("mcopy %s: %v: %s", path, err, out)
		}
	}
}

// remove takes a directory from the ESP.
func (m *machine) remove(t *testing.T, path string) {
	t.Helper()
	out, err := exec.Command("mdeltree", "-i", fmt.Sprintf("%s@@%d", m.disk, m.plan.ESP.Offset), "::/"+path).CombinedOutput()
	if err != nil {
		t.Fatalf("mdeltree %s: %v: %s", path, err, out)
	}
}

// start starts the machine; systemd-boot takes the entry.
func (m *machine) start(t *testing.T, entry string) *vm.Machine {
	t.Helper()
	m.put(t, files{"loader/loader.conf": []byte("timeout 0\nsecure-boot-enroll force\nconsole-mode keep\ndefault " + entry + "\n")})
	return vm.Start(t, vm.Config{Disks: []string{m.disk}, Variables: m.variables, TPMState: m.tpm, Reboots: 1})
}

// report is what the guest says, by the first word of its lines.
type report map[string][]string

// boot starts the machine and returns what the guest says.
func (m *machine) boot(t *testing.T, entry string) report {
	t.Helper()
	guest := m.start(t, entry)
	guest.Expect(`guest: done`, `Kernel panic|guest: error|does not boot|Shell>`)
	guest.Stop()
	r := report{}
	for _, line := range regexp.MustCompile(`(?m)^guest: (\w+) ?(.*)$`).FindAllStringSubmatch(guest.Console(), -1) {
		r[line[1]] = append(r[line[1]], line[2])
	}
	return r
}

// wants checks that the guest said something, by a regular expression for the first word and one for what follows.
func (r report) wants(t *testing.T, word, pattern string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	if !slices.ContainsFunc(r[word], re.MatchString) {
		t.Errorf("%s: want %s, have %q", word, pattern, r[word])
	}
}

// without checks that the guest said nothing of the kind.
func (r report) without(t *testing.T, word, pattern string) {
	t.Helper()
	if k := slices.IndexFunc(r[word], regexp.MustCompile(pattern).MatchString); k >= 0 {
		t.Errorf("%s: do not want %s", word, r[word][k])
	}
}

// verified checks that the guest runs under Secure Boot, with the image as its verified root.
func (r report) verified(t *testing.T, image fsverity.Digest) {
	t.Helper()
	r.wants(t, "SecureBoot", "^1$")
	r.wants(t, "SetupMode", "^0$")
	r.wants(t, "root", "^composefs:"+image.String()+" ro,.*verity=require")
}

// buffer is a file in memory.
type buffer []byte

func (b *buffer) WriteAt(p []byte, off int64) (int, error) {
	if end := int(off) + len(p); end > len(*b) {
		*b = append(*b, make([]byte, end-len(*b))...)
	}
	return copy((*b)[off:], p), nil
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	check(t, err)
	return b
}
