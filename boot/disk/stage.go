package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// stagePerm are the permissions of a stage. debugfs gives them to what it copies.
const stagePerm = 0o644

// newStage opens a file without a name. The directory of the image comes first: there is room for what is large, and it
// may be on one file system with the repository, where a copy of an object costs nothing.
func newStage(image string) (*os.File, error) {
	f, err := os.CreateTemp(filepath.Dir(image), ".composefs-boot-*")
	if err != nil {
		if f, err = os.CreateTemp("", "composefs-boot-*"); err != nil {
			return nil, err
		}
	}
	return f, errors.Join(os.Remove(f.Name()), f.Chmod(stagePerm))
}

// stage makes to what debugfs copies into the image for a regular file: the content, and for a file with fs-verity what
// follows it there, see the package comment.
func stage(ctx context.Context, to *os.File, n *node) error {
	if err := to.Truncate(0); err != nil {
		return err
	}
	from, err := n.open()
	if err != nil {
		return err
	}
	defer from.Close()
	var copied io.Reader = io.TeeReader(from, io.NewOffsetWriter(to, 0))
	if f, ok := from.(*os.File); ok && unix.IoctlFileClone(int(to.Fd()), int(f.Fd())) == nil {
		copied = from
	}
	copied = &contextReader{ctx, io.LimitReader(copied, n.size+1)} // a file that grew must not fill the disk
	if n.verity == 0 {
		size, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, copied, make([]byte, 256<<10))
		if err == nil && size != n.size {
			err = fmt.Errorf("has another size than the planned %d bytes: it changed meanwhile", n.size)
		}
		return err
	}
	at := roundUp(n.size, verityAlign)
	m, err := fsverity.WriteTree(n.verity, copied, n.size, io.NewOffsetWriter(to, at))
	if err != nil {
		return err
	}
	if !n.digest.IsZero() && m.Digest != n.digest {
		return fmt.Errorf("damaged object: its content has the digest %v: delete it and import again", m.Digest)
	}
	_, err = to.WriteAt(verityTail(m.Descriptor), at+fsverity.TreeSize(n.verity, n.size))
	return err
}

// contextReader ends with the context's error once it is cancelled.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
