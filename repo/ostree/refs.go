package ostree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Ref is a name of a commit.
type Ref struct {
	Name   string
	Commit Checksum
}

// checkRefName tells why a ref cannot be a path.
func checkRefName(name string) error {
	for part := range strings.SplitSeq(name, "/") {
		if err := fstree.CheckName(part); err != nil {
			return fmt.Errorf("ref %q: %w", name, err)
		}
	}
	return nil
}

// Ref returns the commit of a ref: NAME, REMOTE:NAME, COLLECTION:NAME, or a path below refs/. A ^ behind it is the commit before that
// one. If no such ref is the repository's own, it may be one that a single remote or collection has.
func (l *Local) Ref(ctx context.Context, name string) (Checksum, error) {
	if of, ok := strings.CutSuffix(name, "^"); ok {
		return l.parentOf(ctx, of)
	}
	remote, rest, far := strings.Cut(name, ":")
	if !far {
		rest = name
	} else if err := checkRefName(remote); err != nil {
		return Checksum{}, err
	}
	if err := checkRefName(rest); err != nil {
		return Checksum{}, err
	}
	candidates := []string{"heads/" + name, name, "remotes/" + name, "mirrors/" + name}
	if far {
		candidates = []string{"remotes/" + remote + "/" + rest, "mirrors/" + remote + "/" + rest}
	}
	for _, c := range candidates {
		if sum, err := l.readRef(c); !errors.Is(err, fs.ErrNotExist) {
			return sum, err
		}
	}
	var found []Ref
	if !far {
		refs, _ := l.Refs() // one that cannot be read does not matter
		for _, r := range refs {
			if _, rest, far := strings.Cut(r.Name, ":"); far && rest == name {
				found = append(found, r)
			}
		}
	}
	switch {
	case len(found) == 1:
		return found[0].Commit, nil
	case len(found) > 1:
		return Checksum{}, fmt.Errorf("%s: %s and %s: say which one", l.Path, found[0].Name, found[1].Name)
	case l.parent != nil:
		return l.parent.Ref(ctx, name)
	}
	return Checksum{}, fmt.Errorf("%w in %s (ostree list-refs lists what is there)", ErrNotFound, l.Path)
}

func (l *Local) parentOf(ctx context.Context, name string) (Checksum, error) {
	sum, err := resolve(ctx, l, name)
	if err != nil {
		return sum, err
	}
	n := ObjectName{sum, KindCommit}
	data, err := l.Metadata(ctx, n)
	if err == nil {
		err = n.Verify(data)
	}
	if err != nil {
		return sum, err
	}
	c, err := ParseCommit(data)
	if err == nil && c.Parent.IsZero() {
		err = fmt.Errorf("commit %v has no parent: %w", sum, ErrNotFound)
	}
	if err != nil {
		return sum, err
	}
	return c.Parent, nil
}

// readRef reads a file below refs/. It may be a symbolic link to another one: an alias. The error is fs.ErrNotExist if it is no file.
func (l *Local) readRef(name string) (Checksum, error) {
	file := "refs/" + name
	if info, err := l.root.Stat(file); err != nil {
		return Checksum{}, err
	} else if !info.Mode().IsRegular() || info.Size() > 1<<10 {
		return Checksum{}, fs.ErrNotExist
	}
	text, err := l.root.ReadFile(file)
	if err != nil {
		return Checksum{}, err
	}
	sum, err := ParseChecksum(strings.TrimSpace(string(text)))
	if err != nil {
		return sum, fmt.Errorf("%s: %s: %w", l.Path, file, err)
	}
	return sum, nil
}

// Refs returns all refs: NAME of the repository's own, REMOTE:NAME and COLLECTION:NAME of others. They are sorted by name. With an error
// come those that can be read.
func (l *Local) Refs() ([]Ref, error) {
	var refs []Ref
	var broken []error
	for _, kind := range []string{"heads", "remotes", "mirrors"} {
		top := "refs/" + kind
		err := fs.WalkDir(l.root.FS(), top, func(file string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) && file == top {
				return fs.SkipDir
			}
			if err != nil || e.IsDir() || strings.HasPrefix(path.Base(file), ".") {
				return err
			}
			sum, err := l.readRef(strings.TrimPrefix(file, "refs/"))
			if errors.Is(err, fs.ErrNotExist) {
				return nil // an alias that leads nowhere
			}
			if err != nil {
				broken = append(broken, err)
				return nil
			}
			name := strings.TrimPrefix(file, top+"/")
			if kind != "heads" {
				name = strings.Replace(name, "/", ":", 1)
			}
			refs = append(refs, Ref{name, sum})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(refs, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	return refs, errors.Join(broken...)
}
