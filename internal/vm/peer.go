package vm

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// Peer returns a command that runs a program of the Debian forky in the cache, with that release's loader and libraries, on
// the files of this machine.
func Peer(t testing.TB, program string, args ...string) *exec.Cmd {
	t.Helper()
	forky := Cache(t, "forky")
	return exec.Command(filepath.Join(forky, "lib64/ld-linux-x86-64.so.2"), append([]string{
		"--library-path", filepath.Join(forky, "usr/lib/x86_64-linux-gnu"), filepath.Join(forky, program)}, args...)...)
}
