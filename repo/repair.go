package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Action is what repair does about one thing that is wrong.
type Action string

// The actions, in the order in which they are carried out.
const (
	ActionEnable     Action = "enable-verity" // the content is right: enable fs-verity
	ActionRestore    Action = "restore"       // write the object again, from where its content was found
	ActionRelink     Action = "relink"        // make a name lead to the object that is there
	ActionQuarantine Action = "quarantine"    // move what is wrong out of the way
	ActionNone       Action = "none"          // it cannot be healed: nobody has the content
)

// quarantine is the directory below the repository to which repair moves what it takes out of objects/. Nothing reads it but
// repair itself, which may find there what it looks for.
const quarantine = "quarantine"

// RepairStep is one step of a repair.
type RepairStep struct {
	Action Action   `json:"action"`
	Path   string   `json:"path"`             // below the repository
	Source string   `json:"source,omitempty"` // where the content or the link text comes from
	Breaks []Broken `json:"breaks,omitempty"` // what is broken as long as it is not healed

	digest fsverity.Digest
}

// String is a line for people.
func (s RepairStep) String() string {
	text := string(s.Action) + " " + s.Path
	if s.Source != "" {
		text += " from " + s.Source
	}
	return text
}

// RepairOptions says where lost contents may be found.
type RepairOptions struct {
	From   []string // repositories, stores of objects, or directories with files of any name
	Read   bool     // as in FsckOptions
	DryRun bool
	Lock   LockOptions
	Step   func(RepairStep) // called before each step is carried out
}

// RepairReport is what was wrong, what was done, and what is wrong now. After is Before if nothing was done.
type RepairReport struct {
	Before, After FsckReport
	Steps         []RepairStep
}

// Repair heals what fsck finds. It deletes nothing: what is in the way of a good object, and what nobody can heal, goes to
// quarantine/. Objects are written as by an import, so that an interruption leaves nothing half done; the next repair goes on.
func (r *Repo) Repair(ctx context.Context, o RepairOptions) (RepairReport, error) {
	var report RepairReport
	var err error
	if report.Before, err = r.Fsck(ctx, FsckOptions{Read: o.Read, Lock: o.Lock}); err != nil {
		return report, err
	}
	report.After = report.Before
	// What an image needs is known when the image has been restored; a stream may need another stream.
	const rounds = 8
	for round := 0; round < rounds && !report.After.OK(); round++ {
		p := &repairPlan{r: r, wanted: map[fsverity.Digest]*wanted{}}
		if err := p.make(ctx, report.After, o.From); err != nil {
			return report, err
		}
		useful := slices.ContainsFunc(p.steps, func(s RepairStep) bool { return s.Action != ActionNone })
		if round == 0 || useful {
			report.Steps = append(report.Steps, p.steps...)
		}
		if o.DryRun {
			break
		}
		if !useful {
			for _, s := range p.steps {
				if o.Step != nil && round == 0 {
					o.Step(s)
				}
			}
			break
		}
		if err := r.executeRepair(ctx, p.steps, o); err != nil {
			return report, err
		}
		if report.After, err = r.Fsck(ctx, FsckOptions{Read: o.Read, Lock: o.Lock}); err != nil {
			return report, err
		}
	}
	return report, nil
}

// wanted is an object that is lost.
type wanted struct {
	size   int64 // -1 if nobody tells
	there  bool  // a file with its name is in the way
	breaks []Broken
	source string
}

type repairPlan struct {
	r       *Repo
	wanted  map[fsverity.Digest]*wanted
	order   []fsverity.Digest
	odd     []string // files in objects/ that are none
	relinks []relink
	steps   []RepairStep
}

func (p *repairPlan) want(f Finding, there bool) {
	if f.object.IsZero() {
		return
	}
	w := p.wanted[f.object]
	if w == nil {
		w = &wanted{size: f.size, breaks: f.Breaks}
		p.wanted[f.object] = w
		p.order = append(p.order, f.object)
	}
	w.there = w.there || there
	if w.size < 0 {
		w.size = f.size
	}
}

