//go:build bench

package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// dumpfile compares images of a system's size.
func (b *bench) dumpfile(t *testing.T) {
	dump := b.dump(t, 64_000, false)
	ours, theirs := b.fromDump(t, dump)
	b.compare("image from a dumpfile of 64,000 lines", 0, 7, always(t, "", ours).run, always(t, "mkcomposefs", theirs, 0.5, 1))
	if one, two := digestFile(t, dump+".ours"), digestFile(t, dump+".theirs"); one != two {
		t.Errorf("the images differ: %s and %s", one, two)
	}
}

// fromDump returns the commands that make an image of a dumpfile.
func (b *bench) fromDump(t *testing.T, dump string) (ours, theirs invocation) {
	ours = b.us("dump-to-image")
	ours.in, ours.out = dump, dump+".ours"
	return ours, cTool(t, "--from-file", "--min-version=1", dump, dump+".theirs")
}

// files compares images: the time against the number of files.
func (b *bench) files(t *testing.T) {
	var last sample
	for _, c := range []struct{ files, runs int }{{10_000, 7}, {100_000, 5}, {1_000_000, 3}} {
		dump := b.dump(t, c.files, false)
		ours, theirs := b.fromDump(t, dump)
		peers := []rival{always(t, "mkcomposefs", theirs)}
		if c.files == 1_000_000 {
			peers[0] = peers[0].atMost(0.25, 0.5)
			// Under the name mkcomposefs cfsctl reads dumpfiles.
			name := filepath.Join(b.dir, "mkcomposefs")
			if b.cfsctl != "" {
				if err := os.Symlink(b.cfsctl, name); err != nil {
					t.Fatal(err)
				}
			}
			peers = append(peers, always(t, "cfsctl", invocation{args: []string{name, "--from-file", "--min-version=1", dump, dump + ".cfsctl"}}, 0.25, 0.5))
		}
		s := b.compare("image from a dumpfile, files", c.files, c.runs, always(t, "", ours).run, peers...)
		if c.files == 1_000_000 {
			b.printf("    from 100,000 to 1,000,000 files time x%.1f and memory x%.1f (10.0)\n",
				float64(s.wall)/float64(last.wall), float64(s.peak)/float64(last.peak))
		}
		last = s
	}
}

// read compares reading all of an image's metadata.
func (b *bench) read(t *testing.T) {
	image := b.image(t, 100_000, false)
	way := func(with string) invocation { return invocation{args: []string{b.packages, "read", with, image}} }
	b.compare("an image of 100,000 files read to a tree", 0, 7, always(t, "", way("erofs")).run, always(t, "go-erofs, a walk", way("go-erofs"), 1))
}

// diff compares two images that differ in the last file. Without such a invocation one compares their dumps.
func (b *bench) diff(t *testing.T) {
	if exec.Command(b.ours, "diff", "--help").Run() != nil {
		b.printf("diff of two images of 100,000 files: there is no such invocation yet\n")
		return
	}
	one, two := b.image(t, 100_000, false), b.image(t, 100_000, true)
	info := vm.Peer(t, "usr/bin/composefs-info", "dump").Args
	script := `"$@" "$0" > "$0.dump"; "$@" "$OTHER" > "$OTHER.dump"; diff "$0.dump" "$OTHER.dump"`
	ours := b.us("diff", one, two)
	ours.exit = 1
	b.compare("diff of two images of 100,000 files", 0, 5, always(t, "", ours).run, always(t, "dumps, diff(1)",
		invocation{args: append([]string{"sh", "-c", script, one}, info...), env: []string{"OTHER=" + two}, exit: 1}))
}

// image makes the image of a dumpfile.
func (b *bench) image(t *testing.T, files int, changed bool) string {
	t.Helper()
	ours, _ := b.fromDump(t, b.dump(t, files, changed))
	ours.measure(t)
	return ours.out
}

// dump makes a dumpfile of n files in directories of a hundred, each with an object and a label. In one that is changed the
// last file has another mode.
func (b *bench) dump(t *testing.T, n int, changed bool) string {
	t.Helper()
	path := filepath.Join(b.dir, fmt.Sprintf("dump-%d-%v", n, changed))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	out := bufio.NewWriterSize(f, 1<<20)
	writeDump(out, n, changed)
	if err := out.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func writeDump(out io.Writer, n int, changed bool) {
	const label = "security.selinux=system_u:object_r:usr_t:s0\\x00"
	fmt.Fprintf(out, "/ 4096 40755 2 0 0 0 0.0 - - -\n")
	for k := range n {
		if k%100 == 0 {
			fmt.Fprintf(out, "/d%05d 4096 40755 2 0 0 0 1700000000.0 - - - %s\n", k/100, label)
		}
		mode := "100644"
		if changed && k == n-1 {
			mode = "100755"
		}
		sum := sha256.Sum256(fmt.Append(nil, k))
		h := hex.EncodeToString(sum[:])
		fmt.Fprintf(out, "/d%05d/file-%02d %d %s 1 0 0 0 1700000000.%d %s/%s - %s %s\n",
			k/100, k%100, 65+k, mode, k, h[:2], h[2:], h, label)
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
