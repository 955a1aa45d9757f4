package boot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// removedState is what a state is called that is being removed, newState what it is called before it is whole.
func removedState(state string) string { return "state/." + path.Base(state) + ".old" }
func newState(state string) string     { return "state/." + path.Base(state) + ".new" }

// unfinished finds the systems of which an interrupted run has left one of these.
func unfinished(root *os.Root) (list []fsverity.Digest, err error) {
	files, err := fs.ReadDir(root.FS(), "state")
	for _, f := range files {
		name := "state/" + f.Name()
		digits := strings.TrimPrefix(strings.TrimSuffix(f.Name(), path.Ext(f.Name())), ".")
		d, err := fsverity.ParseHex(digits)
		state := statePath(d)
		if err == nil && (name == removedState(state) || name == newState(state)) && !slices.Contains(list, d) {
			list = append(list, d)
		}
	}
	return list, err
}

// Nothing reports whether there is nothing to remove.
func (p PrunePlan) Nothing() bool {
	return len(p.Remove) == 0 && len(p.Unfinished) == 0 && len(p.Temporary) == 0
}

// ImageRefs are the names of images in the repository that go, without "images/refs/".
func (p PrunePlan) ImageRefs() []string {
	var refs []string
	for _, d := range p.Unfinished {
		if !p.deployed[d] {
			refs = append(refs, DeployRef(d))
		}
	}
	for _, r := range p.Remove {
		refs = append(refs, DeployRef(r.Digest))
	}
	return refs
}

// Systems returns the systems that stay.
func (p PrunePlan) Systems() []fsverity.Digest {
	var list []fsverity.Digest
	for d := range p.deployed {
		list = append(list, d)
	}
	return list
}

// DeployRef is the name that the image of a system has in the repository.
func DeployRef(d fsverity.Digest) string { return "deploy/" + d.String() }

// Execute carries out the plan. After an error, as after a power cut, the next plan goes on where this one ended.
func (p PrunePlan) Execute(ctx context.Context, r *repo.Repo, l repo.LockOptions) error {
	esp, err := os.OpenRoot(p.ESP)
	if err != nil {
		return err
	}
	defer esp.Close()
	root, err := os.OpenRoot(p.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, step := range p.steps(ctx, esp, root, r, l) {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// steps are what is done, one after the other; see PruneOptions for the order.
func (p PrunePlan) steps(ctx context.Context, esp, root *os.Root, r *repo.Repo, l repo.LockOptions) (steps []func() error) {
	remove := func(from *os.Root, name string) {
		steps = append(steps, func() error {
			if err := from.RemoveAll(name); err != nil {
				return fmt.Errorf("%s: %w", path.Join(from.Name(), name), err)
			}
			return nil
		})
	}
	sync := func(root *os.Root) {
		steps = append(steps, func() error { return syncAll(root) })
	}
	files := slices.Clone(p.Temporary)
	// Systems may share files: all entries go first, so that none names what is gone.
	for _, s := range p.Remove {
		for _, e := range s.Entries {
			remove(esp, e.Path)
		}
		files = append(files, s.Files...)
	}
	sync(esp)
	for _, name := range files {
		remove(esp, name)
	}
	sync(esp)
	old := slices.Clone(p.Unfinished)
	for _, s := range p.Remove {
		state := statePath(s.Digest)
		remove(root, removedState(state))
		steps = append(steps, func() error { return root.Rename(state, removedState(state)) })
		old = append(old, s.Digest)
	}
	sync(root)
	for _, ref := range p.ImageRefs() {
		steps = append(steps, func() error {
			if err := r.RemoveImageRef(ctx, ref, l); !errors.Is(err, repo.ErrNotFound) {
				return err
			}
			return nil
		})
	}
	for _, d := range old {
		remove(root, removedState(statePath(d)))
		remove(root, newState(statePath(d)))
	}
	sync(root)
	return steps
}

func pinPath(d fsverity.Digest) string { return statePath(d) + "/pinned" }

// Pin keeps a system from being pruned, or lets go of it. The mark is the file "pinned" in its state.
func (h *Host) Pin(d fsverity.Digest, pinned bool) error {
	root, err := os.OpenRoot(h.Root)
	if err != nil {
		return err
	}
	defer root.Close()
	if pinned {
		err = root.WriteFile(pinPath(d), nil, 0o644)
	} else if err = root.Remove(pinPath(d)); errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return err
	}
	return syncAll(root)
}

// ErrBusy tells that another process changes the systems of a machine.
var ErrBusy = errors.New("another composefs-boot changes the systems of this machine: wait until it is done")

// Lock keeps others from changing the systems of a machine until release is called. It does not wait.
func Lock(dir string) (release func(), err error) {
	f, err := os.Open(path.Join(dir, "state"))
	if errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil // there are none
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			err = ErrBusy
		}
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}