// make decides what is to be done about each finding.
func (p *repairPlan) make(ctx context.Context, report FsckReport, from []string) error {
	for _, f := range report.Findings {
		switch f.Kind {
		case ObjectNoVerity:
			if err := p.noVerity(f); err != nil {
				return err
			}
		case ObjectCorrupt:
			p.want(f, true)
		case ImageObjectMissing, StreamObjectMissing:
			p.want(f, false)
		case ObjectOdd:
			p.odd = append(p.odd, f.Path)
		case LinkBroken:
			p.link(f)
		case ObjectUnreadable, NotLink, ImageCorrupt, StreamCorrupt:
			// An image or stream that is unreadable though its object is sound was made wrong, and is left to its maker.
			p.steps = append(p.steps, RepairStep{Action: ActionNone, Path: f.Path, Breaks: f.Breaks})
		}
	}
	// Something else may have the name of an object.
	p.odd = slices.DeleteFunc(p.odd, func(name string) bool {
		d, err := fsverity.ParseObjectPath(strings.TrimPrefix(name, "objects/"))
		if w := p.wanted[d]; err == nil && w != nil {
			w.there = true
			return true
		}
		return false
	})
	if err := p.find(ctx, from); err != nil {
		return err
	}
	for _, d := range p.order {
		w := p.wanted[d]
		step := RepairStep{Action: ActionRestore, Path: "objects/" + d.ObjectPath(), Source: w.source, Breaks: w.breaks, digest: d}
		switch {
		case w.source != "":
		case w.there:
			step.Action = ActionQuarantine
		default:
			step.Action = ActionNone
		}
		p.steps = append(p.steps, step)
	}
	for _, l := range p.relinks {
		if w := p.wanted[l.image]; w != nil && w.source == "" {
			l.step.Action, l.step.Source = ActionNone, ""
		}
		p.steps = append(p.steps, l.step)
	}
	for _, name := range p.odd {
		p.steps = append(p.steps, RepairStep{Action: ActionQuarantine, Path: name})
	}
	rank := []Action{ActionEnable, ActionRestore, ActionRelink, ActionQuarantine, ActionNone}
	slices.SortStableFunc(p.steps, func(a, b RepairStep) int { return slices.Index(rank, a.Action) - slices.Index(rank, b.Action) })
	return nil
}

// noVerity looks at the content of an object that only lacks fs-verity.
func (p *repairPlan) noVerity(f Finding) error {
	file, err := p.r.OpenObject(f.object)
	if err != nil {
		return err
	}
	defer file.Close()
	got, _, err := fsverity.OfReader(p.r.Algorithm(), file)
	if err != nil || got != f.object {
		p.want(f, true)
		return nil
	}
	p.steps = append(p.steps, RepairStep{Action: ActionEnable, Path: f.Path, Breaks: f.Breaks, digest: f.object})
	return nil
}

// link plans for a name that leads nowhere. Its object may be there, or to be had.
func (p *repairPlan) link(f Finding) {
	if !f.object.IsZero() {
		p.want(f, false)
	}
	if !f.image.IsZero() {
		p.relinks = append(p.relinks, relink{RepairStep{Action: ActionRelink, Path: "images/" + f.image.String(),
			Source: "../objects/" + f.image.ObjectPath()}, f.image})
	}
	if f.link != "" {
		p.relinks = append(p.relinks, relink{RepairStep{Action: ActionRelink, Path: f.Path, Source: f.link}, f.image})
		return
	}
	if f.object.IsZero() {
		p.steps = append(p.steps, RepairStep{Action: ActionNone, Path: f.Path})
	}
}

// relink is a link to be made, if the image is there or has been found.
type relink struct {
	step  RepairStep
	image fsverity.Digest // zero: it is there
}

