package vm

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TPM starts a TPM 2.0 in software, new and switched on, and returns a connection for its commands. It is gone when the test
// ends.
func TPM(t testing.TB) net.Conn {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm") // paths of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--server", "type=unixio,path="+socket,
		"--flags", "not-need-init,startup-clear")
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: run \"make setup\"", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		os.RemoveAll(dir)
	})
	for range 100 {
		if c, err := net.Dial("unix", socket); err == nil {
			t.Cleanup(func() { c.Close() })
			return c
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("swtpm does not answer")
	return nil
}
