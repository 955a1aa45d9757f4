package initrd

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/u-root/pkg/cpio"
)

// Compression is how the archive is compressed.
type Compression string

// The compressions. The kernel must have the one that is used: CONFIG_RD_ZSTD, CONFIG_RD_GZIP.
const (
	Zstd Compression = "zstd" // what "" means
	Gzip Compression = "gzip"
	None Compression = "none"
)

// ParseCompression reads the name of a compression.
func ParseCompression(name string) (Compression, error) {
	switch c := Compression(name); c {
	case Zstd, Gzip, None:
		return c, nil
	}
	return "", fmt.Errorf("compression %q: want zstd, gzip or none", name)
}

// Types of files, as in stat(2).
const (
	typeFile = cpio.S_IFREG
	typeDir  = cpio.S_IFDIR
	typeLink = cpio.S_IFLNK
	typeChar = cpio.S_IFCHR
)

// Write writes the initramfs.
func (p *Plan) Write(w io.Writer) error {
	if len(p.Early) > 0 {
		if err := writeArchive(w, p.Early, p.time); err != nil {
			return err
		}
	}
	var c io.WriteCloser
	var err error
	switch p.compression {
	case None:
		return writeArchive(w, p.Files, p.time)
	case Gzip:
		c, err = gzip.NewWriterLevel(w, gzip.BestCompression)
	default:
		// Several threads would be faster, and might cut the data elsewhere.
		c, err = zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1),
			zstd.WithWindowSize(8<<20))
	}
	if err != nil {
		return err
	}
	if err := writeArchive(c, p.Files, p.time); err != nil {
		return err
	}
	return c.Close()
}

// alignment is that of the data of files in the microcode's archive: processors want 16 bytes.
const alignment = 16

// headerSize is the size of a newc header without the name.
const headerSize = 110

// writeArchive writes a newc archive, padded to a multiple of 512 bytes.
func writeArchive(out io.Writer, files []File, when time.Time) error {
	var mtime uint64
	if !when.IsZero() {
		seconds := when.Unix()
		if seconds < 0 || seconds > 1<<32-1 {
			return fmt.Errorf("initramfs: time %s: cpio holds 32 bits: choose one from 1970 to 2106", when.UTC().Format(time.RFC3339))
		}
		mtime = uint64(seconds)
	}
	n := &counter{w: out}
	w := cpio.Newc.Writer(n)
	for k, f := range files {
		info := cpio.Info{Name: f.Path, Ino: uint64(k + 1), Mode: uint64(f.Mode), NLink: 1, MTime: mtime,
			Rmajor: uint64(f.Major), Rminor: uint64(f.Minor)}
		switch f.Mode & cpio.S_IFMT {
		case typeDir:
			info.NLink = 2
		case typeFile:
			if strings.HasPrefix(f.Path, microcodeDir) {
				// NULs after the name move the data; who compares names stops at the first one.
				data := (n.n + 3) / 4 * 4
				data += headerSize + int64(len(f.Path)) + 1
				info.Name += strings.Repeat("\x00", int((alignment-data%alignment)%alignment))
			}
		}
		if err := w.WriteRecord(cpio.StaticRecord(f.Data, info)); err != nil {
			return err
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return err
	}
	_, err := n.Write(make([]byte, (512-n.n%512)%512))
	return err
}

// counter counts the bytes that are written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}
