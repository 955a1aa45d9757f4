package repo

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Meta is meta.json.
type Meta struct {
	Version   int         `json:"version"`
	Algorithm string      `json:"algorithm"` // fsverity.Algorithm.Name
	Features  Features    `json:"features"`
	Formats   MetaFormats `json:"erofs_formats"`

	algorithm fsverity.Algorithm
}

// Features names what a program must know to use a repository. Who does not know a compatible feature may do everything,
// who does not know a read-only-compatible one may read, who does not know an incompatible one may do nothing.
type Features struct {
	Compatible         []string `json:"compatible"`
	ReadOnlyCompatible []string `json:"read-only-compatible"`
	Incompatible       []string `json:"incompatible"`
}

// MetaFormats is the format that images have by default, and those that are made besides it.
type MetaFormats struct {
	Default metaFormat   `json:"default"`
	Extra   []metaFormat `json:"extra,omitempty"`
}

type metaFormat int

func (f metaFormat) format() erofs.Format { return erofs.Format(f) }
func (f metaFormat) String() string       { return f.format().String() }

// featureV1 says that there may be images of V0 or V1, which older programs cannot read.
const featureV1 = "v1_erofs"

const maxMeta = 1 << 20

func newMeta(c Config) Meta {
	m := Meta{Version: 1, Algorithm: c.Algorithm.Name(), algorithm: c.Algorithm}
	m.Features = Features{Compatible: []string{}, ReadOnlyCompatible: []string{}, Incompatible: []string{}}
	if c.Format != erofs.V2 {
		m.Features.ReadOnlyCompatible = append(m.Features.ReadOnlyCompatible, featureV1)
	}
	m.Formats.Default = metaFormat(c.Format)
	return m
}

// images returns the formats in which every image is made: the default, then the extra ones.
func (m MetaFormats) images() []erofs.Format {
	list := []erofs.Format{m.Default.format()}
	for _, f := range m.Extra {
		if !slices.Contains(list, f.format()) {
			list = append(list, f.format())
		}
	}
	return list
}

func (m Meta) equal(o Meta) bool {
	return m.Algorithm == o.Algorithm && m.Formats.Default == o.Formats.Default &&
		slices.Equal(m.Formats.Extra, o.Formats.Extra)
}

// unknown returns the features because of which the repository may only be read.
func (m Meta) unknown() string {
	var unknown []string
	for _, f := range m.Features.ReadOnlyCompatible {
		if f != featureV1 {
			unknown = append(unknown, f)
		}
	}
	return strings.Join(unknown, ", ")
}

func readMeta(dir *os.File) (Meta, error) {
	f, err := openBeneath(dir, "meta.json", unix.O_RDONLY)
	if err != nil {
		return Meta{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxMeta+1))
	if err == nil && len(b) > maxMeta {
		err = fmt.Errorf("larger than %d bytes", maxMeta)
	}
	if err != nil {
		return Meta{}, fmt.Errorf("meta.json: %w", err)
	}
	m, err := parseMeta(b)
	if err != nil {
		return Meta{}, fmt.Errorf("meta.json: %w", err)
	}
	return m, nil
}

func parseMeta(b []byte) (Meta, error) {
	// Images of a repository that does not say are V2: composefs-rs wrote no others then.
	m := Meta{Formats: MetaFormats{Default: metaFormat(erofs.V2)}}
	if err := json.Unmarshal(b, &m); err != nil {
		return m, err
	}
	if m.Version != 1 {
		return m, fmt.Errorf("version %d: want 1", m.Version)
	}
	if len(m.Features.Incompatible) > 0 {
		return m, fmt.Errorf("features that this program does not know: %s", strings.Join(m.Features.Incompatible, ", "))
	}
	for _, f := range append([]metaFormat{m.Formats.Default}, m.Formats.Extra...) {
		if f.format() < erofs.V0 || f.format() > erofs.V2 {
			return m, fmt.Errorf("image format %d: want 0, 1 or 2", f)
		}
	}
	var err error
	m.algorithm, err = fsverity.ParseAlgorithm(m.Algorithm)
	return m, err
}

// writeMeta writes meta.json. That it has fs-verity enabled is the sign that all objects must have it.
func writeMeta(dir *os.File, m Meta, c Config) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	t, err := newTemp(dir, dir)
	if err != nil {
		return err
	}
	defer t.discard()
	if _, err := t.Write(append(b, '\n')); err != nil {
		return err
	}
	if err := unix.Fsync(t.fd); err != nil {
		return os.NewSyscallError("fsync", err)
	}
	err = t.seal(c.Algorithm, dir)
	if errors.Is(err, fsverity.ErrNotSupported) {
		if !c.Insecure {
			return fmt.Errorf("%w: use a file system with fs-verity (ext4: tune2fs -O verity, btrfs), "+
				"or make the repository with --insecure", err)
		}
		err = nil
	}
	if err != nil {
		return err
	}
	if err := t.link(int(dir.Fd()), "meta.json"); err != nil {
		return err
	}
	return dir.Sync()
}
