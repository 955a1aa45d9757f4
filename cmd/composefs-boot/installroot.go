package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// installRoot installs onto file systems that are mounted.
func (a *app) installRoot(ctx context.Context, source string, f installFlags) error {
	config, err := a.config(f.insecure)
	if err != nil {
		return err
	}
	r, err := a.rootRepository(f)
	if err != nil {
		return err
	}
	if r != nil {
		defer r.Close()
	}
	if err := f.readTarget(a, r); err != nil {
		return err
	}
	if f.dry {
		return a.planRoot(ctx, source, f, r)
	}
	if r == nil {
		path := filepath.Join(f.root, "composefs")
		if _, err := repo.Init(path, config); err != nil {
			return err
		}
		if r, err = repo.Open(path, repo.Options{RequireVerity: !f.insecure}); err != nil {
			return err
		}
		defer r.Close()
	}
	release, err := boot.Lock(f.root)
	if err != nil {
		return err
	}
	defer release()
	i, err := r.Begin(ctx, a.lock())
	if err != nil {
		return err
	}
	defer i.Abort()
	// An OCI image or OSTree commit is in the repository then, with its name.
	from, err := a.openTree(ctx, source, r, r.Algorithm(), f.image, f.tag(source))
	if err != nil {
		return err
	}
	s, err := a.putSystem(ctx, from, r, i, f)
	if err != nil {
		return err
	}
	if err := f.remember(r, from); err != nil {
		return err
	}
	scratch := &boot.Scratch{Dir: f.work}
	defer scratch.Close()
	plan, esp, err := f.planRoot(ctx, from, s, scratch)
	if err != nil {
		return err
	}
	// Until here, nothing but objects is visible, and an OCI image or OSTree commit.
	if err := i.Commit(); err != nil {
		return err
	}
	if err := plan.WriteState(f.root, objectsOf(r)); err != nil {
		return err
	}
	if err := esp.Execute(); err != nil {
		return err
	}
	return a.printInstall(newInstallResult(s, plan, f).withESP(esp))
}

// rootRepository opens the repository below a mounted root; nil if there is none yet.
func (a *app) rootRepository(f installFlags) (*repo.Repo, error) {
	path := filepath.Join(f.root, "composefs")
	if _, err := os.Stat(filepath.Join(path, "meta.json")); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	r, err := repo.Open(path, repo.Options{RequireVerity: !f.insecure})
	if err != nil {
		return nil, err
	}
	if err := a.checkHash(r); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// planRoot is the dry run of installRoot: nothing is stored, and nothing below the root is touched.
func (a *app) planRoot(ctx context.Context, source string, f installFlags, r *repo.Repo) error {
	alg, err := a.algorithm(r)
	if err != nil {
		return usageError{err}
	}
	from, err := a.openTree(ctx, source, nil, alg, f.image, "")
	if err != nil {
		return err
	}
	defer from.end()
	s, err := a.readSystem(ctx, from, scan.Digests(alg), f)
	if err != nil {
		return err
	}
	if s.Format, err = a.erofsFormat(r); err != nil {
		return usageError{err}
	}
	if s.Digest, err = imageDigest(s.Tree, s.Format, alg); err != nil {
		return err
	}
	if err := f.remember(r, from); err != nil {
		return err
	}
	scratch := &boot.Scratch{Dir: f.work}
	defer scratch.Close()
	plan, esp, err := f.planRoot(ctx, from, s, scratch)
	if err != nil {
		return err
	}
	return a.printInstall(newInstallResult(s, plan, f).withESP(esp))
}

// planRoot plans an install below a mounted root, and onto the mounted ESP, if there is one.
func (f installFlags) planRoot(ctx context.Context, from *treeSource, s boot.System, scratch *boot.Scratch) (plan boot.Plan, esp boot.ESPPlan, err error) {
	rootArgument := f.rootArgument
	if rootArgument == "" {
		uuid, err := filesystemUUID(f.root)
		if err != nil {
			return plan, esp, err
		}
		rootArgument = "root=UUID=" + uuid
	}
	if plan, err = f.plan(ctx, from, s, rootArgument, scratch); err == nil && f.esp != "" {
		esp, err = plan.PlanESP(f.esp)
	}
	return plan, esp, err
}

// filesystemUUID finds the UUID of the file system that a directory is on, by the links that udev makes.
func filesystemUUID(dir string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	const links = "/dev/disk/by-uuid"
	entries, err := os.ReadDir(links)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	for _, e := range entries {
		var dev unix.Stat_t
		if unix.Stat(filepath.Join(links, e.Name()), &dev) == nil && dev.Rdev == st.Dev {
			return e.Name(), nil
		}
	}
	return "", fmt.Errorf("%s: cannot find the UUID of its file system: say --root-arg root=UUID=...", dir)
}
