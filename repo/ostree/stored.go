package ostree

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// commitStream is the name of a commit's stream, before the checksum.
const commitStream = "ostree-commit-"

// Named references of a commit's stream.
const (
	imageKey      = "composefs.image"
	bootPart      = ".boot"
	parentKey     = "parent:"
	commitMetaKey = "commitmeta" // detached metadata, an object
)

// Stored is a commit of the repository.
type Stored struct {
	Checksum Checksum
	Linked   []LinkedImage // sorted by format, the plain ones first

	stream   fsverity.Digest
	image    fsverity.Digest // composefs.image; zero: none
	detached fsverity.Digest // zero: none
	parent   Checksum        // that is kept with this one; zero: none
	before   fsverity.Digest // its stream
}

// LinkedImage is a composefs image that was made of a commit.
type LinkedImage struct {
	Digest   fsverity.Digest
	Bootable bool
	Format   erofs.Format // V1 stands for V0, too
}

func (l LinkedImage) key() string {
	key := imageKey
	if l.Bootable {
		key += bootPart
	}
	if l.Format == erofs.V2 {
		return key + ".v2"
	}
	return key + ".v1"
}

// parseKey reads a named reference. It is false for one that leads to something else, composefs.image alone included.
func parseKey(key string, d fsverity.Digest) (LinkedImage, bool) {
	for _, l := range []LinkedImage{{d, false, erofs.V1}, {d, false, erofs.V2}, {d, true, erofs.V1}, {d, true, erofs.V2}} {
		if l.key() == key {
			return l, true
		}
	}
	return LinkedImage{}, false
}

// Find returns the composefs image of a kind.
func (s *Stored) Find(bootable bool, f erofs.Format) (fsverity.Digest, bool) {
	want := LinkedImage{Bootable: bootable, Format: f}.key()
	for _, l := range s.Linked {
		if l.key() == want {
			return l.Digest, true
		}
	}
	return fsverity.Digest{}, false
}

// Image returns the plain image in the format that the repository had when the commit came, which composefs-rs knows, too. It is false if
// there is none.
func (s *Stored) Image() (fsverity.Digest, bool) { return s.image, !s.image.IsZero() }

// Stream returns the digest of the stream that keeps the commit.
func (s *Stored) Stream() fsverity.Digest { return s.stream }

// link adds a composefs image, or replaces the one of its kind.
func (s *Stored) link(l LinkedImage) {
	s.Linked = slices.DeleteFunc(slices.Clone(s.Linked), func(have LinkedImage) bool { return have.key() == l.key() })
	s.Linked = append(s.Linked, l)
	slices.SortFunc(s.Linked, func(a, b LinkedImage) int {
		if a.Bootable != b.Bootable {
			return map[bool]int{true: 1, false: -1}[a.Bootable]
		}
		return strings.Compare(a.key(), b.key())
	})
}

// Open opens a commit: by a ref, by its checksum, or by the first digits of that.
func Open(r *repo.Repo, name string) (*Stored, error) {
	c, err := Resolve(r, name)
	if err != nil {
		return nil, err
	}
	s, err := open(r, c)
	if err != nil {
		return nil, fmt.Errorf("commit %v: %w", c, err)
	}
	return s, nil
}

func open(r *repo.Repo, c Checksum) (*Stored, error) {
	d, err := r.StreamObject(commitStream + c.String())
	if err != nil {
		return nil, err
	}
	return openStream(r, c, d)
}

func openStream(r *repo.Repo, c Checksum, d fsverity.Digest) (*Stored, error) {
	in, err := r.OpenStream(d, CommitContent)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	s := &Stored{Checksum: c, stream: d}
	for _, ref := range in.Named {
		l, ok := parseKey(ref.Name, ref.Stream)
		parent, isParent := strings.CutPrefix(ref.Name, parentKey)
		switch {
		case ok:
			s.link(l)
		case ref.Name == imageKey:
			s.image = ref.Stream
		case ref.Name == commitMetaKey:
			s.detached = ref.Stream
		case isParent:
			if s.parent, err = ParseChecksum(parent); err != nil {
				return nil, fmt.Errorf("named reference %.100q: %w", ref.Name, err)
			}
			s.before = ref.Stream
		}
	}
	return s, nil
}

