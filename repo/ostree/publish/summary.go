package publish

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/delta"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// Summarize makes the summary of the repository as it is: its own refs, or those of its collection; the refs of collections that it
// mirrors; static deltas.
func (r *Repository) Summarize(ctx context.Context, now time.Time) (*summary.Summary, error) {
	s := &summary.Summary{LastModified: now, Mode: string(r.Mode), Collection: r.Collection(), IndexedDeltas: true}
	var err error
	if s.Tombstones, err = r.Config.Bool("core", "tombstone-commits", false); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if s.Refs, err = r.refs(ctx, "refs/heads"); err != nil {
		return nil, err
	}
	mirrors, err := fs.ReadDir(r.root.FS(), "refs/mirrors")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, m := range mirrors {
		if !m.IsDir() || m.Name() == s.Collection {
			continue
		}
		refs, err := r.refs(ctx, "refs/mirrors/"+m.Name())
		if err != nil {
			return nil, err
		}
		if len(refs) > 0 {
			if s.Collections == nil {
				s.Collections = map[string][]summary.Ref{}
			}
			s.Collections[m.Name()] = refs
		}
	}
	hidden, err := r.Config.Bool("core", "no-deltas-in-summary", false)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if !hidden {
		if s.Deltas, err = r.deltas(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// refs returns the refs below a directory, sorted by name.
func (r *Repository) refs(ctx context.Context, top string) (list []summary.Ref, err error) {
	err = fs.WalkDir(r.root.FS(), top, func(file string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && file == top {
			return fs.SkipDir
		}
		if err != nil || e.IsDir() || strings.HasPrefix(e.Name(), ".") {
			return err
		}
		name := strings.TrimPrefix(file, top+"/")
		if err := summary.CheckRef(name); err != nil {
			return err
		}
		text, err := r.root.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // an alias that leads nowhere
		}
		var sum ostree.Checksum
		if err == nil {
			sum, err = ostree.ParseChecksum(strings.TrimSpace(string(text)))
		}
		var one summary.Ref
		if err == nil {
			one, err = r.describe(ctx, name, sum)
		}
		if err != nil {
			return fmt.Errorf("ref %q: %w", name, err)
		}
		list = append(list, one)
		return nil
	})
	slices.SortFunc(list, func(a, b summary.Ref) int { return strings.Compare(a.Name, b.Name) })
	return list, err
}

func (r *Repository) describe(ctx context.Context, name string, sum ostree.Checksum) (one summary.Ref, err error) {
	n := ostree.ObjectName{Checksum: sum, Kind: ostree.KindCommit}
	data, err := r.Metadata(ctx, n)
	if err == nil {
		err = n.Verify(data)
	}
	if err != nil {
		return one, err
	}
	c, err := ostree.ParseCommit(data)
	if err != nil {
		return one, err
	}
	return summary.Ref{Name: name, Commit: sum, Size: uint64(len(data)), Timestamp: c.When(), Version: c.Text("version")}, nil
}

// deltas returns the static deltas of the repository, and the digests of their superblocks.
func (r *Repository) deltas() (delta.Digests, error) {
	list := delta.Digests{}
	files, err := fs.Glob(r.root.FS(), "deltas/*/*/superblock")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		name, err := delta.ParsePath(strings.TrimSuffix(file, "/superblock"))
		if err != nil {
			return nil, err
		}
		b, err := r.root.ReadFile(file)
		if err != nil {
			return nil, err
		}
		list[name] = sha256.Sum256(b)
	}
	return list, nil
}

// WriteSummary makes the summary and its signatures what readers find, and tells in delta-indexes/ of the static deltas that lead to each
// commit. Without signers, older signatures are removed: they are not of this summary.
func (r *Repository) WriteSummary(s *summary.Summary, signers ...sign.Signer) error {
	data, err := s.Encode()
	if err != nil {
		return err
	}
	indexes, err := r.indexes()
	if err != nil {
		return err
	}
	files := append(indexes, small{"summary", data})
	if len(signers) > 0 {
		signatures, err := sign.Add(nil, data, signers...)
		if err != nil {
			return fmt.Errorf("summary: %w", err)
		}
		files = append(files, small{"summary.sig", signatures})
	} else if err := r.root.Remove("summary.sig"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return r.replace(files...)
}

// indexes returns the indexes of static deltas, and removes those that are none any more.
func (r *Repository) indexes() (files []small, err error) {
	all, err := r.deltas()
	if err != nil {
		return nil, err
	}
	to := map[ostree.Checksum]delta.Digests{}
	for name, sum := range all {
		if to[name.To] == nil {
			to[name.To] = delta.Digests{}
		}
		to[name.To][name] = sum
	}
	wanted := map[string]bool{}
	for c, digests := range to {
		b, err := digests.Index()
		if err != nil {
			return nil, err
		}
		files = append(files, small{delta.IndexPath(c), b})
		wanted[delta.IndexPath(c)] = true
	}
	old, err := fs.Glob(r.root.FS(), "delta-indexes/*/*.index")
	if err != nil {
		return nil, err
	}
	for _, file := range old {
		if !wanted[file] {
			if err := r.root.Remove(file); err != nil {
				return nil, err
			}
		}
	}
	return files, nil
}
