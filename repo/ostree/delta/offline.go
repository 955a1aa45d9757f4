package delta

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// Offline is a delta on this machine. It is an [ostree.Source] that has a commit and nothing else: [ostree.Pull] brings the commit if it is
// given Prefetch, and the commit From as a base.
type Offline struct {
	*Delta
	dir  string
	file *os.File
}

// OpenOffline opens a superblock, or a directory that has one. Parts that are files of their own are beside it.
func OpenOffline(path string) (*Offline, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, "superblock")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	var d *Delta
	if err == nil {
		d, err = Open(f, info.Size())
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Offline{d, filepath.Dir(path), f}, nil
}

// Close closes the delta.
func (o *Offline) Close() error { return o.file.Close() }

// Part opens a part that is a file of its own.
func (o *Offline) Part(_ context.Context, i int) (io.ReadCloser, error) {
	return os.Open(filepath.Join(o.dir, strconv.Itoa(i)))
}

// Ref finds nothing: a delta knows its commit by the checksum.
func (o *Offline) Ref(context.Context, string) (ostree.Checksum, error) {
	return ostree.Checksum{}, ostree.ErrNotFound
}

// Metadata returns the commit, or its detached metadata.
func (o *Offline) Metadata(_ context.Context, n ostree.ObjectName) ([]byte, error) {
	switch {
	case n.Checksum == o.To && n.Kind == ostree.KindCommit:
		return o.Commit, nil
	case n.Checksum == o.To && n.Kind == ostree.KindCommitMeta && o.CommitMeta != nil:
		return o.CommitMeta, nil
	}
	return nil, fmt.Errorf("delta %s: object %v: %w", o.Name, n, ostree.ErrNotFound)
}

// File finds nothing: what Prefetch has not made is not in the delta.
func (o *Offline) File(_ context.Context, c ostree.Checksum) (*ostree.File, error) {
	return nil, fmt.Errorf("delta %s: object %v: %w", o.Name, fileName(c), ostree.ErrNotFound)
}

// Prefetch applies the delta. All objects that it leaves to be fetched must be there.
func (o *Offline) Prefetch(ctx context.Context, _ ostree.Checksum, in *ostree.Collector) error {
	for _, f := range o.Fallbacks {
		if !in.Has(f.Checksum) {
			return fmt.Errorf("delta %s: it lacks object %v, which is to be fetched by itself: pull the commit from a web server, or make the delta without fallbacks",
				o.Name, f.ObjectName)
		}
	}
	return o.Apply(ctx, in, o.Part)
}
