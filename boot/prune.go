package boot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Pruning removes the systems that upgrades leave behind. What a system consists of is removed in this order, each step durable before
// the next:
//
//  1. its boot entries: nobody can choose it any more
//  2. on the ESP, its kernel and what is beside its UKI, unless somebody else names them
//  3. its state gets a name that is no deployment's, state/.DIGEST.old
//  4. the name of its image in the repository; the objects are left to garbage collection
//  5. that state, but for /var, which is a link to that of all systems
//
// Whenever the power fails, what is left are files that the next run finds, and finishes with: a deployment that nothing boots, or a
// state that has been renamed.

// PruneOptions say what stays besides the systems that must.
type PruneOptions struct {
	// Keep is how many systems stay, those that are pinned not counted: what runs and what boots next, then in the order of the menu,
	// of which a rollback takes the first.
	Keep   int
	Booted fsverity.Digest // what runs
	// New is what is about to be installed. It boots next then, counts as one of those that stay, and needs its files. nil: nothing is.
	New *Plan
	// Chosen are defaults of the boot loader: patterns for the names of entries, without counters. What they boot stays.
	Chosen []string
}

// PrunePlan is what is removed of the systems of a machine.
type PrunePlan struct {
	Root, ESP  string
	Remove     []Removal
	Stay       []Stay
	Unfinished []fsverity.Digest // systems of which an interrupted run has left state under a name of its own
	Temporary  []string          // files on the ESP that an interrupted run has not given their names
	Bytes      int64             // that get free on the ESP

	deployed map[fsverity.Digest]bool // their images keep their names, whatever is unfinished
}

// Removal is a system that goes.
type Removal struct {
	Deployed
	Files []string // and directories on the ESP that go with it, besides its entries
	Bytes int64    // of all on the ESP
}

// Stay is a system that stays for a reason of its own, and why.
type Stay struct {
	Digest fsverity.Digest `json:"digest"`
	Why    string          `json:"why"`
}

// ErrForeignLoader tells that a machine is booted in a way that is not known, by GRUB for example.
var ErrForeignLoader = errors.New("no boot entry there boots the system that runs: which boot loader does, and what else it boots, " +
	"is not known, so nothing is removed")

// PlanPrune decides which systems go, so that those that stay boot as before.
func (h *Host) PlanPrune(o PruneOptions) (p PrunePlan, err error) {
	p = PrunePlan{Root: h.Root, ESP: h.ESP, deployed: map[fsverity.Digest]bool{}}
	booted := h.Find(o.Booted)
	if booted == nil || len(booted.Entries) == 0 {
		return p, fmt.Errorf("%s: %w", h.ESP, ErrForeignLoader)
	}
	esp, err := os.OpenRoot(h.ESP)
	if err != nil {
		return p, err
	}
	defer esp.Close()
	root, err := os.OpenRoot(h.Root)
	if err != nil {
		return p, err
	}
	defer root.Close()
	texts, err := entryTexts(esp)
	if err != nil {
		return p, fmt.Errorf("%s: %w", h.ESP, err)
	}
	stays := h.staying(o)
	if o.New != nil {
		p.deployed[o.New.Digest] = true
	}
	going := map[string]bool{} // entries, by their paths
	for _, d := range h.Deployments {
		why := ""
		if !stays[d.Digest] {
			why = h.mustStay(root, d, texts)
		}
		if why != "" {
			p.Stay = append(p.Stay, Stay{d.Digest, why})
		}
		if stays[d.Digest] || why != "" {
			p.deployed[d.Digest] = true
			continue
		}
		p.Remove = append(p.Remove, Removal{Deployed: d})
		for _, e := range d.Entries {
			going[e.Path] = true
		}
	}
	used := newUsed(texts, h.Entries, going, o.New)
	for k := range p.Remove {
		r := &p.Remove[k]
		if err := r.findFiles(esp, used); err != nil {
			return p, fmt.Errorf("%s: %w", h.ESP, err)
		}
		p.Bytes += r.Bytes
	}
	if err := p.findTemporary(esp); err != nil {
		return p, fmt.Errorf("%s: %w", h.ESP, err)
	}
	p.Unfinished, err = unfinished(root)
	return p, err
}

