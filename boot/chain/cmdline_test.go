package chain

import (
	"strings"
	"testing"
)

// Every argument of the list is found as it is written in its manual, and what is like it but harmless is not.
func TestDangerous(t *testing.T) {
	bad := []string{"init=/bin/sh", "rdinit=/bin/sh", "initrd=/x", "initrdmem=0x1,1", "dtb=x", "efivar_ssdt=x", "kgdboc=ttyS0", "kgdboe=@/", "kgdbwait",
		"kdb", "rd.break", "rd.break=pre-mount", "break", "break=premount", "rd.shell", "rd.shell=1", "rd.cmdline=ask", "single", "s", "S", "1", "rescue",
		"rd.rescue", "emergency", "rd.emergency", "-b", "systemd.unit=rescue.target", "systemd.unit=emergency.target", "rd.systemd.unit=rescue.target",
		"systemd.wants=debug-shell.service", "systemd.unit=runlevel1.target", "systemd.debug_shell", "systemd.debug_shell=tty1", "systemd.debug-shell=1",
		"rd.systemd.debug_shell", "systemd.crash_shell", "systemd.confirm_spawn=/dev/console", "systemd.confirm_spawn", "systemd.run=/bin/sh",
		"systemd.setenv=LD_PRELOAD=/var/x", "systemd.set_credential=a:b", "systemd.set_credential_binary=a:b", "rd.systemd.pull=x", "systemd.mount-extra=x",
		"mount.usr=/dev/sdb", "systemd.volatile=yes", "roothash=0", "usrhash=0", "nfsroot=x", "netroot=x", "rd.live.image", `"init=/bin/sh x"`,
		"'rd.break'", `in"it"=/x`, "rd.sh\"ell\"", "root=a root=b", "root=a\n\troot=b"}
	for _, line := range bad {
		links := dangerous("quiet "+line+" rw", "", nil)
		if len(links) == 0 {
			t.Errorf("%s: not found", line)
			continue
		}
		name, _, _ := strings.Cut(strings.Trim(strings.Fields(line)[0], `"'`), "=")
		if strings.HasPrefix(line, "root=") {
			name = "root"
		}
		if name = strings.ReplaceAll(name, `"`, ""); len(dangerous("quiet "+line+" rw", "", []string{name})) > 0 {
			t.Errorf("%s: not permitted by --allow %s", line, name)
		}
		if len(dangerous("quiet "+line+" rw", "", []string{"other", name + "=other"})) == 0 {
			t.Errorf("%s: permitted by something else", line)
		}
	}
	for _, line := range []string{"", "root=UUID=x ro", "root=a root=a", "rd.shell=0", "systemd.debug_shell=no", "systemd.crash_shell=0", "rd.emergency=halt",
		"systemd.unit=multi-user.target", "console=ttyS0,115200", "5", "initcall_debug", "rd.info", "rescue=x", "mitigations=auto", "systemd.volatile=no",
		"quiet\x00 init=/bin/sh", "composefs.onfail=halt"} {
		if links := dangerous(line, "", nil); len(links) > 0 {
			t.Errorf("%s: %s", line, links[0])
		}
	}
	if len(dangerous("systemd.unit=rescue.target", "", []string{"systemd.unit=rescue.target"})) > 0 {
		t.Error("not permitted by its whole text")
	}
}

// What is listed says why.
func TestDangersSayWhy(t *testing.T) {
	seen := map[string]bool{}
	for _, d := range dangers {
		if d.why == "" {
			t.Errorf("%v: no reason", d.names)
		}
		for _, name := range d.names {
			if seen[name] || name != plain(name) {
				t.Errorf("%s: twice, or never found", name)
			}
			seen[name] = true
		}
	}
}
