package publish

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"sync"
	"time"

	"github.com/klauspost/compress/flate"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// writer writes content objects as the mode of a repository has them.
type writer struct {
	r     *Repository
	zlib  sync.Pool // of *flate.Writer
	level int
}

func (r *Repository) newWriter() (*writer, error) {
	w := &writer{r: r, level: 6} // that of ostree
	if text, ok := r.Config.Get("archive", "zlib-level"); ok {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 9 {
			return nil, fmt.Errorf("config: zlib-level=%.20s: want 1 to 9", text)
		}
		w.level = n
	}
	w.zlib.New = func() any {
		z, _ := flate.NewWriter(nil, w.level) // errors tell of a wrong level
		return z
	}
	return w, nil
}

// check tells why a repository of this mode cannot hold an object.
func check(m ostree.Mode, h *ostree.FileHeader) error {
	switch m {
	case ostree.Archive, ostree.BareUser:
		return nil
	case ostree.BareUserOnly:
		if h.UID != 0 || h.GID != 0 || len(h.Xattrs) > 0 || !h.IsSymlink() && h.Mode&0o7777&^0o775 != 0 {
			return fmt.Errorf("owner %d:%d, mode %#o, %d extended attributes: %s holds files of root with mode 0775 at most, and without "+
				"attributes (a commit with --canonical-permissions has such)", h.UID, h.GID, h.Mode, len(h.Xattrs), m)
		}
		return nil
	}
	for _, x := range h.Xattrs {
		if m == ostree.Bare && len(x.Value) == 0 {
			return fmt.Errorf("extended attribute %s has no value: ostree does not see such ones in a repository of mode %s", x.Name, m)
		}
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("mode %s: only root can write files of other owners (%s needs no root)", m, ostree.BareUser)
	}
	return nil
}

// write writes a content object under temporary names, and returns what they are to become. The content is checked: what it is not, it
// does not get a name for.
func (w *writer) write(c ostree.Checksum, h *ostree.FileHeader, content io.Reader) ([]rename, error) {
	if err := check(w.r.Mode, h); err != nil {
		return nil, err
	}
	name := ostree.ObjectName{Checksum: c, Kind: ostree.KindFile}
	to := rename{to: name.Path(w.r.Mode == ostree.Archive)}
	var err error
	if to.from, err = w.r.staged(path.Base(path.Dir(to.to)) + path.Base(to.to)); err != nil {
		return nil, err
	}
	sum, err := h.NewHash()
	if err != nil {
		return nil, err
	}
	physical := w.r.Mode != ostree.Archive && w.r.Mode != ostree.BareUser // symbolic links are such
	if h.IsSymlink() && physical {
		if err := w.r.root.Symlink(h.Target, to.from); err != nil {
			return nil, err
		}
	} else if err := w.file(to.from, h, io.TeeReader(io.LimitReader(content, h.Size+1), sum)); err != nil {
		return nil, err
	}
	if got := ostree.Checksum(sum.Sum(nil)); got != c {
		return nil, fmt.Errorf("%w: %v (composefs-boot fsck --repair heals it)", ostree.ErrChecksum, got)
	}
	switch w.r.Mode {
	case ostree.Bare:
		err = w.own(to.from, h, h.Xattrs)
	case ostree.BareSplitXattrs:
		if err = w.own(to.from, h, nil); err == nil {
			return w.splitXattrs(to, h)
		}
	}
	return []rename{to}, err
}

// rename gives an object its name.
type rename struct{ from, to string }

