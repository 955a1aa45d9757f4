package publish

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/ostree/sign"
	"github.com/composefs-boot/composefs-boot/repo/ostree/summary"
)

// An index of subsummaries serves readers who need a part of the refs: those of one architecture. What they have is described by what
// they had, so that a poll of a repository of thousands of refs takes some hundred bytes. Files of the same content are not written again:
// web servers make ETags of their times.

const (
	indexFile   = "summary.idx"
	indexLimit  = 16       // earlier subsummaries that are kept, as by flatpak
	allMachines = "noarch" // the subsummary of a repository whose refs name no architecture
)

// architectures are what refs call them, by uname, GNU, Debian and RPM.
var architectures = []string{"x86_64", "amd64", "i386", "i486", "i586", "i686", "aarch64", "arm64", "arm", "armhf", "armel", "armhfp", "armv7", "armv7hl",
	"ppc64", "ppc64le", "ppc64el", "s390x", "riscv64", "loongarch64", "mips64el", "mipsel"}

// machine returns the architecture that a ref is for, "" if it does not say: a part of its name, as in fedora/x86_64/coreos/stable and
// app/org.example.App/x86_64/stable. A ref of flatpak has it at a fixed place, whatever it is called.
func machine(ref string) string {
	parts := strings.Split(ref, "/")
	switch {
	case len(parts) == 4 && (parts[0] == "app" || parts[0] == "runtime"):
		return parts[2]
	case len(parts) == 2 && (parts[0] == "appstream" || parts[0] == "appstream2"):
		return parts[1][strings.LastIndexByte(parts[1], '-')+1:]
	}
	for _, p := range parts {
		if slices.Contains(architectures, p) {
			return p
		}
	}
	return ""
}

// byMachine splits refs by architecture. Those that are for none in particular are for all.
func byMachine(refs []summary.Ref) map[string][]summary.Ref {
	parts := map[string][]summary.Ref{}
	for _, r := range refs {
		if m := machine(r.Name); m != "" {
			parts[m] = nil
		}
	}
	if len(parts) == 0 {
		parts[allMachines] = nil
	}
	for _, r := range refs {
		m := machine(r.Name)
		for name := range parts {
			if m == "" || m == name {
				parts[name] = append(parts[name], r)
			}
		}
	}
	return parts
}

// Indexed reports whether the repository has an index, which WriteIndex has to keep in step with the summary.
func (r *Repository) Indexed() (bool, error) { return r.has(indexFile) }

// WriteIndex makes an index of the subsummaries that a summary falls into what readers find, with its signatures, and returns it. Earlier
// subsummaries are kept for a while, and the differences from them; what nothing leads to any more is removed.
func (r *Repository) WriteIndex(s *summary.Summary, signers ...sign.Signer) (*summary.Index, error) {
	old, oldBytes, err := r.index()
	if err != nil {
		return nil, err
	}
	x := &summary.Index{Subsummaries: map[string]summary.Subsummary{}, About: *s}
	x.About.Refs, x.About.Deltas = nil, nil
	var files []small
	keep := map[string]bool{}
	parts := byMachine(s.Refs)
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		one, made, err := r.subsummary(parts[name], old.Subsummaries[name])
		if err != nil {
			return nil, fmt.Errorf("subsummary %q: %w", name, err)
		}
		x.Subsummaries[name] = one
		files = append(files, made...)
		for _, f := range made {
			keep[f.name] = true
		}
		for _, sum := range one.Previous {
			keep[summary.Subsummary{Sum: sum}.Path()] = true
		}
	}
	b, err := x.Encode()
	if err != nil {
		return nil, err
	}
	// One that says nothing new stays as it is.
	if oldBytes != nil {
		again := *x
		again.About.LastModified = old.About.LastModified
		same, err := again.Encode()
		if err != nil {
			return nil, err
		}
		if bytes.Equal(same, oldBytes) {
			x, b = &again, same
		}
		keep[summary.IndexSignaturePath(oldBytes)] = true // who has just read it looks for them
	}
	keep[summary.IndexSignaturePath(b)] = len(signers) > 0
	var signature []byte
	if len(signers) > 0 {
		if signature, err = sign.Add(nil, b, signers...); err != nil {
			return nil, fmt.Errorf("summary index: %w", err)
		}
		files = append(files, small{summary.IndexSignaturePath(b), signature})
	} else if err := r.root.Remove(indexFile + ".sig"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	files = append(files, small{indexFile, b})
	if len(signers) > 0 {
		files = append(files, small{indexFile + ".sig", signature})
	}
	if err := r.replace(files...); err != nil {
		return nil, err
	}
	return x, r.dropSummaries(keep)
}

