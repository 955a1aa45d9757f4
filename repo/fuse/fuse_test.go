package fuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// lines is what Image.Errors gets.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// take returns what was written since the last time.
func (l *lines) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.text.Reset()
	return l.text.String()
}

func dumpTree(t *testing.T, name string) *fstree.Tree {
	t.Helper()
	tree, err := dumpfile.Read(bytes.NewReader(golden.Read(t, "dumps/"+name+".dump")))
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// importDir makes an image of a directory in a new repository below parent, and reads it back.
func importDir(t *testing.T, parent, dir string, insecure bool) (*repo.Repo, *fstree.Tree) {
	t.Helper()
	path := filepath.Join(parent, "repo")
	if _, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA512, Format: erofs.V1, Insecure: insecure}); err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	i, err := r.Begin(context.Background(), repo.LockOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Abort()
	tree, err := scan.Dir(context.Background(), dir, i, scan.Options{Xattrs: fstree.XattrsAll})
	if err == nil {
		_, err = i.PutImage(tree, erofs.V1, "x")
	}
	if err == nil {
		err = i.Commit()
	}
	if err == nil {
		tree, _, err = r.ReadImage("x")
	}
	if err != nil {
		t.Fatal(err)
	}
	return r, tree
}

// writeFiles makes files in a new directory, by name.
func writeFiles(t *testing.T, parent string, contents map[string]string) string {
	t.Helper()
	dir := filepath.Join(parent, "tree")
	for name, content := range contents {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// change replaces an object, which may be read-only, by other bytes, or removes it.
func change(t *testing.T, r *repo.Repo, tree *fstree.Tree, path string, content []byte) {
	t.Helper()
	object := filepath.Join(r.Path(), "objects", tree.Lookup(path).Content.(*fstree.Object).Payload())
	if err := os.Remove(object); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if content == nil {
		return
	}
	if err := os.WriteFile(object, content, 0o444); err != nil {
		t.Fatal(err)
	}
}

// flip returns the text with one bit changed.
func flip(s string) []byte {
	b := []byte(s)
	b[len(b)/2] ^= 1
	return b
}

// reader asks the file system what the kernel would ask.
type reader struct {
	*testing.T
	f *files
}

func (r reader) lookup(dir uint64, name string) gofuse.EntryOut {
	r.Helper()
	var out gofuse.EntryOut
	if s := r.f.Lookup(nil, &gofuse.InHeader{NodeId: dir}, name, &out); s != gofuse.OK {
		r.Fatalf("%s: %v", name, s)
	}
	return out
}

// list reads a directory with a buffer that has room for few entries.
func (r reader) list(dir uint64, plus bool) (entries []gofuse.DirEntry, outs []gofuse.EntryOut) {
	r.Helper()
	var at uint64
	for {
		list := gofuse.NewDirEntryList(make([]byte, 1000), at)
		in := &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: dir}, Offset: at}
		var more []gofuse.DirEntry
		var moreOuts []gofuse.EntryOut
		var err error
		if plus {
			r.f.ReadDirPlus(nil, in, list)
			more, moreOuts, err = gofuse.ParseDirLookupEntries(list.Bytes())
		} else {
			r.f.ReadDir(nil, in, list)
			more, err = gofuse.ParseDirEntries(list.Bytes())
		}
		if err != nil {
			r.Fatal(err)
		}
		if len(more) == 0 {
			return entries, outs
		}
		entries, outs = append(entries, more...), append(outs, moreOuts...)
		at = more[len(more)-1].Off
	}
}