// Objects reads the objects of the commit.
func (s *Stored) Objects(r *repo.Repo) (*Objects, error) {
	in, err := r.OpenStream(s.stream, CommitContent)
	if err != nil {
		return nil, fmt.Errorf("commit %v: %w", s.Checksum, err)
	}
	defer in.Close()
	o, err := readObjects(in.Reader, r.Algorithm(), false)
	if err == nil && o.Commit != s.Checksum {
		err = fmt.Errorf("the stream is that of commit %v", o.Commit)
	}
	if err != nil {
		return nil, fmt.Errorf("commit %v: %w", s.Checksum, err)
	}
	return o, nil
}

// readObjects reads a stream.
func readObjects(s *splitstream.Reader, a fsverity.Algorithm, partial bool) (*Objects, error) {
	if s.Size > maxStream {
		return nil, fmt.Errorf("commit stream of %d bytes: at most %d are read", s.Size, maxStream)
	}
	c, err := s.Content()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var b bytes.Buffer
	b.Grow(int(min(s.Size, 4<<20)) + bytes.MinRead)
	if _, err := b.ReadFrom(io.LimitReader(c, int64(s.Size)+1)); err != nil {
		if errors.Is(err, splitstream.ErrObject) {
			err = errors.New("commit stream: an object where bytes are expected")
		}
		return nil, err
	}
	return decode(b.Bytes(), a, s.Objects, partial)
}

// Commit reads the commit object.
func (s *Stored) Commit(r *repo.Repo) (*Commit, error) {
	o, err := s.Objects(r)
	if err != nil {
		return nil, err
	}
	c, err := o.commit()
	if err != nil {
		return nil, fmt.Errorf("commit %v: %w", s.Checksum, err)
	}
	return c, nil
}

// Detached returns the detached metadata of the commit, an a{sv} with its signatures for example; nil if there is none.
func (s *Stored) Detached(r *repo.Repo) ([]byte, error) {
	if s.detached.IsZero() {
		return nil, nil
	}
	f, err := r.OpenVerified(s.detached)
	if err != nil {
		return nil, fmt.Errorf("detached metadata of commit %v: %w", s.Checksum, err)
	}
	defer f.Close()
	return readAll(f, MaxMetadata)
}

// put stores the stream of a commit, which has no name yet.
func (s *Stored) put(i *repo.Import, o *Objects) error {
	w := splitstream.NewWriter(i.Algorithm(), CommitContent)
	b, err := o.encode(w.Refer)
	if err != nil {
		return err
	}
	w.Write(b)
	refs := map[string]fsverity.Digest{imageKey: s.image, commitMetaKey: s.detached}
	if !s.parent.IsZero() {
		refs[parentKey+s.parent.String()] = s.before
	}
	for _, l := range s.Linked {
		refs[l.key()] = l.Digest
	}
	for _, name := range slices.Sorted(maps.Keys(refs)) { // the order of the references is part of the stream
		if refs[name].IsZero() {
			continue
		}
		if err := w.Name(name, refs[name]); err != nil {
			return err
		}
	}
	s.stream, _, err = i.PutStream(w)
	return err
}

// Files opens the contents of a tree that Objects.Tree has made.
func Files(r *repo.Repo) fstree.Open {
	return func(name string, inode *fstree.Inode) (io.ReadCloser, error) {
		switch c := inode.Content.(type) {
		case fstree.Inline:
			return io.NopCloser(bytes.NewReader(c)), nil
		case *fstree.Object:
			return r.OpenVerified(c.Digest)
		}
		return nil, fmt.Errorf("%s: not a regular file", name)
	}
}
