//go:build interop

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// The same commands are given to cfsctl of composefs-rs and to this program: the same exit code, the same output.
func TestInterop(t *testing.T) {
	peer := vm.Cache(t, "cargo/bin/cfsctl")
	ours := filepath.Join(vm.Top(t), "bin/composefs-boot")
	dir := t.TempDir()
	link := filepath.Join(dir, "cfsctl")
	if err := os.Symlink(ours, link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"files", "links", "metadata", "names", "selinux"} {
		if err := os.Rename(golden.Extract(t, "trees/"+name+".tar.gz"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	both := func(args ...string) {
		t.Helper()
		var out [2]string
		var code [2]int
		for k, program := range []string{peer, link} {
			cmd := exec.Command(program, args...)
			cmd.Dir = dir
			// Each works on a repository of its own, under the same name.
			for n, a := range cmd.Args {
				if a == "REPO" {
					cmd.Args[n] = []string{"peer", "ours"}[k]
				}
			}
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			cmd.Run()
			out[k] = strings.NewReplacer("at peer", "at REPO", "at ours", "at REPO").Replace(stdout.String())
			code[k] = cmd.ProcessState.ExitCode()
		}
		if out[0] != out[1] || code[0] != code[1] {
			t.Errorf("%q:\ncfsctl (%d): %.2000s\nours (%d): %.2000s", args, code[0], out[0], code[1], out[1])
		}
	}
	for _, hash := range []string{"sha256", "sha512"} {
		for _, format := range []string{"0", "1", "2"} {
			for _, tree := range []string{"files", "links", "metadata", "names", "selinux"} {
				for _, flags := range [][]string{{}, {"--bootable"}, {"--no-propagate-usr-to-root"}, {"--xattrs", "keep-user-xattrs"}} {
					both(append([]string{"--no-repo", "--hash", hash, "--erofs-version", format, "compute-id", tree}, flags...)...)
				}
				both("--no-repo", "--hash", hash, "--erofs-version", format, "compute-karg", tree)
			}
		}
	}
	for _, tree := range []string{"files", "links", "metadata", "names", "selinux"} {
		both("--no-repo", "--hash", "sha256", "create-dumpfile", "--bootable", tree)
		both("--no-repo", "create-dumpfile", tree)
	}
	both("--repo", "REPO", "init", "--insecure")
	both("--repo", "REPO", "create-image", "--bootable", "selinux", "name")
	both("--repo", "REPO", "create-image", "links")
	both("--repo", "REPO", "create-image", "nowhere")
	both("--repo", "REPO", "images")
	both("--repo", "REPO", "images", "--json")
	both("--repo", "REPO", "images", "--no-trunc")
	both("--repo", "REPO", "image-objects", "none")
	both("--repo", "REPO", "dump-files", "refs/name", "/etc/selinux/config", "/usr/bin")
	both("--repo", "REPO", "dump-files", "--backing-path-only", "refs/name", "/etc/selinux/config", "/usr/bin/su")
	both("--repo", "REPO", "fsck")
	both("--repo", "REPO", "gc", "-n")
	both("--repo", "REPO", "gc")
	both("--repo", "REPO", "fsck", "--metadata-only")
	both("--repo", "REPO", "cat", "none")
	both("--repo", "none", "fsck")
	both("compute-id")
	both("--nonsense")
	both("--repo", "REPO", "init", "--insecure", "--ensure")
	both("--repo", "REPO", "init", "--insecure", "--algorithm", "fsverity-sha256-12")
	both("--repo", "REPO", "init", "--insecure", "--ensure", "--algorithm", "fsverity-sha256-12")
	// Repositories from before meta.json.
	for _, name := range []string{"peer", "ours"} {
		os.Remove(filepath.Join(dir, name, "meta.json"))
	}
	both("--repo", "REPO", "--no-upgrade", "images")
	both("--repo", "REPO", "images")
	both("--repo", "REPO", "fsck")
	for _, name := range []string{"peer", "ours"} {
		os.Remove(filepath.Join(dir, name, "meta.json"))
	}
	both("--repo", "REPO", "init", "--insecure", "--ensure")
	both("--repo", "REPO", "images")
	// Each reads what the other made.
	for _, pair := range [][2]string{{peer, "ours"}, {link, "peer"}} {
		cmd := exec.Command(pair[0], "--repo", pair[1], "fsck")
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "status: ok") {
			t.Errorf("%q: %v\n%s", cmd.Args, err, out)
		}
	}
	// The peer finds no fault with what was converted and repaired, and makes the same image.
	must := func(program string, args ...string) string {
		t.Helper()
		cmd := exec.Command(program, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", cmd.Args, err, out)
		}
		return string(out)
	}
	must(ours, "-q", "--repo", "ours", "convert", "--algorithm", "sha256", "converted")
	if out := must(peer, "--repo", "converted", "fsck"); !strings.Contains(out, "status: ok") {
		t.Error(out)
	}
	want := must(peer, "--no-repo", "--hash", "sha256", "compute-id", "--bootable", "selinux")
	if out := must(peer, "--repo", "converted", "images", "--no-trunc"); !strings.Contains(out, strings.TrimSpace(want)) {
		t.Errorf("the converted image is not %s:\n%s", want, out)
	}
	objects, _ := filepath.Glob(filepath.Join(dir, "converted/objects/*/*"))
	for _, o := range objects[:len(objects)/2] {
		if !strings.HasSuffix(o, strings.TrimSpace(want)[2:]) { // nobody else has the image
			os.Remove(o)
		}
	}
	must(ours, "-q", "--repo", "converted", "fsck", "--repair", "--from", "selinux", "--from", "links", "--from", "peer", "--from", "ours")
	if out := must(peer, "--repo", "converted", "fsck"); !strings.Contains(out, "status: ok") {
		t.Error(out)
	}
	both("--repo", "REPO", "init", "--insecure", "--reset-metadata")
	both("--repo", "REPO", "images")
	both("--repo", "REPO", "fsck")
}

// The same with OCI images. What differs by nature is left out: digests of streams, whose compression is another, the number of
// objects, since cfsctl leaves the first manifest behind, and its order of images, which is that of the directory.
func TestInteropOCI(t *testing.T) {
	peer, ours := vm.Cache(t, "cargo/bin/cfsctl"), filepath.Join(vm.Top(t), "bin/composefs-boot")
	dir := t.TempDir()
	link := filepath.Join(dir, "cfsctl")
	if err := os.Symlink(ours, link); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(dir, "layout"), golden.Files(t, "oci/oci-boot")); err != nil {
		t.Fatal(err)
	}
	differs := regexp.MustCompile(`(?m)^(verity .*|objects: .*|.*objects_checked.*|.*"verity": .*| *"(verity_required|metadata_only|findings)".*|.*"errors": \[\],?| *\},?)\n`)
	run := func(program, repo string, args ...string) (string, int) {
		cmd := exec.Command(program, append([]string{"--repo", repo}, args...)...)
		cmd.Dir = dir
		out, _ := cmd.Output()
		return differs.ReplaceAllString(string(out), ""), cmd.ProcessState.ExitCode()
	}
	both := func(args ...string) {
		t.Helper()
		a, codeA := run(peer, "peer", args...)
		b, codeB := run(link, "ours", args...)
		a, b = strings.ReplaceAll(a, "at peer", "at REPO"), strings.ReplaceAll(b, "at ours", "at REPO")
		if a != b || codeA != codeB {
			t.Errorf("%q:\ncfsctl (%d): %.2000s\nours (%d): %.2000s", args, codeA, a, codeB, b)
		}
	}
	const manifest = "sha256:8643f7a69861279d88dec2639a8ded9f02e261c9770bed9aacc1d3ee3371778e"
	const config = "@sha256:25721201133cc2c4d70b8a3a6ebc7bffbda0ddf354d3383658e70c65f7508fa7"
	const layer = "sha256:4606438df977f220984847db2425392f2f67b7a0a26742819225a86b5d93dea3"
	both("init", "--insecure")
	both("oci", "images")
	both("oci", "pull", "--bootable", "oci:layout", "vec")
	both("oci", "images")
	both("oci", "images", "--json")
	both("oci", "inspect", "vec")
	both("oci", "inspect", "--manifest", "@"+manifest)
	both("oci", "inspect", "--config", "vec")
	both("oci", "inspect", "none")
	both("oci", "layer", layer)
	both("oci", "layer", "--dumpfile", layer)
	both("oci", "layer", "--json", layer)
	for _, image := range []string{"vec", config} {
		for _, flags := range [][]string{nil, {"--bootable"}, {"--xattrs", "keep-user-xattrs"}} {
			both(append([]string{"oci", "dump", image}, flags...)...)
			both(append([]string{"oci", "compute-id", image}, flags...)...)
			both(append([]string{"--erofs-version", "2", "oci", "compute-id", image}, flags...)...)
		}
	}
	both("oci", "linked-erofs-images", "1aa47ce279e4ea08f3e6b6974c6f375fdd8a65e48a2beec3f3a6ad84616c61dc2d9e1c7a7ea1ddf0e035c68693ce531bdf499f5dc12b78003bcc4640982cbdc6")
	both("oci", "tag", manifest, "a/b")
	both("oci", "tag", manifest, "@a")
	both("oci", "untag", "a/b")
	both("oci", "untag", "a/b")
	both("oci", "fsck")
	both("oci", "fsck", "--json")
	both("oci", "fsck", "vec")
	both("oci", "fsck", "none")
	// Each reads, checks and extends what the other has made.
	want, _ := run(peer, "peer", "oci", "inspect", "vec")
	for _, pair := range [][2]string{{peer, "ours"}, {link, "peer"}} {
		for _, args := range [][]string{{"oci", "fsck"}, {"oci", "pull", "oci:layout", "again"}, {"oci", "fsck"}, {"gc"}, {"oci", "fsck"}} {
			if out, code := run(pair[0], pair[1], args...); code != 0 {
				t.Errorf("%s in the other's repository: %q: %s", pair[0], args, out)
			}
		}
		if got, _ := run(pair[0], pair[1], "oci", "inspect", "again"); got != want {
			t.Errorf("%s: %s", pair[0], got)
		}
	}
	for _, program := range []string{peer, link} {
		for _, repo := range []string{"peer", "ours"} {
			if out, code := run(program, repo, "oci", "fsck"); code != 0 {
				t.Errorf("%s, %s: %s", program, repo, out)
			}
		}
	}
}
