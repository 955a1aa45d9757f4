package disk

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// Limits of FAT32.
const (
	// minClusters is what tells FAT32 from FAT16: a driver that goes by the specification (OVMF's does) takes a volume
	// with fewer clusters for FAT16 and finds nothing on it.
	minClusters = 65525
	maxFileSize = 1<<32 - 1
	maxFATSize  = 32 << 30
	// reservedSectors come before the first FAT: the boot sector, FSInfo and the copies of both.
	reservedSectors = 32
)

// fatGeometry is where things are in a FAT32 file system.
type fatGeometry struct {
	size       int64 // of the file system, in bytes; a few sectors less than the partition where they would not fit
	cluster    int64 // bytes
	fatSectors int64 // length of one of the two FATs
	clusters   int64 // data clusters; the first has number 2
}

// fatGeometryOf returns what go-diskfs makes of a partition of this size. Its FATs lack the two entries that number no
// cluster, and for some sizes (64 MiB, 4 GiB) these are the two that would not fit: then the file system is made smaller
// by sectors until the FATs are long enough.
func fatGeometryOf(partition int64) fatGeometry {
	for size := partition; ; size -= sectorSize {
		g := fatGeometry{size: size, cluster: 4096}
		switch {
		case size <= 260<<20:
			g.cluster = 512
		case size > 16<<30:
			g.cluster = 16384
		case size > 8<<30:
			g.cluster = 8192
		}
		sectors, perCluster := size/sectorSize, g.cluster/sectorSize
		g.fatSectors = (4*(sectors-reservedSectors) + sectorSize*perCluster + 7) / (sectorSize*perCluster + 8)
		g.clusters = (sectors - reservedSectors - 2*g.fatSectors) / perCluster
		if g.clusters+2 <= g.fatSectors*sectorSize/4 {
			return g
		}
	}
}

func (g fatGeometry) capacity() int64 { return g.clusters * g.cluster }

func (p *Plan) planESP() error {
	esp := p.layout.ESP
	if len(esp.Label) > 11 {
		return fmt.Errorf("label %q: %d characters, at most 11 fit", esp.Label, len(esp.Label))
	}
	for _, c := range []byte(esp.Label) {
		if c <= ' ' || c > '~' || strings.IndexByte(badInFAT, c) >= 0 {
			return fmt.Errorf("label %q: only printable ASCII without %s", esp.Label, badInFAT)
		}
	}
	size := esp.Size / align * align
	if size == 0 {
		var err error
		if size, err = smallestESP(esp.Files, esp.Free); err != nil {
			return err
		}
	}
	if size > maxFATSize {
		return fmt.Errorf("%s: FAT32 ends at %s", sizeOf(size), sizeOf(maxFATSize))
	}
	p.fat = fatGeometryOf(size)
	if p.fat.clusters < minClusters {
		return fmt.Errorf("%s are too small for FAT32, which firmware tells by %d clusters: choose %s or more",
			sizeOf(size), minClusters, sizeOf(minESP()))
	}
	used, err := FATUsage(esp.Files, p.fat.cluster)
	if err != nil {
		return err
	}
	if used+esp.Free > p.fat.capacity() {
		return fmt.Errorf("does not fit: the files need %s and %s shall stay free, but a partition of %s holds %s: "+
			"make it larger", sizeOf(used), sizeOf(esp.Free), sizeOf(size), sizeOf(p.fat.capacity()))
	}
	p.ESP = Partition{Offset: align, Size: size, Used: used, Free: p.fat.capacity() - used}
	return nil
}

// minESP is the smallest size that is FAT32.
func minESP() int64 {
	size := int64(minClusters*512) / align * align
	for fatGeometryOf(size).clusters < minClusters {
		size += align
	}
	return size
}

func smallestESP(files []File, free int64) (int64, error) {
	size := minESP()
	for {
		g := fatGeometryOf(size)
		used, err := FATUsage(files, g.cluster)
		if err != nil {
			return 0, err
		}
		missing := used + free - g.capacity()
		if missing <= 0 && g.clusters >= minClusters {
			return size, nil
		}
		size += max(align, missing/align*align)
		if size > maxFATSize {
			return 0, fmt.Errorf("does not fit: the files need %s and %s shall stay free, but FAT32 ends at %s",
				sizeOf(used), sizeOf(free), sizeOf(maxFATSize))
		}
	}
}

