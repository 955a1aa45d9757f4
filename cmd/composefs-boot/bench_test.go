//go:build bench

package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// TestBench compares this program with its peers on the same work in one run, and writes the table to
// examples/bench/results.txt and the measurements to results.csv. A run of some parts (-run TestBench/hash) writes nothing.
// No part fails for being slow, only if the results of two programs differ. It needs 20 GiB of disk, which are free again
// afterwards: nothing is deleted in between, since ext4 searches long for inodes that were deleted a moment ago.
func TestBench(t *testing.T) {
	b := newBench(t)
	parts := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"hash", b.hash}, {"digest", b.digest}, {"selinux", b.selinux}, {"import", b.imports}, {"oci", b.oci}, {"ostree", b.ostree}, {"remote", b.remote},
		{"dumpfile", b.dumpfile}, {"files", b.files}, {"read", b.read}, {"diff", b.diff}, {"uki", b.uki}, {"bytes", b.bytes}, {"million", b.million},
	}
	done := 0
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) {
			p.run(t)
			done++
		})
	}
	if done == len(parts) && !t.Failed() {
		b.save(t)
	}
}

// bench is what the parts have in common.
type bench struct {
	dir      string // of everything that is made
	tree     string // a Debian
	ours     string
	cfsctl   string // "" if it is not there
	packages string // examples/bench/packages
	flags    map[string]bool
	top      string

	table strings.Builder
	csv   [][]string
}

func newBench(t *testing.T) *bench {
	b := &bench{dir: t.TempDir(), tree: vm.Cache(t, "os/trixie"), top: vm.Top(t), flags: map[string]bool{}}
	b.ours = filepath.Join(b.top, "bin/composefs-boot")
	// What the runs remember is not for the user's own.
	t.Setenv("XDG_CACHE_HOME", filepath.Join(b.dir, "remembered"))

	cache := filepath.Dir(vm.Cache(t, "forky"))
	b.packages = filepath.Join(b.dir, "packages")
	if out, err := exec.Command("go", "-C", filepath.Join(b.top, "examples/bench"), "build", "-o", b.packages, "./packages").CombinedOutput(); err != nil {
		t.Fatalf("examples/bench/packages: %v\n%s", err, out)
	}
	cpu, _ := os.ReadFile("/proc/cpuinfo")
	var flags []string
	for _, f := range []string{"sha_ni", "avx2", "avx512f"} {
		if b.flags[f] = strings.Contains(string(cpu), " "+f); b.flags[f] {
			flags = append(flags, f)
		}
	}
	b.printf("%s, %d processors, features: %s\n", time.Now().Format("2006-01-02"), runtime.NumCPU(), strings.Join(flags, " "))
	peers := []string{"mkcomposefs " + debianVersion(t, filepath.Join(cache, "forky"), "composefs")}
	cfsctl := filepath.Join(cache, "cargo/bin/cfsctl")
	if version, err := exec.Command(cfsctl, "--version").Output(); err == nil {
		b.cfsctl = cfsctl
		peers = append(peers, strings.TrimSpace(string(version)))
	}
	peers = append(peers, "crypto of "+runtime.Version(), b.module(t, "github.com/minio/sha256-simd"), b.module(t, "github.com/erofs/go-erofs"))
	b.printf("peers: %s\n", strings.Join(peers, ", "))
	b.printf("the tree: a Debian of %s\n", treeSize(t, b.tree))
	b.printf("medians of runs in turn, time and peak of memory; ratios are ours to the peer's, in brackets what they are to be at most\n\n")
	b.printf("%-52s %20s   %-17s %20s   %-14s %s\n", "", "composefs-boot", "peer", "", "time (target)", "memory (target)")
	b.csv = [][]string{{"what", "size", "program", "seconds", "peak KiB"}}
	return b
}

// printf writes to the table and, so that one sees how far it is, to the terminal.
func (b *bench) printf(format string, args ...any) {
	fmt.Printf(format, args...)
	fmt.Fprintf(&b.table, format, args...)
}

func (b *bench) save(t *testing.T) {
	var numbers bytes.Buffer
	if err := csv.NewWriter(&numbers).WriteAll(b.csv); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string][]byte{"results.txt": []byte(b.table.String()), "results.csv": numbers.Bytes()} {
		if err := os.WriteFile(filepath.Join(b.top, "examples/bench", name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// module returns name and version of a module that examples/bench requires.
func (b *bench) module(t *testing.T, path string) string {
	t.Helper()
	out, err := exec.Command("go", "-C", filepath.Join(b.top, "examples/bench"), "list", "-m", "-json", path).Output()
	var m struct{ Version string }
	if err == nil {
		err = json.Unmarshal(out, &m)
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return filepath.Base(path) + " " + m.Version
}

// debianVersion returns the version of a package that is installed below root.
func debianVersion(t *testing.T, root, name string) string {
	t.Helper()
	status, err := os.ReadFile(filepath.Join(root, "var/lib/dpkg/status"))
	if err != nil {
		t.Fatal(err)
	}
	for entry := range strings.SplitSeq(string(status), "\n\n") {
		if strings.HasPrefix(entry, "Package: "+name+"\n") {
			_, rest, _ := strings.Cut(entry, "\nVersion: ")
			version, _, _ := strings.Cut(rest, "\n")
			return version
		}
	}
	t.Fatalf("%s: %s is not installed", root, name)
	return ""
}
