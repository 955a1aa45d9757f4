package repo_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
)

// A partial file is found again, has one user, and is removed when it is old.
func TestPartial(t *testing.T) {
	r := newRepo(t)
	open := func(name string, timeout time.Duration) (*repo.Partial, error) {
		return r.OpenPartial(context.Background(), name, repo.LockOptions{Timeout: timeout})
	}
	p, err := open("a", 0)
	if err != nil {
		t.Fatal(err)
	}
	p.WriteString("some bytes")
	if _, err := open("a", time.Millisecond); !errors.Is(err, repo.ErrLocked) {
		t.Errorf("two users: %v", err)
	}
	p.Close()
	p, err = open("a", 0)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(p); err != nil || string(b) != "some bytes" {
		t.Errorf("%q, %v", b, err)
	}
	// Who waits gets a new file when this one is removed.
	next := make(chan *repo.Partial)
	go func() {
		n, err := open("a", 0)
		if err != nil {
			t.Error(err)
		}
		next <- n
	}()
	if err := p.Remove(); err != nil {
		t.Fatal(err)
	}
	if n := <-next; n != nil {
		if info, err := n.Stat(); err != nil || info.Size() != 0 {
			t.Errorf("%v, %v", info, err)
		}
		n.Close()
	}
	tmp := filepath.Join(r.Path(), "tmp")
	if err := errors.Join(os.Symlink("/etc/passwd", filepath.Join(tmp, "link")), unix.Mkfifo(filepath.Join(tmp, "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "pipe", "..", "a/b", ""} {
		if p, err := open(name, 0); err == nil {
			t.Errorf("%q is opened", name)
			p.Close()
		}
	}
	old := time.Now().Add(-48 * time.Hour)
	for name, at := range map[string]time.Time{"young": time.Now(), "old": old} {
		p, err := open(name, 0)
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
		if err := os.Chtimes(filepath.Join(tmp, name), at, at); err != nil {
			t.Fatal(err)
		}
	}
	plan, err := r.GC(context.Background(), repo.GCOptions{Margins: repo.DefaultMargins})
	if err != nil || len(plan.Temporary) != 1 || plan.Temporary[0] != "tmp/old" {
		t.Errorf("%v, %v", plan.Temporary, err)
	}
	if err := errors.Join(r.RemovePartial("young"), r.RemovePartial("young")); err != nil {
		t.Error(err)
	}
}