// file writes a regular file with the content, as the mode has it.
func (w *writer) file(name string, h *ostree.FileHeader, content io.Reader) error {
	f, err := w.r.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	perm := h.Mode & 0o7777
	switch w.r.Mode {
	case ostree.Archive:
		perm = 0o644
		err = w.archive(f, h, content)
	case ostree.BareUser:
		perm = perm&0o775 | 0o400
		if h.IsSymlink() {
			perm = 0o644
			_, err = f.WriteString(h.Target)
			break
		}
		fallthrough
	default:
		_, err = io.Copy(f, content)
	}
	if err == nil && w.r.Mode == ostree.BareUser {
		var meta []byte
		if meta, err = h.EncodeDirMeta(); err == nil {
			if err = unix.Fsetxattr(int(f.Fd()), "user.ostreemeta", meta, 0); err != nil {
				err = fmt.Errorf("extended attribute user.ostreemeta: %w", err)
			}
		}
	}
	if err != nil {
		return err
	}
	// Setuid bits come with the owner, when the content is known to be right.
	if w.r.Mode == ostree.Bare || w.r.Mode == ostree.BareSplitXattrs {
		perm &= 0o700
	}
	if err := unix.Fchmod(int(f.Fd()), perm); err != nil {
		return os.NewSyscallError("fchmod", err)
	}
	if w.r.Mode != ostree.Archive {
		if err := w.r.root.Chtimes(name, time.Time{}, time.Unix(0, 0)); err != nil {
			return err
		}
	}
	return f.Close()
}

// archive writes a .filez.
func (w *writer) archive(f *os.File, h *ostree.FileHeader, content io.Reader) error {
	header, err := h.EncodeFilez()
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(f, 64<<10)
	out.Write(header)
	if !h.IsSymlink() {
		z := w.zlib.Get().(*flate.Writer)
		defer w.zlib.Put(z)
		z.Reset(out)
		if _, err := io.Copy(z, content); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
	}
	return out.Flush()
}

// own gives a file or symbolic link its owner, mode and extended attributes. The order counts: a new owner takes setuid bits and
// capabilities away.
func (w *writer) own(name string, h *ostree.FileHeader, xattrs []fstree.Xattr) error {
	if err := w.r.root.Lchown(name, int(h.UID), int(h.GID)); err != nil {
		return err
	}
	// The directory is ours alone: nobody has put another file there.
	where := fmt.Sprintf("/proc/self/fd/%d/%s", w.r.top.Fd(), name)
	for _, x := range xattrs {
		if err := unix.Lsetxattr(where, x.Name, x.Value, 0); err != nil {
			return fmt.Errorf("extended attribute %s: %w", x.Name, err)
		}
	}
	if h.IsSymlink() {
		return nil
	}
	if err := unix.Fchmodat(unix.AT_FDCWD, where, h.Mode&0o7777, 0); err != nil {
		return os.NewSyscallError("chmod", err)
	}
	return nil
}

// splitXattrs writes the extended attributes beside the object: into a file that all objects with the same ones share, and a hard link to
// it by the name of the object.
func (w *writer) splitXattrs(object rename, h *ostree.FileHeader) ([]rename, error) {
	list := gvariant.List{}
	for _, x := range h.Xattrs {
		list = append(list, gvariant.Tuple{append([]byte(x.Name), 0), x.Value})
	}
	v, err := gvariant.Encode("a(ayay)", list)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(v.Bytes())
	digits := ostree.Checksum(sum).String()
	shared := "objects/" + digits[:2] + "/" + digits[2:] + ".file-xattrs"
	link := rename{object.from + "-xattrs-link", object.to + "-xattrs-link"}
	if err := w.r.root.Link(shared, link.from); err == nil {
		return []rename{link, object}, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// Several may write the same at a time: each object has a file of its own then, the last one of which gets the shared name.
	own := rename{object.from + "-xattrs", shared}
	if err := w.r.root.WriteFile(own.from, v.Bytes(), 0o644); err != nil {
		return nil, err
	}
	if err := w.r.root.Link(own.from, link.from); err != nil {
		return nil, err
	}
	return []rename{own, link, object}, nil
}

// metadata writes a dirtree or dirmeta under a temporary name.
func (w *writer) metadata(n ostree.ObjectName, data []byte) ([]rename, error) {
	if err := n.Verify(data); err != nil {
		return nil, err
	}
	to := rename{to: n.Path(false)}
	var err error
	if to.from, err = w.r.staged(n.String()); err != nil {
		return nil, err
	}
	f, err := w.r.root.OpenFile(to.from, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := io.Copy(f, bytes.NewReader(data)); err != nil {
		return nil, err
	}
	return []rename{to}, f.Close()
}
