package ostree

import (
	"context"
	"fmt"
	"io"
)

// Source is where objects come from: a repository on this machine ([Local]), or a web server. It may be used from several goroutines.
// Nothing of what it gives is believed: the caller checks every object against its checksum. Retries and mirrors are the source's
// own business; an error that it returns ends the pull.
type Source interface {
	// Ref returns the commit that a ref leads to. The error is ErrNotFound if there is none.
	Ref(ctx context.Context, name string) (Checksum, error)
	// Metadata returns a commit, dirtree, dirmeta or detached metadata as it is, at most MaxMetadata bytes. The error is ErrNotFound
	// if there is none.
	Metadata(ctx context.Context, n ObjectName) ([]byte, error)
	// File opens a content object. The error is ErrNotFound if there is none.
	File(ctx context.Context, c Checksum) (*File, error)
}

// File is an open content object of a source: its header, and its content behind that.
type File struct {
	FileHeader
	// Content reads the content; nothing for a symbolic link.
	Content io.ReadCloser
	// Deflated says that Content is compressed with raw deflate. Who reads it inflates it, and takes no more than Size bytes.
	Deflated bool
}

// OpenFilez makes a File of the content object of an archive, a .filez: what a web server hands out. It reads the header, and closes r
// if it cannot.
func OpenFilez(r io.ReadCloser) (*File, error) {
	h, err := ReadFilezHeader(r)
	if err != nil {
		r.Close()
		return nil, err
	}
	return &File{*h, r, !h.IsSymlink()}, nil
}

// resolve returns the commit that a name names: a ref, or a checksum.
func resolve(ctx context.Context, s Source, name string) (Checksum, error) {
	if IsChecksum(name) {
		return ParseChecksum(name)
	}
	c, err := s.Ref(ctx, name)
	if err != nil {
		return c, fmt.Errorf("ref %q: %w", name, err)
	}
	return c, nil
}
