package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// sharedVar is the /var of all deployments of a machine, where bootc has it. Each deployment has a link to it.
const (
	sharedVar     = "state/os/default/var"
	sharedVarLink = "../../os/default/var"
)

// Carry is what a new deployment takes over from the one before it.
type Carry struct {
	from fsverity.Digest
	link string        // to /var
	etc  *fstree.Inode // the changes in /etc, a directory for overlayfs, or if the plan has an Etc, all of it; nil: none
	open map[*fstree.Inode]func() (io.ReadCloser, error)
}

// PlanCarry has the new deployment go on with the machine's state: /var is the same one from now on, for both, and /etc gets
// the changes that were made to that of the other deployment, as whole files: those that overlayfs keeps, or the differences to the /etc of
// its image in the repository, where the state has all of it. Both deployments must have it in the same way. What is changed in /etc after
// that stays with the other deployment.
func (p *Plan) PlanCarry(ctx context.Context, dir string, from fsverity.Digest, r *repo.Repo) error {
	c := &Carry{from: from, link: sharedVarLink, open: map[*fstree.Inode]func() (io.ReadCloser, error){}}
	if link, err := os.Readlink(filepath.Join(dir, statePath(from), "var")); err == nil {
		c.link = link // it is shared already, perhaps under another name than "default"
	}
	etc := filepath.Join(dir, statePath(from), "etc")
	entries, err := os.ReadDir(etc)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	changes := filepath.Join(etc, "upper")
	_, err = os.Stat(changes)
	whole := errors.Is(err, fs.ErrNotExist)
	switch {
	case whole && len(entries) == 0:
		p.Carry = c
		return nil
	case whole && p.Etc == nil:
		return fmt.Errorf("%s: it is all of /etc, not the changes to it, and the new system does not say that it has it so: "+
			"set mount = \"bind\" for etc in its setup-root-conf.toml", etc)
	case whole:
		changes = etc
	case p.Etc != nil:
		return fmt.Errorf("%s: it is the changes to /etc, and the new system wants all of it: "+
			"set mount = \"overlay\" for etc in its setup-root-conf.toml", etc)
	}
	t, err := scan.Dir(ctx, changes, scan.Digests(p.Digest.Algorithm()), scan.Options{Xattrs: fstree.XattrsAll})
	if err != nil {
		return fmt.Errorf("%s: %w", changes, err)
	}
	open := scan.Files(changes)
	err = t.Walk(func(name string, i *fstree.Inode) error {
		if !whole {
			i.Xattrs = carriedXattrs(i.Xattrs)
		}
		if _, ok := i.Content.(*fstree.Object); ok {
			c.open[i] = func() (io.ReadCloser, error) { return open(name, i) }
		}
		return nil
	})
	if err != nil {
		return err
	}
	if whole {
		old, _, err := r.ReadImage(from.String())
		if err != nil {
			return fmt.Errorf("what has been changed in %s is not known: %w", etc, err)
		}
		t.Root = mergeEtc(old.Lookup("etc"), t.Root, p.Etc)
	}
	// So that systemd sees that /usr is another one, and brings /etc up to date: ConditionNeedsUpdate=.
	t.Root.Dir().Remove(".updated")
	c.etc = t.Root
	p.Carry = c
	return nil
}

// carriedXattrs are those of a file in the upper directory of an overlay that hold over another lower directory, too. Where the
// lower file was that a file is a copy of, does not.
func carriedXattrs(list []fstree.Xattr) (kept []fstree.Xattr) {
	for _, x := range list {
		name, ours := strings.CutPrefix(x.Name, "trusted.overlay.")
		if !ours || name == "opaque" || name == "whiteout" {
			kept = append(kept, x)
		}
	}
	return kept
}

// opener opens what is carried, and leaves the rest to another one.
func (c *Carry) opener(other fstree.Open) fstree.Open {
	return func(name string, i *fstree.Inode) (io.ReadCloser, error) {
		if open := c.open[i]; open != nil {
			return open()
		}
		return other(name, i)
	}
}

// shareVar puts the /var of a deployment where all deployments have it. Link and directory are exchanged: whenever the power fails,
// the deployment has its /var. It is not copied, and a running system goes on with it.
func (c *Carry) shareVar(root *os.Root) error {
	own := path.Join(statePath(c.from), "var")
	info, err := root.Lstat(own)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = root.MkdirAll(own, 0o755)
	case err == nil && info.Mode().Type() == fs.ModeSymlink:
		return nil
	}
	if err != nil {
		return err
	}
	if info, err := root.Lstat(sharedVar); err == nil && info.Mode().Type() != fs.ModeSymlink {
		return fmt.Errorf("%s: there is a /var already which the booted system does not use: move it away", path.Join(root.Name(), sharedVar))
	}
	if err := root.MkdirAll(path.Dir(sharedVar), 0o755); err != nil {
		return err
	}
	if err := root.Symlink(sharedVarLink, sharedVar); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Renameat2(int(d.Fd()), own, int(d.Fd()), sharedVar, unix.RENAME_EXCHANGE); err != nil {
		return &os.LinkError{Op: "exchange", Old: own, New: sharedVar, Err: err}
	}
	return syncAll(root)
}
