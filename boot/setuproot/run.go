package setuproot

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/karg"
)

// run is a plan that is being executed.
type run struct {
	sysroot    *os.File // the physical root
	repository *os.File
	image      *os.File
	erofs      *os.File // the image, mounted
	lower      *os.File // the image's root, to which transient changes are not made
	root       *os.File // the new root, as far as it has come; lower, if the root is not transient
	place      string   // where mounts are attached in the private namespace, "" if there is none
	outside    *os.File // the namespace that everybody else is in

	warnings []string
}

// Result is what happened.
type Result struct {
	Warnings []string
	Times    []StepTime
}

// StepTime is how long a step took.
type StepTime struct {
	Step Step
	Took time.Duration
}

// Execute carries out a plan. After an error nothing is mounted that was not mounted before.
func Execute(steps []Step) (Result, error) {
	// A mount namespace belongs to a thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r := &run{}
	defer r.close()
	var result Result
	var err error
	if r.outside, err = os.Open("/proc/thread-self/ns/mnt"); err != nil {
		return result, fmt.Errorf("%w (is /proc mounted?)", err)
	}
	for _, s := range steps {
		start := time.Now()
		if err = s.do(r); err != nil {
			err = fmt.Errorf("%v: %w", s, err)
			break
		}
		result.Times = append(result.Times, StepTime{s, time.Since(start)})
	}
	result.Warnings = r.warnings
	return result, errors.Join(err, r.leave())
}

func (r *run) close() {
	for _, f := range []*os.File{r.sysroot, r.repository, r.image, r.erofs, r.lower, r.root, r.outside} {
		if f != nil {
			f.Close()
		}
	}
}

// leave goes back to the namespace that everybody is in; the private one goes, and all that is mounted there.
func (r *run) leave() error {
	if r.place == "" {
		return nil
	}
	r.place = ""
	return os.NewSyscallError("setns", unix.Setns(int(r.outside.Fd()), unix.CLONE_NEWNS))
}

// visible attaches a mount in the private namespace, if there is one: older kernels use only attached mounts as layers.
func (r *run) visible(mount *os.File) error {
	if r.place == "" {
		return nil
	}
	return moveMountPath(mount, r.place)
}

// stack makes a mount the new root, or puts it over the one that there is.
func (r *run) stack(mount *os.File) error {
	if err := r.visible(mount); err != nil {
		mount.Close()
		return err
	}
	if r.lower == nil {
		r.lower = mount
	}
	r.root = mount
	return nil
}

// state opens a directory of the image's state, and makes it if need be.
func (r *run) state(image karg.Image, dir string) (*os.File, error) {
	at := r.sysroot
	path := "state/deploy/" + image.Digest.String() + "/" + dir
	for part := range strings.SplitSeq(path, "/") {
		next, _, err := ensureDir(at, part, 0o755)
		if err != nil {
			if target, ok := sharedVar(at, part, dir); ok {
				next, err = openBeneath(r.sysroot, target, unix.O_PATH|unix.O_DIRECTORY)
			}
		}
		if at != r.sysroot {
			at.Close()
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		at = next
	}
	return at, nil
}

// sharedVar reads the one symbolic link that belongs in the state: bootc has var of all deployments in one place, and in
// each deployment a link "../../os/NAME/var" to it.
func sharedVar(dir *os.File, name, want string) (target string, ok bool) {
	if name != "var" || want != "var" {
		return "", false
	}
	buf := make([]byte, 512)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", false
	}
	parts := strings.Split(string(buf[:n]), "/")
	if len(parts) != 5 || parts[0] != ".." || parts[1] != ".." || parts[2] != "os" || parts[4] != "var" ||
		parts[3] == "" || parts[3] == "." || parts[3] == ".." {
		return "", false
	}
	return "state/os/" + parts[3] + "/var", true
}