func (r reader) read(number uint64) ([]byte, gofuse.Status) {
	r.Helper()
	var out gofuse.OpenOut
	if s := r.f.Open(nil, &gofuse.OpenIn{InHeader: gofuse.InHeader{NodeId: number}}, &out); s != gofuse.OK {
		return nil, s
	}
	defer r.f.Release(nil, &gofuse.ReleaseIn{InHeader: gofuse.InHeader{NodeId: number}})
	var content []byte
	for {
		buf := make([]byte, 1000)
		result, s := r.f.Read(nil, &gofuse.ReadIn{InHeader: gofuse.InHeader{NodeId: number}, Offset: uint64(len(content))}, buf)
		if s != gofuse.OK {
			return content, s
		}
		b, s := result.Bytes(buf)
		if len(b) == 0 || s != gofuse.OK {
			return content, s
		}
		content = append(content, b...)
	}
}

// Everything that the golden dumps have is answered as it is in them, by each of the ways to ask.
func TestAnswers(t *testing.T) {
	for _, name := range golden.Names(t) {
		t.Run(name, func(t *testing.T) {
			tree := dumpTree(t, name)
			errs := &lines{}
			r := reader{t, newFiles(Image{Tree: tree, Errors: errs, Open: func(fsverity.Digest) (*os.File, error) {
				return nil, repo.ErrNotFound
			}})}
			seen := map[uint64]*fstree.Inode{}
			r.compare(seen, errs, 1, 1, "", tree.Root)
			if len(seen) != len(r.f.nodes) {
				t.Errorf("%d inodes were seen, there are %d", len(seen), len(r.f.nodes))
			}
			var out gofuse.StatfsOut
			if r.f.StatFs(nil, nil, &out); out.Files != uint64(len(seen)) || out.NameLen != 255 || out.Bfree != 0 {
				t.Errorf("%+v", out)
			}
		})
	}
}

func (r reader) compare(seen map[uint64]*fstree.Inode, errs *lines, number, parent uint64, path string, inode *fstree.Inode) {
	if other := seen[number]; other != nil && other != inode {
		r.Errorf("%s: inode %d is another file", path, number)
	}
	seen[number] = inode
	var a gofuse.AttrOut
	r.f.GetAttr(nil, &gofuse.GetAttrIn{InHeader: gofuse.InHeader{NodeId: number}}, &a)
	want := gofuse.Attr{Ino: number, Mode: inode.Mode(), Size: inode.Size(), Owner: gofuse.Owner{Uid: inode.UID, Gid: inode.GID},
		Mtime: uint64(inode.Mtime.Sec), Mtimensec: inode.Mtime.Nsec, Nlink: inode.Nlink, Blocks: (inode.Size() + 511) / 512, Blksize: 4096}
	want.Atime, want.Atimensec, want.Ctime, want.Ctimensec = want.Mtime, want.Mtimensec, want.Mtime, want.Mtimensec
	if d, ok := inode.Content.(fstree.Device); ok {
		want.Rdev = d.Rdev
	}
	if d := inode.Dir(); d != nil {
		want.Nlink = 2
		for _, e := range d.Entries {
			if e.Inode.Dir() != nil {
				want.Nlink++
			}
		}
	}
	if a.Attr != want {
		r.Errorf("%s: %+v, want %+v", path, a.Attr, want)
	}
	r.compareXattrs(number, path, inode)
	content, status := r.read(number)
	switch c := inode.Content.(type) {
	case *fstree.Directory:
		r.compareDir(seen, errs, number, parent, path, c)
	case fstree.Inline:
		if status != gofuse.OK || !bytes.Equal(content, c) {
			r.Errorf("%s: %q, %v", path, content, status)
		}
	case *fstree.Object:
		if got := errs.take(); status != gofuse.EIO || !strings.HasPrefix(got, fmt.Sprintf("%q: ", r.f.path(r.f.node(number)))) {
			r.Errorf("%s: %v: %s", path, status, got)
		}
	case fstree.Symlink:
		target, s := r.f.Readlink(nil, &gofuse.InHeader{NodeId: number})
		if s != gofuse.OK || string(target) != string(c) {
			r.Errorf("%s: %q, %v", path, target, s)
		}
	}
}

