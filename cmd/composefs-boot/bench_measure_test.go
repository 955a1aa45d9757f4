//go:build bench

package main

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// invocation is a program to measure.
type invocation struct {
	args    []string
	env     []string
	in, out string // files for standard input and output; "" for none
	exit    int    // the exit code that it is to have
}

// sample is one run of a program.
type sample struct {
	wall time.Duration
	peak int64 // KiB
}

// A program's peak begins with what the process has that starts it. So each is started by a fresh process of this test, which
// has little, and prints what the program took.
func init() {
	want := os.Getenv("BENCH_MEASURE")
	if want == "" {
		return
	}
	os.Unsetenv("BENCH_MEASURE")
	cmd := exec.Command(os.Args[1], os.Args[2:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.NewFile(3, "output"), os.Stderr
	start := time.Now()
	err := cmd.Run()
	wall := time.Since(start)
	if cmd.ProcessState == nil || fmt.Sprint(cmd.ProcessState.ExitCode()) != want {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(wall.Nanoseconds(), cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
	os.Exit(0)
}

func (c invocation) measure(t *testing.T) sample {
	t.Helper()
	cmd := exec.Command(os.Args[0], c.args...)
	cmd.Env = append(append(os.Environ(), c.env...), fmt.Sprintf("BENCH_MEASURE=%d", c.exit))
	out, err := os.Create(cmp.Or(c.out, os.DevNull))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.ExtraFiles = []*os.File{out}
	if c.in != "" {
		f, err := os.Open(c.in)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.Stdin = f
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	printed, err := cmd.Output()
	if err != nil {
		t.Fatalf("%q: %v: %s", c.args, err, errs.String())
	}
	var s sample
	if _, err := fmt.Sscan(string(printed), &s.wall, &s.peak); err != nil {
		t.Fatalf("%q: %v: %q", c.args, err, printed)
	}
	return s
}

// us is this program, quiet.
func (b *bench) us(args ...string) invocation {
	return invocation{args: append([]string{b.ours, "-q"}, args...)}
}

// them is cfsctl.
func (b *bench) them(args ...string) invocation {
	return invocation{args: append([]string{b.cfsctl}, args...)}
}

// cTool is mkcomposefs, the C tool.
func cTool(t *testing.T, args ...string) invocation {
	return invocation{args: vm.Peer(t, "usr/bin/mkcomposefs", args...).Args}
}

// rival is a program in a comparison. It is called with the number of the run.
type rival struct {
	name         string
	run          func(k int) sample
	time, memory float64 // what the ratio of ours to this one is to be at most; 0: nothing is said
}

// always is the rival of an invocation that is the same in every run.
func always(t *testing.T, name string, c invocation, targets ...float64) rival {
	s := rival{name: name, run: func(int) sample { return c.measure(t) }}
	return s.atMost(targets...)
}

func (s rival) atMost(targets ...float64) rival {
	if len(targets) > 0 {
		s.time = targets[0]
	}
	if len(targets) > 1 {
		s.memory = targets[1]
	}
	return s
}

const installCfsctl = "cfsctl is not there: cargo install --root .cache/cargo composefs-ctl@0.9.4"

// compare runs this program and its peers in turn and prints a row for each peer. It returns our median. A size other than 0
// is of rows that differ in nothing else, as the drawings show them.
func (b *bench) compare(what string, size, runs int, ours func(k int) sample, peers ...rival) sample {
	samples := make([][]sample, 1+len(peers))
	for k := range runs {
		samples[0] = append(samples[0], ours(k))
		for n, p := range peers {
			if p.name != "cfsctl" || b.cfsctl != "" {
				samples[n+1] = append(samples[n+1], p.run(k))
			}
		}
	}
	us := median(samples[0])
	b.record(what, size, "composefs-boot", us)
	title := what
	if size > 0 {
		title += ": " + countOrSize(size)
	}
	if len(peers) == 0 {
		b.printf("%-52s %v\n", title, us)
	}
	for n, p := range peers {
		if len(samples[n+1]) == 0 {
			b.printf("%-52s %v   %s\n", title, us, installCfsctl)
			continue
		}
		them := median(samples[n+1])
		b.record(what, size, p.name, them)
		b.printf("%-52s %v   %-17s %v   %-14s %s\n", title, us, p.name, them,
			ratio(float64(us.wall)/float64(them.wall), p.time), ratio(float64(us.peak)/float64(them.peak), p.memory))
	}
	return us
}

func (b *bench) record(what string, size int, program string, s sample) {
	b.csv = append(b.csv, []string{what, strconv.Itoa(size), program, fmt.Sprintf("%.4f", s.wall.Seconds()), strconv.FormatInt(s.peak, 10)})
}

// countOrSize writes whole MiB as such, and other numbers by thousands.
func countOrSize(n int) string {
	if n%(1<<20) == 0 {
		return fmt.Sprintf("%d MiB", n>>20)
	}
	text := strconv.Itoa(n)
	for k := len(text) - 3; k > 0; k -= 3 {
		text = text[:k] + "," + text[k:]
	}
	return text
}

func (s sample) String() string {
	return fmt.Sprintf("%8.3fs %6.1f MiB", s.wall.Seconds(), float64(s.peak)/1024)
}

func ratio(have, target float64) string {
	if target == 0 {
		return fmt.Sprintf("x%.2f", have)
	}
	return fmt.Sprintf("x%.2f (%.2f)", have, target)
}

func median(list []sample) sample {
	var walls []time.Duration
	var peaks []int64
	for _, s := range list {
		walls, peaks = append(walls, s.wall), append(peaks, s.peak)
	}
	slices.Sort(walls)
	slices.Sort(peaks)
	return sample{walls[len(walls)/2], peaks[len(peaks)/2]}
}
