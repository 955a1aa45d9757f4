package disk

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/diskfs/go-diskfs/backend"
	"github.com/diskfs/go-diskfs/partition/gpt"
)

// espType and rootTypes are from the Discoverable Partitions Specification of the UAPI group.
const espType = gpt.EFISystemPartition

var rootTypes = map[string]gpt.Type{
	"386":     "44479540-f297-41b2-9af7-d131d5f0458a",
	"amd64":   "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
	"arm":     "69dad710-2ce4-4e3c-b16c-21a1d49abed3",
	"arm64":   "b921b045-1df0-41c3-af44-4c6f280d3fae",
	"loong64": "77055800-792c-4f94-b39a-98c91b762bb6",
	"ppc64le": "c31c45e6-3f39-412e-80fb-4809c4980599",
	"riscv64": "72ec70a6-cf74-40e6-bd49-4bda08e8f224",
	"s390x":   "5eead9a9-fe09-4a1e-a1d7-520d00531306",
}

func rootType(arch string) (gpt.Type, error) {
	t, ok := rootTypes[arch]
	if !ok {
		known := strings.Join(slices.Sorted(maps.Keys(rootTypes)), ", ")
		return "", fmt.Errorf("disk image: architecture %q has no partition type: want one of %s", arch, known)
	}
	return t, nil
}

func (p *Plan) writeGPT(out *os.File) error {
	typ, err := rootType(p.layout.Arch)
	if err != nil {
		return err
	}
	entry := func(index int, part Partition, typ gpt.Type, name string, id Role) *gpt.Partition {
		return &gpt.Partition{
			Index: index,
			Start: uint64(part.Offset / sectorSize),
			End:   uint64((part.Offset+part.Size)/sectorSize - 1),
			Type:  typ,
			Name:  name,
			GUID:  ID(p.layout.Seed, id),
		}
	}
	table := &gpt.Table{
		LogicalSectorSize:  sectorSize,
		PhysicalSectorSize: sectorSize,
		ProtectiveMBR:      true,
		GUID:               ID(p.layout.Seed, DiskID),
		Partitions: []*gpt.Partition{
			entry(1, p.ESP, espType, "esp", ESPPartition),
			entry(2, p.Root, typ, "root", RootPartition),
		},
	}
	return table.Write(&region{f: out, size: p.Size}, p.Size)
}

// region is a part of a file as go-diskfs wants it. It has no Sync, so go-diskfs does not sync after each of its writes,
// and it refuses writes that would reach past its end into the next partition.
type region struct {
	f         *os.File
	off, size int64
}

var (
	_ backend.Storage      = (*region)(nil)
	_ backend.WritableFile = (*region)(nil)
)

func (r *region) Writable() (backend.WritableFile, error) { return r, nil }
func (r *region) Sys() (*os.File, error)                  { return nil, backend.ErrNotSuitable }
func (r *region) Path() string                            { return "" }
func (r *region) Stat() (fs.FileInfo, error)              { return r.f.Stat() }
func (r *region) Close() error                            { return nil }
func (r *region) Read([]byte) (int, error)                { return 0, fs.ErrInvalid }
func (r *region) Seek(int64, int) (int64, error)          { return 0, fs.ErrInvalid }

func (r *region) ReadAt(p []byte, off int64) (int, error) {
	return io.NewSectionReader(r.f, r.off, r.size).ReadAt(p, off)
}

func (r *region) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || int64(len(p)) > r.size-off {
		return 0, fmt.Errorf("%d bytes at %d do not fit into %d bytes", len(p), off, r.size)
	}
	return r.f.WriteAt(p, r.off+off)
}
