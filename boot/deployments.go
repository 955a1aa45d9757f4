package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/bls"
	"github.com/composefs-boot/composefs-boot/boot/karg"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/uki"
)

// Entry is a boot entry on an ESP with the image that it boots. Of a UKI with several profiles, that is the first one's.
type Entry struct {
	bls.Item
	Cmdline string
	Image   karg.Image // the zero value if its command line names none
	Signed  bool       // a UKI with a signature; whose, and whether it is good, was not looked at
}

// Deployed is a system that is installed, its state and what boots it.
type Deployed struct {
	Digest  fsverity.Digest
	Origin  Origin
	Pinned  bool    // it is never pruned
	Entries []Entry // in the order of the menu; none: it cannot be chosen
}

// Host is a machine with its systems, as it was found.
type Host struct {
	Root, ESP   string     // the mounted physical root and EFI system partition
	Deployments []Deployed // those that the menu has, in its order, then the others
	Entries     []Entry    // all, of others too, in the order of the menu
}

// ReadHost finds the systems that are installed on a machine.
func ReadHost(dir, esp string) (*Host, error) {
	h := &Host{Root: dir, ESP: esp}
	var err error
	if h.Entries, err = readEntries(esp); err != nil {
		return nil, fmt.Errorf("%s: %w", esp, err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	names, err := fs.ReadDir(root.FS(), "state/deploy")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, n := range names {
		digest, err := fsverity.ParseHex(n.Name())
		if err != nil || !n.IsDir() {
			continue // somebody else's
		}
		d := Deployed{Digest: digest}
		if d.Origin, err = readOrigin(root, digest); err != nil {
			return nil, err
		}
		_, err = root.Lstat(pinPath(digest))
		d.Pinned = err == nil
		for _, e := range h.Entries {
			if e.Image.Digest == digest {
				d.Entries = append(d.Entries, e)
			}
		}
		h.Deployments = append(h.Deployments, d)
	}
	slices.SortStableFunc(h.Deployments, func(a, b Deployed) int { return h.place(a.Digest) - h.place(b.Digest) })
	return h, nil
}

// place is where the menu has a system.
func (h *Host) place(d fsverity.Digest) int {
	if k := slices.IndexFunc(h.Entries, func(e Entry) bool { return e.Image.Digest == d }); k >= 0 {
		return k
	}
	return len(h.Entries)
}

// Find returns the deployment of an image, nil if there is none.
func (h *Host) Find(d fsverity.Digest) *Deployed {
	k := slices.IndexFunc(h.Deployments, func(o Deployed) bool { return o.Digest == d })
	if k < 0 {
		return nil
	}
	return &h.Deployments[k]
}

// Next returns the deployment that the machine boots if nobody chooses: that of the first entry in the menu. It is nil if the first
// entry is somebody else's. A default in loader.conf or in the firmware's variables is not looked at.
func (h *Host) Next() *Deployed {
	if len(h.Entries) == 0 {
		return nil
	}
	return h.Find(h.Entries[0].Image.Digest)
}

// Bad reports whether the boot loader has given it up: none of its entries has a try left.
func (d Deployed) Bad() bool {
	return len(d.Entries) > 0 && !slices.ContainsFunc(d.Entries, func(e Entry) bool { return !e.Name.Bad() })
}

// Version is what the menu sorts the system by; "" if it has none.
func (d Deployed) Version() string {
	if len(d.Entries) == 0 {
		return ""
	}
	return d.Entries[0].Version
}

// Arguments are those of the command line of a deployment besides what names its image.
func (d Deployed) Arguments() []string {
	if len(d.Entries) == 0 {
		return nil
	}
	line, forInit, _ := strings.Cut(d.Entries[0].Cmdline, " -- ")
	var list []string
	for _, a := range karg.Split(line) {
		switch {
		case a.Key == karg.KeyDigest || a.Key == karg.KeyV2:
		case !a.HasValue:
			list = append(list, a.Key)
		case strings.ContainsAny(a.Value, " \t"):
			list = append(list, a.Key+`="`+a.Value+`"`)
		default:
			list = append(list, a.Key+"="+a.Value)
		}
	}
	if forInit != "" {
		list = append(list, "-- "+forInit)
	}
	return list
}

// readEntries reads the entries of both types on an ESP, in the order of the menu. What is no entry is left out.
func readEntries(dir string) ([]Entry, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	items, _, err := bls.List(root.FS())
	if err != nil {
		return nil, err
	}
	var entries []Entry
	for _, item := range items {
		e := Entry{Item: item}
		if e.Item.Entry != nil {
			e.Cmdline = e.Item.Entry.Options()
		} else if err := e.readUnified(root); err != nil {
			return nil, err
		}
		// One that is malformed boots nothing of ours.
		if c, err := karg.Parse(e.Cmdline); err == nil {
			e.Image = c.Images[0]
		}
		entries = append(entries, e)
	}
	sortEntries(entries)
	return entries, nil
}

func sortEntries(entries []Entry) {
	var items []bls.Item
	for _, e := range entries {
		items = append(items, e.Item)
	}
	bls.Sort(items)
	place := map[string]int{}
	for k, i := range items {
		place[i.Path] = k
	}
	slices.SortFunc(entries, func(a, b Entry) int { return place[a.Path] - place[b.Path] })
}

// readUnified looks into a UKI. What is none is an entry nevertheless, by its name.
func (e *Entry) readUnified(root *os.Root) error {
	info, err := root.Lstat(e.Path)
	if err != nil || !info.Mode().IsRegular() {
		return err
	}
	f, err := root.Open(e.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	c := uki.Content{ReaderAt: f, Size: info.Size()}
	sortUnified(&e.Item, c)
	if m, _, err := uki.Read(c, c.Size); err == nil {
		e.Cmdline, _ = sectionText(m, 0, ".cmdline")
	}
	if p, err := uki.ParsePE(c, c.Size); err == nil {
		list, err := p.Signatures()
		e.Signed = err != nil || len(list) > 0
	}
	return nil
}

// Rename is a boot entry that gets another name: only its counter is another one.
type Rename struct {
	From string `json:"from"` // on the ESP
	To   string `json:"to"`
}

// PlanFirst decides which names put a deployment before all others of this machine. They say what boot counting says, in the way of
// systemd-bless-boot: its own entry is good, and those of ours before it have no tries left. Nothing else than names on the
// ESP decides what is booted, and each rename leaves a system that boots: the one that shall be first is made good before others are
// made bad. An entry of another system that comes first is returned, and stays; "" if there is none.
func (h *Host) PlanFirst(d fsverity.Digest) (plan []Rename, first string, err error) {
	own := h.Find(d)
	if own == nil || len(own.Entries) == 0 {
		return nil, "", fmt.Errorf("image %v: no boot entry on %s", d, h.ESP)
	}
	target := own.Entries[0]
	entries := slices.Clone(h.Entries)
	rename := func(e *Entry, name bls.Name) {
		to := path.Join(path.Dir(e.Path), name.String())
		plan = append(plan, Rename{e.Path, to})
		e.Path, e.Name = to, name
	}
	if target.Name.Bad() {
		k := h.place(d)
		rename(&entries[k], bls.Name{ID: target.Name.ID, Ext: target.Name.Ext})
		target = entries[k]
		sortEntries(entries)
	}
	for k := range entries {
		e := &entries[k]
		if e.Path == target.Path {
			break
		}
		if e.Image.Digest != d && h.Find(e.Image.Digest) != nil && !e.Name.Bad() {
			rename(e, bls.Name{ID: e.Name.ID, Ext: e.Name.Ext, Counted: true, Done: max(1, e.Name.Done)})
		}
	}
	sortEntries(entries)
	if entries[0].Image.Digest != d {
		first = entries[0].Path
	}
	return plan, first, nil
}

// Execute carries out renames on a mounted ESP.
func ExecuteRenames(dir string, plan []Rename) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, r := range plan {
		if _, err := root.Lstat(r.To); err == nil {
			return fmt.Errorf("%s: it is there already: remove it, or %s", path.Join(dir, r.To), r.From)
		}
		if err := root.Rename(r.From, r.To); err != nil {
			return err
		}
		if err := syncAll(root); err != nil { // one after the other
			return err
		}
	}
	return nil
}