// staying chooses the systems that stay.
func (h *Host) staying(o PruneOptions) map[fsverity.Digest]bool {
	stays := map[fsverity.Digest]bool{o.Booted: true}
	if o.New != nil {
		stays[o.New.Digest] = true
	} else if next := h.Next(); next != nil {
		stays[next.Digest] = true
	}
	for _, pattern := range o.Chosen {
		// The first entry in the menu that it names boots.
		k := slices.IndexFunc(h.Entries, func(e Entry) bool { return e.names(pattern) })
		if k >= 0 && h.Find(h.Entries[k].Image.Digest) != nil {
			stays[h.Entries[k].Image.Digest] = true
		}
	}
	count := len(stays)
	for _, d := range h.Deployments {
		switch {
		case d.Pinned:
			stays[d.Digest] = true
		case !stays[d.Digest] && count < o.Keep && len(d.Entries) > 0:
			stays[d.Digest] = true
			count++
		}
	}
	// Of those that stay, one must have been seen to come up. What is about to be installed has not.
	seen := func(d Deployed) bool { return d.Good() && (o.New == nil || d.Digest != o.New.Digest) }
	if !slices.ContainsFunc(h.Deployments, func(d Deployed) bool { return stays[d.Digest] && seen(d) }) {
		if k := slices.IndexFunc(h.Deployments, seen); k >= 0 {
			stays[h.Deployments[k].Digest] = true
		}
	}
	return stays
}

// names reports whether a pattern names the entry, as systemd-boot compares them: see "default" in loader.conf(5).
func (e Entry) names(pattern string) bool {
	id := strings.ToLower(e.Name.ID + e.Name.Ext)
	for _, id := range []string{id, strings.TrimSuffix(id, ".conf")} { // older ones leave the suffix of type 1 entries out
		if ok, err := path.Match(strings.ToLower(pattern), id); ok && err == nil {
			return true
		}
	}
	return false
}

// Good reports whether the system has been seen to come up: an entry of it is not, or not any more, counted.
func (d Deployed) Good() bool {
	return slices.ContainsFunc(d.Entries, func(e Entry) bool { return !e.Name.Counted })
}

// mustStay tells why a system cannot go, though it is none of those that stay; "" if it can.
func (h *Host) mustStay(root *os.Root, d Deployed, texts map[string]string) string {
	for _, e := range d.Entries {
		if id := strings.ToLower(e.Name.ID); !strings.HasPrefix(id, entryID(d.Digest)) && !strings.HasPrefix(id, "bootc_") {
			return e.Path + " boots it, which is no name that an upgrade gives"
		}
	}
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		ours := slices.ContainsFunc(d.Entries, func(e Entry) bool { return e.Path == name })
		if !ours && strings.Contains(texts[name], d.Digest.String()) {
			return name + " names it"
		}
	}
	// After an upgrade it is a link, see Carry: this system was installed beside the others, with data that they do not have.
	if info, err := root.Lstat(statePath(d.Digest) + "/var"); err == nil && info.IsDir() {
		return fmt.Sprintf("%s/var is its own: take from it what is needed, and remove it", statePath(d.Digest))
	}
	return ""
}

// entryID is the name that a boot entry has by itself, or begins with.
func entryID(d fsverity.Digest) string { return "composefs-" + d.String()[:32] }

// entryTexts reads all that may name a kernel or a system: type 1 entries, those that cannot be read as one, and those that bootc is about
// to put in their place, in loader/entries.staged. In small letters, since FAT makes no difference.
func entryTexts(esp *os.Root) (map[string]string, error) {
	texts := map[string]string{}
	dirs, err := fs.ReadDir(esp.FS(), "loader")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, d := range dirs {
		dir := "loader/" + d.Name()
		if strings.EqualFold(d.Name(), "entries") {
			dir = "loader/entries"
		}
		if !d.IsDir() || !strings.HasPrefix(strings.ToLower(d.Name()), "entries") {
			continue
		}
		files, err := fs.ReadDir(esp.FS(), dir)
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if !f.Type().IsRegular() {
				continue
			}
			text, err := readLimited(esp, dir+"/"+f.Name())
			if err != nil {
				return nil, err
			}
			texts[dir+"/"+f.Name()] = strings.ToLower(string(text))
		}
	}
	return texts, nil
}

