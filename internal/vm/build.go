package vm

import (
	"os"
	"os/exec"
	"testing"
)

// Programs builds the two programs as a release has them, and more packages if they are named ("./internal/vm/guest"). It
// returns the directory where they are.
func Programs(t testing.TB, more ...string) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("go", append([]string{"build", "-tags", "containers_image_openpgp", "-trimpath", "-ldflags=-s -w", "-o", dir, "./cmd/..."}, more...)...)
	cmd.Dir = Top(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}
