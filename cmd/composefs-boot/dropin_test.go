package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// outcome is what came of a command.
type outcome struct {
	code           int
	stdout, stderr string
	made           string // all files below OUT, with their modes and contents
}

// bothTools gives the same command to the C tool and to this program, in one directory; what they make goes to "OUT", where
// each has a directory of its own.
type bothTools struct {
	t       *testing.T
	program string
	peer    string // where the C tool is
	dir     string
	env     []string
	script  string // of a shell that runs the command as "$@", where it may mount what it likes
}

func newBothTools(t *testing.T, program string) *bothTools {
	peer := "usr/bin/" + program
	if program == "mount.composefs" {
		peer = "usr/sbin/" + program
	}
	return &bothTools{t: t, program: program, peer: peer, dir: t.TempDir()}
}

func (b *bothTools) write(name string, content []byte) {
	b.t.Helper()
	path := filepath.Join(b.dir, name)
	os.MkdirAll(filepath.Dir(path), 0o755)
	if err := os.WriteFile(path, content, 0o644); err != nil {
		b.t.Fatal(err)
	}
}

// run gives both the command, and returns what came of it: the C tool's, ours.
func (b *bothTools) run(stdin []byte, args ...string) (peer, ours outcome) {
	b.t.Helper()
	return b.one(vm.Peer(b.t, b.peer), "peer", stdin, args), b.one(exec.Command(b.program), "ours", stdin, args)
}

func (b *bothTools) one(cmd *exec.Cmd, who string, stdin []byte, args []string) outcome {
	b.t.Helper()
	out := filepath.Join(b.dir, who)
	os.RemoveAll(out)
	if err := os.Mkdir(out, 0o755); err != nil {
		b.t.Fatal(err)
	}
	for _, a := range args {
		cmd.Args = append(cmd.Args, strings.ReplaceAll(a, "OUT", who))
	}
	if b.script != "" {
		cmd = exec.Command("unshare", append([]string{"-m", "sh", "-euc", strings.ReplaceAll(b.script, "OUT", who), "sh", cmd.Path}, cmd.Args[1:]...)...)
	}
	cmd.Dir, cmd.Env, cmd.Stdin = b.dir, append(os.Environ(), b.env...), bytes.NewReader(stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Run()
	var made strings.Builder
	filepath.WalkDir(out, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		content := ""
		if e.Type().IsRegular() {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = string(text)
		}
		_, err = fmt.Fprintf(&made, "%s %v %x\n", strings.TrimPrefix(path, out), info.Mode(), content)
		return err
	})
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String(), made.String()}
}

// same checks that both do the same; what a failed command leaves behind does not count.
func (b *bothTools) same(stdin []byte, args ...string) {
	b.t.Helper()
	peer, ours := b.run(stdin, args...)
	switch {
	case peer.code != ours.code:
		b.t.Errorf("%q: exit code %d, and %d of the C tool\nours: %s\npeer: %s", args, ours.code, peer.code, ours.stderr, peer.stderr)
	case peer.code != 0:
		b.oneLine(ours, args)
	case peer.stdout != ours.stdout:
		b.t.Errorf("%q: another output\nours: %.3000s\npeer: %.3000s", args, ours.stdout, peer.stdout)
	case peer.made != ours.made:
		b.t.Errorf("%q: other files\nours: %.3000s\npeer: %.3000s", args, ours.made, peer.made)
	}
}

func (b *bothTools) oneLine(o outcome, args []string) {
	b.t.Helper()
	if o.code != 1 || strings.Count(o.stderr, "\n") != 1 || !strings.HasPrefix(o.stderr, b.program+": ") {
		b.t.Errorf("%q: want exit code 1 and one line: %d, %q", args, o.code, o.stderr)
	}
}

