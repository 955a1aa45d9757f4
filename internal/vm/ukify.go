package vm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// Ukify is a directory in which ukify and systemd-measure of Debian forky can be run. It needs root.
type Ukify struct {
	Dir  string // as this machine sees it
	t    testing.TB
	root string
}

// NewUkify makes an empty directory, which is gone when the test ends.
func NewUkify(t testing.TB) *Ukify {
	t.Helper()
	root := Cache(t, "ukify")
	dir, err := os.MkdirTemp(filepath.Join(root, "tmp"), "test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &Ukify{dir, t, root}
}

// With returns the same directory for a subtest.
func (u *Ukify) With(t testing.TB) *Ukify { return &Ukify{u.Dir, t, u.root} }

// Stub returns a stub of that release, as linuxx64.efi.stub.
func (u *Ukify) Stub(name string) string {
	return Cache(u.t, "ukify/usr/lib/systemd/boot/efi/"+name)
}

// Write makes a file in the directory and returns its path on this machine.
func (u *Ukify) Write(name string, content []byte) string {
	u.t.Helper()
	path := filepath.Join(u.Dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		u.t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		u.t.Fatal(err)
	}
	return path
}

// Read returns what a file of the directory has.
func (u *Ukify) Read(name string) []byte {
	u.t.Helper()
	b, err := os.ReadFile(filepath.Join(u.Dir, name))
	if err != nil {
		u.t.Fatal(err)
	}
	return b
}

// Ukify runs ukify in the directory and returns what it prints.
func (u *Ukify) Ukify(args ...string) []byte {
	u.t.Helper()
	return u.run("/usr/bin/python3", append([]string{"/usr/bin/ukify"}, args...)...)
}

// Args returns a command line that runs ukify on files of the directory, which stand in the arguments as DIR.
func (u *Ukify) Args(args ...string) []string {
	list := []string{"chroot", u.root, "/usr/bin/python3", "/usr/bin/ukify"}
	for _, a := range args {
		list = append(list, strings.ReplaceAll(a, "DIR", u.inside()))
	}
	return list
}

// inside is the directory as ukify sees it.
func (u *Ukify) inside() string {
	rel, err := filepath.Rel(u.root, u.Dir)
	if err != nil {
		u.t.Fatal(err)
	}
	return "/" + rel
}

// Measure runs systemd-measure in the directory and returns what it prints.
func (u *Ukify) Measure(args ...string) []byte {
	u.t.Helper()
	return u.run("/usr/lib/systemd/systemd-measure", args...)
}

// Sbsign runs systemd-sbsign in the directory.
func (u *Ukify) Sbsign(args ...string) {
	u.t.Helper()
	u.run("/usr/lib/systemd/systemd-sbsign", args...)
}

func (u *Ukify) run(program string, args ...string) []byte {
	u.t.Helper()
	var out, errOut bytes.Buffer
	cmd := &exec.Cmd{Path: program, Args: append([]string{program}, args...), Dir: u.inside(), Stdout: &out, Stderr: &errOut,
		Env: []string{"PATH=/usr/bin:/usr/sbin", "LC_ALL=C.UTF-8"}, SysProcAttr: &syscall.SysProcAttr{Chroot: u.root}}
	if err := cmd.Run(); err != nil {
		u.t.Fatalf("%s %q: %v\n%s", program, args, err, errOut.Bytes())
	}
	return out.Bytes()
}
