package disk

import (
	"context"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// verityFlags are EXT4_EXTENTS_FL and EXT4_VERITY_FL. Setting them says that the blocks after the file's size are its
// Merkle tree and descriptor.
const verityFlags = "0x180000"

func (p *Plan) writeRoot(ctx context.Context, out *os.File, done func(int64)) (err error) {
	if err := p.mke2fs(ctx, out); err != nil {
		return err
	}
	// Two: one is filled while debugfs reads the other.
	var stages [2]*os.File
	for k := range stages {
		f, err := newStage(out.Name())
		if err != nil {
			return err
		}
		defer f.Close()
		stages[k] = f
	}
	d, err := p.startDebugfs(ctx, out, stages[:]...)
	if err != nil {
		return err
	}
	f := &filler{plan: p, debugfs: d, stages: stages, done: done}
	err = f.fill(ctx)
	if closed := d.close(); err == nil {
		err = closed
	}
	if ctx.Err() != nil {
		return ctx.Err() // not the error of the debugfs that was killed
	}
	return err
}

// filler puts the nodes of a plan into the empty file system.
type filler struct {
	*debugfs
	plan    *Plan
	stages  [2]*os.File
	next    int   // the stage to be filled
	pending *node // that debugfs copies from the other stage
	done    func(int64)
}

func (f *filler) fill(ctx context.Context) error {
	for _, n := range f.plan.nodes {
		if err := f.put(ctx, n); err != nil {
			return fmt.Errorf("%s: %w", n.path, err)
		}
	}
	return f.finishPending()
}

func (f *filler) put(ctx context.Context, n *node) error {
	if n.link != nil {
		return f.do("ln", n.link.path, n.path)
	}
	switch n.typ() {
	case fstree.TypeRegular:
		if err := stage(ctx, f.stages[f.next], n); err != nil {
			return err
		}
		if err := f.finishPending(); err != nil {
			return err
		}
		if err := f.do("write", fmt.Sprintf("/dev/fd/%d", 4+f.next), n.path); err != nil {
			return err
		}
		f.pending, f.next = n, 1-f.next
	case fstree.TypeDir:
		// mke2fs makes these two.
		if n.path != "/" && n.path != "/lost+found" {
			if err := f.do("mkdir", n.path); err != nil {
				return err
			}
		}
	case fstree.TypeSymlink:
		if err := f.do("symlink", n.path, n.target); err != nil {
			return err
		}
	default:
		// mknod takes the name for one in the current directory, slashes and all.
		args := []string{path.Base(n.path), "p"}
		if n.typ() != fstree.TypeFifo {
			args[1] = map[uint32]string{fstree.TypeBlock: "b", fstree.TypeChar: "c"}[n.typ()]
			major, minor := n.rdev>>8&0xfff, n.rdev&0xff|n.rdev>>12&0xfff00
			args = append(args, fmt.Sprint(major), fmt.Sprint(minor))
		}
		if err := f.do("cd", path.Dir(n.path)); err != nil {
			return err
		}
		if err := f.do("mknod", args...); err != nil {
			return err
		}
	}
	if err := f.metadata(n); err != nil {
		return err
	}
	return f.out.Flush()
}

// finishPending waits until debugfs has copied the file that it was told to.
func (f *filler) finishPending() error {
	if f.pending == nil {
		return nil
	}
	if err := f.wait(); err != nil {
		return err
	}
	f.done(f.pending.size)
	f.pending = nil
	return nil
}

// metadata sets what a file has apart from its content. debugfs makes files with the caller's identity and permissions of
// its own choice, so all of them are set.
func (f *filler) metadata(n *node) error {
	fields := [][2]string{
		{"mode", fmt.Sprintf("0%o", n.mode)},
		{"uid", fmt.Sprint(n.uid)},
		{"gid", fmt.Sprint(n.gid)},
	}
	if n.mtime.Sec != f.plan.layout.Time.Unix() || n.mtime.Nsec != 0 {
		// In the extra field the nanoseconds are above the two bits that continue the seconds.
		fields = append(fields, [2]string{"mtime", fmt.Sprintf("@%d", n.mtime.Sec)},
			[2]string{"mtime_extra", fmt.Sprint(n.mtime.Nsec << 2)})
	}
	if n.verity != 0 {
		fields = append(fields, [2]string{"size", fmt.Sprint(n.size)}, [2]string{"flags", verityFlags})
	}
	if n.links > 1 {
		fields = append(fields, [2]string{"links_count", fmt.Sprint(n.links)})
	}
	for _, field := range fields {
		if err := f.do("set_inode_field", n.path, field[0], field[1]); err != nil {
			return err
		}
	}
	for _, x := range n.xattrs {
		if err := f.do("ea_set", n.path, x.Name, escape(x.Value)); err != nil {
			return err
		}
	}
	return nil
}

// escape writes a value so that debugfs reads any bytes, as octal escapes.
func escape(value []byte) string {
	var b strings.Builder
	for _, c := range value {
		fmt.Fprintf(&b, "\\%03o", c)
	}
	return b.String()
}
