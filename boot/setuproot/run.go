package setuproot

import (
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

	warnings []string
	times    []StepTime
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

// Execute carries out a plan, whose last step is the one that attaches the new root. After an error nothing is mounted that
// was not mounted before.
func Execute(plan []Step) (Result, error) {
	r := &run{}
	defer r.close()
	build, attach := plan[:len(plan)-1], plan[len(plan)-1:]
	var err error
	if _, ok := plan[0].(stepPrivate); ok {
		err = onOwnThread(func() error { return r.privately(build) })
	} else {
		err = r.steps(build)
	}
	if err == nil {
		err = r.steps(attach)
	}
	return Result{r.warnings, r.times}, err
}

func (r *run) steps(steps []Step) error {
	for _, s := range steps {
		start := time.Now()
		if err := s.do(r); err != nil {
			return fmt.Errorf("%v: %w", s, err)
		}
		r.times = append(r.times, StepTime{s, time.Since(start)})
	}
	return nil
}

// privately carries out steps that begin with stepPrivate, and leaves the new root attached to nothing.
func (r *run) privately(steps []Step) error {
	if err := r.steps(steps); err != nil {
		return err
	}
	tree, err := cloneTree(int(r.root.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	if r.root != r.lower {
		r.root.Close()
	}
	r.root = tree
	return nil
}

// onOwnThread calls a function on a thread that ends after it. A mount namespace belongs to a thread: with it goes the
// namespace and all that is mounted there, and the caller stays where it is, with its root directory and its working
// directory, which the way back by setns(2) would change.
func onOwnThread(do func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked, so that the thread ends with this goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread would live on, and /proc/self is what it sees. While it is held here it must be another one.
			defer runtime.UnlockOSThread()
			result <- onOwnThread(do)
			return
		}
		result <- do()
	}()
	return <-result
}

func (r *run) close() {
	for _, f := range []*os.File{r.sysroot, r.repository, r.image, r.erofs, r.lower, r.root} {
		if f != nil {
			f.Close()
		}
	}
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

// state opens a directory of the image's state, and makes it before, and those above it, if it may.
func (r *run) state(image karg.Image, dir string, create bool) (f *os.File, made bool, err error) {
	at := r.sysroot
	path := "state/deploy/" + image.Digest.String() + "/" + dir
	for part := range strings.SplitSeq(path, "/") {
		var next *os.File
		if create {
			next, made, err = ensureDir(at, part, 0o755)
		} else {
			next, err = openBeneath(at, part, unix.O_PATH|unix.O_DIRECTORY)
		}
		if err != nil {
			if target, ok := sharedVar(at, part, dir); ok {
				next, err = openBeneath(r.sysroot, target, unix.O_PATH|unix.O_DIRECTORY)
			}
		}
		if at != r.sysroot {
			at.Close()
		}
		if err != nil {
			return nil, false, fmt.Errorf("%s: %w", path, err)
		}
		at = next
	}
	return at, made, nil
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
