package repo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// LockOptions says how long to wait for a lock. The zero value waits for ever and silently.
type LockOptions struct {
	Timeout time.Duration       // 0: no limit but the context's
	Waiting func(holder string) // called once, when the lock is not to be had at once
}

// ErrLocked tells that somebody else holds the lock.
var ErrLocked = errors.New("the repository is locked")

// ErrUpgrade tells that this process would wait for itself.
var ErrUpgrade = errors.New("this process reads or imports: it cannot lock the repository for itself alone before that is over")

// LockShared keeps garbage collection away until release is called. Other programs of the ecosystem take part: the lock is
// flock(2) on the repository's directory.
func (r *Repo) LockShared(ctx context.Context, o LockOptions) (release func(), err error) {
	unlock, err := r.lock(ctx, unix.LOCK_SH, o)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	if r.locks == 0 {
		// While nobody here held the lock, another process may have removed what this one has measured.
		clear(r.verified)
	}
	r.locks++
	r.mu.Unlock()
	return func() {
		r.mu.Lock()
		r.locks--
		r.mu.Unlock()
		unlock()
	}, nil
}

// lockExclusive keeps everybody else away. A process that holds a shared lock gets an error: it would wait for itself.
func (r *Repo) lockExclusive(ctx context.Context, o LockOptions) (release func(), err error) {
	r.mu.Lock()
	held := r.locks
	r.mu.Unlock()
	if held > 0 {
		return nil, ErrUpgrade
	}
	return r.lock(ctx, unix.LOCK_EX, o)
}

func (r *Repo) lock(ctx context.Context, how int, o LockOptions) (func(), error) {
	// A descriptor of its own: locks on the same one would be the same lock.
	f, err := r.openat(".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	if err := r.flock(ctx, f, how, o); err != nil {
		f.Close()
		return nil, err
	}
	return func() { f.Close() }, nil
}

// flock locks an open file of the repository.
func (r *Repo) flock(ctx context.Context, f *os.File, how int, o LockOptions) error {
	if o.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.Timeout)
		defer cancel()
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			return fmt.Errorf("%s: %w", r.path, os.NewSyscallError("flock", err))
		}
		if o.Waiting != nil {
			o.Waiting(holder(f))
			o.Waiting = nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w by %s: %w", r.path, ErrLocked, holder(f), ctx.Err())
		case <-time.After(wait):
		}
	}
}

// holder names a process that holds a lock on the file, by what the kernel tells in /proc/locks.
func holder(f *os.File) string {
	var st unix.Stat_t
	locks, err := os.Open("/proc/locks")
	if err != nil || unix.Fstat(int(f.Fd()), &st) != nil {
		return "another process"
	}
	defer locks.Close()
	id := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		fields := strings.Fields(lines.Text()) // "1: FLOCK ADVISORY READ 123 fd:00:456 0 EOF"
		if len(fields) < 6 || fields[1] != "FLOCK" || fields[5] != id {
			continue
		}
		pid, err := strconv.Atoi(fields[4])
		if err != nil {
			continue
		}
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			return fmt.Sprintf("process %d", pid)
		}
		return fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(comm)))
	}
	return "another process"
}