func (r reader) compareDir(seen map[uint64]*fstree.Inode, errs *lines, number, parent uint64, path string, d *fstree.Directory) {
	names, _ := r.list(number, false)
	plus, outs := r.list(number, true)
	if !slices.Equal(names, plus) || len(names) != len(d.Entries)+2 {
		r.Fatalf("%s: %d and %d entries, want %d", path, len(names), len(plus), len(d.Entries)+2)
	}
	if names[0].Name != "." || names[0].Ino != number || names[1].Name != ".." || names[1].Ino != parent {
		r.Errorf("%s: %v, %v", path, names[0], names[1])
	}
	for k, e := range d.Entries {
		got, out := names[k+2], r.lookup(number, e.Name)
		if got.Name != e.Name || got.Mode != e.Inode.Type() || got.Ino != out.Ino || out.NodeId != out.Ino || outs[k+2] != out {
			r.Errorf("%s/%s: %v, %+v, %+v", path, e.Name, got, out, outs[k+2])
		}
		r.compare(seen, errs, out.NodeId, number, path+"/"+e.Name, e.Inode)
	}
	if out := r.lookup(number, "not there"); out.NodeId != 0 || out.EntryValid == 0 {
		r.Errorf("%s: a name that is not there: %+v", path, out)
	}
}

func (r reader) compareXattrs(number uint64, path string, inode *fstree.Inode) {
	in := &gofuse.InHeader{NodeId: number}
	var want string
	for _, x := range inode.Xattrs {
		want += x.Name + "\x00"
		value := make([]byte, len(x.Value))
		n, s := r.f.GetXAttr(nil, in, x.Name, value)
		if s != gofuse.OK || !bytes.Equal(value[:n], x.Value) {
			r.Errorf("%s: %s: %q, %v", path, x.Name, value, s)
		}
		if n, s := r.f.GetXAttr(nil, in, x.Name, nil); int(n) != len(x.Value) || n > 0 && s != gofuse.ERANGE {
			r.Errorf("%s: %s: size %d, %v", path, x.Name, n, s)
		}
	}
	list := make([]byte, 1<<16)
	n, s := r.f.ListXAttr(nil, in, list)
	if s != gofuse.OK || string(list[:n]) != want {
		r.Errorf("%s: %q, %v, want %q", path, list[:n], s, want)
	}
	in.Uid = 1000
	if n, _ := r.f.ListXAttr(nil, in, list); bytes.Contains(list[:n], []byte("trusted.")) {
		r.Errorf("%s: a user sees %q", path, list[:n])
	}
	if _, s := r.f.GetXAttr(nil, in, "user.not-there", nil); s != gofuse.ENOATTR {
		r.Errorf("%s: an attribute that is not there: %v", path, s)
	}
}

