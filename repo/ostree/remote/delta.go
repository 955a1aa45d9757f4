package remote

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/delta"
)

const (
	// maxSuperblock limits a superblock, which may have parts inside, in bytes.
	maxSuperblock = 1 << 30
	// overhead is about what each object costs besides its content: headers of HTTP in both directions, and of the object.
	overhead = 600
)

// prefetcher brings commits by static deltas, where that is cheaper than to fetch their objects.
//
// What a delta costs is known: the sizes of its parts that make something which is not here. What the objects cost is known if the
// commit lists their sizes, in ostree.sizes; else it is estimated by what the delta makes, of which deflate leaves less than half.
type prefetcher struct {
	r     *Remote
	into  *repo.Repo
	names []string
	o     PullOptions

	mu   sync.Mutex
	used map[ostree.Checksum]string
}

// ErrNoDelta tells that there is no static delta that can be used.
var ErrNoDelta = errors.New("no static delta leads to it from what is here")

// offer is a static delta that can be used, and what it costs.
type offer struct {
	d     *delta.Delta
	file  *os.File // the superblock
	bytes int64
}

// prefetch implements ostree.PullOptions.Prefetch.
func (p *prefetcher) prefetch(ctx context.Context, c ostree.Checksum, in *ostree.Collector) error {
	best, objects, err := p.best(ctx, c, in.Has)
	if err != nil {
		return err
	}
	if best == nil {
		if p.o.Deltas == DeltasAlways {
			return ErrNoDelta
		}
		return nil
	}
	defer best.file.Close()
	if p.o.Deltas == DeltasIfCheaper && best.bytes >= objects {
		return nil
	}
	p.mu.Lock()
	p.used[c] = best.d.Name.String()
	p.mu.Unlock()
	part := func(ctx context.Context, i int) (io.ReadCloser, error) {
		b, err := p.r.c.open(ctx, p.r.c.content, fmt.Sprintf("%s/%d", best.d.Path(), i), 0)
		if err != nil {
			return nil, err
		}
		return b, nil
	}
	if err := best.d.Apply(ctx, in, part); err != nil {
		return fmt.Errorf("%w (--no-delta does without)", err)
	}
	return nil
}

// best returns the cheapest of the deltas to a commit, nil if there is none, and what its objects cost. Has tells what is here.
func (p *prefetcher) best(ctx context.Context, c ostree.Checksum, has func(ostree.Checksum) bool) (*offer, int64, error) {
	digests, err := p.r.deltas(ctx, c)
	if err != nil {
		return nil, 0, err
	}
	sizes, err := p.sizes(ctx, c)
	if err != nil {
		return nil, 0, err
	}
	var best *offer
	var objects int64
	for _, name := range p.usable(digests) {
		o, err := p.r.superblock(ctx, name, digests[name], p.into)
		if err != nil {
			return nil, 0, fmt.Errorf("static delta %s: %w (--no-delta does without)", name, err)
		}
		var all int64
		o.bytes, all = costs(o.d, has, sizes)
		if best != nil && best.bytes <= o.bytes {
			o.file.Close()
			continue
		}
		if best != nil {
			best.file.Close()
		}
		best, objects = o, all
	}
	return best, objects, nil
}

// maxOffers is how many superblocks are looked at.
const maxOffers = 3

// usable returns the deltas whose base is here, the newest base first, and then the one that needs none.
func (p *prefetcher) usable(digests delta.Digests) []delta.Name {
	type candidate struct {
		delta.Name
		time uint64
	}
	var list []candidate
	for name := range digests {
		if name.From.IsZero() {
			continue
		}
		s, err := ostree.Open(p.into, name.From.String())
		if err != nil {
			continue // it is not here, or not sound
		}
		c, err := s.Commit(p.into)
		if err != nil {
			continue
		}
		list = append(list, candidate{name, c.Time})
	}
	slices.SortFunc(list, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(b.time, a.time), bytes.Compare(a.From[:], b.From[:]))
	})
	var names []delta.Name
	for _, c := range list[:min(len(list), maxOffers-1)] {
		names = append(names, c.Name)
	}
	for name := range digests {
		if name.From.IsZero() {
			names = append(names, name)
		}
	}
	return names
}

