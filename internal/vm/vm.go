// Package vm runs virtual machines from tests: QEMU without acceleration, the console on the serial line.
//
// A guest is started, watched until a pattern appears on its console, and ended there. Whatever goes wrong, the test fails
// with the whole console. Not more than two guests run at the same time, over all packages: see slot.
package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what kind of machine it is.
type Config struct {
	Kernel string // a kernel to start directly; "" to start from the first disk by UEFI
	Initrd string
	Append string   // kernel command line
	Disks  []string // raw images; guests write to them
	Memory int      // MiB; 0 is 1024
	TPM    bool     // a TPM 2.0, empty
	// Network has a virtio network card, at which the guest has 10.0.2.15, and the loopback of this machine is 10.0.2.2.
	Network bool

	// What a machine keeps from one start to the next; both are made if they are not there.
	Variables string // file with the firmware's variables
	TPMState  string // directory with the state of a TPM, which the machine then has

	// Reboots is how often the guest may restart itself; the time after that, it ends.
	Reboots int
}

// Machine is a guest that runs.
type Machine struct {
	t       testing.TB
	cancel  func()
	mu      sync.Mutex
	console bytes.Buffer
	seen    int // bytes of the console that patterns have been found in
	ended   chan struct{}
}

// slowest is how long a guest may take for anything; these machines are emulated, and may share the host.
const slowest = 6 * time.Minute

// Cache returns a path below the cache that internal/setup fills, and fails the test if it is not there.
func Cache(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("CACHE")
	if dir == "" {
		dir = filepath.Join(Top(t), ".cache")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run \"make setup\"", err)
	}
	return path
}

// Top returns the top of the repository.
func Top(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
	}
	t.Fatal("no go.mod above the working directory")
	return ""
}

// slot waits until not more than one other guest runs on this machine.
func slot(t testing.TB) (release func()) {
	t.Helper()
	for {
		for k := range 2 {
			f, err := os.OpenFile(filepath.Join(os.TempDir(), fmt.Sprintf("composefs-boot-guest-%d", k)), os.O_CREATE|os.O_RDWR, 0o666)
			if err != nil {
				t.Fatal(err)
			}
			if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
				return func() { f.Close() }
			}
			f.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Start starts a guest. It is ended with the test at the latest.
func Start(t testing.TB, c Config) *Machine {
	t.Helper()
	release := slot(t)
	if c.Memory == 0 {
		c.Memory = 1024
	}
	args := []string{"-machine", "q35,accel=tcg", "-cpu", "max,-svm,-la57", "-smp", "1", "-m", fmt.Sprint(c.Memory),
		"-nodefaults", "-display", "none", "-serial", "stdio"}
	if c.Network {
		args = append(args, "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
	} else {
		args = append(args, "-net", "none")
	}
	if c.Kernel != "" {
		args = append(args, "-kernel", c.Kernel, "-initrd", c.Initrd, "-append", "console=ttyS0 panic=-1 "+c.Append)
	} else {
		if c.Variables == "" {
			c.Variables = filepath.Join(t.TempDir(), "vars.fd")
		}
		makeVariables(t, c.Variables)
		args = append(args, "-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
			"-drive", "if=pflash,format=raw,file="+c.Variables)
	}
	for _, d := range c.Disks {
		args = append(args, "-drive", "file="+d+",format=raw,if=virtio,cache=unsafe")
	}
	// The path of a socket has at most 108 bytes.
	sockets, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })
	if c.TPMState == "" && c.TPM {
		c.TPMState = filepath.Join(sockets, "state")
	}
	if c.TPMState != "" {
		socket := filepath.Join(sockets, "tpm")
		startTPM(t, socket, c.TPMState)
		args = append(args, "-chardev", "socket,id=tpm,path="+socket, "-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm")
	}
	var events *net.UnixListener
	if c.Reboots == 0 {
		args = append(args, "-no-reboot")
	} else {
		path := filepath.Join(sockets, "events")
		if events, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-qmp", "unix:"+path)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	m := &Machine{t: t, cancel: cancel, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = m, m
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		cancel()
		release()
		t.Fatalf("%v: run \"make setup\"", err)
	}
	if events != nil {
		go m.countReboots(events, c.Reboots)
	}
	go func() {
		cmd.Wait()
		if events != nil {
			events.Close()
		}
		release()
		close(m.ended)
	}()
	t.Cleanup(m.Stop)
	return m
}

// makeVariables makes the file of a firmware that has just been installed: without keys, it lets everything boot.
func makeVariables(t testing.TB, path string) {
	t.Helper()
	if _, err := os.Stat(path); err == nil {
		return
	}
	b, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	if err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatalf("%v: run \"make setup\"", err)
	}
}

// startTPM starts a TPM that listens on a socket. It ends with the guest, or with the test.
func startTPM(t testing.TB, socket, state string) {
	t.Helper()
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--ctrl", "type=unixio,path="+socket,
		"--flags", "startup-clear", "--terminate")
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: run \"make setup\"", err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 100 {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("swtpm does not make its socket")
}

// countReboots ends the guest when it restarts itself more often than it may. QEMU tells what happens to the machine by its
// protocol QMP: lines of JSON.
func (m *Machine) countReboots(events *net.UnixListener, most int) {
	conn, err := events.Accept()
	if err != nil {
		return // it ended before
	}
	defer conn.Close()
	fmt.Fprintln(conn, `{"execute": "qmp_capabilities"}`)
	lines := bufio.NewScanner(conn)
	for count := 0; lines.Scan(); {
		var line struct{ Event string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Event == "RESET" {
			if count++; count > most {
				m.cancel()
			}
		}
	}
}

// Stop ends the guest, as if its power was cut.
func (m *Machine) Stop() {
	m.cancel()
	<-m.ended
}

// Write takes what the guest prints.
func (m *Machine) Write(b []byte) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.console.Write(b)
}

// escapes are what terminals understand and people do not want to read.
var escapes = regexp.MustCompile("\x1b\\[[0-9;?]*[a-zA-Z]|\x1b[()][A-Z0-9]|\r")

// Console returns everything that the guest has printed.
func (m *Machine) Console() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return escapes.ReplaceAllString(m.console.String(), "")
}

// ErrEnded tells that a guest ended before it printed what was expected.
var ErrEnded = errors.New("the machine ended")

// Expect waits until a line that matches the pattern is printed and returns it with its groups. The test fails if it does not
// come, or if a line comes that matches never.
func (m *Machine) Expect(pattern, never string) []string {
	m.t.Helper()
	want := regexp.MustCompile(pattern)
	bad := regexp.MustCompile("a^")
	if never != "" {
		bad = regexp.MustCompile(never)
	}
	deadline := time.Now().Add(slowest)
	for {
		ended := false
		select {
		case <-m.ended:
			ended = true
		default:
		}
		text := m.Console()
		rest := text[min(m.seen, len(text)):]
		found := want.FindStringSubmatchIndex(rest)
		if b := bad.FindString(rest); b != "" && (found == nil || strings.Index(rest, b) < found[0]) {
			m.fail("%q was printed, waiting for %q", b, pattern)
		}
		if found != nil {
			m.seen += found[1]
			return want.FindStringSubmatch(rest)
		}
		if ended {
			m.fail("%v before it printed %q", ErrEnded, pattern)
		}
		if time.Now().After(deadline) {
			m.fail("%q was not printed for %v", pattern, slowest)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (m *Machine) fail(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf(format+"; the console:\n%s", append(args, m.Console())...)
}
