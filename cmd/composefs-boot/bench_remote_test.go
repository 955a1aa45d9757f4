//go:build bench

package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// roundTrip is how far away the web server is.
const roundTrip = 5 * time.Millisecond

// remote compares pulls of the commit that ostree makes from a web server.
func (b *bench) remote(t *testing.T) {
	archive := filepath.Join(b.dir, "ostree-archive")
	b.makeArchive(t, archive)
	if text, err := vm.Ostree(t, "summary", "--update", "--repo="+archive).CombinedOutput(); err != nil {
		t.Fatalf("ostree summary: %v: %s", err, text)
	}
	web := httptest.NewServer(http.FileServer(http.Dir(archive)))
	defer web.Close()
	url := "http://" + farAway(t, web.Listener.Addr().String())
	b.compare("an OSTree commit from a web server 5 ms away", 0, 3, func(k int) sample {
		repo := b.initRepo(t, "sha512", fmt.Sprintf("remote-%d", k))
		return b.us("--repo", repo, "ostree", "pull", "--no-verify", url, "os").measure(t)
	}, rival{name: "ostree", run: func(k int) sample {
		repo := "--repo=" + filepath.Join(b.dir, fmt.Sprintf("remote-original-%d", k))
		for _, args := range [][]string{{"init", "--mode=bare-user"}, {"remote", "add", "--no-gpg-verify", "origin", url}} {
			invocation{args: vm.Ostree(t, append([]string{repo}, args...)...).Args}.measure(t)
		}
		return invocation{args: vm.Ostree(t, repo, "pull", "origin", "os").Args}.measure(t)
	}}.atMost(0.6))
}

// farAway forwards connections to an address, with half a round trip's delay in each direction, and returns its own.
func farAway(t *testing.T, to string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil {
				near.Close()
				continue
			}
			go delayed(near, far)
			go delayed(far, near)
		}
	}()
	return l.Addr().String()
}

// delayed copies what comes, later.
func delayed(to, from net.Conn) {
	type piece struct {
		b  []byte
		at time.Time
	}
	queue := make(chan piece, 1024)
	go func() {
		defer close(queue)
		for {
			b := make([]byte, 32<<10)
			n, err := from.Read(b)
			if n > 0 {
				queue <- piece{b[:n], time.Now().Add(roundTrip / 2)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range queue {
		time.Sleep(time.Until(p.at))
		if _, err := to.Write(p.b); err != nil {
			break
		}
	}
	to.Close()
	for range queue {
	}
	from.Close()
}
