package ostree

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"

	"github.com/composefs-boot/composefs-boot/repo"
)

// FsckKind says what is wrong with a commit.
type FsckKind string

// The kinds of findings.
const (
	RefMissing    FsckKind = "ref-resolve-failed"   // there is no such ref
	StreamBroken  FsckKind = "commit-read-failed"   // the commit's stream cannot be read
	TreeBroken    FsckKind = "object-check-failed"  // a commit, dirtree, dirmeta or small file is missing, or another one
	ContentBroken FsckKind = "content-check-failed" // the content of a file is
	ImageMissing  FsckKind = "erofs-image-missing"  // a composefs image of it is not there
)

// Finding is one thing that is wrong with a commit.
type Finding struct {
	Kind   FsckKind `json:"kind"`
	Ref    string   `json:"ref"`
	Commit string   `json:"commit,omitempty"`
	Detail string   `json:"detail,omitempty"`
}

// String is a line for people.
func (f Finding) String() string {
	s := fmt.Sprintf("fsck: %s: %s", f.Kind, f.Ref)
	for _, part := range []string{f.Commit, f.Detail} {
		if part != "" {
			s += ": " + part
		}
	}
	return s
}

// FsckReport is what is wrong with commits.
type FsckReport struct {
	Commits, Bad int
	Findings     []Finding
	Partial      []Checksum // commits that a pull has not brought to an end
}

// FsckOptions says what is checked.
type FsckOptions struct {
	Ref          string // the commit of this name alone, if it is not ""
	MetadataOnly bool   // not the contents of files
	Lock         repo.LockOptions
}

// Fsck checks that commits with names have what they need: every object with its checksum, the composefs images. Whether objects of
// the repository have their fs-verity digests is for repo.Fsck.
func Fsck(ctx context.Context, r *repo.Repo, o FsckOptions) (FsckReport, error) {
	var report FsckReport
	release, err := r.LockShared(ctx, o.Lock)
	if err != nil {
		return report, err
	}
	defer release()
	if report.Partial, err = Partial(r); err != nil {
		return report, err
	}
	var refs []Ref
	if o.Ref != "" {
		c, err := Resolve(r, o.Ref)
		if err != nil {
			report.Commits, report.Bad = 1, 1
			report.Findings = []Finding{{RefMissing, o.Ref, "", err.Error()}}
			return report, nil
		}
		refs = []Ref{{o.Ref, c}}
	} else if refs, err = Tags(r); err != nil {
		return report, err
	}
	known := map[Checksum][]Finding{}
	for _, ref := range refs {
		findings, ok := known[ref.Commit]
		if !ok {
			if findings, err = check(ctx, r, ref, o.MetadataOnly); err != nil {
				return report, err
			}
			known[ref.Commit] = findings
		}
		report.Commits++
		if len(findings) > 0 {
			report.Bad++
		}
		for _, f := range findings {
			f.Ref = ref.Name
			report.Findings = append(report.Findings, f)
		}
	}
	return report, nil
}

// Partial returns the commits that a pull has not brought to an end: those that have a journal.
func Partial(r *repo.Repo) ([]Checksum, error) {
	names, err := r.Partials()
	if err != nil {
		return nil, err
	}
	var list []Checksum
	for _, name := range names {
		digits, ok := strings.CutPrefix(name, journalPrefix)
		if c, err := ParseChecksum(digits); ok && err == nil {
			list = append(list, c)
		}
	}
	return list, nil
}

// check tells what is wrong with a commit. The error is that of the context.
func check(ctx context.Context, r *repo.Repo, ref Ref, metadataOnly bool) (list []Finding, err error) {
	var mu sync.Mutex
	add := func(k FsckKind, err error) {
		mu.Lock()
		defer mu.Unlock()
		list = append(list, Finding{k, ref.Name, ref.Commit.String(), err.Error()})
	}
	s, err := open(r, ref.Commit)
	var o *Objects
	if err == nil {
		o, err = s.Objects(r)
	}
	if err != nil {
		add(StreamBroken, err)
		return list, nil
	}
	if _, err := o.Tree(RightNames); err != nil {
		add(TreeBroken, err)
	}
	for _, l := range s.Linked {
		f, _, err := r.OpenImage(l.Digest.String())
		if err != nil {
			add(ImageMissing, fmt.Errorf("%v: %w", l.Digest, err))
			continue
		}
		f.Close()
	}
	if metadataOnly {
		return list, nil
	}
	work := make(chan Checksum)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for c := range work {
				if err := o.verifyContent(r, c); err != nil {
					add(ContentBroken, err)
				}
			}
		})
	}
	for c, e := range o.entries {
		if !e.object.IsZero() && ctx.Err() == nil {
			work <- c
		}
	}
	close(work)
	workers.Wait()
	return list, ctx.Err()
}

// verifyContent reads the content of a file.
func (o *Objects) verifyContent(r *repo.Repo, c Checksum) error {
	f, err := o.File(c)
	if err != nil {
		return err
	}
	h, err := f.NewHash()
	if err != nil {
		return err
	}
	n := ObjectName{c, KindFile}
	content, err := r.OpenObject(f.Object)
	if err != nil {
		return fmt.Errorf("object %v: %w", n, err)
	}
	defer content.Close()
	if _, err := io.Copy(h, content); err != nil {
		return fmt.Errorf("object %v: %w", n, err)
	}
	if got := Checksum(h.Sum(nil)); got != c {
		return fmt.Errorf("object %v: %w: %v", n, ErrChecksum, got)
	}
	return nil
}
