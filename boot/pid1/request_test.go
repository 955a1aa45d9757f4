package pid1

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseRequest(t *testing.T) {
	none := map[string][]string{}
	plain := func(change func(*Request)) Request {
		r := Request{Root: Source{Kind: Auto}, Wait: defaultWait, Fail: Halt, Parameters: none, Without: map[string]bool{}}
		change(&r)
		return r
	}
	root := func(kind Kind, value string) Request {
		return plain(func(r *Request) { r.Root, r.ReadOnly = Source{kind, value}, true })
	}
	for line, want := range map[string]Request{
		"":                                   plain(func(*Request) {}),
		"root=gpt-auto ro":                   plain(func(r *Request) { r.ReadOnly = true }),
		"root=UUID=ABCD":                     root(ByUUID, "abcd"),
		"root=LABEL=Root":                    root(ByLabel, "Root"),
		`root="LABEL=a b"`:                   root(ByLabel, "a b"),
		"root=PARTUUID=AB":                   root(ByPartUUID, "ab"),
		"root=PARTLABEL=x":                   root(ByPartLabel, "x"),
		"root=/dev/disk/by-uuid/AB":          root(ByUUID, "ab"),
		"root=/dev/disk/by-partlabel/x":      root(ByPartLabel, "x"),
		"root=/dev/vda2":                     root(ByPath, "/dev/vda2"),
		"root=LABEL=a root=LABEL=b":          root(ByLabel, "a"),
		"root=LABEL=a ro rw":                 plain(func(r *Request) { r.Root = Source{ByLabel, "a"} }),
		"rootwait":                           plain(func(r *Request) { r.Wait = forEver }),
		"rootwait=3":                         plain(func(r *Request) { r.Wait = 3 * time.Second }),
		"rootfstype=xfs,ext4 rootfstype=xfs": plain(func(r *Request) { r.Types = []string{"xfs"} }),
		"rootflags=noatime,subvol=a,nodev,compress=zstd:3": plain(func(r *Request) {
			r.Mount, r.Flags = unix.MS_NOATIME|unix.MS_NODEV, "subvol=a,compress=zstd:3"
		}),
		"init=/bin/sh": plain(func(*Request) {}),
		"composefs.onfail=reboot composefs.onfail=halt": plain(func(r *Request) {
			r.Fail = Reboot
		}),
		`nvme-core.x=1 nvme_core.y="a b" nvme_core.z modprobe.blacklist=usb-storage,uas`: plain(func(r *Request) {
			r.Parameters = map[string][]string{"nvme_core": {"x=1", `y="a b"`, "z"}}
			r.Without = map[string]bool{"usb_storage": true, "uas": true}
		}),
	} {
		if got, err := ParseRequest(line, false); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v", line, got, err)
		}
	}
	for line, want := range map[string]string{
		"root=":                          "root= on the kernel command line: want UUID=",
		"root=UUID=":                     "want UUID=",
		"root=vda":                       "want UUID=",
		"root=/dev/../etc/passwd":        "want UUID=",
		"root=/dev/":                     "want UUID=",
		"rootwait=soon":                  "a number of seconds",
		"rootwait=99999999999":           "a number of seconds",
		"composefs.onfail=shell root=no": "want halt or reboot",
	} {
		if r, err := ParseRequest(line, false); err == nil || !strings.Contains(err.Error(), want) || r.Fail != Halt {
			t.Errorf("%q: %+v, %v", line, r, err)
		}
	}
	if r, err := ParseRequest("root=no composefs.onfail=reboot", false); err == nil || r.Fail != Reboot {
		t.Errorf("%+v, %v", r, err)
	}
}

// init= counts only on a line that somebody vouches for, and there only the first one, before the composefs argument.
func TestSignedInit(t *testing.T) {
	if r, err := ParseRequest("init=/usr/bin/app init=/bin/sh", true); err != nil || r.Init != "/usr/bin/app" {
		t.Errorf("%+v, %v", r, err)
	}
	for _, line := range []string{"composefs=00 init=/bin/sh", "composefs.digest=v1-sha512-12:00 root=/dev/sda init=/bin/sh"} {
		if r, err := ParseRequest(line, true); err != nil || r.Init != "" {
			t.Errorf("%q: appended: %+v, %v", line, r, err)
		}
	}
	if _, err := ParseRequest("init=sh", true); err == nil {
		t.Error("a relative path is accepted")
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add("root=UUID=a rootflags=ro,x rootwait=1 a.b=c -- x", true)
	f.Fuzz(func(t *testing.T, line string, signed bool) {
		r, err := ParseRequest(line, signed)
		if !signed && r.Init != "" || r.Fail != Halt && r.Fail != Reboot {
			t.Errorf("%+v", r)
		}
		if err == nil && r.Root.Kind != Auto && r.Root.Value == "" {
			t.Errorf("%+v", r)
		}
		Format(Plan(r, nil))
	})
}
