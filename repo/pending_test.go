package repo

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// What an import has put can be read before it is visible, however it was written, while it becomes visible, and then.
func TestOpenPending(t *testing.T) {
	for _, c := range []struct{ unnamed, cached bool }{{true, false}, {true, true}, {false, true}} {
		noUnnamed = !c.unnamed
		defer func() { noUnnamed = false }()
		r := directRepo(t, Options{KeepCached: c.cached})
		i, err := r.Begin(context.Background(), LockOptions{})
		if err != nil {
			t.Fatal(err)
		}
		contents := map[fsverity.Digest][]byte{}
		check := func(what string) {
			t.Helper()
			for d, want := range contents {
				f, err := i.OpenVerified(d)
				if err != nil {
					t.Fatal(what, err)
				}
				got, err := io.ReadAll(f)
				if f.Close(); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s: %d bytes of %d: %v", what, len(got), len(want), err)
				}
			}
		}
		for k, size := range []int{100, 5000, directSize + 1, 3*blockBuffer + 77, inMemory + 12345} {
			content := bytes.Repeat([]byte{byte(k + 1)}, size)
			d, err := i.Put(bytes.NewReader(content), int64(size))
			if err != nil {
				t.Fatal(err)
			}
			contents[d] = content
			check("pending")
			if _, err := r.OpenObject(d); !errors.Is(err, ErrNotFound) {
				t.Fatal("it is visible", err)
			}
		}
		flushed := make(chan error)
		go func() { flushed <- i.settle() }()
		check("on its way")
		if err := <-flushed; err != nil {
			t.Fatal(err)
		}
		check("visible")
		if _, err := i.OpenVerified(fsverity.Of(r.Algorithm(), []byte("nothing"))); !errors.Is(err, ErrNotFound) {
			t.Error(err)
		}
		i.failed = errors.New("the disk is full")
		content := []byte("not to be had")
		d := fsverity.Of(r.Algorithm(), content)
		i.pending[d] = &temp{fd: -1}
		if _, err := i.OpenVerified(d); err != i.failed {
			t.Error(err)
		}
		delete(i.pending, d)
		i.Abort()
	}
}
