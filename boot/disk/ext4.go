package disk

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// repository is where the composefs repository is in the root file system.
const repository = "/composefs"

// node is a file of the root file system.
type node struct {
	path     string // absolute
	mode     uint32 // type and permissions
	uid, gid uint32
	mtime    fstree.Time
	size     int64 // of a regular file, in bytes
	target   string
	rdev     uint32
	xattrs   []fstree.Xattr
	// verity is the algorithm of a file that gets fs-verity, 0 for others; digest what it must give, if that is known.
	verity fsverity.Algorithm
	digest fsverity.Digest
	open   func() (io.ReadCloser, error)
	// link is set in the second and further names of a file: the first one.
	link  *node
	links uint32
}

func (n *node) typ() uint32 { return n.mode & fstree.TypeMask }

// planRoot lists the nodes, directories before what is in them, and decides the sizes.
func (p *Plan) planRoot() error {
	for _, tool := range []string{"mke2fs", "debugfs"} {
		if _, err := findTool(tool); err != nil {
			return err
		}
	}
	root := p.layout.Root
	if len(root.Label) > 16 || strings.ContainsAny(root.Label, "\x00\n") {
		return fmt.Errorf("label %q: at most 16 characters in one line", root.Label)
	}
	nodes, err := p.hostNodes()
	if err != nil {
		return err
	}
	if root.Overlay != nil {
		if err := p.overlay(nodes); err != nil {
			return err
		}
	}
	p.nodes = make([]*node, 0, len(nodes))
	for _, n := range nodes {
		if strings.ContainsAny(n.path+n.target, "\n\r\x00") {
			return fmt.Errorf("%q: names and targets with line breaks cannot be written: rename it", n.path)
		}
		p.nodes = append(p.nodes, n)
	}
	slices.SortFunc(p.nodes, func(a, b *node) int { return strings.Compare(a.path, b.path) })

	offset := p.ESP.Offset + p.ESP.Size
	g := ext4GeometryOf(p.nodes, root.Free, align)
	size := g.size
	if p.layout.Size != 0 {
		p.Size = p.layout.Size / align * align
		size = p.Size - offset - align
		if g = ext4GeometryOf(p.nodes, root.Free, max(size, align)); size < g.size {
			return fmt.Errorf("does not fit: it needs %s, of which %s shall stay free; with the EFI system partition of %s "+
				"the disk must have %s, not %s", sizeOf(g.size), sizeOf(root.Free), sizeOf(p.ESP.Size),
				sizeOf(offset+g.size+align), sizeOf(p.Size))
		}
	} else {
		p.Size = offset + size + align
	}
	p.Root = Partition{Offset: offset, Size: size, Used: g.used, Free: g.free}
	return nil
}

// hostNodes lists Root.Dir, by path.
func (p *Plan) hostNodes() (map[string]*node, error) {
	nodes := map[string]*node{}
	metaAlg, err := metaAlgorithm(filepath.Join(p.layout.Root.Dir, repository, "meta.json"))
	if err != nil {
		return nil, err
	}
	err = filepath.WalkDir(p.layout.Root.Dir, func(host string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(p.layout.Root.Dir, host)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		n := &node{
			path:  path.Join("/", rel),
			mode:  st.Mode,
			mtime: p.clamp(fstree.Time{Sec: st.Mtim.Sec, Nsec: uint32(st.Mtim.Nsec)}),
			links: 1,
		}
		switch n.typ() {
		case fstree.TypeDir:
			if n.path == "/" {
				n.mode = fstree.TypeDir | 0o755
				n.mtime = fstree.Time{Sec: p.layout.Time.Unix()}
			}
		case fstree.TypeSymlink:
			if n.target, err = os.Readlink(host); err != nil {
				return err
			}
		case fstree.TypeRegular:
			n.size = info.Size()
			n.open = func() (io.ReadCloser, error) {
				return os.OpenFile(host, os.O_RDONLY|unix.O_NOFOLLOW, 0)
			}
		default:
			return fmt.Errorf("%s: not a file, directory or symbolic link: put it into the overlay", host)
		}
		nodes[n.path] = n
		return p.inRepository(n, metaAlg)
	})
	return nodes, err
}

