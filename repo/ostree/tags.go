package ostree

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
)

const refDir = "ostree" // below streams/refs

// Slashes would be directories; a name is one file.
var (
	encoder = strings.NewReplacer("%", "%25", "/", "%2F")
	decoder = strings.NewReplacer("%25", "%", "%2F", "/")
)

// TagRef is the ref of a name of a commit, below streams/refs.
func TagRef(name string) string { return refDir + "/" + encoder.Replace(name) }

// Tags returns the names of commits, sorted. What they lead to is kept.
func Tags(r *repo.Repo) ([]Ref, error) {
	refs, err := r.StreamRefs(refDir)
	if err != nil {
		return nil, err
	}
	var tags []Ref
	for _, ref := range refs {
		digits, ok := strings.CutPrefix(ref.Target, commitStream)
		if c, err := ParseChecksum(digits); ok && err == nil {
			tags = append(tags, Ref{decoder.Replace(ref.Name), c})
		}
	}
	slices.SortFunc(tags, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	return tags, nil
}

// CheckTag tells why a commit cannot have this name.
func CheckTag(name string) error {
	switch {
	case name == "":
		return errors.New("a commit cannot have an empty name")
	case IsChecksum(name):
		return fmt.Errorf("a commit cannot have the name %s: it is the checksum of a commit", name)
	}
	return nil
}

// Resolve returns the commit that a name leads to: a name it was given, its checksum, or the first digits of that if they are those of one
// commit alone. The error is repo.ErrNotFound if there is none.
func Resolve(r *repo.Repo, name string) (Checksum, error) {
	if IsChecksum(name) {
		c, err := ParseChecksum(name)
		if err == nil {
			_, err = r.StreamObject(commitStream + name)
		}
		if errors.Is(err, repo.ErrNotFound) {
			err = fmt.Errorf("commit %s: %w (ostree images lists what is there)", name, repo.ErrNotFound)
		}
		return c, err
	}
	tags, err := Tags(r)
	if err != nil {
		return Checksum{}, err
	}
	for _, t := range tags {
		if t.Name == name {
			return t.Commit, nil
		}
	}
	var found []Checksum
	if isHex(name) {
		all, err := Commits(r)
		if err != nil {
			return Checksum{}, err
		}
		for _, c := range all {
			if strings.HasPrefix(c.String(), name) {
				found = append(found, c)
			}
		}
	}
	switch len(found) {
	case 0:
		return Checksum{}, fmt.Errorf("commit %q: %w (ostree images lists what is there)", name, repo.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return Checksum{}, fmt.Errorf("commit %q: it is %v or %v or another one: say more digits", name, found[0], found[1])
}

// Commits returns all commits, whether they have names or not, sorted.
func Commits(r *repo.Repo) ([]Checksum, error) {
	names, err := r.Streams()
	if err != nil {
		return nil, err
	}
	var list []Checksum
	for _, name := range names {
		if digits, ok := strings.CutPrefix(name, commitStream); ok {
			if c, err := ParseChecksum(digits); err == nil {
				list = append(list, c)
			}
		}
	}
	return list, nil
}

// SetTag gives a commit a name, in place of the commit that had it.
func SetTag(ctx context.Context, r *repo.Repo, c Checksum, name string, l repo.LockOptions) error {
	if err := CheckTag(name); err != nil {
		return err
	}
	i, err := r.Begin(ctx, l)
	if err != nil {
		return err
	}
	defer i.Abort()
	d, err := r.StreamObject(commitStream + c.String())
	if err != nil {
		return err
	}
	if err := i.NameStream(commitStream+c.String(), d, TagRef(name)); err != nil {
		return err
	}
	return i.Commit()
}

// Untag takes a name away. The commit is garbage if it has no other.
func Untag(ctx context.Context, r *repo.Repo, name string, l repo.LockOptions) error {
	if err := CheckTag(name); err != nil {
		return err
	}
	if err := r.RemoveStreamRef(ctx, TagRef(name), l); err != nil {
		return fmt.Errorf("ref %q: %w", name, err)
	}
	return nil
}

// Remove takes all names of a commit away, and returns them.
func Remove(ctx context.Context, r *repo.Repo, c Checksum, l repo.LockOptions) ([]string, error) {
	names, err := namesOf(r, c)
	if err != nil {
		return nil, err
	}
	for k, name := range names {
		if err := Untag(ctx, r, name, l); err != nil {
			return names[:k], err
		}
	}
	return names, nil
}

func namesOf(r *repo.Repo, c Checksum) (names []string, err error) {
	tags, err := Tags(r)
	for _, t := range tags {
		if t.Commit == c {
			names = append(names, t.Name)
		}
	}
	return names, err
}

// Freed is what garbage collection removes besides, when names have been taken away. Bytes are those of the objects.
type Freed struct {
	Tags    []string `json:"tags"`
	Objects int      `json:"objects"`
	Bytes   int64    `json:"objects_bytes"`
	Images  int      `json:"images"`
	Streams int      `json:"streams"`
}

// UntagFrees returns what would be free without these names.
func UntagFrees(ctx context.Context, r *repo.Repo, names []string, l repo.LockOptions) (Freed, error) {
	o := repo.GCOptions{DryRun: true, Lock: l}
	before, err := r.GC(ctx, o)
	if err != nil {
		return Freed{}, err
	}
	for _, name := range names {
		o.Without = append(o.Without, "streams/refs/"+TagRef(name))
	}
	after, err := r.GC(ctx, o)
	return Freed{names, after.Objects - before.Objects, after.Bytes - before.Bytes, len(after.Images) - len(before.Images),
		len(after.Streams) - len(before.Streams)}, err
}

// RemoveFrees returns what would be free without these commits, see Remove.
func RemoveFrees(ctx context.Context, r *repo.Repo, commits []Checksum, l repo.LockOptions) (Freed, error) {
	var all []string
	for _, c := range commits {
		names, err := namesOf(r, c)
		if err != nil {
			return Freed{}, err
		}
		all = append(all, names...)
	}
	return UntagFrees(ctx, r, all, l)
}

// Entry is a commit of a history.
type Entry struct {
	Checksum Checksum
	*Commit
}

// History returns a commit and those before it, as far as they are in the repository, the newest first. More tells that there is another
// one before them, which is not here.
func (s *Stored) History(r *repo.Repo) (list []Entry, more bool, err error) {
	for {
		c, err := s.Commit(r)
		if err != nil {
			return list, false, err
		}
		list = append(list, Entry{s.Checksum, c})
		if c.Parent.IsZero() {
			return list, false, nil
		}
		next, err := open(r, c.Parent)
		if errors.Is(err, repo.ErrNotFound) && s.parent == c.Parent {
			next, err = openStream(r, c.Parent, s.before)
		}
		if errors.Is(err, repo.ErrNotFound) {
			return list, true, nil
		}
		if err != nil {
			return list, false, fmt.Errorf("commit %v: %w", c.Parent, err)
		}
		s = next
	}
}
