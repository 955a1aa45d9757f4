package setuproot

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Verity says whether the objects of an image must have the fs-verity digests that the image names.
type Verity int

const (
	NoVerity      Verity = iota // they need not
	TryVerity                   // they must if the kernel knows verity=require of overlayfs
	RequireVerity               // they must
)

// ImageMount says how an image is mounted that is a file anywhere, with its objects anywhere: as mount.composefs does.
type ImageMount struct {
	Image   string          // path of the file
	Digest  fsverity.Digest // that the file must have; zero: the file is not verified
	Objects []string        // directories of objects, the first one that has an object counts; without ":" in them
	Verity  Verity
	IDMap   string // path of a user namespace by which the owners are mapped; "" for none

	Upper, Work string // directories for what is changed; "" for none
	Writable    bool
}

// Look finds out what the kernel can do. The file is opened for that, and refused if it is not what Digest says.
func (m ImageMount) Look() (Abilities, error) {
	f, err := stepFile{m.Image, m.Digest}.open()
	if err != nil {
		return Abilities{}, err
	}
	defer f.Close()
	return Probe(f), nil
}

// Plan decides what to do to mount the image at target.
func (m ImageMount) Plan(a Abilities, target string) ([]Step, error) {
	if len(m.Objects) == 0 || strings.Contains(strings.Join(m.Objects, ""), ":") {
		return nil, fmt.Errorf("%s: the objects are in %q: want one directory or more, without \":\"", m.Image, m.Objects)
	}
	if (m.Upper == "") != (m.Work == "") || m.Writable && m.Upper == "" {
		return nil, fmt.Errorf("%s: a directory for changes and one for the kernel's work go together, and a writable mount needs them", m.Image)
	}
	if err := a.enough(m.Verity == RequireVerity); err != nil {
		return nil, err
	}
	var steps []Step
	if !a.FloatTrees {
		steps = append(steps, stepPrivate{target})
	}
	overlay := stepOverlay{source: "composefs", objects: strings.Join(m.Objects, ":"),
		verity: m.Verity == RequireVerity || m.Verity == TryVerity && a.Verity,
		fd:     a.LayerFD, upper: m.Upper, work: m.Work, writable: m.Writable}
	return append(steps, stepFile{m.Image, m.Digest}, stepErofs{a.FileErofs, m.IDMap}, overlay, stepAttach{"", target}), nil
}

// stepFile opens an image that is a file anywhere, and has the kernel tell its digest, unless that is zero.
type stepFile struct {
	path   string
	digest fsverity.Digest
}

func (s stepFile) String() string {
	if s.digest.IsZero() {
		return "open image " + s.path + ", unverified"
	}
	return fmt.Sprintf("open image %s and measure it: its fs-verity digest must be %v", s.path, s.digest)
}

func (s stepFile) do(r *run) (err error) {
	r.image, err = s.open()
	return err
}

func (s stepFile) open() (*os.File, error) {
	f, err := os.OpenFile(s.path, unix.O_RDONLY|unix.O_NONBLOCK, 0) // a fifo would make us wait for ever
	if err != nil {
		return nil, err
	}
	if err := s.check(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", s.path, err)
	}
	return f, nil
}

func (s stepFile) check(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("not a regular file")
	}
	if !s.digest.IsZero() {
		got, err := fsverity.Measure(f)
		switch {
		case errors.Is(err, fsverity.ErrNotEnabled), errors.Is(err, fsverity.ErrNotSupported):
			return fmt.Errorf("Image has no fs-verity: %w: enable it, or leave digest= out", err)
		case err != nil:
			return err
		case got != s.digest:
			return fmt.Errorf("Image has wrong fs-verity: its digest is %v, not %v: it was replaced, or made anew", got, s.digest)
		}
	}
	magic := make([]byte, 4)
	if _, err := f.ReadAt(magic, 0); err != nil || string(magic) != "\x9a\x62\x78\xd0" {
		return errors.New("not a composefs image")
	}
	return nil
}
