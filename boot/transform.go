// Package boot is what makes a file tree bootable and brings it onto a machine.
//
// [FindResources] finds the kernels, entries and unified kernel images in a tree. [Transform] turns the tree into the one
// whose image is booted. [PlanInstall] decides what goes where: the repository, the state of the deployment, the files on
// the EFI system partition.
package boot

import (
	"fmt"

	"github.com/composefs-boot/composefs-boot/boot/selinux"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// emptied are the directories that a booted system mounts something on: what an image has in them would be hidden.
var emptied = []string{"boot", "sysroot"}

// needed are the directories that every booted system mounts something on. They are made if they are missing.
var needed = []string{"boot", "run", "sysroot"}

// Transform makes a container's root, see fstree.Tree.MakeContainerRoot, into one to boot: /boot and /sysroot are emptied,
// missing directories that are mounted on are made, and everything is labelled by the SELinux policy in the tree, or has no
// labels where there is none. Directories that are made, or emptied, have the time of /usr.
func Transform(t *fstree.Tree, open fstree.Open) error {
	root := t.Root.Dir()
	usr := root.Lookup("usr")
	if usr == nil || usr.Dir() == nil {
		return fstree.ErrNoUsr
	}
	for _, name := range needed {
		dir := root.Lookup(name)
		if dir == nil {
			dir = fstree.NewDir(0o755)
			dir.Mtime = usr.Mtime
			root.Set(name, dir)
		}
		if dir.Dir() == nil {
			return fmt.Errorf("/%s: not a directory: a system to boot needs one there", name)
		}
	}
	for _, name := range emptied {
		t.EmptyDir(root.Lookup(name))
	}
	policy, err := selinux.Load(t, open)
	if err != nil {
		return fmt.Errorf("SELinux policy: %w", err)
	}
	if policy == nil {
		selinux.Strip(t)
	} else if err := policy.Apply(t); err != nil {
		return fmt.Errorf("SELinux policy: %w", err)
	}
	t.CountLinks()
	return nil
}