func TestMkcomposefsOfDirectoriesAgainstTheCTool(t *testing.T) {
	b := newBothTools(t, "mkcomposefs")
	for _, name := range []string{"files", "links", "metadata", "names", "selinux"} {
		if err := os.Rename(golden.Extract(t, "trees/"+name+".tar.gz"), filepath.Join(b.dir, name)); err != nil {
			t.Fatal(err)
		}
		for _, options := range []string{"", "--use-epoch", "--skip-devices", "--skip-xattrs", "--user-xattrs", "--min-version=1",
			"--min-version 0", "--max-version=0", "--max-version 1", "--threads=1 --use-epoch --skip-xattrs"} {
			b.same(nil, append(strings.Fields(options), "--print-digest-only", name)...)
		}
		b.same(nil, "--print-digest", "--digest-store=OUT/a/store", name, "OUT/image")
		b.same(nil, name, "-", "--print-digest")
	}
	os.Symlink("files", filepath.Join(b.dir, "link"))
	for _, line := range []string{
		"", "files", "--print-digest-only", "--print-digest-only files OUT/image", "files OUT/image more", "nowhere OUT/image",
		"link OUT/image", "link/ OUT/image", "files/usr/nothing OUT/image", "files OUT/no/where",
		"--skip-xattrs --user-xattrs files OUT/image", "--min-version=2 files OUT/image", "--max-version=2 files OUT/image",
		"--min-version=x files OUT/image", "--min-version= files OUT/image", "--min-version=-1 files OUT/image", "--max-version=1x files OUT/image",
		"--threads=0 files OUT/image", "--threads=-1 files OUT/image", "--threads=two files OUT/image", "files OUT/image --threads",
		"--nonsense files OUT/image", "-x files OUT/image", "--use-epoch=1 files OUT/image", "--print-d files OUT/image",
		"files --use OUT/image --print-digest", "--skip-d --skip-x files -- OUT/image", "--skip files OUT/image", "-- --print-digest OUT/image",
		"--digest OUT/store files OUT/image", "--digest-store= files OUT/image",
	} {
		b.same(nil, strings.Fields(line)...)
	}
	b.same(nil, "", "OUT/image")
	b.same(nil, "--print-digest", "--threads", " 2", "files", "OUT/image")
}

// Dumpfiles that the C tool takes and this program does not. It would cut numbers off, wrap them, guess a digest, or write an
// image that no kernel reads.
var refusedMore = []string{"digest-short", "digest-without-payload", "link-to-directory", "mtime-nsec-too-large",
	"number-negative", "number-too-large", "path-relative", "size-of-device", "content-of-device", "symlink-too-long", "digest-of-sha512", "fields-missing-at-end"}

