package scan

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

func statx(dir int, name string) (unix.Statx_t, error) {
	var st unix.Statx_t
	flags := unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT
	if name == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	err := unix.Statx(dir, name, flags, unix.STATX_BASIC_STATS, &st)
	return st, err
}

func device(st *unix.Statx_t) uint64 { return unix.Mkdev(st.Dev_major, st.Dev_minor) }

func inodeOf(st *unix.Statx_t) *fstree.Inode {
	i := &fstree.Inode{
		Perm:  uint32(st.Mode) &^ fstree.TypeMask,
		UID:   st.Uid,
		GID:   st.Gid,
		Mtime: fstree.Time{Sec: st.Mtime.Sec, Nsec: st.Mtime.Nsec},
	}
	switch uint32(st.Mode) & fstree.TypeMask {
	case fstree.TypeDir:
		i.Content = &fstree.Directory{}
	case fstree.TypeBlock, fstree.TypeChar:
		i.Content = fstree.Device{
			Block: uint32(st.Mode)&fstree.TypeMask == fstree.TypeBlock,
			Rdev:  uint32(unix.Mkdev(st.Rdev_major, st.Rdev_minor)),
		}
	case fstree.TypeFifo:
		i.Content = fstree.Fifo{}
	case fstree.TypeSocket:
		i.Content = fstree.Socket{}
	}
	return i
}

// xattrs reads the attributes that are kept, of the open file or of an entry of the open directory. The second way goes through
// /proc, since symlinks and devices cannot be opened without side effects. None tells that there are no others either.
func (s *scanner) xattrs(fd int, name string) (list []fstree.Xattr, none bool, err error) {
	if s.options.NoXattrs {
		return nil, false, nil
	}
	listAttrs := func(b []byte) (int, error) { return unix.Flistxattr(fd, b) }
	get := func(attr string, b []byte) (int, error) { return unix.Fgetxattr(fd, attr, b) }
	if name != "" {
		path := fmt.Sprintf("/proc/self/fd/%d/%s", fd, name)
		listAttrs = func(b []byte) (int, error) { return unix.Llistxattr(path, b) }
		get = func(attr string, b []byte) (int, error) { return unix.Lgetxattr(path, attr, b) }
	}
	var small [512]byte
	names, err := readGrowing(small[:], listAttrs)
	if errors.Is(err, unix.EOPNOTSUPP) || len(names) == 0 && err == nil {
		return nil, true, nil
	}
	if err != nil {
		return nil, false, os.NewSyscallError("listxattr", err)
	}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if !s.options.Xattrs.Keeps(attr) {
			continue
		}
		value, err := readGrowing(make([]byte, 256), func(b []byte) (int, error) { return get(attr, b) })
		if errors.Is(err, unix.ENODATA) {
			continue // removed since it was listed
		}
		if err != nil {
			return nil, false, fmt.Errorf("xattr %s: %w", attr, err)
		}
		list = append(list, fstree.Xattr{Name: attr, Value: value})
	}
	sort.Slice(list, func(a, b int) bool { return list[a].Name < list[b].Name })
	return list, false, nil
}

// readGrowing calls read with a buffer that is large enough; the kernel's limit for either kind is 64 KiB.
func readGrowing(buf []byte, read func([]byte) (int, error)) ([]byte, error) {
	n, err := read(buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 1<<16)
		n, err = read(buf)
	}
	if err != nil {
		return nil, err
	}
	return buf[:n:n], nil
}
