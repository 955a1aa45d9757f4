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
	"slices"
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

// ESPFile is a planned file and what becomes of it. If the same boot entry is there already, Path is its name, unless it is
// written.
type ESPFile struct {
	Place
	Fate Fate
	// Replaces are other names of the same boot entry, with other counters. They go when it is there.
	Replaces []string
}

// ESPPlan is what an install does to a mounted ESP. Without a directory, it does nothing.
type ESPPlan struct {
	Dir        string
	Files      []ESPFile // in the order in which they are written
	Need, Free int64     // bytes, as FAT counts them
	// First is the boot entry of another system, or of another version, that the menu will have before those of the plan, and
	// that is booted if nobody chooses; "" if there is none.
	First string
}

// entry takes the name of a file apart that makes a system appear in the boot menu. The boot loader renames such files when
// it counts boots.
func (f Place) entry() (n bls.Name, ok bool) {
	dir, file := path.Split(f.Path)
	if dir != "loader/entries/" && dir != unifiedDir {
		return n, false
	}
	n, err := bls.ParseName(file)
	return n, err == nil
}

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
	for _, place := range p.ESP {
		f, err := place.look(root)
		if err != nil {
			return e, fmt.Errorf("%s: %w", path.Join(dir, place.Path), err)
		}
		if f.Fate == Write {
			files = append(files, disk.File{Path: f.Path, Size: f.Size, Open: f.Open})
		}
		e.Files = append(e.Files, f)
	}
	if e.First, err = e.first(root); err != nil {
		return e, fmt.Errorf("%s: %w", dir, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return e, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	e.Free = int64(st.Bavail)*st.Bsize + p.Freed
	if len(files) > 0 {
		if e.Need, err = disk.FATUsage(files, st.Bsize); err != nil {
			return e, fmt.Errorf("%s: %w", dir, err)
		}
	}
	if e.Need > e.Free {
		return e, fmt.Errorf("%s: %d bytes are needed, only %d are free: remove old boot entries, with composefs-boot prune for example, "+
			"or use a larger partition", dir, e.Need, e.Free)
	}
	return e, nil
}

// look decides what becomes of a file, and of the names that a boot entry has there already.
func (f Place) look(root *os.Root) (ESPFile, error) {
	entry, ok := f.entry()
	if !ok {
		fate, err := f.fate(root)
		return ESPFile{Place: f, Fate: fate}, err
	}
	files, err := fs.ReadDir(root.FS(), path.Dir(f.Path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return ESPFile{}, err
	}
	file := ESPFile{Place: f, Fate: Write}
	for _, e := range files {
		name, err := bls.ParseName(e.Name())
		if err != nil || name.ID != entry.ID || name.Ext != entry.Ext {
			continue
		}
		there := f
		there.Path = path.Join(path.Dir(f.Path), e.Name())
		fate, err := there.fate(root)
		if err != nil {
			return file, err
		}
		// One that has been found bad gets its tries anew.
		if fate == Same && file.Fate != Same && !name.Bad() {
			file.Place, file.Fate = there, Same
		}
		file.Replaces = append(file.Replaces, there.Path)
	}
	file.Replaces = slices.DeleteFunc(file.Replaces, func(name string) bool { return name == file.Path })
	return file, nil
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
		if _, ok := f.entry(); ok {
			if err := syncAll(root); err != nil {
				return fmt.Errorf("%s: %w", e.Dir, err)
			}
		}
		if err := writeFile(root, f.Place); err != nil {
			return fmt.Errorf("%s: %w", path.Join(e.Dir, f.Path), err)
		}
	}
	if err := syncAll(root); err != nil {
		return fmt.Errorf("%s: %w", e.Dir, err)
	}
	for _, f := range e.Files {
		for _, name := range f.Replaces {
			if err := root.Remove(name); err != nil {
				return fmt.Errorf("%s: %w", path.Join(e.Dir, name), err)
			}
		}
	}
	return syncAll(root)
}

// temporaryName is what a file is called until it is whole.
func temporaryName() string { return "." + rand.Text()[:12] + ".tmp" }

func isTemporary(name string) bool {
	letters := strings.TrimSuffix(strings.TrimPrefix(name, "."), ".tmp")
	return name == "."+letters+".tmp" && len(letters) == 12 && strings.Trim(letters, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567") == ""
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
	temporary := path.Join(path.Dir(f.Path), temporaryName())
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
