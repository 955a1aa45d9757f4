package repo

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// measurer finds out whether objects are what their names say: by the kernel where they have fs-verity, by reading them
// otherwise. Small ones are read and hashed many at a time.
type measurer struct {
	alg    fsverity.Algorithm
	verity bool        // objects must have fs-verity
	read   bool        // read them all the same: the kernel checks every block then
	plain  atomic.Bool // the file system has no fs-verity, as it turned out
	work   sync.Pool   // of *measuring
}

// Objects of up to smallObject bytes are read in batches.
const (
	smallObject  = 64 << 10
	measureBytes = 512 << 10
	measureFiles = 64
)

type measuring struct {
	content  []byte
	contents [][]byte
	which    []int
	digester *fsverity.Digester
}

func newMeasurer(r *Repo) *measurer {
	m := &measurer{alg: r.Algorithm(), verity: r.verity}
	m.work.New = func() any {
		return &measuring{content: make([]byte, 0, measureBytes), digester: fsverity.NewDigester(m.alg)}
	}
	return m
}

// measured is what was found out about an object.
type measured struct {
	digest fsverity.Digest // of the content, where it was found out
	size   int64
	err    error // ErrNotFound, ErrCorrupt, ErrNoVerity or that of opening or reading
}

// objects measures files of the open directory and calls result for each, in any order.
func (m *measurer) objects(dir int, names []string, want []fsverity.Digest, result func(k int, found measured)) {
	w := m.work.Get().(*measuring)
	defer m.work.Put(w)
	flush := func() {
		for k, d := range fsverity.OfAll(m.alg, w.contents) {
			result(w.which[k], compare(measured{digest: d, size: int64(len(w.contents[k]))}, want[w.which[k]]))
		}
		w.content, w.contents, w.which = w.content[:0], w.contents[:0], w.which[:0]
	}
	for k, name := range names {
		found, later := m.object(w, dir, name, want[k])
		if !later {
			result(k, found)
			continue
		}
		w.which = append(w.which, k)
		if len(w.which) == measureFiles || len(w.content)+smallObject > measureBytes {
			flush()
		}
	}
	flush()
}

// object measures a file, or adds its content to the batch.
func (m *measurer) object(w *measuring, dir int, name string, want fsverity.Digest) (found measured, later bool) {
	fd, err := retry(func() (int, error) {
		return unix.Openat(dir, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	})
	switch {
	case err == unix.ENOENT:
		return measured{err: ErrNotFound}, false
	case err == unix.ELOOP:
		return measured{err: ErrCorrupt}, false
	case err != nil:
		return measured{err: os.NewSyscallError("open", err)}, false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return measured{err: os.NewSyscallError("fstat", err)}, false
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return measured{err: ErrCorrupt}, false
	}
	noVerity := m.plain.Load()
	if !noVerity {
		d, err := fsverity.MeasureDescriptor(fd)
		switch {
		case err == nil && (!m.read || d != want):
			return compare(measured{digest: d, size: st.Size}, want), false
		case errors.Is(err, fsverity.ErrNotEnabled):
			noVerity = true
		case errors.Is(err, fsverity.ErrNotSupported):
			m.plain.Store(true)
			noVerity = true
		case err != nil:
			return measured{err: err}, false
		}
	}
	if noVerity && m.verity {
		return measured{size: st.Size, err: ErrNoVerity}, false
	}
	if st.Size > smallObject {
		return m.large(w, fd, st.Size, want), false
	}
	start := len(w.content)
	n, err := io.ReadFull(descriptor(fd), w.content[start:start+int(st.Size)])
	if err != nil && err != io.EOF {
		return measured{size: st.Size, err: err}, false
	}
	w.content = w.content[:start+n]
	w.contents = append(w.contents, w.content[start:])
	return measured{}, true
}

func (m *measurer) large(w *measuring, fd int, size int64, want fsverity.Digest) measured {
	w.digester.Reset()
	if _, err := w.digester.ReadFrom(io.LimitReader(descriptor(fd), size)); err != nil {
		return measured{size: size, err: err}
	}
	return compare(measured{digest: w.digester.Sum(), size: size}, want)
}

func compare(found measured, want fsverity.Digest) measured {
	if found.digest != want {
		found.err = ErrCorrupt
	}
	return found
}

// descriptor reads from an open file.
type descriptor int

func (d descriptor) Read(p []byte) (int, error) {
	n, err := retry(func() (int, error) { return unix.Read(int(d), p) })
	if err != nil {
		return 0, os.NewSyscallError("read", err)
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}