func TestMkcomposefsOfDumpfilesAgainstTheCTool(t *testing.T) {
	const root = "/ 4096 40755 2 0 0 0 0.0 - - -\n"
	b := newBothTools(t, "mkcomposefs")
	digest := strings.Repeat("ab", 32)
	dumps := map[string]string{
		"no-newline":            strings.TrimSuffix(root, "\n"),
		"long-xattr":            root + "/a 0 100644 1 0 0 0 0.0 - - - user.a=" + strings.Repeat("x", 32000) + "\n",
		"longer-xattr":          root + "/a 0 100644 1 0 0 0 0.0 - - - user.a=" + strings.Repeat("x", 33000) + "\n",
		"too-long-xattr":        root + "/a 0 100644 1 0 0 0 0.0 - - - user.a=" + strings.Repeat("x", 66000) + "\n",
		"xattr-name-too-long":   root + "/a 0 100644 1 0 0 0 0.0 - - - user." + strings.Repeat("x", 256) + "=\n",
		"inline-limit":          root + "/a 5000 100644 1 0 0 0 0.0 - " + strings.Repeat("x", 5000) + " -\n",
		"rdev-of-file":          root + "/a 0 100644 1 0 0 7 0.0 - - -\n",
		"symlink-size":          root + "/a 5 120777 1 0 0 0 0.0 abc - -\n",
		"symlink-content":       root + "/a 3 120777 1 0 0 0 0.0 abc abc -\n",
		"link-chain":            root + "/a 0 @100644 - - - - - /b - -\n/b 0 @100644 - - - - - /c - -\n/c 0 100644 3 0 0 0 0.0 - - -\n",
		"link-elsewhere":        root + "/a 0 @100644 - - - - - /d/b - -\n/d 0 40755 2 0 0 0 0.0 - - -\n/d/a 0 @100644 - - - - - /d/b - -\n/d/b 0 100644 3 0 0 0 0.0 - - -\n/e 0 @20644 - - - - - /f - -\n/f 0 20644 1 0 0 0 0.0 - - -\n",
		"huge-file":             root + "/a 9223372036854775807 100644 1 0 0 0 0.0 - - -\n",
		"empty-line":            root + "\n",
		"whiteout":              root + "/a 0 20644 1 0 0 0 0.0 - - -\n",
		"digest-of-sha512":      root + "/a 100 100644 1 0 0 0 0.0 a/b - " + digest + digest + "\n",
		"fields-missing-at-end": root + "/a 0 100644 1 0 0 0 0.0\n",
	}
	for _, name := range golden.Names(t) {
		dumps[name] = string(golden.Read(t, "dumps/"+name+".dump"))
	}
	hostile, err := filepath.Glob(filepath.Join(vm.Top(t), "repo/dumpfile/testdata/*.dump"))
	if err != nil || len(hostile) == 0 {
		t.Fatal("no hostile dumpfiles", err)
	}
	for _, path := range hostile {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		dumps[strings.TrimSuffix(filepath.Base(path), ".dump")] = string(text)
	}
	for _, env := range []string{"IGNORED=", "CFS_PARSE_STRICT="} {
		b.env = []string{env}
		for name, text := range dumps {
			b.write(name, []byte(text))
			if slices.Contains(refusedMore, name) {
				peer, ours := b.run(nil, "--from-file", "--print-digest", name, "OUT/image")
				if peer.code != 0 {
					t.Errorf("%s: the C tool refuses it, too: %s", name, peer.stderr)
				}
				b.oneLine(ours, []string{name})
				continue
			}
			b.same(nil, "--from-file", "--print-digest", name, "OUT/image")
		}
	}
	b.env = nil
	whiteout := []byte(dumps["whiteout"])
	for _, options := range []string{"", "--min-version=0", "--max-version=0", "--max-version=1", "--min-version=1", "--min-version=1 --max-version=0",
		"--use-epoch --skip-devices --skip-xattrs --user-xattrs --digest-store=OUT/store"} {
		b.same(whiteout, append(strings.Fields(options), "--from-file", "--print-digest", "-", "OUT/image")...)
	}
	b.same(whiteout, "--from-file", "-", "-")
	b.same(nil, "--from-file", "-", "OUT/image")
	b.same(nil, "--from-file", "nowhere", "OUT/image")
}

// Whatever dumpfile this program takes, the C tool takes, and makes the same image of it.
func TestMutatedDumpfilesAgainstTheCTool(t *testing.T) {
	lines := []string{
		"/f 100 100644 1 0 0 0 7.5 aa/bb - " + strings.Repeat("ab", 32) + " user.y=\\x00z trusted.overlay.foo=1",
		"/d/i 3 100600 1 1000 1000 0 9.999999999 - abc -",
		"/l 3 120777 1 0 0 0 0.0 foo - -",
		"/h 0 @100644 2 0 0 0 0.0 /f - -",
		"/a 0 @100644 2 0 0 0 0.0 /e - -",
		"/aa 0 @100644 2 0 0 0 0.0 /a - -",
		"/c 0 20644 1 0 0 0 0.0 - - -",
		"/b 0 60644 1 0 0 2049 0.0 - - -",
		"/e 0 100644 1 0 0 0 0.0 - - -",
		"/d/s 0 140644 1 0 0 0 0.0 - - -",
		"/p 0 10644 1 0 0 0 0.0 - - - user.a=b security.selinux=x\\x00",
	}
	tokens := append(strings.Fields(`- 0 1 / /f /d /d/i /h /l .. a/b \x2d \ \n \xzz 100644 40755 120777 @100644 @40755 @20644 20000 104755 777 4096
		-5.0 -5.7 7. 1.000000000001 user.q= =x no-equals user.z=1 trusted.overlay.whiteout= user.overlay.whiteout= lustre.x=1 user.=1
		trusted.overlay.metacopy=x 18446744073709551615 9223372036854775807 4294967295 +1 security.capability=\x01
		system.posix_acl_access=\x02`), "", " ", "\t", strings.Repeat("x", 255), strings.Repeat("x", 256), strings.Repeat("ab", 32))
	r := rand.New(rand.NewPCG(1, 2))
	b := newBothTools(t, "mkcomposefs")
	dump := filepath.Join(b.dir, "dump")
	for taken := 0; taken < 200; {
		text := "/ 4096 40755 2 0 0 0 0.0 - - -\n/d 4096 40755 2 0 0 0 5.0 - - - user.x=1\n"
		for _, line := range lines {
			fields := strings.Split(line, " ")
			k, token := r.IntN(len(fields)), tokens[r.IntN(len(tokens))]
			switch r.IntN(24) {
			case 0:
				fields = slices.Delete(fields, k, k+1)
			case 1:
				fields = append(fields, token)
			case 2:
				fields[k] += token
			case 3, 4, 5:
				fields[k] = token
			case 6, 7:
				continue
			}
			text += strings.Join(fields, " ") + "\n"
		}
		b.write("dump", []byte(text))
		var stdout, stderr bytes.Buffer
		if run(context.Background(), []string{"mkcomposefs", "--from-file", "--print-digest-only", dump}, nil, &stdout, &stderr) != 0 {
			continue
		}
		taken++
		peer := b.one(vm.Peer(t, b.peer), "peer", nil, []string{"--from-file", "--print-digest-only", "dump"})
		if peer.code != 0 || peer.stdout != stdout.String() {
			t.Errorf("the C tool: %d %s%s, ours: %s\n%s", peer.code, peer.stdout, peer.stderr, stdout.String(), text)
		}
	}
}