// inRepository gives what is in the repository the same metadata on whatever host it was made, and tells which of it
// gets fs-verity.
func (p *Plan) inRepository(n *node, metaAlg fsverity.Algorithm) error {
	in, ok := strings.CutPrefix(n.path, repository+"/")
	if !ok {
		return nil
	}
	n.mtime = fstree.Time{Sec: p.layout.Time.Unix()}
	switch n.typ() {
	case fstree.TypeDir:
		n.mode = fstree.TypeDir | 0o755
	case fstree.TypeRegular:
		n.mode = fstree.TypeRegular | 0o644
	}
	object, ok := strings.CutPrefix(in, "objects/")
	switch {
	case in == "meta.json":
		n.verity = metaAlg
	case ok && n.typ() != fstree.TypeDir:
		d, err := fsverity.ParseObjectPath(object)
		if err != nil || n.typ() != fstree.TypeRegular {
			return fmt.Errorf("%s: not an object: remove it from the repository", n.path)
		}
		n.verity, n.digest = d.Algorithm(), d
	}
	return nil
}

// metaAlgorithm reads the algorithm of a repository: meta.json has fs-verity itself where its objects must have it. It
// returns 0 if there is no such file.
func metaAlgorithm(file string) (fsverity.Algorithm, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var meta struct{ Algorithm string }
	if err := json.NewDecoder(io.LimitReader(f, 1<<20)).Decode(&meta); err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	a, err := fsverity.ParseAlgorithm(meta.Algorithm)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", file, err)
	}
	return a, nil
}

// overlay lays Root.Overlay over the nodes.
func (p *Plan) overlay(nodes map[string]*node) error {
	seen := map[*fstree.Inode]*node{}
	return p.layout.Root.Overlay.Walk(func(name string, i *fstree.Inode) error {
		n := &node{path: name, mode: i.Mode(), uid: i.UID, gid: i.GID, mtime: p.clamp(i.Mtime), xattrs: i.Xattrs, links: 1}
		if old := nodes[name]; old != nil && (old.typ() == fstree.TypeDir) != (n.typ() == fstree.TypeDir) {
			return fmt.Errorf("%s: a directory in Dir or in the overlay, but not in both", name)
		}
		nodes[name] = n
		if first := seen[i]; first != nil {
			first.links++
			n.link = first
			return nil
		}
		switch c := i.Content.(type) {
		case *fstree.Directory:
			return nil
		case fstree.Inline:
			n.size = int64(len(c))
			n.open = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(string(c))), nil }
		case *fstree.Object:
			n.size = int64(c.Size)
			n.open = func() (io.ReadCloser, error) { return p.layout.Root.Open(name, i) }
		case fstree.Symlink:
			n.target = string(c)
		case fstree.Device:
			n.rdev = c.Rdev
		case fstree.Fifo:
		default:
			return fmt.Errorf("%s: a socket cannot be put on a disk", name)
		}
		seen[i] = n
		return nil
	})
}

// clamp keeps a time between 1970 and the layout's time.
func (p *Plan) clamp(t fstree.Time) fstree.Time {
	latest := fstree.Time{Sec: p.layout.Time.Unix()}
	if latest.Before(t) {
		return latest
	}
	if t.Sec < 0 {
		return fstree.Time{}
	}
	return t
}

const (
	blockSize = 4096
	inodeSize = 256
	// bytesPerInode is how many bytes there are for every inode of the file system, for what is added later.
	bytesPerInode = 16384
)

// minJournaled is the smallest file system in bytes that gets a journal, as with mke2fs: the smallest journal is half of it.
const minJournaled = 8 << 20

// ext4Geometry is what mke2fs is told.
type ext4Geometry struct {
	size int64 // that is needed, in bytes
	used int64
	free int64 // at least
}

