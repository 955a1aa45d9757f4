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
	return foreign(Cache(t, "forky"), program, args...)
}

// Ostree returns a command that runs ostree 2026.4 of the Debian forky in the cache, on the files of this machine, with its gpg.
func Ostree(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	return foreign(Cache(t, "ostree"), "usr/bin/ostree", args...)
}

func foreign(forky, program string, args ...string) *exec.Cmd {
	return exec.Command(filepath.Join(forky, "lib64/ld-linux-x86-64.so.2"), append([]string{
		"--library-path", filepath.Join(forky, "usr/lib/x86_64-linux-gnu"), filepath.Join(forky, program)}, args...)...)
}
