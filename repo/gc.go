package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// Margins keep garbage collection from what may still be wanted.
type Margins struct {
	// Objects that changed less than this ago are kept, though nothing leads to them: an interrupted import finds them
	// again.
	Objects time.Duration
	// Unfinished files in tmp/ that changed less than this ago are kept.
	Temporary time.Duration
}

// DefaultMargins give an interrupted import an hour to be repeated.
var DefaultMargins = Margins{Objects: time.Hour, Temporary: 24 * time.Hour}

// GCOptions says what is kept besides what refs lead to.
type GCOptions struct {
	Roots   []string // names of images (digests) and streams
	Margins Margins
	Now     time.Time // zero: the time it is
	Lock    LockOptions
	DryRun  bool
}

// GCPlan is what garbage collection removes, and what it found odd and leaves alone. Paths are below the repository.
type GCPlan struct {
	Objects   []string
	Bytes     int64 // of Objects
	Images    []string
	Streams   []string
	Temporary []string
	Recent    int // objects that are garbage, but too young
	Odd       []string
}

// GC removes what no ref leads to. The plan it returns has been carried out, unless it is a dry run. Nothing is removed if
// it cannot be found out what an image or stream needs.
func (r *Repo) GC(ctx context.Context, o GCOptions) (GCPlan, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	if o.DryRun {
		release, err := r.LockShared(ctx, o.Lock)
		if err != nil {
			return GCPlan{}, err
		}
		defer release()
		return r.planGC(ctx, o)
	}
	if err := r.writable(); err != nil {
		return GCPlan{}, err
	}
	release, err := r.lockExclusive(ctx, o.Lock)
	if err != nil {
		return GCPlan{}, err
	}
	defer release()
	plan, err := r.planGC(ctx, o)
	if err != nil {
		return plan, err
	}
	return plan, r.executeGC(ctx, plan)
}

// executeGC removes names before the objects they lead to, so that an interruption leaves no name without its object.
func (r *Repo) executeGC(ctx context.Context, p GCPlan) error {
	names := append(slices.Clone(p.Images), p.Streams...)
	for k, list := range [][]string{names, p.Objects, p.Temporary} {
		if k == 1 && len(names) > 0 {
			if err := unix.Syncfs(int(r.dir.Fd())); err != nil {
				return os.NewSyscallError("syncfs", err)
			}
		}
		for _, name := range list {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := r.unlink(name); err != nil {
				return err
			}
		}
	}
	r.mu.Lock()
	clear(r.verified)
	r.mu.Unlock()
	return nil
}

func (r *Repo) unlink(name string) error {
	dir, err := r.openat(path.Dir(name), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Unlinkat(int(dir.Fd()), path.Base(name), 0); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
}

func (r *Repo) planGC(ctx context.Context, o GCOptions) (GCPlan, error) {
	var p GCPlan
	live, err := r.live(ctx, o.Roots, &p)
	if err != nil {
		return p, err
	}
	if err := r.eachObject(func(name string, d fsverity.Digest, dir *os.File) error {
		if d.IsZero() {
			p.Odd = append(p.Odd, name)
			return nil
		}
		if live.objects[d] {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(dir.Fd()), path.Base(name), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "stat", Path: name, Err: err}
		}
		if o.Now.Sub(time.Unix(st.Ctim.Unix())) < o.Margins.Objects {
			p.Recent++
			live.objects[d] = true
			return nil
		}
		p.Objects = append(p.Objects, name)
		p.Bytes += st.Size
		return ctx.Err()
	}); err != nil {
		return p, err
	}
	// A name whose object goes, or is gone, goes as well. A ref never does: what it leads to is kept.
	for _, kind := range []struct {
		dir  string
		list *[]string
	}{{"images", &p.Images}, {"streams", &p.Streams}} {
		for name, d := range live.names[kind.dir] {
			if !live.objects[d] || !r.exists("objects/"+d.ObjectPath()) {
				*kind.list = append(*kind.list, name)
			}
		}
		slices.Sort(*kind.list)
	}
	return p, r.planTemporary(o, &p)
}

