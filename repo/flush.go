package repo

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

func (i *Import) add(d fsverity.Digest, t *temp, size int64) error {
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
	i.stats.Objects++
	i.stats.Bytes += size
	if len(i.pending) < i.batch {
		return i.failed
	}
	// One flush goes on while others fill the next batch; who is faster than the disk waits here.
	i.awaitFlush()
	if i.failed != nil || len(i.pending) < i.batch {
		return i.failed
	}
	i.flushing, i.pending = i.pending, map[fsverity.Digest]*temp{}
	list := maps.Clone(i.flushing)
	go func() {
		err := i.flush(list)
		i.mu.Lock()
		i.failed, i.flushing = err, nil
		i.flushed.Broadcast()
		i.mu.Unlock()
	}()
	return nil
}

// awaitFlush waits until no flush goes on. The caller holds the lock.
func (i *Import) awaitFlush() {
	for i.flushing != nil {
		i.flushed.Wait()
	}
}

// settle makes visible what has been put so far.
func (i *Import) settle() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.flushPending()
}

// flushPending flushes what is pending, after what is on its way. The caller holds the lock.
func (i *Import) flushPending() error {
	i.awaitFlush()
	if i.failed != nil {
		return i.failed
	}
	list := i.pending
	i.pending = map[fsverity.Digest]*temp{}
	return i.flush(list)
}

// flush makes files durable and then visible. It closes them, whatever happens.
func (i *Import) flush(list map[fsverity.Digest]*temp) error {
	if len(list) == 0 {
		return nil
	}
	var failed error
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
		err = t.replace(dir, name)
	}
	if err == nil {
		i.r.mu.Lock()
		i.r.verified[d] = true
		i.r.mu.Unlock()
	}
	return err
}
