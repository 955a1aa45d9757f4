package fuse

import (
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	gofuse "github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Mounted is an image that is being served.
type Mounted struct {
	Dir    string // absolute
	server *gofuse.Server
}

// Mount serves the image at a directory until somebody unmounts it. Root mounts by itself; for others the program fusermount3
// does it. The image can be read when it returns.
func (i Image) Mount(dir string) (*Mounted, error) {
	m, err := serve(newFiles(i), dir)
	if err != nil {
		return nil, fmt.Errorf("mount %s with FUSE: %w", dir, err)
	}
	return m, nil
}

func serve(f *files, dir string) (*Mounted, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	// What the kernel has kept of a server that is gone may answer the first question, but not the second.
	resolved, err := filepath.EvalSymlinks(dir)
	if err == nil {
		var st unix.Statfs_t
		if dead := unix.Statfs(resolved, &st); dead == unix.ENOTCONN {
			err = dead
		}
	}
	if errors.Is(err, unix.ENOTCONN) {
		return nil, fmt.Errorf("%w: an earlier mount was left there: fusermount3 -u %s", unix.ENOTCONN, dir)
	}
	if err != nil {
		return nil, err
	}
	dir = resolved
	info, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, unix.ENOTDIR
	}
	if _, err := os.Stat("/dev/fuse"); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: load the kernel's module fuse", err)
	}
	options := &gofuse.MountOptions{
		FsName: f.image.Source, Name: "composefs", Options: []string{"ro"},
		EnableSymlinkCaching: true, ExplicitDataCacheControl: true,
		Logger: log.New(f.image.Errors, "", 0),
	}
	if os.Geteuid() == 0 {
		options.DirectMountStrict = true
		options.AllowOther = true
		options.Options = append(options.Options, "default_permissions")
		options.EnableAcl = true
	}
	server, err := gofuse.NewServer(f, dir, options)
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return nil, errors.New("fusermount3 is not there, which mounts for users: install fuse3")
	case err != nil && strings.HasPrefix(err.Error(), "fusermount exited"):
		return nil, errors.New("fusermount3 refuses, for the reason that it has printed")
	case err != nil:
		return nil, err
	}
	// The kernel keeps whoever comes waiting until the first answer. The library's WaitMount would open a file here: when the
	// process is killed at that moment, the kernel waits for its answer to the closing of that file, for ever.
	go server.Serve()
	return &Mounted{dir, server}, nil
}

// Wait returns when the image is unmounted and nobody uses it.
func (m *Mounted) Wait() { m.server.Wait() }

// Unmount unmounts the image. One that is in use is taken from its place, and served until nobody uses it.
func (m *Mounted) Unmount() (inUse bool, err error) {
	if m.unmount(0) == nil {
		return false, nil
	}
	return true, m.unmount(unix.MNT_DETACH)
}

func (m *Mounted) unmount(flags int) error {
	err := unix.Unmount(m.Dir, flags|unix.UMOUNT_NOFOLLOW)
	if err == nil {
		return nil
	}
	if err != unix.EPERM {
		return &os.PathError{Op: "unmount", Path: m.Dir, Err: err}
	}
	args := []string{"-u", m.Dir}
	if flags&unix.MNT_DETACH != 0 {
		args = []string{"-u", "-z", m.Dir}
	}
	out, err := exec.Command("fusermount3", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("unmount %s: %w: %s", m.Dir, err, strings.TrimSpace(string(out)))
	}
	return nil
}