// A content is read only if it is that of the digest, whatever is wrong with it.
func TestObjectsAreChecked(t *testing.T) {
	text := strings.Repeat("the content of a file\n", 1000)
	r, tree := importDir(t, t.TempDir(), writeFiles(t, t.TempDir(), map[string]string{"a/file": text, "copy": text, "other": "x" + text}), true)
	opens := 0
	errs := &lines{}
	k := reader{t, newFiles(Image{Tree: tree, Errors: errs, Open: func(d fsverity.Digest) (*os.File, error) {
		opens++
		return r.OpenObject(d)
	}})}
	digest := tree.Lookup("copy").Content.(*fstree.Object).Digest.String()
	file, other := k.lookup(k.lookup(1, "a").NodeId, "file").NodeId, k.lookup(1, "copy").NodeId
	mustRead := func() {
		t.Helper()
		if content, s := k.read(file); s != gofuse.OK || string(content) != text {
			t.Errorf("%d bytes, %v", len(content), s)
		}
		if line := errs.take(); line != "" {
			t.Error(line)
		}
	}
	mustRead()
	for name, content := range map[string][]byte{"one bit": flip(text), "shorter": []byte(text[:8192]), "longer": []byte(text + "\n"),
		"empty": {}, "missing": nil} {
		change(t, r, tree, "a/file", content)
		if got, s := k.read(file); s != gofuse.EIO || got != nil {
			t.Errorf("%s: %d bytes, %v", name, len(got), s)
		}
		line := errs.take()
		if !strings.HasPrefix(line, `"/a/file": object `+digest+": ") || strings.Count(line, "\n") != 1 {
			t.Errorf("%s: %q", name, line)
		}
	}
	change(t, r, tree, "a/file", nil)
	object := filepath.Join(r.Path(), "objects", tree.Lookup("copy").Content.(*fstree.Object).Payload())
	if err := os.Mkdir(object, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, s := k.read(file); s != gofuse.EIO || !strings.Contains(errs.take(), digest) {
		t.Errorf("a directory: %v", s)
	}
	os.Remove(object)

	// A check holds for every file with this content while one of them is open, and no longer.
	change(t, r, tree, "a/file", []byte(text))
	opens = 0
	var out gofuse.OpenOut
	in := gofuse.InHeader{NodeId: other}
	if s := k.f.Open(nil, &gofuse.OpenIn{InHeader: in}, &out); s != gofuse.OK || out.OpenFlags != 0 {
		t.Errorf("checked anew: %v, flags %#x", s, out.OpenFlags)
	}
	mustRead()
	if s := k.f.Open(nil, &gofuse.OpenIn{InHeader: in}, &out); s != gofuse.OK || out.OpenFlags != gofuse.FOPEN_KEEP_CACHE {
		t.Errorf("open already: %v, flags %#x", s, out.OpenFlags)
	}
	for range 2 {
		k.f.Release(nil, &gofuse.ReleaseIn{InHeader: in})
	}
	if opens != 1 {
		t.Errorf("opened %d times", opens)
	}
	mustRead()
	if opens != 2 {
		t.Errorf("not opened again")
	}
	if s := k.f.Open(nil, &gofuse.OpenIn{InHeader: in, Flags: unix.O_RDWR}, &out); s != gofuse.EROFS {
		t.Errorf("for writing: %v", s)
	}
	for k, n := range k.f.nodes {
		if o := n.object; o != nil && (o.file != nil || o.opens != 0) {
			t.Errorf("node %d stays open", k+1)
		}
	}
}

// mount mounts an image at a new directory until the test ends.
func mount(t *testing.T, f *files) *Mounted {
	t.Helper()
	m, err := serve(f, t.TempDir())
	if err == nil {
		err = m.server.WaitMount() // this process reads from its own mount, see there
	}
	if err != nil {
		t.Fatalf("%v (the tests need root, and the kernel's module fuse)", err)
	}
	t.Cleanup(func() {
		if inUse, err := m.Unmount(); err != nil || inUse {
			t.Errorf("unmount: in use: %v, %v", inUse, err)
		}
		m.Wait()
	})
	return m
}

// waitClosed waits until the kernel has told that all files are closed, which it does some time after they are.
func (f *files) waitClosed() {
	for k := range f.nodes {
		for o := f.nodes[k].object; o != nil; time.Sleep(time.Millisecond) {
			o.mu.Lock()
			opens := o.opens
			o.mu.Unlock()
			if opens == 0 {
				break
			}
		}
	}
}

// stat is what the kernel answers for a file, without what belongs to the file system.
type stat struct {
	Mode, UID, GID uint32
	Rdev           uint64
	Size           int64
	Nlink          uint64
	Mtime          unix.Timespec
	Xattrs         string
	Content        string
	FirstName      string // of all names of the inode
}

// statAll returns what is found in a directory by path.
func statAll(t *testing.T, dir string) map[string]stat {
	t.Helper()
	all := map[string]stat{}
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: path, Err: err}
		}
		s := stat{Mode: st.Mode, UID: st.Uid, GID: st.Gid, Rdev: st.Rdev, Mtime: st.Mtim}
		buf := make([]byte, 1<<16)
		n, err := unix.Llistxattr(path, buf)
		if err != nil {
			return &os.PathError{Op: "llistxattr", Path: path, Err: err}
		}
		names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
		slices.Sort(names)
		for _, name := range names {
			if name == "" {
				continue
			}
			n, err := unix.Lgetxattr(path, name, buf)
			if err != nil {
				return &os.PathError{Op: "lgetxattr " + name, Path: path, Err: err}
			}
			s.Xattrs += fmt.Sprintf("%s=%q ", name, buf[:n])
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR { // file systems differ in what size and links directories have
			s.Size, s.Nlink = st.Size, uint64(st.Nlink)
			if first[st.Ino] == "" {
				first[st.Ino] = path
			}
			s.FirstName = strings.TrimPrefix(first[st.Ino], dir)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			s.Content = string(b)
		case unix.S_IFLNK:
			if s.Content, err = os.Readlink(path); err != nil {
				return err
			}
		}
		all[strings.TrimPrefix(path, dir)] = s
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func compareDirs(t *testing.T, got, want string) {
	t.Helper()
	g, w := statAll(t, got), statAll(t, want)
	for path, s := range w {
		if !reflect.DeepEqual(g[path], s) {
			t.Errorf("%s:\n%.500v, want\n%.500v", path, g[path], s)
		}
	}
	if len(g) != len(w) {
		t.Errorf("%d files, want %d", len(g), len(w))
	}
}

// A directory and the mount of its image are the same to who reads them.
func TestMountedTrees(t *testing.T) {
	for _, name := range []string{"files", "links", "metadata", "names", "selinux"} {
		t.Run(name, func(t *testing.T) {
			dir := golden.Extract(t, "trees/"+name+".tar.gz")
			r, tree := importDir(t, t.TempDir(), dir, true)
			errs := &lines{}
			m := mount(t, newFiles(Image{Tree: tree, Open: r.OpenObject, Source: "composefs:test", Errors: errs}))
			compareDirs(t, m.Dir, dir)
			compareDirs(t, m.Dir, dir) // with what the kernel has kept
			if err := os.WriteFile(filepath.Join(m.Dir, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
				t.Errorf("writing: %v", err)
			}
			var st unix.Statfs_t
			if err := unix.Statfs(m.Dir, &st); err != nil || st.Flags&unix.ST_RDONLY == 0 || st.Files != uint64(len(newFiles(Image{Tree: tree}).nodes)) {
				t.Errorf("%+v, %v", st, err)
			}
			if got := errs.take(); got != "" {
				t.Error(got)
			}
		})
	}
}

// The corners of the format, which no directory has, come through the kernel as they are.
func TestMountedDumps(t *testing.T) {
	tree := fstree.New()
	for _, name := range golden.Names(t) {
		tree.Root.Dir().Set(name, dumpTree(t, name).Root)
	}
	m := mount(t, newFiles(Image{Tree: tree, Errors: io.Discard, Open: func(fsverity.Digest) (*os.File, error) {
		return nil, repo.ErrNotFound
	}}))
	tree.Walk(func(path string, i *fstree.Inode) error {
		var st unix.Stat_t
		if err := unix.Lstat(m.Dir+path, &st); err != nil {
			// Paths of more than 4096 bytes have to be walked in pieces.
			if len(m.Dir+path) < 4096 {
				t.Errorf("%s: %v", path, err)
			}
			return nil
		}
		rdev := uint64(0)
		if d, ok := i.Content.(fstree.Device); ok {
			rdev = unix.Mkdev(d.Rdev>>8&0xfff, d.Rdev&0xff|d.Rdev>>12&0xfff00)
		}
		if st.Mode != i.Mode() || st.Uid != i.UID || st.Gid != i.GID || uint64(st.Size) != i.Size() || st.Rdev != rdev ||
			st.Mtim.Sec != i.Mtime.Sec || uint32(st.Mtim.Nsec) != i.Mtime.Nsec || i.Dir() == nil && uint32(st.Nlink) != i.Nlink {
			t.Errorf("%s: %+v, want %+v", path, st, i)
		}
		if _, ok := i.Content.(*fstree.Object); ok {
			if _, err := os.ReadFile(m.Dir + path); !errors.Is(err, unix.EIO) {
				t.Errorf("%s: reading: %v", path, err)
			}
		}
		return nil
	})
}

// Through a mount, too, a changed object is never read, even if the kernel has kept the right content.
func TestMountedObjectsAreChecked(t *testing.T) {
	text := strings.Repeat("the content of a file\n", 100_000)
	r, tree := importDir(t, t.TempDir(), writeFiles(t, t.TempDir(), map[string]string{"file": text, "good": "x" + text, "late": "y" + text}), true)
	errs := &lines{}
	served := newFiles(Image{Tree: tree, Open: r.OpenObject, Errors: errs})
	m := mount(t, served)
	read := func(name string) (string, error) {
		b, err := os.ReadFile(filepath.Join(m.Dir, name))
		served.waitClosed()
		return string(b), err
	}
	for _, content := range [][]byte{flip(text), nil} {
		if got, err := read("file"); err != nil || got != text {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		change(t, r, tree, "file", content)
		got, err := read("file")
		if !errors.Is(err, unix.EIO) || got != "" {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		if line := errs.take(); !strings.HasPrefix(line, `"/file": object `) || strings.Count(line, "\n") != 1 {
			t.Errorf("%q", line)
		}
		if got, err := read("good"); err != nil || got != "x"+text {
			t.Errorf("another file: %d bytes, %v", len(got), err)
		}
		change(t, r, tree, "file", []byte(text))
	}

	// What changes while a file is open is seen, as the package says, but not by who opens it later.
	path := filepath.Join(r.Path(), "objects", tree.Lookup("late").Content.(*fstree.Object).Payload())
	f, err := os.Open(filepath.Join(m.Dir, "late"))
	if err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	w.WriteAt([]byte("Y"), 0)
	if b, err := io.ReadAll(f); err != nil || string(b) != "Y"+text {
		t.Errorf("%d bytes, %v, starting with %.3q", len(b), err, b)
	}
	w.WriteAt([]byte("y"), 0)
	w.Close()
	f.Close()
	served.waitClosed()
	if got, err := read("late"); err != nil || got != "y"+text {
		t.Errorf("after a change that was undone: %d bytes, %v, starting with %.3q", len(got), err, got)
	}
}

// A mount in use is taken away and served on; Wait returns when nobody uses it.
func TestUnmountInUse(t *testing.T) {
	text := strings.Repeat("the content of a file\n", 1000)
	r, tree := importDir(t, t.TempDir(), writeFiles(t, t.TempDir(), map[string]string{"file": text}), true)
	m, err := Image{Tree: tree, Open: r.OpenObject, Errors: io.Discard}.Mount(t.TempDir())
	if err == nil {
		err = m.server.WaitMount() // this process reads from its own mount, see there
	}
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(m.Dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	if inUse, err := m.Unmount(); err != nil || !inUse {
		t.Errorf("in use: %v, %v", inUse, err)
	}
	if got, err := io.ReadAll(f); err != nil || string(got) != text {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if _, err := os.Stat(filepath.Join(m.Dir, "file")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	f.Close()
	m.Wait()
}

func TestMountRefusals(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	os.WriteFile(file, nil, 0o644)
	for path, want := range map[string]error{file: unix.ENOTDIR, file + "-not-there": unix.ENOENT} {
		_, err := Image{Tree: fstree.New(), Errors: io.Discard}.Mount(path)
		if !errors.Is(err, want) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
	}
}
