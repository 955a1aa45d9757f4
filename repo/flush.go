package repo

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// The disk begins to write when there is as much as this, in bytes or in objects, and nobody else flushes: it works while more comes.
const (
	flushBytes = 32 << 20
	flushCount = 1024
)

func (i *Import) add(d fsverity.Digest, t *temp, size int64) error {
	if err := t.finish(); err != nil {
		t.discard()
		return err
	}
	if i.store {
		if err := unix.Fchmod(t.fd, 0o644); err != nil {
			t.discard()
			return os.NewSyscallError("fchmod", err)
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.pending[d] != nil || i.flushing[d] != nil { // another goroutine had the same content
		t.discard()
		return nil
	}
	i.pending[d] = t
	i.waiting += size
	i.stats.Objects++
	i.stats.Bytes += size
	// Who is faster than the disk waits here.
	if len(i.pending) >= i.batch {
		i.awaitFlush()
	}
	if i.failed != nil || i.busy || len(i.pending) < min(i.batch, flushCount) && i.waiting < flushBytes {
		return i.failed
	}
	list := i.beginFlush()
	go func() {
		err := i.flush(list)
		i.mu.Lock()
		defer i.mu.Unlock()
		i.endFlush(err)
	}()
	return nil
}

// awaitFlush waits until no flush goes on. The caller holds the lock.
func (i *Import) awaitFlush() {
	for i.busy {
		i.flushed.Wait()
	}
}

// beginFlush takes what is pending. Until endFlush, which gets the result, nobody else flushes. The caller holds the lock.
func (i *Import) beginFlush() map[fsverity.Digest]*temp {
	i.flushing, i.pending, i.waiting, i.busy = i.pending, map[fsverity.Digest]*temp{}, 0, true
	return i.flushing
}

func (i *Import) endFlush(err error) {
	i.failed, i.flushing, i.busy = err, nil, false
	i.flushed.Broadcast()
}

// flushAll flushes what is pending, and then calls the function. The caller holds the lock, which is let go meanwhile.
func (i *Import) flushAll(then func() error) error {
	i.awaitFlush()
	if i.failed != nil {
		return i.failed
	}
	list := i.beginFlush()
	i.mu.Unlock()
	err := i.flush(list)
	if err == nil {
		err = then()
	}
	i.mu.Lock()
	i.endFlush(err)
	return err
}

// settle makes visible what has been put so far.
func (i *Import) settle() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.flushAll(func() error { return nil })
}

// flush makes files durable and then visible. It closes them, whatever happens.
func (i *Import) flush(list map[fsverity.Digest]*temp) error {
	if len(list) == 0 {
		return nil
	}
	var failed error
	for d, t := range list {
		if err := t.wait(); err != nil {
			failed = fmt.Errorf("object %v: %w", d, err)
		}
	}
	if err := unix.Syncfs(int(i.objects.Fd())); err != nil {
		failed = os.NewSyscallError("syncfs", err)
	}
	var mu sync.Mutex
	var workers sync.WaitGroup
	queue := make(chan fsverity.Digest)
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for d := range queue {
				mu.Lock()
				skip := failed != nil
				mu.Unlock()
				if !skip {
					if err := i.publish(d, list[d]); err != nil {
						mu.Lock()
						failed = fmt.Errorf("object %v: %w", d, err)
						mu.Unlock()
					}
				}
				list[d].discard()
			}
		})
	}
	for d := range list {
		queue <- d
	}
	close(queue)
	workers.Wait()
	return failed
}

func (i *Import) publish(d fsverity.Digest, t *temp) error {
	if !i.plain.Load() || i.r.verity {
		err := t.seal(i.r.Algorithm(), i.objects)
		if errors.Is(err, fsverity.ErrNotSupported) && !i.r.verity {
			i.plain.Store(true)
			err = nil
		}
		if i.store && unsuitable(err) {
			err = nil
		}
		if err != nil {
			return err
		}
	}
	dir, err := i.fanout(d, true)
	if err != nil {
		return err
	}
	name := d.FileName()
	err = t.link(dir, name)
	if errors.Is(err, unix.EEXIST) {
		// Either somebody else was faster, or this object is there to be replaced.
		if ok, _ := i.sound(d, nil); ok {
			return nil
		}
		err = i.r.replace(dir, name, t.link)
	}
	if err == nil {
		i.r.mu.Lock()
		i.r.verified[d] = true
		i.r.mu.Unlock()
	}
	return err
}
