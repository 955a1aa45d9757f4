package setuproot

import (
	"fmt"
	"strings"
)

// Mount says how a directory of the state is mounted over that of the image.
type Mount string

// The ways to mount.
const (
	None      Mount = "none"      // the image's directory stays, read-only
	Bind      Mount = "bind"      // the state's directory instead of the image's
	Overlay   Mount = "overlay"   // the image's directory, changes go to upper/ in the state's
	Transient Mount = "transient" // the image's directory, changes go to memory
)

// Config is setup-root-conf.toml.
type Config struct {
	Etc, Var      Mount
	TransientRoot bool // changes to the whole root go to memory
	// SignedCmdline tells that somebody vouches for the kernel command line: package pid1 follows its init=.
	SignedCmdline bool
}

// DefaultConfig is what counts where the file says nothing.
var DefaultConfig = Config{Etc: Overlay, Var: Bind}

// maxConfig limits the file, in bytes.
const maxConfig = 64 << 10

// ParseConfig reads a configuration. The file is TOML, of which it uses this much: comments, the tables [etc], [var],
// [root] and [init], the key mount with one of the strings of Mount, and the key transient, true or false. For [etc] and [var],
// transient = true is another way to say mount = "transient". [init] has the key signed-cmdline only, true or false. Anything
// else is an error that names the line.
func ParseConfig(text []byte) (Config, error) {
	c := DefaultConfig
	if len(text) > maxConfig {
		return c, fmt.Errorf("larger than %d bytes", maxConfig)
	}
	mounts := map[string]Mount{}
	flags := map[string]bool{}
	seen := map[string]bool{}
	table := ""
	for number, line := range strings.Split(string(text), "\n") {
		fail := func(format string, args ...any) (Config, error) {
			return c, fmt.Errorf("line %d: "+format, append([]any{number + 1}, args...)...)
		}
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if strings.HasPrefix(line, "[") {
			table = strings.TrimSpace(strings.TrimSuffix(strings.TrimPrefix(line, "["), "]"))
			if !strings.HasSuffix(line, "]") || table != "etc" && table != "var" && table != "root" && table != "init" {
				return fail("table %q: want [etc], [var], [root] or [init]", line)
			}
			if seen[table] {
				return fail("a second table [%s]", table)
			}
			seen[table] = true
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || table == "" {
			return fail("%q: want KEY = VALUE in a table", line)
		}
		if seen[table+"."+key] {
			return fail("%s: given twice", key)
		}
		seen[table+"."+key] = true
		switch {
		case key == "mount" && table != "root" && table != "init":
			m := Mount(strings.Trim(value, `"'`))
			if len(value) != len(m)+2 || m != None && m != Bind && m != Overlay && m != Transient {
				return fail(`mount = %s: want "none", "bind", "overlay" or "transient"`, value)
			}
			mounts[table] = m
		case key == "transient" && table != "init" || key == "signed-cmdline" && table == "init":
			if value != "true" && value != "false" {
				return fail("%s = %s: want true or false", key, value)
			}
			flags[table] = value == "true"
		default:
			return fail("unknown key %s in [%s]", key, table)
		}
	}
	for table, m := range map[string]*Mount{"etc": &c.Etc, "var": &c.Var} {
		if given, ok := mounts[table]; ok {
			*m = given
		} else if flags[table] {
			*m = Transient
		}
	}
	c.TransientRoot, c.SignedCmdline = flags["root"], flags["init"]
	return c, nil
}