func readLimited(root *os.Root, name string) ([]byte, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxEntryFile))
}

// used knows which files on the ESP somebody needs when the entries that go are gone.
type used struct {
	texts   string // of entries
	unified map[string]bool
	planned []string
	taken   map[string]bool // directories that go with a system already: two may share one
}

func newUsed(texts map[string]string, entries []Entry, going map[string]bool, plan *Plan) used {
	u := used{unified: map[string]bool{}, taken: map[string]bool{}}
	for name, text := range texts {
		if !going[name] {
			u.texts += text + "\n"
		}
	}
	for _, e := range entries {
		if e.Item.Entry == nil && !going[e.Path] {
			u.unified[strings.ToLower(e.Name.ID)] = true
		}
	}
	if plan != nil {
		for _, f := range plan.ESP {
			u.planned = append(u.planned, strings.ToLower(f.Path))
		}
	}
	return u
}

// names reports whether a directory is needed.
func (u used) names(dir string) bool {
	base := strings.ToLower(path.Base(dir))
	id, beside := strings.CutSuffix(base, extraSuffix)
	return beside && u.unified[id] || strings.Contains(u.texts, base) ||
		slices.ContainsFunc(u.planned, func(name string) bool { return strings.HasPrefix(name, strings.ToLower(dir)+"/") })
}

// What belongs to boot entries, in EFI/Linux.
const (
	kernelPrefix = "bootc_composefs-" // and the SHA-256 of kernel and initramfs: a directory with both
	extraSuffix  = ".efi.extra.d"     // beside a UKI
)

// findFiles finds the directories on the ESP that are of no use without the system, whether its entries are still there or not.
func (r *Removal) findFiles(esp *os.Root, u used) error {
	var ids []string
	for _, e := range r.Entries {
		ids = append(ids, strings.ToLower(e.Name.ID)+extraSuffix)
		n, err := diskUsage(esp, e.Path)
		if err != nil {
			return err
		}
		r.Bytes += n
	}
	dirs, err := fs.ReadDir(esp.FS(), path.Clean(unifiedDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, d := range dirs {
		name, lower := unifiedDir+d.Name(), strings.ToLower(d.Name())
		sum, kernel := strings.CutPrefix(lower, kernelPrefix)
		kernel = kernel && isSHA256(sum) && (r.Origin.BootType != "uki" && sum == r.Origin.BootDigest || r.boots(lower))
		beside := strings.HasSuffix(lower, extraSuffix) && (slices.Contains(ids, lower) || strings.HasPrefix(lower, entryID(r.Digest)))
		if !d.IsDir() || !kernel && !beside || u.names(name) || u.taken[name] {
			continue
		}
		u.taken[name] = true
		n, err := diskUsage(esp, name)
		if err != nil {
			return err
		}
		r.Files, r.Bytes = append(r.Files, name), r.Bytes+n
	}
	return nil
}

// findTemporary finds what writeFile has left where a power cut came before the rename, if it does not go with a system.
func (p *PrunePlan) findTemporary(esp *os.Root) error {
	for _, dir := range []string{"EFI/BOOT", "EFI/systemd", path.Clean(unifiedDir), "loader"} {
		err := fs.WalkDir(esp.FS(), dir, func(name string, e fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case slices.ContainsFunc(p.Remove, func(r Removal) bool { return slices.Contains(r.Files, name) }):
				return fs.SkipDir
			case !e.Type().IsRegular() || !isTemporary(e.Name()):
				return nil
			}
			n, err := diskUsage(esp, name)
			p.Temporary, p.Bytes = append(p.Temporary, name), p.Bytes+n
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// boots reports whether an entry of the system takes its kernel from the directory.
func (r *Removal) boots(dir string) bool {
	return slices.ContainsFunc(r.Entries, func(e Entry) bool {
		return e.Item.Entry != nil && strings.EqualFold(path.Dir(e.Item.Entry.Get("linux")), "/"+unifiedDir+dir)
	})
}

func isSHA256(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// diskUsage returns how many bytes get free with a file or directory.
func diskUsage(root *os.Root, name string) (n int64, err error) {
	err = fs.WalkDir(root.FS(), name, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			n += st.Blocks * 512
		}
		return nil
	})
	return n, err
}