func TestInfoAgainstTheCTool(t *testing.T) {
	b := newBothTools(t, "composefs-info")
	var images []string
	for _, name := range golden.Names(t) {
		tree, err := dumpfile.Read(bytes.NewReader(golden.Read(t, "dumps/"+name+".dump")))
		if err != nil {
			t.Fatal(err)
		}
		for _, format := range []erofs.Format{erofs.V0, erofs.V1, erofs.V2} {
			if format == erofs.V2 && name == "whiteout-hardlink" {
				continue // the C tool says that the second name is a hard link to itself
			}
			var image bytes.Buffer
			if err := erofs.Write(&image, tree, format); err != nil {
				t.Fatal(err)
			}
			path := fmt.Sprintf("%s.%v", name, format)
			b.write(path, image.Bytes())
			images = append(images, path)
		}
	}
	// Some of the objects are there.
	for _, name := range []string{"an-os", "hardlinks"} {
		tree, _ := dumpfile.Read(bytes.NewReader(golden.Read(t, "dumps/"+name+".dump")))
		for k, d := range repo.Objects(tree) {
			if k%2 == 0 {
				b.write("store/"+d.ObjectPath(), nil)
			}
		}
	}
	for _, image := range images {
		b.same(nil, "dump", image)
	}
	for _, command := range []string{"ls", "dump", "objects", "missing-objects", "--basedir=store missing-objects",
		"--filter=usr ls", "--filter usr dump", "--filt=usr --filter=a objects", "--filter=none dump"} {
		b.same(nil, append(strings.Fields(command), images...)...)
	}
	b.write("large", bytes.Repeat([]byte("large"), 1<<16))
	b.write("empty", nil)
	image := golden.Read(t, "images/symlinks.v1.erofs.gz")
	b.write("cut-off", image[:len(image)/2+100])
	b.write("superblock-only", image[:1200])
	for name, at := range map[string]int{"root-elsewhere": 1024 + 14, "magic": 0, "erofs-magic": 1024, "version": 4} {
		changed := bytes.Clone(image)
		changed[at], changed[at+1] = 0xff, 0xff
		b.write(name, changed)
	}
	b.write("not-an-image", bytes.Repeat([]byte("x"), 8192))
	for _, line := range []string{
		"", "ls", "objects", "nonsense", "nonsense an-os.v1", "measure-file", "measure-file large an-os.v1", "measure-file large nowhere",
		"measure-file store", "ls nowhere", "ls large", "ls empty", "ls cut-off", "ls superblock-only", "dump root-elsewhere", "dump magic", "dump erofs-magic", "ls version", "objects not-an-image",
		"--basedir=nowhere ls an-os.v1", "--basedir=large missing-objects an-os.v1", "missing-objects an-os.v1 --basedir store",
		"--filter=a/b ls an-os.v1", "--filter", "--nonsense ls an-os.v1", "-x ls an-os.v1", "-- ls an-os.v1", "ls -- an-os.v1",
		"objects an-os.v1 large", "--basedir=store --basedir=nowhere missing-objects an-os.v1",
	} {
		b.same(nil, strings.Fields(line)...)
	}
	// The digest of an empty file is the kernel's; the C tool computes another one than the kernel would.
	if _, ours := b.run(nil, "measure-file", "empty"); strings.TrimSpace(ours.stdout) != fsverity.Of(fsverity.SHA256, nil).String() {
		t.Errorf("an empty file: %s", ours.stdout)
	}
	// What was printed before the error is the same, too.
	peer, ours := b.run(nil, "ls", "an-os.v1", "large", "symlinks.v1")
	if peer.stdout != ours.stdout || ours.code != 1 {
		t.Errorf("%d, %s", ours.code, ours.stdout)
	}
}

