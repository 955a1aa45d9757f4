package ostree

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// Overrides are changes of single files and directories, by their absolute paths. A path that is not in the tree is an error: who names it
// means it.
type Overrides struct {
	Modes map[string]ModeOverride
	Skip  map[string]bool // left out, with all below
}

// ModeOverride is what the permissions of a file become.
type ModeOverride struct {
	Perm uint32
	Add  bool // to those that it has
}

// ReadModes reads a file as ostree commit has it for --statoverride: in each line +NUMBER or =NUMBER, a space, and a path. The number is
// decimal, or hexadecimal behind 0x; + adds bits, = replaces them.
func (o *Overrides) ReadModes(text string) error {
	o.Modes = map[string]ModeOverride{}
	for k, line := range strings.Split(text, "\n") {
		if line == "" {
			continue
		}
		number, name, ok := strings.Cut(line, " ")
		value, set := strings.CutPrefix(number, "=")
		if !set {
			value = strings.TrimPrefix(number, "+")
		}
		perm, err := strconv.ParseUint(value, 0, 32)
		octal := len(value) > 1 && value[0] == '0' && value[1] != 'x' // which ostree takes for decimal
		if !ok || err != nil || octal || perm > 0o7777 || !path.IsAbs(name) {
			return fmt.Errorf("line %d: %.200q: want +NUMBER or =NUMBER, decimal and at most %d, and an absolute path", k+1, line, 0o7777)
		}
		o.Modes[name] = ModeOverride{uint32(perm), !set}
	}
	return nil
}

// ReadSkips reads a file as ostree commit has it for --skip-list: a path in each line.
func (o *Overrides) ReadSkips(text string) error {
	o.Skip = map[string]bool{}
	for k, line := range strings.Split(text, "\n") {
		if line == "" {
			continue
		}
		if !path.IsAbs(line) || line == "/" {
			return fmt.Errorf("line %d: %.200q: want an absolute path, and not all of the tree", k+1, line)
		}
		o.Skip[line] = true
	}
	return nil
}

// apply changes the tree. A file of several names is changed under those alone that are named.
func (o Overrides) apply(tree *fstree.Tree) error {
	skip, modes := maps.Clone(o.Skip), maps.Clone(o.Modes)
	change := func(i *fstree.Inode, name string) {
		if m, ok := modes[name]; ok {
			if m.Add {
				m.Perm |= i.Perm
			}
			i.Perm = m.Perm
			delete(modes, name)
		}
	}
	change(tree.Root, "/")
	var walk func(d *fstree.Directory, dir string)
	walk = func(d *fstree.Directory, dir string) {
		var kept []fstree.Entry
		for _, e := range d.Entries {
			name := path.Join(dir, e.Name)
			if skip[name] {
				delete(skip, name)
				continue
			}
			if _, ok := modes[name]; ok {
				if e.Inode.Dir() == nil {
					one := *e.Inode
					e.Inode = &one
				}
				change(e.Inode, name)
			}
			if sub := e.Inode.Dir(); sub != nil {
				walk(sub, name)
			}
			kept = append(kept, e)
		}
		d.Entries = kept
	}
	walk(tree.Root.Dir(), "/")
	var left []error
	for name := range skip {
		left = append(left, fmt.Errorf("%s: to be skipped, and not in the tree", fstree.Printable(name)))
	}
	for name := range modes {
		left = append(left, fmt.Errorf("%s: to have another mode, and not in the tree", fstree.Printable(name)))
	}
	if len(left) == 0 {
		return nil
	}
	first := slices.MinFunc(left, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	if len(left) > 1 {
		return fmt.Errorf("%w (and %d more)", first, len(left)-1)
	}
	return first
}
