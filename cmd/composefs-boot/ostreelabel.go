package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/composefs-boot/composefs-boot/boot/selinux"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// policyPlaces are where the policy of a system is; a deployment of OSTree has it in /usr/etc.
var policyPlaces = []string{"usr/etc/selinux", "etc/selinux"}

// labelCommit labels the tree of a commit as ostree does: by the policy of a system, or its own if that is "". A file that the policy has no
// label for is an error, since nothing labels it later.
func labelCommit(ctx context.Context, s commitSource, system string) error {
	var policy *selinux.Policy
	var err error
	if system != "" {
		policy, err = systemPolicy(ctx, system)
	} else {
		policy, err = ownPolicy(s.tree, s.open)
	}
	if err != nil {
		return err
	}
	if policy == nil {
		return fmt.Errorf("no SELinux policy: neither %s nor %s has a config that names one", filepath.Join(cmp.Or(system, "/"), policyPlaces[0]),
			filepath.Join(cmp.Or(system, "/"), policyPlaces[1]))
	}
	if err := policy.Apply(s.tree); err != nil {
		return err
	}
	// Something is mounted on /proc, and policies have no label for what is below.
	if proc := s.tree.Lookup("proc"); proc != nil {
		label, err := policy.Label("/mnt", proc.Type())
		if err != nil {
			return err
		}
		proc.SetXattr(selinux.Attribute, []byte(label))
	}
	s.tree.CountLinks()
	seen := map[*fstree.Inode]bool{}
	return s.tree.Walk(func(path string, i *fstree.Inode) error {
		label, _ := i.Xattr(selinux.Attribute)
		if len(label) == 0 {
			return fmt.Errorf("%s: the SELinux policy has no label for it (--skip-list leaves it out)", fstree.Printable(path))
		}
		if !seen[i] {
			seen[i] = true
			i.SetXattr(selinux.Attribute, append(label, 0)) // as the kernel has labels
		}
		return nil
	})
}

// ownPolicy reads the policy that is in a tree, nil if there is none.
func ownPolicy(t *fstree.Tree, open fstree.Open) (*selinux.Policy, error) {
	for _, place := range policyPlaces {
		if dir := t.Lookup(place); dir != nil && dir.Dir() != nil && dir.Dir().Lookup("config") != nil {
			return loadPolicy(dir, func(name string, i *fstree.Inode) (io.ReadCloser, error) { return open("/"+place+name, i) })
		}
	}
	return nil, nil
}

// systemPolicy reads the policy of a system in a directory, nil if there is none.
func systemPolicy(ctx context.Context, system string) (*selinux.Policy, error) {
	for _, place := range policyPlaces {
		path := filepath.Join(system, place)
		if _, err := os.Stat(filepath.Join(path, "config")); err != nil {
			continue
		}
		t, err := scan.Dir(ctx, path, scan.Digests(fsverity.SHA256), scan.Options{NoXattrs: true})
		if err != nil {
			return nil, err
		}
		return loadPolicy(t.Root, scan.Files(path))
	}
	return nil, nil
}

// loadPolicy reads a policy by its directory, in which open opens files.
func loadPolicy(dir *fstree.Inode, open fstree.Open) (*selinux.Policy, error) {
	t, etc := fstree.New(), fstree.NewDir(0o755)
	etc.Dir().Set("selinux", dir)
	t.Root.Dir().Set("etc", etc)
	return selinux.Load(t, func(name string, i *fstree.Inode) (io.ReadCloser, error) {
		return open(strings.TrimPrefix(name, "/etc/selinux"), i)
	})
}
