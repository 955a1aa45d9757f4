package oci

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// archive reads the files of a layer from its stream. Contents that are objects are not read.
type archive struct {
	content *splitstream.Content
	tar     tarReader
	objects objects
	sink    fstree.Sink // for files that are not in the layer as they will be: those with holes
	holes   int64       // bytes that may still come of them
}

// objects are where streams and the contents of files are: a repository, or an import that has put some of them.
type objects interface {
	OpenStream(d fsverity.Digest, contentType uint64) (*repo.Stream, error)
	OpenVerified(d fsverity.Digest) (*os.File, error)
}

func newArchive(s *splitstream.Reader, o objects, sink fstree.Sink, l Limits) (*archive, error) {
	c, err := s.Content()
	if err != nil {
		return nil, err
	}
	return &archive{content: c, tar: tarReader{r: c}, objects: o, sink: sink, holes: l.Layer}, nil
}

func (a *archive) close() { a.content.Close() }

// next returns the next file, io.EOF behind the last one.
func (a *archive) next() (*entry, error) {
	e, err := a.tar.next()
	if err != nil {
		return nil, err
	}
	inline := []byte(nil)
	var d fsverity.Digest
	isObject := false
	if e.size > 0 {
		if d, isObject, err = a.content.Object(); err == nil && !isObject {
			if e.size > maxExtended { // this program, and composefs-rs, keep nothing of that size in a stream
				return nil, fmt.Errorf("%s: %d bytes in the stream itself", e.path, e.size)
			}
			inline = make([]byte, e.size)
			_, err = io.ReadFull(a.content, inline)
		}
	}
	if err == nil {
		_, err = io.CopyN(io.Discard, a.content, e.padding())
	}
	a.tar.skip(e.size + e.padding())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.path, unexpected(err))
	}
	if e.isRegular() {
		if e.inode.Content, err = a.file(e, inline, d, isObject); err != nil {
			return nil, fmt.Errorf("%s: %w", e.path, err)
		}
	} else if isObject {
		return nil, fmt.Errorf("%s: it has a content, but is not a regular file", e.path)
	}
	return e, nil
}

// file returns the content of a regular file.
func (a *archive) file(e *entry, inline []byte, d fsverity.Digest, isObject bool) (fstree.Content, error) {
	if e.sparse != nil {
		return a.expand(e, inline, d, isObject)
	}
	switch {
	case !isObject && e.size <= fstree.MaxInline:
		return fstree.Inline(inline), nil
	case isObject && e.size > fstree.MaxInline:
		return &fstree.Object{Digest: d, Size: uint64(e.size)}, nil
	}
	return nil, fmt.Errorf("%d bytes, object: %v: the stream does not keep contents of more than %d bytes, and no others, as objects",
		e.size, isObject, fstree.MaxInline)
}

// expand makes the content of a file with holes.
func (a *archive) expand(e *entry, inline []byte, d fsverity.Digest, isObject bool) (fstree.Content, error) {
	if a.holes -= e.sparse.size; a.holes < 0 {
		return nil, fmt.Errorf("sparse file of %d bytes: %w", e.sparse.size, ErrTooLarge)
	}
	var data io.Reader = bytes.NewReader(inline)
	if isObject {
		f, err := a.objects.OpenVerified(d)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		data = io.LimitReader(f, e.size)
	}
	content, err := e.sparse.expand(data, e.size)
	if err != nil {
		return nil, err
	}
	if e.sparse.size <= fstree.MaxInline {
		b, err := io.ReadAll(content)
		if err == nil && int64(len(b)) != e.sparse.size {
			err = errors.New("its data end too early")
		}
		return fstree.Inline(b), err
	}
	o := &fstree.Object{Size: uint64(e.sparse.size)}
	o.Digest, err = a.sink.Put(content, e.sparse.size)
	return o, err
}
