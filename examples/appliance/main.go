// Appliance is a whole operating system: the kernel starts it as process 1, after the root was verified, and there is nothing
// else. It tells on the console what its root is, and serves that as a web page.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	if err := serve(); err != nil {
		fmt.Println("appliance:", err)
	}
	time.Sleep(time.Second) // for the console
	syscall.Sync()
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}

func serve() error {
	page, err := about()
	if err != nil {
		return err
	}
	fmt.Print(page)
	if err := up("lo"); err != nil {
		return err
	}
	if err := up("eth0"); err != nil {
		fmt.Println("appliance: eth0:", err) // a machine without a network card serves itself
	}
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		return err
	}
	go ask()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			c.Read(make([]byte, 4096)) // whatever is asked for
			fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s", len(page), page)
		}()
	}
}

// about describes the root, and tries to change it.
func about() (string, error) {
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == "/" && f[0] != "rootfs" {
			fmt.Fprintf(&b, "appliance: the root is %s, %s %s\n", f[0], f[2], f[3])
		}
	}
	if err := os.WriteFile("/usr/bin/appliance", nil, 0o755); err != nil {
		fmt.Fprintf(&b, "appliance: it cannot be changed: %v\n", err)
	}
	start, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return "", err
	}
	seconds, _, _ := strings.Cut(string(start), " ")
	fmt.Fprintf(&b, "appliance: up %s seconds after the kernel\n", seconds)
	return b.String(), nil
}

// ask gets the page, as somebody on the network would.
func ask() {
	c, err := net.Dial("tcp", "127.0.0.1:80")
	if err == nil {
		defer c.Close()
		fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
		var answer []byte
		if answer, err = io.ReadAll(c); err == nil {
			status, _, _ := strings.Cut(string(answer), "\r\n")
			fmt.Printf("appliance: serving: %s, %d bytes\n", status, len(answer))
			return
		}
	}
	fmt.Println("appliance:", err)
}

// up brings a network interface up. Ethernet gets the address that QEMU gives to its guests.
func up(name string) error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	// struct ifreq of netdevice(7): the name, then a union.
	control := func(request uintptr, value ...byte) error {
		var r [40]byte
		copy(r[:15], name)
		copy(r[16:], value)
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&r))); errno != 0 {
			return errno
		}
		return nil
	}
	if name != "lo" {
		if err := control(syscall.SIOCSIFADDR, syscall.AF_INET, 0, 0, 0, 10, 0, 2, 15); err != nil {
			return err
		}
	}
	return control(syscall.SIOCSIFFLAGS, syscall.IFF_UP)
}
