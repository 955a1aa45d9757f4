package chain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/uki"
)

// ESP verifies everything that can be booted from an EFI system partition by systemd-boot. An error means that the check could
// not be done, or that there is nothing to boot; what is wrong is in the report.
func ESP(ctx context.Context, fsys fs.FS, o Options) (Report, error) {
	v, err := newVerifier(ctx, fsys, o)
	if err != nil {
		return Report{}, err
	}
	defer v.close()
	r := Report{Loader: v.loader()}
	items, foreign, err := bls.List(fsys)
	if err != nil {
		return r, err
	}
	if len(items) == 0 {
		return r, errors.New("nothing to boot in EFI/Linux and loader/entries: want an EFI system partition or a UKI")
	}
	for _, item := range items {
		var e Entry
		if item.Entry == nil {
			e, err = v.uki(item.Path, []string{"loader/addons"})
		} else {
			e, err = v.type1(item)
		}
		if err != nil {
			return r, fmt.Errorf("%s: %w", item.Path, err)
		}
		r.Entries = append(r.Entries, e)
	}
	for _, f := range foreign {
		kind := Type1
		if strings.HasPrefix(f.Path, "EFI/") {
			kind = Type2
		}
		r.Entries = append(r.Entries, Entry{f.Path, kind, []Link{{Signature, "", Warning, f.Err.Error(), "boot loaders pass it over: remove it"}}})
	}
	return r, nil
}

// names returns the files of a directory with this ending, sorted; none if it is not there.
func (v *verifier) names(dir, ending string) []string {
	var list []string
	entries, _ := fs.ReadDir(v.fsys, dir)
	for _, e := range entries {
		if !e.IsDir() && strings.HasSuffix(strings.ToLower(e.Name()), ending) {
			list = append(list, path.Join(dir, e.Name()))
		}
	}
	return list
}

// loader checks the boot loaders that firmware may start, and the configuration of systemd-boot.
func (v *verifier) loader() []Link {
	var links []Link
	for _, dir := range []string{"EFI/systemd", "EFI/BOOT"} {
		for _, name := range v.names(dir, ".efi") {
			_, more := v.program(name, [2]Kind{Loader, Loader}, name)
			links = append(links, more...)
		}
	}
	if len(links) == 0 {
		links = []Link{{Loader, "", Warning, "none in EFI/systemd and EFI/BOOT: firmware has to start the UKIs", ""}}
	}
	editor := true // systemd-boot's default
	if f, err := v.fsys.Open("loader/loader.conf"); err == nil {
		defer f.Close()
		text, err := io.ReadAll(io.LimitReader(f, maxText))
		if err == nil {
			for line := range strings.Lines(string(text)) {
				if words := strings.Fields(line); len(words) == 2 && words[0] == "editor" {
					editor = !slices.Contains(off, strings.ToLower(words[1]))
				}
			}
		}
	}
	if editor {
		return append(links, Link{LoaderConf, "", Warning,
			"the boot menu has an editor: where no signature covers the command line, whoever is at the console changes it",
			"write \"editor no\" into loader/loader.conf"})
	}
	return append(links, Link{LoaderConf, "", OK, "editor no", ""})
}

// extras are the directories with what the stub adds to a UKI. Names with counted boots may have theirs under the bare name.
func extras(name string) []string {
	list := []string{name + ".extra.d"}
	if n, err := bls.ParseName(path.Base(name)); err == nil && n.Counted {
		list = append(list, path.Join(path.Dir(name), n.ID+n.Ext+".extra.d"))
	}
	return list
}

// addons checks what the stub would add to a UKI.
func (v *verifier) addons(dirs []string) []Link {
	var links []Link
	for _, dir := range dirs {
		for _, name := range v.names(dir, ".addon.efi") {
			links = append(links, v.addon(name)...)
		}
		entries, _ := fs.ReadDir(v.fsys, dir)
		for _, e := range entries {
			if n := strings.ToLower(e.Name()); strings.HasSuffix(n, ".cred") || strings.HasSuffix(n, ".raw") {
				links = append(links, Link{Addon, path.Join(dir, e.Name()), Unchecked,
					"a credential or extension: the initramfs decides whether it is taken", ""})
			}
		}
	}
	return links
}

func (v *verifier) addon(name string) []Link {
	m, links := v.program(name, [2]Kind{Addon, Addon}, name)
	if m == nil || links[0].Status == Broken {
		// Firmware under Secure Boot does not load it: that is no way in.
		links = links[:1]
		links[0].Status, links[0].Found = Warning, links[0].Found+": with Secure Boot it is left out"
		return links
	}
	sections := sectionsOf(m)
	if !m.IsAddon() {
		return append(links, Link{Addon, name, Warning, "a UKI, or nothing to add: the stub passes it over", "remove it"})
	}
	adds := []string{}
	for _, s := range sections {
		if slices.Contains([]string{".dtb", ".dtbauto", ".ucode", ".initrd"}, s.Name) {
			adds = append(adds, fmt.Sprintf("%s of %d bytes", s.Name, s.Size))
		}
	}
	if s := find(sections, ".cmdline"); s != nil {
		text, err := textOf(s)
		if err != nil {
			return append(links, Link{Addon, name, Broken, err.Error(), "build it again"})
		}
		if bad := v.appended(text, name); len(bad) > 0 {
			return append(links, bad...)
		}
		adds = append(adds, fmt.Sprintf("%.200q", strings.TrimSpace(text)))
	}
	links[0].Found += "; appends " + strings.Join(adds, ", ")
	return links
}

// type1 verifies a type 1 entry.
func (v *verifier) type1(item bls.Item) (Entry, error) {
	for _, key := range []string{"uki", "efi"} {
		value := item.Entry.Get(key)
		if value == "" || item.Entry.Get("linux") != "" {
			continue
		}
		e, err := v.uki(onPartition(value), []string{"loader/addons"})
		e.Path, e.Type = item.Path, Type1
		if options := item.Entry.Options(); options != "" {
			e.Links = append(e.Links, Link{Cmdline, "", Warning, "the entry has options, which count only without Secure Boot", "leave them out"})
		}
		return e, err
	}
	e := Entry{Path: item.Path, Type: Type1}
	e.Links = []Link{{Signature, "", Broken, "a type 1 entry: nothing signs its command line and its initramfs, and who writes to the ESP chooses the image",
		"boot a signed UKI: install with --uki"}}
	links, images := v.cmdline(item.Entry.Options(), "")
	e.Links = append(e.Links, links...)
	b := boot{images: images}
	open := func(kind Kind, value string) uki.Content {
		c, err := v.open(onPartition(value))
		if err != nil {
			e.Links = append(e.Links, Link{kind, value, Broken, "cannot be read: " + err.Error(), "install it again"})
		}
		return c
	}
	b.linux = open(Kernel, item.Entry.Get("linux"))
	var parts []uki.Content
	for _, value := range item.Entry.All("initrd") {
		if c := open(Initramfs, value); c.IsSet() {
			parts = append(parts, c)
		}
	}
	if len(parts) > 0 {
		b.initrd = uki.Join(parts...)
	}
	e.Links = append(e.Links, v.initramfs([]boot{b})...)
	if !b.linux.IsSet() {
		return e, nil
	}
	links, err := v.rest([]boot{b})
	e.Links = append(e.Links, links...)
	return e, err
}

// onPartition turns a path of an entry into a name on the partition.
func onPartition(value string) string {
	return strings.TrimPrefix(path.Clean("/"+strings.ReplaceAll(value, `\`, "/")), "/")
}
