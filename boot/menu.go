package boot

import (
	"cmp"
	"io"
	"os"
	"path"
	"slices"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/uki"
)

// first finds the boot entry that comes first in the menu when the plan is carried out, if it is none of the plan's. A default
// in loader.conf or in the firmware's variables is not looked at.
func (e ESPPlan) first(root *os.Root) (string, error) {
	items, _, err := bls.List(root.FS())
	if err != nil {
		return "", err
	}
	var planned []bls.Item
	changed := map[string]bool{}
	for _, f := range e.Files {
		for _, name := range append(f.Replaces, f.Path) {
			changed[name] = true
		}
		name, ok := f.entry()
		if !ok {
			continue
		}
		r, err := f.Open()
		if err != nil {
			return "", err
		}
		item := bls.Item{Path: f.Path, Name: name}
		if at, ok := r.(io.ReaderAt); ok && path.Dir(f.Path)+"/" == unifiedDir {
			sortUnified(&item, uki.Content{ReaderAt: at, Size: f.Size})
		} else if b, err := io.ReadAll(r); err == nil {
			sortEntry(&item, b)
		}
		r.Close()
		planned = append(planned, item)
	}
	if len(planned) == 0 {
		return "", nil
	}
	items = slices.DeleteFunc(items, func(i bls.Item) bool { return changed[i.Path] })
	for k := range items {
		info, err := root.Lstat(items[k].Path)
		if err != nil || !info.Mode().IsRegular() || items[k].Entry != nil {
			continue
		}
		f, err := root.Open(items[k].Path)
		if err != nil {
			return "", err
		}
		sortUnified(&items[k], uki.Content{ReaderAt: f, Size: info.Size()})
		f.Close()
	}
	all := append(items, planned...)
	bls.Sort(all)
	if slices.ContainsFunc(planned, func(i bls.Item) bool { return i.Path == all[0].Path }) {
		return "", nil
	}
	return all[0].Path, nil
}

// sortUnified fills in what decides the place of a UKI in the menu, as systemd-boot reads it from .osrel. What is no UKI is
// sorted by its name.
func sortUnified(item *bls.Item, c uki.Content) {
	m, _, err := uki.Read(c, c.Size)
	if err != nil {
		return
	}
	text, err := sectionText(m, 0, ".osrel")
	if err != nil {
		return
	}
	v := parseOSRelease(text)
	item.SortKey = cmp.Or(v["IMAGE_ID"], v["ID"])
	item.Version = cmp.Or(v["IMAGE_VERSION"], v["VERSION"], v["VERSION_ID"], v["BUILD_ID"])
}

func sortEntry(item *bls.Item, text []byte) {
	e, err := bls.Parse(text)
	if err != nil {
		return
	}
	item.Entry, item.SortKey, item.MachineID, item.Version = e, e.Get("sort-key"), e.Get("machine-id"), e.Get("version")
}
