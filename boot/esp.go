package boot

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/boot/disk"
)

// Fate is what becomes of a planned file on an ESP that is in use.
type Fate string

// The fates.
const (
	Write Fate = "write" // it is new, or takes the place of an older one of ours
	Same  Fate = "same"  // the same bytes are there already
	Kept  Fate = "kept"  // what is there is somebody else's, or newer, and stays
)

// ESPFile is a planned file and what becomes of it.
type ESPFile struct {
	Place
	Fate Fate
}

// ESPPlan is what an install does to a mounted ESP. Without a directory, it does nothing.
type ESPPlan struct {
	Dir        string
	Files      []ESPFile // in the order in which they are written
	Need, Free int64     // bytes, as FAT counts them
}

// entries is the directory of the files that make systems appear in the boot menu.
const entries = "loader/entries/"

// PlanESP looks at a mounted ESP and decides what becomes of the plan's files there. It is an error if what is to be written
// does not fit. A file that is replaced needs its space a second time: both are there for a moment.
func (p Plan) PlanESP(dir string) (ESPPlan, error) {
	e := ESPPlan{Dir: dir}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return e, err
	}
	defer root.Close()
	var files []disk.File
	for _, f := range p.ESP {
		fate, err := f.fate(root)
		if err != nil {
			return e, fmt.Errorf("%s: %w", path.Join(dir, f.Path), err)
		}
		if fate == Write {
			files = append(files, disk.File{Path: f.Path, Size: f.Size, Open: f.Open})
		}
		e.Files = append(e.Files, ESPFile{f, fate})
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return e, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	e.Free = int64(st.Bavail) * st.Bsize
	if len(files) > 0 {
		if e.Need, err = disk.FATUsage(files, st.Bsize); err != nil {
			return e, fmt.Errorf("%s: %w", dir, err)
		}
	}
	if e.Need > e.Free {
		return e, fmt.Errorf("%s: %d bytes are needed, only %d are free: remove old boot entries, or use a larger partition",
			dir, e.Need, e.Free)
	}
	return e, nil
}

// fate looks at what is there under the file's name.
func (f Place) fate(root *os.Root) (Fate, error) {
	info, err := root.Lstat(f.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return Write, nil
	}
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", errors.New("there is something that is not a file: move it away")
	}
	there, err := root.Open(f.Path)
	if err != nil {
		return "", err
	}
	defer there.Close()
	if info.Size() == f.Size {
		same, err := f.equals(there)
		if same || err != nil {
			return Same, err
		}
	}
	if !f.Loader {
		return Write, nil
	}
	return f.loaderFate(there)
}

// equals compares the planned content with another one.
func (f Place) equals(other io.Reader) (bool, error) {
	ours, err := f.Open()
	if err != nil {
		return false, err
	}
	defer ours.Close()
	a, b := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := io.ReadFull(ours, a)
		m, errB := io.ReadFull(other, b)
		for _, err := range []error{errA, errB} {
			if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
				return false, err
			}
		}
		if !bytes.Equal(a[:n], b[:m]) {
			return false, nil
		}
		if errA != nil { // the end, of both
			return true, nil
		}
	}
}

// loaderFate decides about a boot loader's file that differs from what is there. Another boot loader stays, for other systems
// may need it; so does a newer systemd-boot, and a configuration, which has become its owner's.
func (f Place) loaderFate(there *os.File) (Fate, error) {
	if _, err := there.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	theirs, err := loaderVersion(there)
	if err != nil || theirs == "" {
		return Kept, err
	}
	r, err := f.Open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	ours, err := loaderVersion(r)
	if err != nil || bls.CompareVersions(theirs, ours) > 0 {
		return Kept, err
	}
	return Write, nil
}

// maxLoader limits what is searched of a boot loader, in bytes; systemd-boot has about 150 KiB.
const maxLoader = 16 << 20

// loaderVersion finds the mark that systemd-boot has in its binary, "#### LoaderInfo: systemd-boot VERSION ####", by which
// bootctl knows it, too. It returns the version, or "" for anything else.
func loaderVersion(r io.Reader) (string, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxLoader))
	if err != nil {
		return "", err
	}
	_, after, _ := bytes.Cut(b, []byte("#### LoaderInfo: systemd-boot "))
	version, _, ended := bytes.Cut(after[:min(len(after), 256)], []byte(" ####"))
	if !ended {
		return "", nil
	}
	return string(version), nil
}

// Execute writes what is to be written. Files get their names when they are whole, and what makes the system appear in the
// menu comes when everything else is on the disk: whenever the power fails, what booted before boots.
func (e ESPPlan) Execute() error {
	if e.Dir == "" {
		return nil
	}
	root, err := os.OpenRoot(e.Dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, f := range e.Files {
		if f.Fate != Write {
			continue
		}
		if strings.HasPrefix(f.Path, entries) {
			if err := syncAll(root); err != nil {
				return fmt.Errorf("%s: %w", e.Dir, err)
			}
		}
		if err := writeFile(root, f.Place); err != nil {
			return fmt.Errorf("%s: %w", path.Join(e.Dir, f.Path), err)
		}
	}
	return syncAll(root)
}

func writeFile(root *os.Root, f Place) error {
	if err := root.MkdirAll(path.Dir(f.Path), 0o755); err != nil {
		return err
	}
	r, err := f.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	temporary := path.Dir(f.Path) + "/." + rand.Text()[:12] + ".tmp"
	w, err := root.OpenFile(temporary, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	n, err := io.Copy(w, r)
	if err == nil && n != f.Size {
		err = fmt.Errorf("%d bytes, %d were planned", n, f.Size)
	}
	if err == nil {
		err = w.Sync()
	}
	err = errors.Join(err, w.Close())
	if err == nil {
		err = root.Rename(temporary, f.Path)
	}
	if err != nil {
		root.Remove(temporary)
	}
	return err
}

// syncAll makes everything durable on the file system of a directory.
func syncAll(root *os.Root) error {
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return os.NewSyscallError("syncfs", unix.Syncfs(int(d.Fd())))
}