// FATUsage returns how many bytes files take in an empty FAT file system with this cluster size in bytes: every file its
// size rounded up to clusters and at least one, every directory as many as its entries need. It errs on names that FAT or
// the firmware's drivers would confuse. For a file system with other files in it, give those that are new: the result is
// an upper bound, since some of the directories are there already.
func FATUsage(files []File, cluster int64) (int64, error) {
	dirs := map[string]int64{} // path in upper case -> bytes of entries
	names := map[string]string{}
	short := map[string]string{}
	var used int64
	// claim checks a path and enters it and its directories.
	var claim func(p string, isDir bool) error
	claim = func(p string, isDir bool) error {
		key := strings.ToUpper(p)
		if _, known := dirs[key]; known && isDir && names[key] == p {
			return nil
		}
		dir, name := path.Split(p)
		if err := checkFATName(name); err != nil {
			return fmt.Errorf("%s: %w", p, err)
		}
		dir = strings.TrimSuffix(dir, "/")
		if dir != "" {
			if err := claim(dir, true); err != nil {
				return err
			}
		}
		if other, taken := names[key]; taken {
			return fmt.Errorf("%s and %s: one name for FAT, which ignores case", other, p)
		}
		if s := shortName(name); s != "" {
			if other, taken := short[strings.ToUpper(dir)+"/"+s]; taken {
				return fmt.Errorf("%s and %s: both would get the short name %s: rename one", other, p, s)
			}
			short[strings.ToUpper(dir)+"/"+s] = p
		}
		names[key] = p
		if isDir {
			dirs[key] = 2 * 32 // . and ..
		}
		dirs[strings.ToUpper(dir)] += 32 * int64(1+(len(name)+12)/13)
		return nil
	}
	dirs[""] = 32 // volume label
	for _, f := range files {
		if strings.HasPrefix(f.Path, "/") {
			return 0, fmt.Errorf("%s: a path on the ESP is relative to its root", f.Path)
		}
		if err := claim(strings.TrimSuffix(f.Path, "/"), strings.HasSuffix(f.Path, "/")); err != nil {
			return 0, err
		}
		if strings.HasSuffix(f.Path, "/") {
			continue
		}
		if f.Size < 0 || f.Size > maxFileSize {
			return 0, fmt.Errorf("%s: %s: FAT32 holds files of up to %d bytes", f.Path, sizeOf(f.Size), int64(maxFileSize))
		}
		used += max(roundUp(f.Size, cluster), cluster)
	}
	for _, entries := range dirs {
		used += roundUp(entries, cluster)
	}
	return used, nil
}

// badInFAT has what long names must not have, and the tilde: it is left to the short names that drivers make up.
const badInFAT = `"*/:<>?\|~`

func checkFATName(name string) error {
	for _, c := range []byte(name) {
		if c <= ' ' || c > '~' || strings.IndexByte(badInFAT, c) >= 0 {
			return fmt.Errorf("name %q: only printable ASCII without spaces and %s", name, badInFAT)
		}
	}
	if name == "" || len(name) > 255 || name[0] == '.' || name[len(name)-1] == '.' {
		return fmt.Errorf("name %q: 1 to 255 characters, no dot at either end", name)
	}
	return nil
}

// shortName returns the 8.3 name that go-diskfs gives a file without looking at others, "" if it looks and finds a free
// one by a number after a tilde.
func shortName(name string) string {
	stem, ext := name, ""
	if dot := strings.LastIndexByte(name, '.'); dot >= 0 {
		stem, ext = name[:dot], name[dot+1:]
	}
	upper := func(s string) string {
		return strings.Map(func(r rune) rune {
			switch {
			case r == '.':
				return -1
			case strings.ContainsRune("+,;=[]", r):
				return '_'
			}
			return r
		}, strings.ToUpper(s))
	}
	if stem = upper(stem); len(stem) > 8 {
		return ""
	}
	return stem + "." + upper(ext[:min(3, len(ext))])
}

// sortedFiles returns the files in the order in which they are written: by path.
func sortedFiles(files []File) []File {
	return slices.SortedFunc(slices.Values(files), func(a, b File) int { return strings.Compare(a.Path, b.Path) })
}
