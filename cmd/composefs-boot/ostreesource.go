package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

const commitPrefix = "ostree:"

const commitNames = `An OSTree commit is ostree:PATH:REF, in the repository in the directory PATH; REF is a ref, REMOTE:REF or the checksum of a commit.
Of a commit, /usr/etc becomes /etc, and all extended attributes are kept.`

// isCommit reports whether the name of a source is that of an OSTree commit.
func isCommit(name string) bool { return strings.HasPrefix(name, commitPrefix) }

// splitCommit takes the name of an OSTree commit apart. A path ends at the first colon, since refs may have one.
func splitCommit(name string) (path, ref string, err error) {
	path, ref, ok := strings.Cut(strings.TrimPrefix(name, commitPrefix), ":")
	if !ok || path == "" || ref == "" {
		return "", "", usageError{fmt.Errorf("%s: want ostree:PATH:REF, the directory of an OSTree repository and a ref or checksum", name)}
	}
	return path, ref, nil
}

// pullCommit pulls the commit that a source names. It gets the name of the ref, if it is to stay.
func (a *app) pullCommit(ctx context.Context, r *repo.Repo, name string, stay bool) (*ostree.Stored, error) {
	path, ref, err := splitCommit(name)
	if err != nil {
		return nil, err
	}
	source, err := ostree.OpenLocal(path)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	if !stay && !ostree.IsChecksum(ref) {
		c, err := source.Ref(ctx, ref)
		if err != nil {
			return nil, fmt.Errorf("ref %q: %w", ref, err)
		}
		ref = c.String()
	}
	list, err := a.bringCommits(ctx, r, source, path, []string{ref}, ostree.PullOptions{Lock: a.lock(), Progress: &ostree.Progress{}})
	if err != nil {
		return nil, err
	}
	return list[0].Stored, nil
}

// readCommit makes the tree of the commit.
func (s *treeSource) readCommit(t treeFlags) (*fstree.Tree, error) {
	o, err := s.commit.Objects(s.repo)
	if err != nil {
		return nil, err
	}
	tree, err := o.Tree(ostree.RightNames)
	if err == nil && !t.asIs {
		err = ostree.PlaceEtc(tree)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return tree, nil
}
