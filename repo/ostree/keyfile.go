package ostree

import (
	"fmt"
	"slices"
	"strings"
)

// Keyfile is a parsed key file of GLib, such as the config of a repository: groups in brackets, and keys with values.
type Keyfile struct {
	groups []string
	values map[[2]string]string
}

// ParseKeyfile parses a key file. Of a key that is there twice the last value counts, as in GLib.
func ParseKeyfile(text []byte) (Keyfile, error) {
	k := Keyfile{values: map[[2]string]string{}}
	group, any := "", false
	for n, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if name, ok := strings.CutPrefix(line, "["); ok {
			if group, ok = strings.CutSuffix(name, "]"); !ok {
				return k, fmt.Errorf("line %d: %.60q: a group ends with ]", n+1, line)
			}
			k.groups, any = append(k.groups, group), true
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || !any {
			return k, fmt.Errorf("line %d: %.60q: want KEY=VALUE below a [GROUP]", n+1, line)
		}
		k.values[[2]string{group, strings.TrimSpace(key)}] = strings.TrimSpace(value)
	}
	return k, nil
}

// Groups returns the names of the groups in their order: core, or remote "NAME".
func (k Keyfile) Groups() []string { return k.groups }

// Keys returns the keys of a group, sorted.
func (k Keyfile) Keys(group string) []string {
	var keys []string
	for at := range k.values {
		if at[0] == group {
			keys = append(keys, at[1])
		}
	}
	slices.Sort(keys)
	return keys
}

// Get returns the value of a key, and whether it is there.
func (k Keyfile) Get(group, key string) (string, bool) {
	v, ok := k.values[[2]string{group, key}]
	return v, ok
}

// Bool returns the value of a key that is true or false, and otherwise if it is not there.
func (k Keyfile) Bool(group, key string, otherwise bool) (bool, error) {
	v, ok := k.Get(group, key)
	switch {
	case !ok:
		return otherwise, nil
	case v == "true" || v == "1":
		return true, nil
	case v == "false" || v == "0":
		return false, nil
	}
	return false, fmt.Errorf("[%s] %s=%s: want true or false", group, key, v)
}

// List returns the values of a key, which are separated by semicolons.
func (k Keyfile) List(group, key string) []string {
	v, _ := k.Get(group, key)
	return strings.FieldsFunc(v, func(r rune) bool { return r == ';' })
}
