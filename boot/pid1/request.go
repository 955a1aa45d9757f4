package pid1

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/boot/karg"
)

// Kind says by what the physical root is found.
type Kind string

// The kinds, in the kernel's and systemd's words.
const (
	ByUUID      Kind = "UUID"      // of the file system
	ByLabel     Kind = "LABEL"     // of the file system
	ByPartUUID  Kind = "PARTUUID"  // of the partition
	ByPartLabel Kind = "PARTLABEL" // of the partition
	ByPath      Kind = "path"      // below /dev
	Auto        Kind = "gpt-auto"  // by its type, on the disk of the boot loader
)

// Source says where the physical root is.
type Source struct {
	Kind  Kind
	Value string
}

func (s Source) String() string {
	switch s.Kind {
	case Auto:
		return "the root partition on the boot loader's disk"
	case ByPath:
		return s.Value
	}
	return string(s.Kind) + "=" + s.Value
}

// Request is what the kernel command line asks of the initramfs.
type Request struct {
	Root     Source
	Types    []string // rootfstype=; none: the superblock tells
	Flags    string   // rootflags=, what is for the file system
	Mount    uintptr  // rootflags=, what is for the mount: MS_NOATIME and the like
	ReadOnly bool
	Wait     time.Duration // for the root device
	Init     string        // program; "": one of the usual ones
	// Parameters are those of modules, "module.parameter=value", by the module's name with "_" for "-".
	Parameters map[string][]string
	// Without are modules that are not to be loaded: modprobe.blacklist=
	Without map[string]bool
	Fail    OnFail
}

// OnFail says what comes after a failure.
type OnFail string

// What may come.
const (
	Halt   OnFail = "halt"
	Reboot OnFail = "reboot"
)

// defaultWait is how long the root device may take where rootwait says nothing; disks at USB take up to ten seconds.
const defaultWait = 30 * time.Second

// forEver is what rootwait without a value means.
const forEver = time.Duration(1<<63 - 1)

// ParseRequest reads a kernel command line. Of root=, init= and composefs.onfail= the first one counts, as for the composefs
// arguments: more can be appended to a signed line, by the machine's owner or an attacker (SMBIOS, unsigned addons). Signed
// says that somebody vouches for the line: only then init= counts, and only before the composefs argument, where nothing can
// be appended. For the same reason arguments after "--" are not given to the system's init. After an error, Fail is right as
// far as the line tells.
func ParseRequest(cmdline string, signed bool) (Request, error) {
	r := Request{Root: Source{Kind: Auto}, Wait: defaultWait, Fail: Halt, Parameters: map[string][]string{}, Without: map[string]bool{}}
	var problem error
	fail := func(a karg.Arg, want string) {
		if problem == nil {
			problem = fmt.Errorf("%.200s=%.200s on the kernel command line: want %s", a.Key, a.Value, want)
		}
	}
	seen := map[string]bool{}
	for _, a := range karg.Split(cmdline) {
		switch a.Key {
		case "root", "init", "composefs.onfail":
			if seen[a.Key] {
				continue
			}
			seen[a.Key] = true
		}
		switch a.Key {
		case "root":
			var ok bool
			if r.Root, ok = parseSource(a.Value); !ok {
				fail(a, "UUID=, LABEL=, PARTUUID= or PARTLABEL= with a value, /dev/NAME, or gpt-auto")
			}
		case "rootfstype":
			r.Types = nil
			for t := range strings.SplitSeq(a.Value, ",") {
				if t != "" && t != "auto" {
					r.Types = append(r.Types, t)
				}
			}
		case "rootflags":
			r.Mount, r.Flags = parseFlags(a.Value)
		case "ro", "rw":
			r.ReadOnly = a.Key == "ro"
			seen["rw"] = true
		case "rootwait":
			r.Wait = forEver
			if a.HasValue {
				n, err := strconv.ParseUint(a.Value, 10, 20)
				if err != nil {
					fail(a, "a number of seconds")
				}
				r.Wait = time.Duration(n) * time.Second
			}
		case "composefs", "composefs.digest":
			seen["init"] = true
		case "init":
			if !signed {
				continue
			}
			if !strings.HasPrefix(a.Value, "/") {
				fail(a, "an absolute path")
			}
			r.Init = a.Value
		case "composefs.onfail":
			switch OnFail(a.Value) {
			case Halt, Reboot:
				r.Fail = OnFail(a.Value)
			default:
				fail(a, "halt or reboot")
			}
		case "modprobe.blacklist":
			for name := range strings.SplitSeq(a.Value, ",") {
				r.Without[moduleName(name)] = true
			}
		default:
			if module, parameter, ok := strings.Cut(a.Key, "."); ok {
				if a.HasValue {
					parameter += "=" + quote(a.Value)
				}
				name := moduleName(module)
				r.Parameters[name] = append(r.Parameters[name], parameter)
			}
		}
	}
	// Like the kernel, read-only if nothing is said; systemd's way for a root that is found by its type is the other one.
	if !seen["rw"] {
		r.ReadOnly = r.Root.Kind != Auto
	}
	return r, problem
}

// parseSource reads the value of root=.
func parseSource(value string) (Source, bool) {
	for _, kind := range []Kind{ByUUID, ByLabel, ByPartUUID, ByPartLabel} {
		text, ok := strings.CutPrefix(value, string(kind)+"=")
		if !ok {
			text, ok = strings.CutPrefix(value, "/dev/disk/by-"+strings.ToLower(string(kind))+"/")
		}
		if ok {
			text = strings.Trim(text, `"`)
			if kind == ByUUID || kind == ByPartUUID {
				text = strings.ToLower(text)
			}
			return Source{kind, text}, text != ""
		}
	}
	switch {
	case value == "gpt-auto" || value == "/dev/gpt-auto-root":
		return Source{Kind: Auto}, true
	case strings.HasPrefix(value, "/dev/") && !strings.Contains(value, ".."):
		return Source{ByPath, value}, len(value) > len("/dev/")
	}
	return Source{}, false
}

// mountFlags are the options of mount(8) that are not for the file system.
var mountFlags = map[string]uintptr{
	"noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME, "strictatime": unix.MS_STRICTATIME,
	"lazytime": unix.MS_LAZYTIME, "nodev": unix.MS_NODEV, "nosuid": unix.MS_NOSUID, "noexec": unix.MS_NOEXEC,
	"sync": unix.MS_SYNCHRONOUS, "dirsync": unix.MS_DIRSYNC, "defaults": 0, "rw": 0, "ro": unix.MS_RDONLY,
}

// parseFlags separates the options of the mount from those of the file system.
func parseFlags(text string) (flags uintptr, data string) {
	var rest []string
	for option := range strings.SplitSeq(text, ",") {
		if f, ok := mountFlags[option]; ok {
			flags |= f
		} else if option != "" {
			rest = append(rest, option)
		}
	}
	return flags, strings.Join(rest, ",")
}

// quote keeps a value with blanks in one piece, for the kernel's parser of module parameters.
func quote(value string) string {
	if strings.ContainsAny(value, " \t\n") {
		return `"` + value + `"`
	}
	return value
}

// moduleName is the name of a module as the kernel has it.
func moduleName(name string) string { return strings.ReplaceAll(name, "-", "_") }
