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
	stages := make([]*os.File, stageCount)
	for k := range stages {
		f, err := newStage(out.Name())
		if err != nil {
			return err
		}
		defer f.Close()
		stages[k] = f
	}
	d, err := p.startDebugfs(ctx, out, stages)
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

// stageCount is how many files may be on their way to debugfs, so that it copies small ones while a large one is hashed.
const stageCount = 16

// filler puts the nodes of a plan into the empty file system.
type filler struct {
	*debugfs
	plan    *Plan
	stages  []*os.File
	written int     // number of files that debugfs was told to write
	pending []*node // those that it may not have copied yet, at most one for every stage
	done    func(int64)
}

func (f *filler) fill(ctx context.Context) error {
	for _, n := range f.plan.nodes {
		if err := f.put(ctx, n); err != nil {
			return fmt.Errorf("%s: %w", n.path, err)
		}
	}
	if err := f.do("cd", "/"); err != nil { // its echo tells that the last file is copied
		return err
	}
	return f.finishPending(0)
}

func (f *filler) put(ctx context.Context, n *node) error {
	if n.link != nil {
		return f.do("ln", n.link.path, n.path)
	}
	switch n.typ() {
	case fstree.TypeRegular:
		k := f.written % len(f.stages)
		if err := f.finishPending(len(f.stages) - 1); err != nil {
			return err
		}
		if err := stage(ctx, f.stages[k], n); err != nil {
			return err
		}
		if err := f.do("write", stageName(k), n.path); err != nil {
			return err
		}
		f.pending = append(f.pending, n)
		f.written++
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
	if f.written%8 == 0 {
		return f.out.Flush()
	}
	return nil
}

// finishPending waits until debugfs has no more than this number of files to copy.
func (f *filler) finishPending(atMost int) error {
	for len(f.pending) > atMost {
		if err := f.out.Flush(); err != nil {
			return f.died(err)
		}
		if err := f.wait(); err != nil {
			return err
		}
		f.done(f.pending[0].size)
		f.pending = f.pending[1:]
	}
	return nil
}

// metadata sets what a file has apart from its content, as far as it differs from what debugfs gives to new files: they
// belong to root, whoever runs it, have the layout's time and these permissions.
func (f *filler) metadata(n *node) error {
	created := map[uint32]uint32{fstree.TypeRegular: stagePerm, fstree.TypeDir: 0o755, fstree.TypeSymlink: 0o777}
	var fields [][2]string
	if perm, ok := created[n.typ()]; !ok || n.mode != n.typ()|perm || n.path == "/lost+found" {
		fields = append(fields, [2]string{"mode", fmt.Sprintf("0%o", n.mode)})
	}
	if n.uid != 0 {
		fields = append(fields, [2]string{"uid", fmt.Sprint(n.uid)})
	}
	if n.gid != 0 {
		fields = append(fields, [2]string{"gid", fmt.Sprint(n.gid)})
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
