package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/diskfs/go-diskfs/filesystem/fat32"
)

// pieceSize is how much is written to a file on the ESP at once. go-diskfs writes both FATs and the directory for every
// piece, so small ones cost more than the data.
const pieceSize = 4 << 20

func (p *Plan) writeESP(ctx context.Context, out *os.File, done func(int64)) error {
	part := &region{f: out, off: p.ESP.Offset, size: p.fat.size}
	esp := p.layout.ESP
	fs, err := fat32.Create(part, p.fat.size, 0, sectorSize, esp.Label, true)
	if err != nil {
		return err
	}
	buf := make([]byte, pieceSize)
	for _, f := range sortedFiles(esp.Files) {
		if err := writeESPFile(ctx, fs, f, buf, done); err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
	}
	return p.finishFAT(part)
}

func writeESPFile(ctx context.Context, fs *fat32.FileSystem, f File, buf []byte, done func(int64)) error {
	dir := f.Path[:max(0, strings.LastIndexByte(f.Path, '/'))]
	if dir != "" {
		if err := fs.Mkdir("/" + dir); err != nil {
			return err
		}
	}
	if strings.HasSuffix(f.Path, "/") {
		return nil
	}
	r, err := f.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := fs.OpenFile("/"+f.Path, os.O_CREATE|os.O_RDWR)
	if err != nil {
		return err
	}
	defer w.Close()
	// The size was planned: a file that grew must not take the space of others.
	limited, size := io.LimitReader(r, f.Size+1), int64(0)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(limited, buf)
		if err != nil && err != io.EOF && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		if size += int64(n); size > f.Size {
			return fmt.Errorf("has more than the planned %d bytes: it changed meanwhile", f.Size)
		}
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			done(int64(n))
		}
		if err != nil {
			break
		}
	}
	if size != f.Size {
		return fmt.Errorf("has %d instead of the planned %d bytes: it changed meanwhile", size, f.Size)
	}
	return nil
}
