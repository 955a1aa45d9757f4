//go:build bench

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// sample is one run of a program.
type sample struct {
	wall time.Duration
	peak int64 // KiB
}

// A program's peak begins with what the process has that starts it. So each is started by a fresh process of this test, which
// has little, and prints what the program took.
func init() {
	if os.Getenv("BENCH_MEASURE") == "" {
		return
	}
	os.Unsetenv("BENCH_MEASURE")
	cmd := exec.Command(os.Args[1], os.Args[2:]...)
	cmd.Stdin, cmd.Stderr = os.Stdin, os.Stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(time.Since(start).Nanoseconds(), cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
	os.Exit(0)
}

func measure(t *testing.T, prepare func(), stdin string, args ...string) sample {
	t.Helper()
	if prepare != nil {
		prepare()
	}
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), "BENCH_MEASURE=1")
	if stdin != "" {
		f, err := os.Open(stdin)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.Stdin = f
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%q: %v: %s", args, err, errs.String())
	}
	var s sample
	if _, err := fmt.Sscan(string(out), &s.wall, &s.peak); err != nil {
		t.Fatalf("%q: %v: %q", args, err, out)
	}
	return s
}

// pair runs two programs in turn and prints the medians and the ratio of the medians, ours to the peer's.
func pair(t *testing.T, what string, ours, peer func() sample) {
	t.Helper()
	const runs = 7
	var a, b []sample
	for range runs {
		a = append(a, ours())
		b = append(b, peer())
	}
	median := func(list []sample) (time.Duration, int64) {
		var walls []time.Duration
		var peaks []int64
		for _, s := range list {
			walls, peaks = append(walls, s.wall), append(peaks, s.peak)
		}
		slices.Sort(walls)
		slices.Sort(peaks)
		return walls[runs/2], peaks[runs/2]
	}
	wallA, peakA := median(a)
	wallB, peakB := median(b)
	fmt.Printf("%-44s %8.3fs %6.1f MiB   peer %8.3fs %6.1f MiB   time x%.2f memory x%.2f\n", what, wallA.Seconds(),
		float64(peakA)/1024, wallB.Seconds(), float64(peakB)/1024, float64(wallA)/float64(wallB), float64(peakA)/float64(peakB))
}

func cpuFlags() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	var have []string
	for _, flag := range []string{"sha_ni", "avx2", "avx512f"} {
		if strings.Contains(string(text), " "+flag) {
			have = append(have, flag)
		}
	}
	return strings.Join(have, " ")
}

// TestBench compares this program with its peers on the same work in one run.
func TestBench(t *testing.T) {
	ours := filepath.Join(vm.Top(t), "bin/composefs-boot")
	dir := t.TempDir()
	fmt.Printf("%s, %d processors, flags: %s\n", time.Now().Format("2006-01-02"), runtime.NumCPU(), cpuFlags())

	dump := filepath.Join(dir, "dump")
	if err := os.WriteFile(dump, dumpOf(64_000), 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "image")
	fmt.Println("peer: mkcomposefs 1.0.8")
	pair(t, "dumpfile of 64,000 lines to image",
		func() sample { return measure(t, nil, dump, "/bin/sh", "-c", "exec "+ours+" dump-to-image > "+image) },
		func() sample {
			return measure(t, nil, "", vm.Peer(t, "usr/bin/mkcomposefs", "--from-file", "--min-version=1", dump, image+"2").Args...)
		})
	if one, two := digestFile(t, image), digestFile(t, image+"2"); one != two {
		t.Errorf("the images differ: %s and %s", one, two)
	}

	tree := vm.Cache(t, "os/trixie")
	pair(t, "digest of a Debian, as mkcomposefs",
		func() sample { return measure(t, nil, "", ours, "mkcomposefs", "--print-digest-only", tree) },
		func() sample {
			return measure(t, nil, "", vm.Peer(t, "usr/bin/mkcomposefs", "--print-digest-only", tree).Args...)
		})
	store := func(name string) (path string, fresh func()) {
		path = filepath.Join(dir, name)
		return path, func() { os.RemoveAll(path); syscall.Sync() }
	}
	storeA, freshA := store("ours")
	storeB, freshB := store("peer")
	pair(t, "and into a fresh digest store",
		func() sample {
			return measure(t, freshA, "", ours, "mkcomposefs", "--digest-store="+storeA, tree, image)
		},
		func() sample {
			return measure(t, freshB, "", vm.Peer(t, "usr/bin/mkcomposefs", "--digest-store="+storeB, tree, image+"2").Args...)
		})

	peer := filepath.Join(filepath.Dir(vm.Cache(t, "forky")), "cargo/bin/cfsctl")
	version, err := exec.Command(peer, "--version").Output()
	if err != nil {
		fmt.Println("cfsctl is not there: \"make interop\" builds it")
		return
	}
	fmt.Printf("peer: %s; a Debian of %s\n", strings.TrimSpace(string(version)), treeSize(t, tree))
	for _, hash := range []string{"sha256", "sha512"} {
		pair(t, "digest of the tree, "+hash,
			func() sample { return measure(t, nil, "", ours, "-q", "--no-repo", "--hash", hash, "compute-id", tree) },
			func() sample { return measure(t, nil, "", peer, "--no-repo", "--hash", hash, "compute-id", tree) })
		repository := filepath.Join(dir, "repo")
		fresh := func() {
			os.RemoveAll(repository)
			measure(t, nil, "", ours, "--hash", hash, "init", "--insecure", repository)
			syscall.Sync()
		}
		pair(t, "the tree into a fresh repository, "+hash,
			func() sample { return measure(t, fresh, "", ours, "-q", "--repo", repository, "create-image", tree) },
			func() sample { return measure(t, fresh, "", peer, "--repo", repository, "create-image", tree) })
		pair(t, "again, all objects there, "+hash,
			func() sample { return measure(t, nil, "", ours, "-q", "--repo", repository, "create-image", tree) },
			func() sample { return measure(t, nil, "", peer, "--repo", repository, "create-image", tree) })
		pair(t, "fsck, "+hash,
			func() sample { return measure(t, nil, "", ours, "-q", "--repo", repository, "fsck") },
			func() sample { return measure(t, nil, "", peer, "--repo", repository, "fsck") })
	}
}

func digestFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
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

// dumpOf makes a dumpfile of n files in directories of a hundred, each with an object and a label.
func dumpOf(n int) []byte {
	var b bytes.Buffer
	b.WriteString("/ 4096 40755 2 0 0 0 0.0 - - -\n")
	for k := range n {
		if k%100 == 0 {
			fmt.Fprintf(&b, "/d%05d 4096 40755 2 0 0 0 1700000000.0 - - - security.selinux=system_u:object_r:usr_t:s0\\x00\n", k/100)
		}
		sum := sha256.Sum256(fmt.Append(nil, k))
		h := hex.EncodeToString(sum[:])
		fmt.Fprintf(&b, "/d%05d/file-%02d %d 100644 1 0 0 0 1700000000.%d %s/%s - %s security.selinux=system_u:object_r:usr_t:s0\\x00\n",
			k/100, k%100, 65+k, k, h[:2], h[2:], h)
	}
	return b.Bytes()
}
