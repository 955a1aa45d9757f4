package repo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
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
	Without []string // refs that count as if they were not there, "streams/refs/oci/NAME": for a dry run
	// Follows returns the name of the stream that a ref, "streams/refs/oci-referrers/...", belongs to: the ref counts as long as that
	// stream is kept for other reasons, and goes with it. "" is for one that counts by itself, as all do if Follows is nil.
	Follows func(ref string) (stream string)
	Margins Margins
	Now     time.Time // zero: the time it is
	Lock    LockOptions
	DryRun  bool
}

// GCPlan is what garbage collection removes, and what it found odd and leaves alone. Paths are below the repository.
type GCPlan struct {
	Objects   int
	Bytes     int64 // of Objects
	Images    []string
	Streams   []string
	Refs      []string // that belong to streams which go, see GCOptions.Follows
	Temporary []string
	Recent    int // objects that are garbage, but too young
	Odd       []string

	doomed [256][]fsverity.Digest // the objects, by directory
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
	if len(o.Without) > 0 {
		return GCPlan{}, errors.New("refs that are there are only left out in a dry run")
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
	names := slices.Concat(p.Refs, p.Images, p.Streams)
	for _, name := range append(names, p.Temporary...) {
		if err := r.unlink(name); err != nil {
			return err
		}
	}
	if err := r.removeEmpty("streams/refs", 0); err != nil {
		return err
	}
	if len(names) > 0 {
		if err := unix.Syncfs(int(r.dir.Fd())); err != nil {
			return os.NewSyscallError("syncfs", err)
		}
	}
	for _, objects := range p.doomed {
		if err := r.removeObjects(ctx, objects); err != nil {
			return err
		}
	}
	r.mu.Lock()
	clear(r.verified)
	r.mu.Unlock()
	return nil
}

// removeObjects removes objects of one directory.
func (r *Repo) removeObjects(ctx context.Context, objects []fsverity.Digest) error {
	if len(objects) == 0 {
		return nil
	}
	dir, err := r.openat("objects/"+objects[0].ObjectPath()[:2], unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	for _, d := range objects {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := unix.Unlinkat(int(dir.Fd()), d.FileName(), 0); err != nil && err != unix.ENOENT {
			return &os.PathError{Op: "remove", Path: "objects/" + d.ObjectPath(), Err: err}
		}
	}
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

// removeEmpty removes directories of refs in which nothing is, but for "oci" and the like, depth 1.
func (r *Repo) removeEmpty(name string, depth int) error {
	dir, err := r.openat(name, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := r.removeEmpty(name+"/"+e.Name(), depth+1); err != nil {
			return err
		}
		if depth == 0 {
			continue
		}
		switch err := unix.Unlinkat(int(dir.Fd()), e.Name(), unix.AT_REMOVEDIR); err {
		case nil, unix.ENOENT, unix.ENOTEMPTY:
		default:
			return &os.PathError{Op: "remove", Path: name + "/" + e.Name(), Err: err}
		}
	}
	return nil
}

func (r *Repo) planGC(ctx context.Context, o GCOptions) (GCPlan, error) {
	var p GCPlan
	live, err := r.live(ctx, o, &p)
	if err != nil {
		return p, err
	}
	named := map[fsverity.Digest]bool{}
	for _, names := range live.names {
		for _, d := range names {
			named[d] = true
		}
	}
	if err := r.planObjects(ctx, o, &p, live, named); err != nil {
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

// planObjects decides about all objects, several directories at a time.
func (r *Repo) planObjects(ctx context.Context, o GCOptions, p *GCPlan, live liveSet, named map[fsverity.Digest]bool) error {
	type directory struct {
		fd      int
		objects []fsverity.Digest
	}
	var mu sync.Mutex
	var failed error
	young := map[fsverity.Digest]bool{}
	one := func(d directory) error {
		defer unix.Close(d.fd)
		doomed := d.objects[:0]
		var bytes int64
		recent := 0
		for _, object := range d.objects {
			if live.objects[object] {
				continue
			}
			var st unix.Stat_t
			name := object.ObjectPath()
			if err := unix.Fstatat(d.fd, name[3:], &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				return &os.PathError{Op: "stat", Path: "objects/" + name, Err: err}
			}
			if o.Now.Sub(time.Unix(st.Ctim.Unix())) >= o.Margins.Objects {
				doomed, bytes = append(doomed, object), bytes+st.Size
				continue
			}
			recent++
			if named[object] {
				mu.Lock()
				young[object] = true
				mu.Unlock()
			}
		}
		mu.Lock()
		defer mu.Unlock()
		p.Objects, p.Bytes, p.Recent = p.Objects+len(doomed), p.Bytes+bytes, p.Recent+recent
		if len(doomed) > 0 {
			p.doomed[doomed[0].Bytes()[0]] = doomed
		}
		return nil
	}
	work := make(chan directory)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for d := range work {
				if err := one(d); err != nil {
					mu.Lock()
					failed = err
					mu.Unlock()
				}
			}
		})
	}
	err := r.eachDirectory(func(dir *os.File, _ string, objects []fsverity.Digest, odd []string) error {
		mu.Lock()
		p.Odd = append(p.Odd, odd...)
		stop := failed
		mu.Unlock()
		if err := cmp.Or(stop, ctx.Err()); err != nil || len(objects) == 0 {
			return err
		}
		fd, err := unix.FcntlInt(dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("dup", err)
		}
		work <- directory{fd, objects}
		return nil
	})
	close(work)
	workers.Wait()
	for d := range young { // what has the name stays as long as the object does
		live.objects[d] = true
	}
	return cmp.Or(err, failed)
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
		if info, err := e.Info(); err == nil && !info.IsDir() && o.Now.Sub(info.ModTime()) >= o.Margins.Temporary {
			p.Temporary = append(p.Temporary, "tmp/"+e.Name())
		}
	}
	return nil
}

// eachDirectory calls f for every directory of objects/ with the digests of the objects in it, and the paths of what is none.
func (r *Repo) eachDirectory(f func(dir *os.File, name string, objects []fsverity.Digest, odd []string) error) error {
	buf := make([]byte, 64<<10)
	var digits [2 * 64]byte
	for k := range 256 {
		sub := fmt.Sprintf("objects/%02x", k)
		dir, err := r.openat(sub, unix.O_RDONLY|unix.O_DIRECTORY)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			if err := f(r.dir, sub, nil, []string{sub}); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		// Here the names are all that counts: an os.File would allocate several times for each of a million.
		objects, odd := []fsverity.Digest(nil), []string(nil)
		for err == nil {
			var n int
			n, err = retry(func() (int, error) { return unix.Getdents(int(dir.Fd()), buf) })
			if n <= 0 || err != nil {
				break
			}
			copy(digits[:], sub[len("objects/"):])
			eachEntry(buf[:n], func(kind byte, name []byte) {
				var d fsverity.Digest
				if len(name) <= len(digits)-2 {
					d, _ = fsverity.ParseHex(digits[:2+copy(digits[2:], name)])
				}
				if d.Algorithm() == r.Algorithm() && (kind == unix.DT_REG || kind == unix.DT_UNKNOWN && isRegular(dir, string(name))) {
					objects = append(objects, d)
				} else {
					odd = append(odd, sub+"/"+string(name))
				}
			})
		}
		if err == nil {
			err = f(dir, sub, objects, odd)
		}
		dir.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// eachEntry calls f for the entries that getdents64(2) has returned, but for "." and "..".
func eachEntry(buf []byte, f func(kind byte, name []byte)) {
	for len(buf) > 19 {
		size := int(binary.NativeEndian.Uint16(buf[16:]))
		if size < 20 || size > len(buf) {
			return
		}
		name, _, _ := bytes.Cut(buf[19:size], []byte{0})
		if n := string(name); n != "." && n != ".." {
			f(buf[18], name)
		}
		buf = buf[size:]
	}
}

func isRegular(dir *os.File, name string) bool {
	var st unix.Stat_t
	return unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// liveSet is what roots lead to.
type liveSet struct {
	objects map[fsverity.Digest]bool
	names   map[string]map[string]fsverity.Digest // "images" or "streams" -> images/NAME -> object
}

// live finds what must stay.
func (r *Repo) live(ctx context.Context, o GCOptions, p *GCPlan) (liveSet, error) {
	live := liveSet{map[fsverity.Digest]bool{}, map[string]map[string]fsverity.Digest{"images": {}, "streams": {}}}
	byObject := map[fsverity.Digest]string{} // images and streams
	var start []string
	wantedBy := map[string]string{}  // images/NAME -> a ref that leads to it
	following := map[string]string{} // ref -> streams/NAME, for those that wait for GCOptions.Follows
	for _, kind := range []string{"images", "streams"} {
		names := live.names[kind]
		if err := r.walkLinks(kind, func(name, target string) {
			if slices.Contains(o.Without, name) {
				return
			}
			if strings.HasPrefix(name, kind+"/refs/") {
				wanted := kind + "/" + path.Base(target)
				wantedBy[wanted] = name
				if o.Follows != nil && o.Follows(name) != "" {
					following[name] = wanted
				} else {
					start = append(start, wanted)
				}
				return
			}
			d, err := digestOfLink(target)
			if err != nil || path.Dir(name) != kind {
				p.Odd = append(p.Odd, name)
				return
			}
			names[name] = d
			byObject[d] = name
			if slices.Contains(o.Roots, path.Base(name)) {
				start = append(start, name)
			}
		}, func(name string) { p.Odd = append(p.Odd, name) }); err != nil {
			return live, err
		}
	}
	done, unnamed := map[string]bool{}, map[fsverity.Digest]bool{}
	for {
		if len(start) == 0 {
			// Whoever follows may be followed by others.
			for ref, wanted := range following {
				leader := "streams/" + o.Follows(ref)
				if done[leader] || r.isRecent(live.names["streams"][leader], o) {
					start = append(start, wanted)
					delete(following, ref)
				}
			}
		}
		if len(start) == 0 {
			p.Refs = slices.Sorted(maps.Keys(following))
			return live, nil
		}
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
		for len(streams) > 0 { // or images
			s := streams[0]
			streams = streams[1:]
			live.objects[s] = true
			if name, ok := byObject[s]; ok {
				start = append(start, name)
				continue
			}
			// The name of a stream may lead to a newer one by now: an OCI config that has got another image. What can be no stream leads
			// nowhere.
			if unnamed[s] {
				continue
			}
			unnamed[s] = true
			if objects, more, err := r.references("", s); err == nil {
				streams = append(streams, more...)
				for _, o := range objects {
					live.objects[o] = true
				}
			}
		}
	}
}

// isRecent reports whether an object stays though nothing leads to it, see Margins.
func (r *Repo) isRecent(d fsverity.Digest, o GCOptions) bool {
	if d.IsZero() {
		return false // there is no such name
	}
	f, err := r.openat("objects/"+d.ObjectPath(), unix.O_PATH)
	if err != nil {
		return false
	}
	defer f.Close()
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && o.Now.Sub(time.Unix(st.Ctim.Unix())) < o.Margins.Objects
}

// references returns the objects that an image or stream refers to, and the objects that are streams or images themselves.
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
