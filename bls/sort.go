package bls

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Item is a boot entry of either type with what decides its place in the menu.
type Item struct {
	Path      string // on the partition: loader/entries/NAME.conf or EFI/Linux/NAME.efi
	Name      Name
	Entry     *Entry // of type 1
	SortKey   string
	MachineID string
	Version   string
}

// Foreign is a file among the entries that cannot be read as one. It is left alone.
type Foreign struct {
	Path string
	Err  error
}

// List reads the type 1 entries of a partition and names its type 2 entries, in the order of the menu. What it cannot read
// it returns, too: one odd file does not hide the others.
func List(fsys fs.FS) (items []Item, foreign []Foreign, err error) {
	for _, dir := range []string{"loader/entries", "EFI/Linux"} {
		files, err := fs.ReadDir(fsys, dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		for _, f := range files {
			file := path.Join(dir, f.Name())
			if f.IsDir() {
				continue
			}
			item, err := readItem(fsys, file)
			if err != nil {
				foreign = append(foreign, Foreign{file, err})
				continue
			}
			items = append(items, item)
		}
	}
	Sort(items)
	return items, foreign, nil
}

func readItem(fsys fs.FS, file string) (Item, error) {
	name, err := ParseName(path.Base(file))
	if err != nil {
		return Item{}, err
	}
	item := Item{Path: file, Name: name}
	if strings.HasPrefix(file, "EFI/") {
		if !strings.EqualFold(name.Ext, ".efi") {
			return item, fmt.Errorf("%w in EFI/Linux", ErrNotEntry)
		}
		return item, nil
	}
	if name.Ext != ".conf" {
		return item, fmt.Errorf("%w in loader/entries", ErrNotEntry)
	}
	f, err := fsys.Open(file)
	if err != nil {
		return item, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxEntry+1))
	if err != nil {
		return item, err
	}
	if item.Entry, err = Parse(b); err != nil {
		return item, err
	}
	e := item.Entry
	item.SortKey, item.MachineID, item.Version = e.Get("sort-key"), e.Get("machine-id"), e.Get("version")
	for _, key := range []string{"linux", "efi", "uki", "uki-url"} {
		if e.Get(key) != "" {
			return item, nil
		}
	}
	return item, errors.New("names nothing to boot: no linux, efi or uki")
}

// Sort sorts entries as systemd-boot shows them, the one that it boots first. Entries with no tries left come last. Those
// with a sort key come before those without: by sort key, machine ID, and the version, the newest first; then all by their
// names, the newest first.
func Sort(items []Item) {
	slices.SortStableFunc(items, func(a, b Item) int {
		if a.Name.Bad() != b.Name.Bad() {
			if a.Name.Bad() {
				return 1
			}
			return -1
		}
		if (a.SortKey == "") != (b.SortKey == "") {
			if a.SortKey == "" {
				return 1
			}
			return -1
		}
		if a.SortKey != "" {
			if c := cmp.Or(strings.Compare(a.SortKey, b.SortKey), strings.Compare(a.MachineID, b.MachineID),
				CompareVersions(b.Version, a.Version)); c != 0 {
				return c
			}
		}
		if c := CompareVersions(b.Name.ID, a.Name.ID); c != 0 {
			return c
		}
		// Of the same entry, the one with more tries left, then with fewer made.
		return cmp.Or(cmp.Compare(b.Name.Left, a.Name.Left), cmp.Compare(a.Name.Done, b.Name.Done))
	})
}

// CompareVersions compares two versions by the UAPI Version Format Specification: negative if a is older than b. "~" is older
// than nothing, "-" separates release from version, "^" and "." separate parts; numbers are compared as numbers, and are
// newer than letters; capitals are older than small letters.
func CompareVersions(a, b string) int {
	for {
		a, b = skipInvalid(a), skipInvalid(b)
		for _, mark := range "~" {
			if ca, cb := starts(a, byte(mark)), starts(b, byte(mark)); ca != cb {
				return newer(cb)
			} else if ca {
				a, b = a[1:], b[1:]
			}
		}
		if a == "" || b == "" {
			return cmp.Compare(len(a), len(b)) // what has more is newer
		}
		separated := false
		for _, mark := range "-^." {
			ca, cb := starts(a, byte(mark)), starts(b, byte(mark))
			if ca != cb {
				return newer(cb)
			}
			if ca {
				a, b = a[1:], b[1:]
				separated = true
				break
			}
		}
		if separated {
			continue
		}
		if isDigit(a[0]) || isDigit(b[0]) {
			na, nb := prefix(a, isDigit), prefix(b, isDigit)
			if (na == "") != (nb == "") {
				return newer(na != "")
			}
			ta, tb := strings.TrimLeft(na, "0"), strings.TrimLeft(nb, "0")
			if c := cmp.Or(cmp.Compare(len(ta), len(tb)), strings.Compare(ta, tb)); c != 0 {
				return c
			}
			a, b = a[len(na):], b[len(nb):]
			continue
		}
		la, lb := prefix(a, isLetter), prefix(b, isLetter)
		if c := strings.Compare(la, lb); c != 0 {
			return c
		}
		a, b = a[len(la):], b[len(lb):]
	}
}

func newer(yes bool) int {
	if yes {
		return 1
	}
	return -1
}

func starts(s string, c byte) bool { return s != "" && s[0] == c }
func isDigit(c byte) bool          { return c >= '0' && c <= '9' }
func isLetter(c byte) bool         { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

func prefix(s string, is func(byte) bool) string {
	k := 0
	for k < len(s) && is(s[k]) {
		k++
	}
	return s[:k]
}

// skipInvalid skips characters that mean nothing in a version.
func skipInvalid(s string) string {
	for s != "" && !isDigit(s[0]) && !isLetter(s[0]) && !strings.ContainsRune("~-^.", rune(s[0])) {
		s = s[1:]
	}
	return s
}
