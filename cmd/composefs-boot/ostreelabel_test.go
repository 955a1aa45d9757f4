package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// Commits that are labelled have the checksums that ostree gives them.
func TestLabelAsOstree(t *testing.T) {
	dir := t.TempDir()
	policy := map[string]string{
		"config":                               "SELINUX=enforcing\nSELINUXTYPE=p\n",
		"p/policy/policy.33":                   "",
		"p/contexts/files/file_contexts.subs":  "/usr/lib64 /usr/lib\n",
		"p/contexts/files/file_contexts.local": "/usr/bin/own\t--\tsystem_u:object_r:own_t:s0\n",
		"p/contexts/files/file_contexts": `/.*	system_u:object_r:default_t:s0
/	-d	system_u:object_r:root_t:s0
/usr(/.*)?	system_u:object_r:usr_t:s0
/usr/bin(/.*)?	system_u:object_r:bin_t:s0
/usr/lib/.*\.so	--	system_u:object_r:lib_t:s0
/usr/lib/.*	-l	system_u:object_r:link_t:s0
/etc(/.*)?	system_u:object_r:etc_t:s0
/mnt	-d	system_u:object_r:mnt_t:s0
/proc	-d	<<none>>
/none	<<none>>
`}
	files := map[string]string{"usr/bin/x": "x", "usr/bin/own": "own", "usr/lib/x.so": "so", "usr/lib64/x.so": "so 64", "usr/etc/conf": "c", "proc/x": "p", "f": "f"}
	write := func(top string, files map[string]string) {
		t.Helper()
		for name, text := range files {
			path := filepath.Join(top, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	tree := func(name, place string) string {
		t.Helper()
		top := filepath.Join(dir, name)
		write(top, files)
		if place != "" {
			write(filepath.Join(top, place, "selinux"), policy)
		}
		if err := os.Symlink("x.so", filepath.Join(top, "usr/lib/link")); err != nil {
			t.Fatal(err)
		}
		if err := os.Link(filepath.Join(top, "f"), filepath.Join(top, "usr/bin/f")); err != nil { // two labels
			t.Fatal(err)
		}
		return top
	}
	theirs, ours := filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
	if text, err := vm.Ostree(t, "init", "--repo="+theirs, "--mode=archive").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	var made struct{ Commit string }
	refused := func(want string, args ...string) {
		t.Helper()
		var errs bytes.Buffer
		code := run(t.Context(), append([]string{"composefs-boot", "--quiet", "--repo", ours}, args...), nil, io.Discard, &errs)
		if (code == 0) != (want == "") || !strings.Contains(errs.String(), want) {
			t.Errorf("%q: %d: %s", args, code, errs.String())
		}
	}
	refused("", "init", "--insecure")
	plain, deployed, ordinary := tree("plain", ""), tree("deployed", "usr/etc"), tree("ordinary", "etc")
	for _, args := range [][]string{{"--selinux-policy=" + deployed, plain}, {"--selinux-policy=" + ordinary, "--no-xattrs", plain}, {"-P", deployed}, {"-P", ordinary}} {
		args = append([]string{"--orphan", "--timestamp=@1"}, args...)
		out, err := vm.Ostree(t, append([]string{"commit", "--fsync=false", "--repo=" + theirs}, args...)...).Output()
		if err != nil {
			t.Fatalf("ostree %q: %v", args, err)
		}
		runJSON(t, &made, append([]string{"--repo", ours, "ostree", "commit", "--dry-run"}, args...)...)
		if want := strings.TrimSpace(string(out)); made.Commit != want {
			t.Errorf("%q: %s, want %s", args, made.Commit, want)
		}
	}
	write(plain, map[string]string{"none": ""})
	refused("/none: the SELinux policy has no label", "ostree", "commit", "--dry-run", "--orphan", "--selinux-policy="+deployed, plain)
	refused("no SELinux policy", "ostree", "commit", "--dry-run", "--orphan", "-P", plain)
}
