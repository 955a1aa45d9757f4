//go:build bench

package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// ostree compares pulls of a commit of 8,500 files and 250 MB from an archive on the same machine.
func (b *bench) ostree(t *testing.T) {
	archive := filepath.Join(b.dir, "ostree-archive")
	b.makeArchive(t, archive)
	const runs = 5
	pull := func(program func(...string) invocation, repo string) sample {
		return program("--repo", repo, "ostree", "pull-local", archive, "os").measure(t)
	}
	fresh := func(program func(...string) invocation, name string, k int) sample {
		return pull(program, b.initRepo(t, "sha512", fmt.Sprintf("ostree-%s-%d", name, k)))
	}
	original := func(k int) (init, pull invocation) {
		repo := "--repo=" + filepath.Join(b.dir, fmt.Sprintf("ostree-original-%d", k))
		return invocation{args: vm.Ostree(t, repo, "init", "--mode=bare-user").Args},
			invocation{args: vm.Ostree(t, repo, "pull-local", archive, "os").Args}
	}
	peers := []rival{
		rival{name: "cfsctl", run: func(k int) sample { return fresh(b.them, "theirs", k) }}.atMost(0.5),
		rival{name: "ostree", run: func(k int) sample {
			init, pull := original(k)
			init.measure(t)
			return pull.measure(t)
		}}.atMost(0.5),
	}
	if b.cfsctl != "" {
		// What is there after a power cut: ours is, when it ends, and so is that of ostree.
		peers = append(peers, rival{name: "cfsctl and sync", run: func(k int) sample {
			repo := b.initRepo(t, "sha512", fmt.Sprintf("ostree-synced-%d", k))
			return withSync(b.them("--repo", repo, "ostree", "pull-local", archive, "os"), repo).measure(t)
		}})
	}
	b.compare("an OSTree commit into a fresh repository", 0, runs, func(k int) sample { return fresh(b.us, "ours", k) }, peers...)
	ours, theirs := filepath.Join(b.dir, "ostree-ours-0"), filepath.Join(b.dir, "ostree-theirs-0")
	b.same(t, b.us("--repo", ours, "ostree", "compute-id", "os"), b.them("--repo", theirs, "ostree", "compute-id", "os"))
	b.compare("the same again", 0, runs, func(int) sample { return pull(b.us, ours) },
		rival{name: "cfsctl", run: func(int) sample { return pull(b.them, theirs) }}.atMost(4),
		rival{name: "ostree", run: func(k int) sample {
			_, pull := original(k)
			return pull.measure(t)
		}})
}

// makeArchive commits the files of the image that oci pulls.
func (b *bench) makeArchive(t *testing.T, archive string) {
	t.Helper()
	if _, err := os.Stat(archive); err == nil {
		return // another part has made it
	}
	tree := filepath.Join(b.dir, "ostree-tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(6) {
		cmd := exec.Command("tar", "-x", "-C", tree)
		in, out := io.Pipe()
		cmd.Stdin = in
		go func() {
			writeLayer(t, out, seed+1)
			out.Close()
		}()
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("tar: %v: %s", err, text)
		}
	}
	for _, args := range [][]string{{"init", "--mode=archive"}, {"commit", "--branch=os", "--subject=os", "--tree=dir=" + tree}} {
		if text, err := vm.Ostree(t, append([]string{"--repo=" + archive}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("ostree %q: %v: %s", args, err, text)
		}
	}
}
