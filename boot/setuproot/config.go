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
}

// DefaultConfig is what counts where the file says nothing.
var DefaultConfig = Config{Etc: Overlay, Var: Bind}

// maxConfig limits the file, in bytes.
const maxConfig = 64 << 10

// ParseConfig reads a configuration. The file is TOML, of which it uses this much: comments, the tables [etc], [var] and
// [root], the key mount with one of the strings of Mount, and the key transient, true or false. For [etc] and [var],
// transient = true is another way to say mount = "transient". Anything else is an error that names the line.
func ParseConfig(text []byte) (Config, error) {
	c := DefaultConfig
	if len(text) > maxConfig {
		return c, fmt.Errorf("larger than %d bytes", maxConfig)
	}
	mounts := map[string]Mount{}
	transient := map[string]bool{}
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
			if !strings.HasSuffix(line, "]") || table != "etc" && table != "var" && table != "root" {
				return fail("table %q: want [etc], [var] or [root]", line)
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
		case key == "mount" && table != "root":
			m := Mount(strings.Trim(value, `"'`))
			if len(value) != len(m)+2 || m != None && m != Bind && m != Overlay && m != Transient {
				return fail(`mount = %s: want "none", "bind", "overlay" or "transient"`, value)
			}
			mounts[table] = m
		case key == "transient" && (value == "true" || value == "false"):
			transient[table] = value == "true"
		case key == "transient":
			return fail("transient = %s: want true or false", value)
		default:
			return fail("unknown key %s in [%s]", key, table)
		}
	}
	for table, m := range map[string]*Mount{"etc": &c.Etc, "var": &c.Var} {
		if given, ok := mounts[table]; ok {
			*m = given
		} else if transient[table] {
			*m = Transient
		}
	}
	c.TransientRoot = transient["root"]
	return c, nil
}