func (r *Repo) exists(name string) bool {
	f, err := r.openat(name, unix.O_PATH)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

func (r *Repo) planTemporary(o GCOptions, p *GCPlan) error {
	f, err := r.openat("tmp", unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && info.Mode().IsRegular() && o.Now.Sub(info.ModTime()) >= o.Margins.Temporary {
			p.Temporary = append(p.Temporary, "tmp/"+e.Name())
		}
	}
	return nil
}

// eachObject calls f for every file in objects/, with a zero digest for those whose name is none.
func (r *Repo) eachObject(f func(name string, d fsverity.Digest, dir *os.File) error) error {
	for k := range 256 {
		sub := fmt.Sprintf("objects/%02x", k)
		dir, err := r.openat(sub, unix.O_RDONLY|unix.O_DIRECTORY)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			if err := f(sub, fsverity.Digest{}, r.dir); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		entries, err := dir.ReadDir(-1)
		for _, e := range entries {
			d, _ := fsverity.ParseHex(sub[len("objects/"):] + e.Name())
			if d.Algorithm() != r.Algorithm() || !e.Type().IsRegular() {
				d = fsverity.Digest{}
			}
			if err == nil {
				err = f(sub+"/"+e.Name(), d, dir)
			}
		}
		dir.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// liveSet is what roots lead to.
type liveSet struct {
	objects map[fsverity.Digest]bool
	names   map[string]map[string]fsverity.Digest // "images" or "streams" -> images/NAME -> object
}

// live finds what must stay.
func (r *Repo) live(ctx context.Context, roots []string, p *GCPlan) (liveSet, error) {
	live := liveSet{map[fsverity.Digest]bool{}, map[string]map[string]fsverity.Digest{"images": {}, "streams": {}}}
	byObject := map[fsverity.Digest]string{} // streams
	var start []string
	wantedBy := map[string]string{} // images/NAME -> a ref that leads to it
	for _, kind := range []string{"images", "streams"} {
		names := live.names[kind]
		if err := r.walkLinks(kind, func(name, target string) {
			if strings.HasPrefix(name, kind+"/refs/") {
				wanted := kind + "/" + path.Base(target)
				wantedBy[wanted] = name
				start = append(start, wanted)
				return
			}
			d, err := digestOfLink(target)
			if err != nil || path.Dir(name) != kind {
				p.Odd = append(p.Odd, name)
				return
			}
			names[name] = d
			if kind == "streams" {
				byObject[d] = name
			}
			if slices.Contains(roots, path.Base(name)) {
				start = append(start, name)
			}
		}, func(name string) { p.Odd = append(p.Odd, name) }); err != nil {
			return live, err
		}
	}
	done := map[string]bool{}
	for len(start) > 0 {
		name := start[len(start)-1]
		start = start[:len(start)-1]
		d, there := live.names[path.Dir(name)][name]
		if done[name] {
			continue
		}
		// Somebody wants to keep this. That it was lost is no reason to remove what else it needs: it can be brought back.
		if !there || !r.exists("objects/"+d.ObjectPath()) {
			return live, fmt.Errorf("%s: it leads to nothing that is there, so nothing is removed: bring that back, or remove this name",
				cmp.Or(wantedBy[name], name))
		}
		done[name] = true
		if err := ctx.Err(); err != nil {
			return live, err
		}
		live.objects[d] = true
		objects, streams, err := r.references(name, d)
		if err != nil {
			return live, fmt.Errorf("%s: cannot tell what it needs, nothing is removed: %w", name, err)
		}
		for _, o := range objects {
			live.objects[o] = true
		}
		for _, s := range streams {
			live.objects[s] = true
			if name, ok := byObject[s]; ok {
				start = append(start, name)
			}
		}
	}
	return live, nil
}

// references returns the objects that an image or stream refers to, and the objects that are streams.
func (r *Repo) references(name string, d fsverity.Digest) (objects, streams []fsverity.Digest, err error) {
	f, err := r.OpenObject(d)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if strings.HasPrefix(name, "images/") {
		t, _, err := readImage(f)
		if err != nil {
			return nil, nil, err
		}
		return Objects(t), nil, nil
	}
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	s, err := splitstream.Open(f, info.Size(), r.Algorithm())
	if err != nil {
		return nil, nil, err
	}
	return s.Objects, s.Streams, nil
}

// StreamObject returns the object of a stream by its name, or by the name of a ref with "refs/" before it.
func (r *Repo) StreamObject(name string) (fsverity.Digest, error) {
	if ref, ok := strings.CutPrefix(name, "refs/"); ok {
		if err := checkRef(ref); err != nil {
			return fsverity.Digest{}, err
		}
	} else if err := checkRef(name); err != nil || strings.Contains(name, "/") {
		return fsverity.Digest{}, fmt.Errorf("stream %q: not a name", name)
	}
	for range 2 {
		dir, err := r.openat(path.Dir("streams/"+name), unix.O_RDONLY|unix.O_DIRECTORY)
		var target string
		if err == nil {
			target, err = readlink(dir, path.Base(name))
			dir.Close()
		}
		if errors.Is(err, unix.ENOENT) {
			err = ErrNotFound
		}
		if err != nil {
			return fsverity.Digest{}, fmt.Errorf("stream %q: %w", name, err)
		}
		if d, err := digestOfLink(target); err == nil {
			return d, nil
		}
		name = path.Base(target)
	}
	return fsverity.Digest{}, fmt.Errorf("stream %q: the link leads to no object", name)
}