func TestMountAgainstTheCTool(t *testing.T) {
	b := newBothTools(t, "mount.composefs")
	b.write("tree/large", bytes.Repeat([]byte("large"), 1000))
	b.write("tree/also large", bytes.Repeat([]byte("also"), 1000))
	b.write("tree/etc/small", []byte("small"))
	b.write("no-image", bytes.Repeat([]byte("x"), 8192))
	for _, args := range [][]string{{"--digest-store=store", "tree", "image"}, {"--digest-store=other", "tree/etc", "image2"}} {
		cmd := exec.Command("mkcomposefs", args...)
		cmd.Dir = b.dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for _, line := range []string{
		"", "image", "image OUT", "-o basedir=store image", "-o basedir= image OUT", "-o basedir image OUT", "-o basedir=store: image OUT",
		"-o basedir=store,nonsense image OUT", "-o basedir=store,nosuid image OUT", "-o basedir=store, image OUT", "-o ,basedir=store image OUT",
		"-o basedir=store,upperdir=up image OUT", "-o basedir=store,workdir=up image OUT", "-o basedir=store,digest image OUT",
		"-o basedir=store,digest=xyz image OUT", "-o basedir=store,idmap image OUT", "-o basedir=store,idmap=nowhere image OUT",
		"-t erofs -o basedir=store image OUT", "-x -o basedir=store image OUT", "image OUT -o",
		"-o basedir=store nowhere OUT", "-o basedir=store no-image OUT", "-o basedir=nowhere image OUT", "-o basedir=store image nowhere",
		"-o basedir=store,digest=" + strings.Repeat("ab", 32) + " image OUT", "-o basedir=sto\\re,ro,idmap=image image OUT",
	} {
		b.script = `"$@"; umount OUT`
		b.same(nil, strings.Fields(line)...)
	}
	// What is mounted, and how. The C tool leaves its own directory in the list of layers.
	b.script = `umask 022; mkdir -p OUT/up OUT/work OUT/mnt; "$@"
		find OUT/mnt -printf '%P %M %U %G %s %T@\n' | grep -v '^ ' | sort; cat OUT/mnt/*arge OUT/mnt/etc/small
		grep " $PWD/OUT/mnt " /proc/self/mounts | grep -o ' overlay r[ow],\|verity=[a-z]*'
		if echo changed > OUT/mnt/new; then ls OUT/up; fi
		umount OUT/mnt; rm -rf OUT/*`
	if os.Geteuid() != 0 {
		t.Fatal("mounting needs root")
	}
	for _, options := range []string{"basedir=store", "basedir=other:store,ro", "basedir=store,rw", "basedir=st\\ore",
		"basedir=store,upperdir=OUT/up,workdir=OUT/work", "basedir=store,upperdir=OUT/up,workdir=OUT/work,ro",
		"basedir=store,upperdir=OUT/up,workdir=OUT/work,ro,rw"} {
		b.same(nil, "-o", options, "image", "OUT/mnt")
	}
}
