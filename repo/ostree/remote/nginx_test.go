package remote_test

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
)

// nginx serves a directory and returns the URL. Answers of more than a kilobyte come compressed to who wants them so.
func nginx(t testing.TB, dir string) string {
	t.Helper()
	program, err := exec.LookPath("nginx")
	if err != nil {
		program = "/usr/sbin/nginx"
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	work := t.TempDir()
	var temp string
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temp += fmt.Sprintf("%s_temp_path %s/%s; ", kind, work, kind)
	}
	write(t, filepath.Join(work, "nginx.conf"), fmt.Sprintf(`daemon off; pid %s/pid; error_log %[1]s/error;
events {}
http { access_log off; %s
  gzip on; gzip_types application/octet-stream; gzip_min_length 1000; default_type application/octet-stream;
  server { listen %s; root %s; } }
`, work, temp, address, dir))
	for d := dir; d != "/"; d = filepath.Dir(d) { // as root, its workers are of another user
		if err := os.Chmod(d, 0o755); err != nil {
			break
		}
	}
	cmd := exec.Command(program, "-p", work, "-e", work+"/error", "-c", work+"/nginx.conf")
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v (internal/setup packages)", err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
	})
	url := "http://" + address
	for range 500 {
		r, err := http.Get(url)
		if err == nil {
			r.Body.Close()
			return url
		}
		time.Sleep(20 * time.Millisecond)
	}
	text, _ := os.ReadFile(work + "/error")
	t.Fatalf("nginx does not answer: %s", text)
	return ""
}

// A real web server hands out the image, by objects and by deltas, and its summary comes once.
func TestNginx(t *testing.T) {
	url := nginx(t, filepath.Join(golden.Extract(t, "ostree/archive.tar.gz"), "archive"))
	config := configured(t, url, "gpg-verify-summary=true\n")
	check(t, newRepo(t), mustPull(t, open(t, config, remote.Options{}), newRepo(t), never, vectorRef).Commits[0])
	r := newRepo(t)
	mustPull(t, open(t, config, remote.Options{}), r, remote.PullOptions{Deltas: remote.DeltasAlways}, first)
	check(t, r, mustPull(t, open(t, config, remote.Options{}), r, remote.PullOptions{Deltas: remote.DeltasAlways}, vectorRef).Commits[0])
	o := remote.Options{Cache: t.TempDir()}
	var bytes [2]int64
	for k := range bytes {
		o.Counters = &remote.Counters{}
		if _, err := open(t, config, o).Refs(t.Context()); err != nil {
			t.Fatal(err)
		}
		bytes[k] = o.Counters.Bytes.Load()
	}
	if bytes[1] >= bytes[0] {
		t.Errorf("the summary comes again: %d bytes, and %d", bytes[0], bytes[1])
	}
}