// bases returns the commits that are here and begin deltas to the commit of a name.
func (p *prefetcher) bases(ctx context.Context, name string) ([]string, error) {
	var sum ostree.Checksum
	var err error
	if ostree.IsChecksum(name) {
		sum, err = ostree.ParseChecksum(name)
	} else {
		sum, err = p.r.Ref(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	if _, err := ostree.Open(p.into, sum.String()); err == nil {
		return nil, nil // it is here
	}
	digests, err := p.r.deltas(ctx, sum)
	if err != nil {
		return nil, err
	}
	var bases []string
	for _, d := range p.usable(digests) {
		if !d.From.IsZero() {
			bases = append(bases, d.From.String())
		}
	}
	return bases, nil
}

// deltas returns the deltas to a commit that the remote has, by its summary or an index of them.
func (r *Remote) deltas(ctx context.Context, c ostree.Checksum) (delta.Digests, error) {
	s, err := r.Summary(ctx)
	if err != nil || s == nil {
		return nil, err
	}
	found := delta.Digests{}
	for name, sum := range s.Deltas {
		if name.To == c {
			found[name] = sum
		}
	}
	if len(found) > 0 || !s.IndexedDeltas {
		return found, nil
	}
	b, err := r.c.get(ctx, r.c.content, delta.IndexPath(c), ostree.MaxMetadata)
	if errors.Is(err, ostree.ErrNotFound) {
		return nil, nil
	}
	var listed delta.Digests
	if err == nil {
		listed, err = delta.ParseIndex(b)
	}
	for name, sum := range listed {
		if name.To == c {
			found[name] = sum
		}
	}
	return found, err
}

// superblock fetches the superblock of a delta into a file without a name.
func (r *Remote) superblock(ctx context.Context, name delta.Name, want ostree.Checksum, into *repo.Repo) (*offer, error) {
	f, err := temp(into)
	if err != nil {
		return nil, err
	}
	d, err := r.readSuperblock(ctx, f, name, want)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &offer{d: d, file: f}, nil
}

func (r *Remote) readSuperblock(ctx context.Context, f *os.File, name delta.Name, want ostree.Checksum) (*delta.Delta, error) {
	path := name.Path() + "/superblock"
	b, err := r.c.open(ctx, r.c.meta, path, 0)
	if err != nil {
		return nil, err
	}
	defer b.Close()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, sum), io.LimitReader(b, maxSuperblock+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if n > maxSuperblock {
		return nil, fmt.Errorf("%s: more than %d bytes", path, maxSuperblock)
	}
	if got := ostree.Checksum(sum.Sum(nil)); got != want {
		return nil, fmt.Errorf("%s: it has the SHA-256 %s, and %s is listed", path, got, want)
	}
	d, err := delta.Open(f, n)
	if err == nil && d.Name != name {
		err = fmt.Errorf("%s: it is the delta %s", path, d.Name)
	}
	return d, err
}

// temp makes a file that is gone when it is closed.
func temp(into *repo.Repo) (*os.File, error) {
	dir := filepath.Join(into.Path(), "tmp")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir), nil
	}
	f, err := os.CreateTemp(dir, "delta-*") // on file systems that know no files without a name
	if err != nil {
		return nil, err
	}
	return f, os.Remove(f.Name())
}

// sizes reads what the objects of a commit cost, from its metadata ostree.sizes: aay, where each is a checksum and two varints, the
// size in the archive and that of the content, and perhaps the kind. It is nil if the commit has none.
func (p *prefetcher) sizes(ctx context.Context, c ostree.Checksum) (map[ostree.Checksum]int64, error) {
	commit, err := p.r.Commit(ctx, c)
	if err != nil {
		return nil, err
	}
	v, ok, err := commit.Metadata.Lookup("ostree.sizes")
	if err != nil || !ok || v.Type() != "aay" {
		return nil, err
	}
	n, err := v.Len()
	if err != nil {
		return nil, err
	}
	sizes := make(map[ostree.Checksum]int64, n)
	for i := range n {
		e, err := v.At(i)
		if err != nil {
			return nil, err
		}
		b := e.Bytes()
		if len(b) < 33 {
			return nil, fmt.Errorf("ostree.sizes: an entry of %d bytes", len(b))
		}
		archived, k := binary.Uvarint(b[32:])
		if k <= 0 || archived > 1<<60 {
			return nil, errors.New("ostree.sizes: not a size")
		}
		sizes[ostree.Checksum(b[:32])] = int64(archived)
	}
	return sizes, nil
}

// costs returns how many bytes a delta costs, and how many the objects do that it makes. Its fallbacks cost the same either way.
func costs(d *delta.Delta, has func(ostree.Checksum) bool, sizes map[ostree.Checksum]int64) (parts, objects int64) {
	for _, p := range d.Parts {
		missing, known := int64(0), int64(0)
		for _, o := range p.Objects {
			if has(o.Checksum) || o.Kind == ostree.KindCommit {
				continue
			}
			missing++
			known += sizes[o.Checksum]
		}
		if missing == 0 {
			continue
		}
		if !p.Inline() { // or it is here already
			parts += clamp(p.Size) + overhead
		}
		if sizes == nil {
			known = clamp(p.Makes) * 2 / 5 / int64(len(p.Objects)) * missing
		}
		objects += known + missing*overhead
	}
	return parts, objects
}

// clamp makes sums of sizes that anybody may have written not overflow.
func clamp(n uint64) int64 { return int64(min(n, 1<<40)) }
