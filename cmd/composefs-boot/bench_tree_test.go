//go:build bench

package main

import (
	"bytes"
	"compress/bzip2"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var algorithms = []string{"sha256", "sha512"}

// digest compares digests of a tree, of which nothing is stored.
func (b *bench) digest(t *testing.T) {
	for _, hash := range algorithms {
		ours, theirs := b.us("--no-repo", "--hash", hash, "compute-id", b.tree), b.them("--no-repo", "--hash", hash, "compute-id", b.tree)
		uncached := b.us("--no-repo", "--hash", hash, "compute-id", "--no-cache", b.tree)
		b.same(t, ours, theirs) // from here on the cache is filled
		peers := []rival{always(t, "cfsctl", theirs, 0.35)}
		if hash == "sha256" {
			peers = append(peers, always(t, "mkcomposefs", cTool(t, "--print-digest-only", b.tree), 0.35))
		}
		b.compare("digest of the tree, "+hash+", no cache", 0, 7, always(t, "", uncached).run, peers...)
		b.compare("digest of the tree, "+hash+", with the cache", 0, 7, always(t, "", ours).run, peers...)
	}
}

// same fails the test if our program and cfsctl do not print the same.
func (b *bench) same(t *testing.T, ours, theirs invocation) {
	t.Helper()
	if b.cfsctl == "" {
		return
	}
	ours.out, theirs.out = filepath.Join(b.dir, "ours.out"), filepath.Join(b.dir, "theirs.out")
	ours.measure(t)
	theirs.measure(t)
	if one, two := digestFile(t, ours.out), digestFile(t, theirs.out); one != two {
		t.Errorf("%q and %q do not print the same", ours.args, theirs.args)
	}
}

// selinux compares the same with labels.
func (b *bench) selinux(t *testing.T) {
	tree := filepath.Join(b.dir, "labelled")
	if out, err := exec.Command("cp", "-a", "--reflink=auto", b.tree, tree).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	rules, from := b.policy(t)
	files := filepath.Join(tree, "etc/selinux/default/contexts/files")
	if err := os.MkdirAll(files, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{
		filepath.Join(tree, "etc/selinux/config"): []byte("SELINUX=enforcing\nSELINUXTYPE=default\n"),
		filepath.Join(files, "file_contexts"):     rules,
	} {
		if err := os.WriteFile(name, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b.printf("a policy of %d rules, %s:\n", bytes.Count(rules, []byte("\n")), from)
	for _, hash := range algorithms {
		theirs := b.them("--no-repo", "--hash", hash, "compute-id", "--bootable", tree)
		ours := b.us("--no-repo", "--hash", hash, "compute-id", "--bootable", "--no-cache", tree)
		b.same(t, ours, theirs)
		b.compare("digest with SELinux labels, "+hash+", no cache", 0, 5, always(t, "", ours).run, always(t, "cfsctl", theirs, 0.4))
	}
}

// policy returns the file_contexts of Debian's policy, or one like it if there is no package to get, and where it is from.
func (b *bench) policy(t *testing.T) (rules []byte, from string) {
	t.Helper()
	const name = "selinux-policy-default"
	dir := filepath.Join(b.dir, "policy")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "apt-get -qq download "+name+" && dpkg-deb -x "+name+"_*.deb . && dpkg-deb -f "+name+"_*.deb Version")
	cmd.Dir = dir
	version, err := cmd.Output()
	modules, _ := filepath.Glob(filepath.Join(dir, "usr/share/selinux/default/*.pp.bz2"))
	for _, path := range modules {
		rules = append(rules, contextsOf(t, path)...)
	}
	if err == nil && len(rules) > 0 {
		return rules, name + " " + strings.TrimSpace(string(version))
	}
	var text bytes.Buffer
	text.WriteString("/.*	system_u:object_r:default_t:s0\n")
	for k := range 5500 {
		fmt.Fprintf(&text, []string{
			"/usr/s?bin/program%[1]d	--	system_u:object_r:type%[1]d_exec_t:s0\n",
			"/usr/lib/package%[1]d(/.*)?	system_u:object_r:type%[1]d_t:s0\n",
			"/var/lib/[^/]+/data%[1]d/.*\\.db	--	system_u:object_r:type%[1]d_t:s0\n",
			"/etc/service%[1]d\\.conf	--	system_u:object_r:type%[1]d_etc_t:s0\n",
		}[k%4], k)
	}
	return text.Bytes(), "made up, since " + name + " could not be got"
}

// contextsOf returns the rules of a policy module. A module package is a magic number, a version, the number of sections and
// their offsets; the section of file contexts begins with a number of its own.
func contextsOf(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	module, err := io.ReadAll(bzip2.NewReader(f))
	if err != nil {
		t.Fatal(err)
	}
	number := func(at int) int { return int(binary.LittleEndian.Uint32(module[at:])) }
	count := number(8)
	var rules bytes.Buffer
	for k := range count {
		start, end := number(12+4*k), len(module)
		if k+1 < count {
			end = number(12 + 4*(k+1))
		}
		if number(start) != 0xf97cff90 {
			continue
		}
		for line := range bytes.Lines(module[start+4 : end]) {
			// What begins otherwise is a comment, or a template for the homes of the users there are.
			if line[0] == '/' {
				rules.Write(line)
			}
		}
	}
	return rules.Bytes()
}

// initRepo makes a repository with a name that no run had before, and writes out what earlier runs have left.
func (b *bench) initRepo(t *testing.T, hash, name string) string {
	path := filepath.Join(b.dir, name)
	b.us("--hash", hash, "init", "--insecure", path).measure(t)
	syscall.Sync()
	return path
}

// imports compares imports, and then what is done with a full repository.
func (b *bench) imports(t *testing.T) {
	for _, hash := range algorithms {
		const runs = 5
		name := func(who string, k int) string { return fmt.Sprintf("repo-%s-%s-%d", who, hash, k) }
		b.compare("the tree into a fresh repository, "+hash, 0, runs, func(k int) sample {
			return b.us("--repo", b.initRepo(t, hash, name("ours", k)), "create-image", "--no-cache", b.tree, "it").measure(t)
		}, rival{name: "cfsctl", run: func(k int) sample {
			return b.them("--repo", b.initRepo(t, hash, name("theirs", k)), "create-image", b.tree, "it").measure(t)
		}}.atMost(0.5))

		// What changed less than two seconds ago is not remembered.
		syscall.Sync()
		time.Sleep(2100 * time.Millisecond)
		ours, theirs := filepath.Join(b.dir, name("ours", runs-1)), filepath.Join(b.dir, name("theirs", runs-1))
		again, cfsctl := b.us("--repo", ours, "create-image", b.tree), b.them("--repo", theirs, "create-image", b.tree)
		again.measure(t)
		b.compare("again, all objects there, "+hash+", no cache", 0, 5,
			always(t, "", b.us("--repo", ours, "create-image", "--no-cache", b.tree)).run, always(t, "cfsctl", cfsctl, 0.15))
		b.compare("again, all objects there, "+hash+", with the cache", 0, 5, always(t, "", again).run, always(t, "cfsctl", cfsctl, 0.05))
		b.compare("fsck, warm, "+hash, 0, 5, always(t, "", b.us("--repo", ours, "fsck")).run,
			always(t, "cfsctl", b.them("--repo", theirs, "fsck"), 0.4))
		b.compare("gc --dry-run, "+hash, 0, 7, always(t, "", b.us("--repo", ours, "gc", "-n", "--grace", "0")).run,
			always(t, "cfsctl", b.them("--repo", theirs, "gc", "-n"), 1.5))
	}

	image := filepath.Join(b.dir, "store.cfs")
	ours := func(k int) invocation {
		return invocation{args: []string{b.ours, "mkcomposefs", fmt.Sprintf("--digest-store=%s/store-ours-%d", b.dir, k), b.tree, image}}
	}
	theirs := func(k int) invocation {
		return cTool(t, fmt.Sprintf("--digest-store=%s/store-theirs-%d", b.dir, k), b.tree, image+"2")
	}
	b.compare("the tree into a fresh digest store, sha256", 0, 5, func(k int) sample {
		syscall.Sync()
		return ours(k).measure(t)
	}, rival{name: "mkcomposefs", run: func(k int) sample {
		syscall.Sync()
		return theirs(k).measure(t)
	}}.atMost(0.5))
	if one, two := digestFile(t, image), digestFile(t, image+"2"); one != two {
		t.Errorf("the images differ: %s and %s", one, two)
	}
	b.compare("again, all objects there, sha256, no cache", 0, 5, always(t, "", ours(0)).run, always(t, "mkcomposefs", theirs(0), 0.15))
}

// bytes compares trees of random content: the time against their size.
func (b *bench) bytes(t *testing.T) {
	random := rand.NewChaCha8([32]byte{2})
	for _, mib := range []int{1, 4, 16, 64, 256, 1024} {
		const fileSize = 256 << 10
		tree := filepath.Join(b.dir, fmt.Sprintf("random-%d", mib))
		content := make([]byte, fileSize)
		for k := range mib << 20 / fileSize {
			path := filepath.Join(tree, "usr", fmt.Sprintf("%02d", k/100), fmt.Sprintf("%02d", k%100))
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			random.Read(content)
			if err := os.WriteFile(path, content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		syscall.Sync()
		size, runs := mib<<20, 3
		b.compare("digest of random content", size, runs, always(t, "", b.us("--no-repo", "compute-id", "--no-cache", tree)).run,
			always(t, "cfsctl", b.them("--no-repo", "compute-id", tree)))
		b.compare("import of random content", size, runs, func(k int) sample {
			return b.us("--repo", b.initRepo(t, "sha512", fmt.Sprintf("random-ours-%d-%d", mib, k)), "create-image", "--no-cache", tree).measure(t)
		}, rival{name: "cfsctl", run: func(k int) sample {
			return b.them("--repo", b.initRepo(t, "sha512", fmt.Sprintf("random-theirs-%d-%d", mib, k)), "create-image", tree).measure(t)
		}})
	}
}

func treeSize(t *testing.T, dir string) string {
	t.Helper()
	var total int64
	files := 0
	filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if info, err := e.Info(); err == nil {
				total += info.Size()
				files++
			}
		}
		return nil
	})
	return fmt.Sprintf("%d files, %s", files, size(total))
}

// million asks a repository of a million objects without content, which no image needs.
func (b *bench) million(t *testing.T) {
	const objects = 1_000_000
	empty, full := b.initRepo(t, "sha256", "empty"), b.initRepo(t, "sha256", "million")
	makeObjects(t, filepath.Join(full, "objects"), objects)
	syscall.Sync()
	for _, c := range []struct {
		what string
		args []string
		peer []rival
	}{
		{"gc --dry-run, objects", []string{"gc", "-n", "--grace", "0"}, []rival{always(t, "cfsctl", b.them("--repo", full, "gc", "-n"))}},
		{"fsck --metadata-only, objects", []string{"fsck", "--metadata-only"}, nil},
	} {
		none := b.us(slices.Concat([]string{"--repo", empty}, c.args)...).measure(t)
		s := b.compare(c.what, objects, 3, always(t, "", b.us(slices.Concat([]string{"--repo", full}, c.args)...)).run, c.peer...)
		b.printf("    for each object %.2f µs (3.00) and %d bytes (200)\n", float64((s.wall-none.wall).Nanoseconds())/objects/1000,
			(s.peak-none.peak)*1024/objects)
	}
}

// makeObjects makes empty files with names of objects.
func makeObjects(t *testing.T, dir string, n int) {
	t.Helper()
	random := rand.New(rand.NewPCG(3, 3))
	failed := make(chan error, 256)
	for first := range 256 {
		names := make([]string, n/256)
		if first < n%256 {
			names = append(names, "")
		}
		for k := range names {
			names[k] = fmt.Sprintf("%02x/%014x%016x%016x%016x", first, random.Uint64()>>8, random.Uint64(), random.Uint64(), random.Uint64())
		}
		go func() {
			err := os.MkdirAll(filepath.Join(dir, fmt.Sprintf("%02x", first)), 0o755)
			for _, name := range names {
				if err == nil {
					err = os.WriteFile(filepath.Join(dir, name), nil, 0o644)
				}
			}
			failed <- err
		}()
	}
	for range 256 {
		if err := <-failed; err != nil {
			t.Fatal(err)
		}
	}
}
