package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// LayoutTarget is a layout that images are added to; see Layout. Other images in it stay as they are. Every blob is durable before
// index.json, which is replaced at once, names it: a push that is killed leaves blobs that nobody needs yet, and temporary files, which
// the next one removes.
type LayoutTarget struct {
	root *os.Root
	lock *os.File
	name string
	tag  string
}

// temporary is how the names of files begin that are not complete.
const temporary = ".composefs-boot-"

// CreateLayout opens a layout to add an image with a tag, or without one if that is "". A directory that is not there is made; one
// with other things in it is refused. Nobody else may push to it meanwhile.
func CreateLayout(dir, tag string) (*LayoutTarget, error) {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	l := &LayoutTarget{root: root, name: dir, tag: tag}
	if err := l.prepare(); err != nil {
		l.Close()
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return l, nil
}

func (l *LayoutTarget) prepare() error {
	var err error
	if l.lock, err = l.root.Open("."); err != nil {
		return err
	}
	switch err := unix.Flock(int(l.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case err == unix.EWOULDBLOCK:
		return errors.New("another program has locked the layout: try again when it is done")
	case err != nil && err != unix.ENOTSUP:
		return os.NewSyscallError("flock", err)
	}
	entries, err := l.lock.ReadDir(-1)
	if err != nil {
		return err
	}
	known, foreign := false, false
	var stale []string
	for _, e := range entries {
		switch {
		case e.Name() == "oci-layout":
			known = true
		case strings.HasPrefix(e.Name(), temporary):
			stale = append(stale, e.Name())
		default:
			foreign = true
		}
	}
	if foreign && !known {
		return errors.New("neither empty nor an OCI layout: there is no file oci-layout")
	}
	for _, name := range stale {
		if err := l.root.Remove(name); err != nil {
			return err
		}
	}
	if known {
		return nil
	}
	return l.write("oci-layout", strings.NewReader(`{"imageLayoutVersion":"1.0.0"}`))
}

// Close closes the directory.
func (l *LayoutTarget) Close() error {
	if l.lock != nil {
		l.lock.Close()
	}
	return l.root.Close()
}

// Has reports whether a blob is there and has its digest: a name alone proves nothing after a power cut. See Target.
func (l *LayoutTarget) Has(_ context.Context, d Descriptor) (bool, error) {
	f, err := l.root.OpenFile(blobPath(d.Digest), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", l.name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() != d.Size {
		return false, err
	}
	h := d.Digest.newHash()
	if _, err := io.Copy(h, f); err != nil {
		return false, fmt.Errorf("%s: %w", l.name, err)
	}
	return d.Digest.check(h) == nil, nil
}

// PutBlob stores a blob, durable, see Target.
func (l *LayoutTarget) PutBlob(_ context.Context, d Descriptor, content io.Reader) error {
	return l.write(blobPath(d.Digest), content)
}

// PutManifest stores a manifest and names it in index.json, see Target. The tag is taken from the image that had it.
func (l *LayoutTarget) PutManifest(ctx context.Context, d Descriptor, content []byte, as Known) error {
	if err := l.write(blobPath(d.Digest), bytes.NewReader(content)); err != nil || as == KnownByIndex {
		return err
	}
	index, manifests, err := l.readIndex()
	if err != nil {
		return fmt.Errorf("%s/index.json: %w", l.name, err)
	}
	tag := ""
	if as == KnownByName && l.tag != "" {
		tag = l.tag
		d.Annotations = map[string]string{refName: tag}
	}
	manifests = slices.DeleteFunc(manifests, func(m json.RawMessage) bool {
		var have Descriptor
		if json.Unmarshal(m, &have) != nil {
			return false
		}
		name := have.Annotations[refName]
		return tag != "" && name == tag || name == "" && tag == "" && have.Digest == d.Digest
	})
	entry, err := json.Marshal(d)
	if err != nil {
		return err
	}
	if index["manifests"], err = json.Marshal(append(manifests, entry)); err != nil {
		return err
	}
	text, err := json.Marshal(index)
	if err != nil {
		return err
	}
	return l.write("index.json", bytes.NewReader(text))
}

// readIndex reads index.json so that it can be written again with all that others have put there.
func (l *LayoutTarget) readIndex() (map[string]json.RawMessage, []json.RawMessage, error) {
	index := map[string]json.RawMessage{"schemaVersion": json.RawMessage("2"), "mediaType": json.RawMessage(`"` + typeOCIIndex + `"`)}
	f, err := l.root.OpenFile("index.json", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return index, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	text, err := readJSON(f)
	if err != nil {
		return nil, nil, err
	}
	var manifests []json.RawMessage
	if err = unmarshal(text, &index); err == nil && index["manifests"] != nil {
		err = json.Unmarshal(index["manifests"], &manifests)
	}
	return index, manifests, err
}

// write makes a file under a temporary name and gives it its own when it is complete and durable.
func (l *LayoutTarget) write(name string, content io.Reader) error {
	dir := path.Dir(name)
	if err := l.root.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	temp := temporary + path.Base(name)
	f, err := l.root.Create(temp)
	if err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	_, err = io.Copy(f, content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = l.root.Rename(temp, name)
	}
	if err != nil {
		l.root.Remove(temp)
		return fmt.Errorf("%s/%s: %w", l.name, name, err)
	}
	// The directories that are new have names as well: blobs, and the algorithm in it.
	for ; ; dir = path.Dir(dir) {
		if err := l.sync(dir); err != nil {
			return fmt.Errorf("%s/%s: %w", l.name, dir, err)
		}
		if dir == "." {
			return nil
		}
	}
}

func (l *LayoutTarget) sync(dir string) error {
	f, err := l.root.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
