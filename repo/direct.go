package repo

import (
	"errors"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// What an import writes is not read again soon. Finding pages for it and copying into them takes the kernel longer than hashing it
// does, and pushes out of memory what the machine works with: large contents go past the page cache (O_DIRECT), where the file
// system says that it can (STATX_DIOALIGN, Linux 6.1). With fs-verity they do not, since the kernel reads the file to enable it.

const (
	// directSize is the size in bytes from which on waiting for the disk costs less than the page cache does.
	directSize = 64 << 10
	// blockBuffer is how much is written at once.
	blockBuffer = 256 << 10
	// pageAlign is the alignment of the buffers in memory.
	pageAlign = 4096
)

// blocks is a content on its way to a file, past the page cache. It is written while more of it comes, and while its file waits for
// its name already.
type blocks struct {
	align   int           // of the lengths that can be written directly, a power of two
	writes  chan struct{} // has as many elements as there are writes going on, of all files
	buffer  *[blockBuffer]byte
	n       int           // bytes in it
	written chan struct{} // closed when all has been written that was in earlier buffers; nil if there were none
	direct  bool          // the descriptor is in this mode. This and err are of who writes
	err     error
}

var blockBuffers = sync.Pool{New: func() any {
	b := make([]byte, blockBuffer+pageAlign)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (pageAlign - 1)
	return (*[blockBuffer]byte)(b[skip:])
}}

// directAlign returns the alignment of what may be written directly to a file, 0 if nothing may, or should.
func directAlign(fd int) int {
	if _, err := fsverity.MeasureDescriptor(fd); !errors.Is(err, fsverity.ErrNotSupported) {
		return 0
	}
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err != nil || st.Mask&unix.STATX_DIOALIGN == 0 {
		return 0
	}
	length := int(st.Dio_offset_align)
	if length == 0 || length > directSize || length&(length-1) != 0 || st.Dio_mem_align > pageAlign {
		return 0
	}
	// What comes behind whole pages begins a new one, for which the kernel reads nothing.
	return max(length, pageAlign)
}

// collect takes the place of Write.
func (t *temp) collect(b []byte) {
	k := t.blocks
	for len(b) > 0 {
		if k.n == blockBuffer {
			t.spill()
		}
		if k.buffer == nil {
			k.buffer = blockBuffers.Get().(*[blockBuffer]byte)
		}
		n := copy(k.buffer[k.n:], b)
		k.n += n
		b = b[n:]
	}
}

// finish has all of the content on its way. What becomes of it wait returns.
func (t *temp) finish() error {
	k := t.blocks
	if k == nil || k.buffer == nil {
		return nil
	}
	if k.n < directSize && k.written == nil {
		_, err := t.write(k.buffer[:k.n])
		t.drop()
		return os.NewSyscallError("write", err)
	}
	t.spill()
	return nil
}

// drop gives back the buffer.
func (t *temp) drop() {
	if k := t.blocks; k.buffer != nil {
		blockBuffers.Put(k.buffer)
		k.buffer, k.n = nil, 0
	}
}

// wait waits until all is written that was on its way, and returns the error of writing it.
func (t *temp) wait() error {
	if t.blocks == nil || t.blocks.written == nil {
		return nil
	}
	<-t.blocks.written
	return t.blocks.err
}

// spill begins to write the buffer.
func (t *temp) spill() {
	k := t.blocks
	buffer, b := k.buffer, k.buffer[:k.n]
	before, done := k.written, make(chan struct{})
	k.buffer, k.n, k.written = nil, 0, done
	k.writes <- struct{}{}
	go func() {
		if before != nil {
			<-before
		}
		if k.err == nil {
			k.err = t.writeBlocks(b)
		}
		blockBuffers.Put(buffer)
		<-k.writes
		close(done)
	}()
}

// writeBlocks appends to the file: whole blocks directly, and the rest behind them.
func (t *temp) writeBlocks(b []byte) error {
	if whole := len(b) &^ (t.blocks.align - 1); whole > 0 {
		n, err := 0, t.setDirect(true)
		if err == nil {
			n, err = t.write(b[:whole])
		}
		b = b[n:]
		// What the file system does not take like this it takes as usual.
		if err != nil && err != unix.EINVAL {
			return os.NewSyscallError("write", err)
		}
	}
	if len(b) == 0 {
		return nil
	}
	if err := t.setDirect(false); err != nil {
		return os.NewSyscallError("fcntl", err)
	}
	_, err := t.write(b)
	return os.NewSyscallError("write", err)
}

func (t *temp) setDirect(on bool) error {
	if t.blocks.direct == on {
		return nil
	}
	flags := 0 // the mode of access is not among those that can be changed
	if on {
		flags = unix.O_DIRECT
	}
	_, err := unix.FcntlInt(uintptr(t.fd), unix.F_SETFL, flags)
	if err == nil {
		t.blocks.direct = on
	}
	return err
}