// index returns the index that is there. One that cannot be read is as none: it is made of the refs, which are there.
func (r *Repository) index() (*summary.Index, []byte, error) {
	none := &summary.Index{}
	b, err := r.root.ReadFile(indexFile)
	if errors.Is(err, fs.ErrNotExist) {
		return none, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	x, err := summary.ParseIndex(b)
	if err != nil {
		return none, nil, nil
	}
	return x, b, nil
}

// subsummary makes a subsummary of refs, and the files that it takes.
func (r *Repository) subsummary(refs []summary.Ref, old summary.Subsummary) (summary.Subsummary, []small, error) {
	one := summary.Subsummary{}
	refs, err := r.flatpak(refs)
	if err != nil {
		return one, nil, err
	}
	b, err := summary.EncodeSubsummary(refs)
	if err != nil {
		return one, nil, err
	}
	one.Sum = sha256.Sum256(b)
	gz, err := summary.Compress(b)
	if err != nil {
		return one, nil, err
	}
	files := []small{{one.Path(), gz}}
	for _, sum := range append([][32]byte{old.Sum}, old.Previous...) {
		if sum == one.Sum || len(one.Previous) == indexLimit {
			continue
		}
		before := summary.Subsummary{Sum: sum}
		content, err := r.root.ReadFile(before.Path())
		if err == nil {
			content, err = before.Decompress(content)
		}
		if err != nil {
			continue // it is gone, or damaged
		}
		diff, err := summary.MakeDiff(content, b)
		if err != nil {
			return one, nil, err
		}
		one.Previous = append(one.Previous, sum)
		files = append(files, small{one.DiffPath(sum), diff})
	}
	return one, files, nil
}

// flatpak adds to refs what flatpak wants to know of an application before it fetches anything: xa.data, the sizes, installed and to be
// fetched, and its metadata. The commits of applications have them.
func (r *Repository) flatpak(refs []summary.Ref) ([]summary.Ref, error) {
	refs = slices.Clone(refs)
	for i, ref := range refs {
		if !strings.HasPrefix(ref.Name, "app/") && !strings.HasPrefix(ref.Name, "runtime/") {
			continue
		}
		data, err := r.root.ReadFile(ostree.ObjectName{Checksum: ref.Commit, Kind: ostree.KindCommit}.Path(r.Mode == ostree.Archive))
		if err != nil {
			return nil, err
		}
		c, err := ostree.ParseCommit(data)
		if err != nil {
			return nil, fmt.Errorf("ref %q: %w", ref.Name, err)
		}
		var sizes [2]uint64 // big endian, there as here
		for k, key := range []string{"xa.installed-size", "xa.download-size"} {
			if v, ok, err := c.Metadata.Lookup(key); err == nil && ok && v.Type() == "t" {
				sizes[k], _ = v.Uint64()
			}
		}
		metadata := c.Text("xa.metadata")
		if metadata == "" {
			continue
		}
		v, err := gvariant.Encode("(tts)", gvariant.Tuple{sizes[0], sizes[1], metadata})
		if err != nil {
			return nil, err
		}
		refs[i].Other = gvariant.Dict{"xa.data": v}
		maps.Copy(refs[i].Other, ref.Other)
	}
	return refs, nil
}

var ownSummary = regexp.MustCompile(`^([0-9a-f]{64}\.(gz|idx\.sig)|[0-9a-f]{64}-[0-9a-f]{64}\.delta)$`)

// dropSummaries removes files in summaries/ that nothing leads to. What is called otherwise is of somebody else.
func (r *Repository) dropSummaries(keep map[string]bool) error {
	entries, err := fs.ReadDir(r.root.FS(), "summaries")
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := path.Join("summaries", e.Name())
		if keep[name] || !ownSummary.MatchString(e.Name()) {
			continue
		}
		if err := r.root.Remove(name); err != nil {
			return err
		}
	}
	return nil
}