// ext4GeometryOf bounds from above what the nodes take, in a file system of at least this size. Blocks of zeros become holes,
// so it is often less.
func ext4GeometryOf(nodes []*node, free, size int64) ext4Geometry {
	var blocks int64
	dirs := map[string]int64{}
	for _, n := range nodes {
		// An entry takes 8 bytes and the name, in steps of 4, and does not cross blocks, of which 12 bytes are a checksum.
		entry := 8 + roundUp(int64(len(path.Base(n.path))), 4)
		dirs[path.Dir(n.path)] += entry
		if n.link != nil {
			continue
		}
		switch n.typ() {
		case fstree.TypeRegular:
			size := n.size
			if n.verity != 0 {
				size = verityEnd(n)
				size -= roundUp(n.size, verityAlign) - roundUp(n.size, blockSize) // a hole
			}
			// Extents beyond four need a block; one is at most 128 MiB, and block groups cut them.
			blocks += roundUp(size, blockSize)/blockSize + size/(32<<20) + 1
		case fstree.TypeSymlink:
			blocks += (int64(len(n.target)) + blockSize - 60) / blockSize
		}
		if len(n.xattrs) > 0 {
			blocks++
		}
	}
	for _, n := range nodes {
		if n.typ() == fstree.TypeDir {
			blocks += dirs[n.path]/(blockSize-12-264) + 1
		}
	}
	content := blocks*blockSize + roundUp(free, blockSize)
	for {
		over := ext4Overhead(size, int64(len(nodes)))
		if next := roundUp(content+over, align); next > size {
			size = next
			continue
		}
		return ext4Geometry{size: size, used: blocks * blockSize, free: size - over - blocks*blockSize}
	}
}

// ext4Overhead bounds from above what a file system of this size takes for itself.
func ext4Overhead(size, files int64) int64 {
	const blocksPerGroup = 8 * blockSize
	groups := size/blockSize/blocksPerGroup + 1
	descriptors := groups*64/blockSize + 1
	// mke2fs reserves descriptors for growing a thousandfold, in every group that has a copy: 0, 1 and the powers of
	// 3, 5 and 7. There are fewer than 6 of them and twice the logarithm.
	reserved := min(descriptors*1024, groups*16+1024/64, 1024)
	copies := min(groups, 8)
	for g := groups; g > 8; g /= 3 {
		copies += 3
	}
	perGroup := int64(2) // bitmaps
	return copies*(1+descriptors+reserved)*blockSize + groups*perGroup*blockSize +
		inodeCount(size, files)*inodeSize + groups*blockSize + journalSize(size) + 64<<10
}

// inodeCount is what is asked for: what the content needs with as much again, or the usual density.
func inodeCount(size, files int64) int64 {
	return max(2*files+1024, size/bytesPerInode)
}

func journalSize(size int64) int64 {
	switch {
	case size < minJournaled:
		return 0
	case size < 256<<20:
		return 4 << 20
	case size < 4<<30:
		return 16 << 20
	}
	return 64 << 20
}

// verityAlign is where ext4 looks for the Merkle tree after the data: the next multiple of the largest page size.
const verityAlign = 64 << 10

// verityEnd is the end of the file with its tree and descriptor, in bytes.
func verityEnd(n *node) int64 {
	return roundUp(n.size, verityAlign) + fsverity.TreeSize(n.verity, n.size) + blockSize
}

// verityTail returns the descriptor's block.
func verityTail(descriptor []byte) []byte {
	b := make([]byte, blockSize)
	copy(b, descriptor)
	binary.LittleEndian.PutUint32(b[blockSize-4:], uint32(len(descriptor)))
	return b
}

// toolDirs are where the programs of e2fsprogs are; a user's PATH often lacks these directories.
var toolDirs = []string{"/usr/sbin", "/sbin"}

// findTool finds a program of e2fsprogs.
func findTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range toolDirs {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: not found: install e2fsprogs (apt install e2fsprogs)", name)
}