// find looks for what is wanted: in files of the repository that have another name, and in the sources, in their order.
func (p *repairPlan) find(ctx context.Context, from []string) error {
	if len(p.wanted) == 0 {
		return nil
	}
	// Files whose names are wrong may be what other names miss: two that were swapped heal each other.
	var local []string
	for _, d := range p.order {
		if p.wanted[d].there {
			local = append(local, "objects/"+d.ObjectPath())
		}
	}
	local = append(local, p.odd...)
	if dir, err := p.r.openat(quarantine, unix.O_RDONLY|unix.O_DIRECTORY); err == nil {
		names, _ := dir.Readdirnames(-1)
		dir.Close()
		slices.Sort(names)
		for _, name := range names {
			local = append(local, quarantine+"/"+name)
		}
	}
	for _, name := range local {
		f, err := p.r.openat(name, unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			continue
		}
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			if d, _, err := fsverity.OfReader(p.r.Algorithm(), f); err == nil {
				p.found(d, filepath.Join(p.r.path, name))
			}
		}
		f.Close()
	}
	for _, source := range from {
		if err := p.findIn(ctx, source); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (p *repairPlan) found(d fsverity.Digest, source string) {
	if w := p.wanted[d]; w != nil && w.source == "" {
		w.source = source
	}
}

// findIn looks into a repository or store by name, and into any other directory by content.
func (p *repairPlan) findIn(ctx context.Context, source string) error {
	if info, err := os.Stat(source); err != nil {
		return err
	} else if !info.IsDir() {
		return fmt.Errorf("%s: neither a repository nor a directory", source)
	}
	missing := false
	for d, w := range p.wanted {
		for _, below := range []string{"objects", ""} {
			name := filepath.Join(source, below, d.ObjectPath())
			f, err := os.Open(name)
			if err != nil {
				continue
			}
			// A name proves nothing.
			if got, _, err := fsverity.OfReader(p.r.Algorithm(), f); err == nil && got == d {
				p.found(d, name)
			}
			f.Close()
		}
		missing = missing || w.source == ""
	}
	if _, err := os.Stat(filepath.Join(source, "meta.json")); !missing || err == nil {
		return nil
	}
	return p.findContent(ctx, source)
}

// executeRepair carries out the steps.
func (r *Repo) executeRepair(ctx context.Context, steps []RepairStep, o RepairOptions) error {
	i, err := r.Begin(ctx, o.Lock)
	if err != nil {
		return err
	}
	defer i.Abort()
	for k, s := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if o.Step != nil {
			o.Step(s)
		}
		// What was restored has its name before anything is taken away.
		if s.Action == ActionQuarantine && (k == 0 || steps[k-1].Action != ActionQuarantine) {
			if err := i.settle(); err != nil {
				return err
			}
		}
		if err := r.repairStep(i, s); err != nil {
			return fmt.Errorf("%s: %w", s, err)
		}
	}
	return i.Commit()
}

func (r *Repo) repairStep(i *Import, s RepairStep) error {
	switch s.Action {
	case ActionEnable:
		f, err := r.OpenObject(s.digest)
		if err != nil {
			return err
		}
		err = fsverity.Enable(f, r.Algorithm())
		f.Close()
		if err == nil || errors.Is(err, fsverity.ErrAlreadyEnabled) {
			return nil
		}
		return r.restore(i, s, filepath.Join(r.path, s.Path)) // a file that somebody writes to: take a copy
	case ActionRestore:
		return r.restore(i, s, s.Source)
	case ActionRelink:
		i.mu.Lock()
		i.names = append(i.names, name{s.Path, s.Source})
		i.mu.Unlock()
	case ActionQuarantine:
		return r.moveAway(s.Path)
	}
	return nil
}

// restore writes an object again. What has its name now is kept in quarantine.
func (r *Repo) restore(i *Import, s RepairStep, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	// Looked at before anything is changed; Put measures what it writes.
	if d, _, err := fsverity.OfReader(r.Algorithm(), f); err != nil || d != s.digest {
		return errors.Join(err, ErrCorrupt)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if s.Action == ActionRestore {
		if err := r.keepAside(s.Path); err != nil {
			return err
		}
	}
	got, err := i.Put(f, info.Size())
	if err == nil && got != s.digest {
		err = errChanged
	}
	return err
}

// quarantineName is the name in quarantine/ of a file in objects/.
func quarantineName(object string) string {
	return strings.ReplaceAll(strings.TrimPrefix(object, "objects/"), "/", "-")
}

// keepAside gives what has this name another one in quarantine/, too.
func (r *Repo) keepAside(object string) error {
	dir, err := r.openat(path.Dir(object), unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	to, err := r.mkdir(quarantine)
	if err != nil {
		return err
	}
	defer to.Close()
	err = unix.Linkat(int(dir.Fd()), path.Base(object), int(to.Fd()), quarantineName(object), 0)
	if err == unix.ENOENT || err == unix.EEXIST { // nothing is there, or an earlier repair has done it
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "link", Path: object, Err: err}
	}
	return to.Sync()
}

// moveAway moves a file from objects/ to quarantine/.
func (r *Repo) moveAway(object string) error {
	dir, err := r.openat(path.Dir(object), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	to, err := r.mkdir(quarantine)
	if err != nil {
		return err
	}
	defer to.Close()
	for k := 0; ; k++ {
		name := quarantineName(object)
		if k > 0 {
			name = fmt.Sprintf("%s.%d", name, k)
		}
		err := unix.Renameat2(int(dir.Fd()), path.Base(object), int(to.Fd()), name, unix.RENAME_NOREPLACE)
		if err == unix.EEXIST {
			continue
		}
		if err == unix.ENOENT {
			return nil
		}
		if err != nil {
			return &os.PathError{Op: "rename", Path: object, Err: err}
		}
		return to.Sync()
	}
}
