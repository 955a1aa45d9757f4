package repo_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// objectFiles returns the objects of a repository, sorted.
func objectFiles(t *testing.T, r *repo.Repo) []string {
	t.Helper()
	list, err := filepath.Glob(filepath.Join(r.Path(), "objects/*/*"))
	if err != nil || len(list) == 0 {
		t.Fatal("no objects", err)
	}
	slices.Sort(list)
	return list
}

// replaceFile gives a path another content, as a new file: objects may be shared with another repository.
func replaceFile(t *testing.T, path string, content []byte) {
	t.Helper()
	os.Remove(path)
	if content != nil {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func contentOf(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// damages break a repository with the image d, each in its own way.
var damages = map[string]func(t *testing.T, r *repo.Repo, d fsverity.Digest, objects []string){
	"truncated": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) {
		replaceFile(t, o[0], contentOf(t, o[0])[:70])
	},
	"empty": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) { replaceFile(t, o[0], []byte{}) },
	"flipped": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) {
		b := contentOf(t, o[1])
		b[len(b)/2] ^= 4
		replaceFile(t, o[1], b)
	},
	"missing": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) { replaceFile(t, o[2], nil) },
	"all missing": func(t *testing.T, r *repo.Repo, _ fsverity.Digest, _ []string) {
		os.RemoveAll(filepath.Join(r.Path(), "objects"))
		os.Mkdir(filepath.Join(r.Path(), "objects"), 0o755)
	},
	"swapped": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) {
		a, b := contentOf(t, o[3]), contentOf(t, o[4])
		replaceFile(t, o[3], b)
		replaceFile(t, o[4], a)
	},
	"foreign name": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) {
		os.Rename(o[5], filepath.Join(filepath.Dir(o[5]), "README"))
	},
	"upper case": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) {
		os.Rename(o[5], filepath.Join(filepath.Dir(o[5]), strings.ToUpper(filepath.Base(o[5]))))
	},
	"a symlink": func(t *testing.T, _ *repo.Repo, _ fsverity.Digest, o []string) {
		os.Remove(o[6])
		os.Symlink(o[7], o[6])
	},
	"image object missing": func(t *testing.T, r *repo.Repo, d fsverity.Digest, _ []string) {
		replaceFile(t, filepath.Join(r.Path(), "objects", d.ObjectPath()), nil)
	},
	"image object flipped": func(t *testing.T, r *repo.Repo, d fsverity.Digest, _ []string) {
		path := filepath.Join(r.Path(), "objects", d.ObjectPath())
		b := contentOf(t, path)
		b[2000] ^= 1
		replaceFile(t, path, b)
	},
	"image name missing": func(t *testing.T, r *repo.Repo, d fsverity.Digest, _ []string) {
		os.Remove(filepath.Join(r.Path(), "images", d.String()))
	},
	"image name and object missing": func(t *testing.T, r *repo.Repo, d fsverity.Digest, _ []string) {
		os.Remove(filepath.Join(r.Path(), "images", d.String()))
		os.Remove(filepath.Join(r.Path(), "objects", d.ObjectPath()))
	},
	"image name wrong": func(t *testing.T, r *repo.Repo, d fsverity.Digest, o []string) {
		link := filepath.Join(r.Path(), "images", d.String())
		os.Remove(link)
		os.Symlink("../objects/../objects/"+d.ObjectPath(), link)
	},
	"ref with another way": func(t *testing.T, r *repo.Repo, d fsverity.Digest, o []string) {
		link := filepath.Join(r.Path(), "images/refs/a/b")
		os.Remove(link)
		os.Symlink("../../../images/"+d.String(), link)
	},
}

func TestRepair(t *testing.T) {
	tree := newTree(t, 30, 1)
	for name, damage := range damages {
		for _, source := range []string{"repository", "directory"} {
			t.Run(name+" from a "+source, func(t *testing.T) {
				r, other := newRepo(t), newRepo(t)
				d := mustImport(t, r, tree, "a/b")
				mustImport(t, other, tree, "other")
				from := other.Path()
				if source == "directory" { // the same files under names that tell nothing
					from = t.TempDir()
					for k, object := range objectFiles(t, other) {
						replaceFile(t, filepath.Join(from, fmt.Sprint("sub", k)), contentOf(t, object))
					}
				}
				objects := slices.DeleteFunc(objectFiles(t, r), func(o string) bool { return strings.HasSuffix(o, d.ObjectPath()) })
				damage(t, r, d, objects)
				before, err := r.Fsck(ctx, repo.FsckOptions{})
				if err != nil || before.OK() {
					t.Fatal("the damage is not seen", err)
				}
				dry, err := r.Repair(ctx, repo.RepairOptions{From: []string{from}, DryRun: true})
				if err != nil || len(dry.After.Findings) != len(before.Findings) {
					t.Fatal("a dry run changes something", err)
				}
				report, err := r.Repair(ctx, repo.RepairOptions{From: []string{from}})
				if err != nil || !report.After.OK() {
					t.Fatalf("%v\n%v\n%v", err, report.Steps, report.After.Findings)
				}
				if verified, err := r.VerifyImage(ctx, "a/b", repo.VerifyOptions{}); err != nil || len(verified.Findings) > 0 || verified.Image != d {
					t.Errorf("%+v, %v", verified, err)
				}
				mustBeClean(t, other)
			})
		}
	}
}

// Without a source the report names what is lost, what cannot be healed is out of the way, and nothing is gone.
func TestRepairWithoutSource(t *testing.T) {
	tree := newTree(t, 30, 1)
	r := newRepo(t)
	d := mustImport(t, r, tree, "os")
	broken := filepath.Join(tree, "usr/d3/f3")
	object := filepath.Join(r.Path(), "objects", fsverity.Of(fsverity.SHA256, contentOf(t, broken)).ObjectPath())
	replaceFile(t, object, []byte("something else"))
	report, err := r.Repair(ctx, repo.RepairOptions{})
	if err != nil || report.After.OK() {
		t.Fatal(report, err)
	}
	found := false
	for _, f := range report.After.Findings {
		for _, b := range f.Breaks {
			found = found || b.Name == "images/"+d.String() && slices.Equal(b.Refs, []string{"refs/os"}) && slices.Equal(b.Paths, []string{"/usr/d3/f3"})
		}
	}
	if !found {
		t.Errorf("nothing names /usr/d3/f3: %+v", report.After.Findings)
	}
	aside, _ := filepath.Glob(filepath.Join(r.Path(), "quarantine/*"))
	if len(aside) != 1 || string(contentOf(t, aside[0])) != "something else" {
		t.Errorf("in quarantine: %q", aside)
	}
	if report, err := r.VerifyImage(ctx, "os", repo.VerifyOptions{}); err != nil || len(report.Findings) != 1 ||
		report.Findings[0].Kind != repo.ImageObjectMissing || !slices.Equal(report.Findings[0].Breaks[0].Paths, []string{"/usr/d3/f3"}) {
		t.Errorf("%+v, %v", report, err)
	}
	// An import of the same files heals it, too.
	if d2 := mustImport(t, r, tree, "os"); d2 != d {
		t.Error("another image")
	}
	mustBeClean(t, r)
}

// A converted repository has the images that the other tool made with that algorithm from the same OCI image, and streams
// whose content is the same.
func TestConvertGolden(t *testing.T) {
	for _, c := range []struct {
		from   string
		to     fsverity.Algorithm
		format erofs.Format
	}{
		{"oci-boot.sha512.v1", fsverity.SHA256, erofs.V1}, {"oci-boot.sha512.v1", fsverity.SHA256, erofs.V2},
		{"oci-boot.sha256.v2", fsverity.SHA512, erofs.V2}, {"oci-boot.sha256.v2", fsverity.SHA512, erofs.V1},
	} {
		t.Run(fmt.Sprint(c.from, " to ", c.to, " ", c.format), func(t *testing.T) {
			from := open(t, filepath.Join(golden.Extract(t, "repos/"+c.from+".tar.gz"), "repo"))
			if _, err := from.GC(ctx, repo.GCOptions{}); err != nil { // what nothing leads to is not converted
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "to")
			if _, err := repo.Init(path, repo.Config{Algorithm: c.to, Format: c.format, Insecure: true}); err != nil {
				t.Fatal(err)
			}
			to := open(t, path)
			done, err := from.ConvertTo(ctx, to, repo.ConvertOptions{Format: c.format})
			if err != nil {
				t.Fatal(err)
			}
			one, two := mustBeClean(t, from), mustBeClean(t, to)
			if one.Images != two.Images || one.Streams != two.Streams || one.Objects != two.Objects || len(done.Images) != one.Images {
				t.Errorf("%+v became %+v", one, two)
			}
			// And back again: the same repository, but for nanoseconds if a V2 was in between.
			back := filepath.Join(t.TempDir(), "back")
			if _, err := repo.Init(back, repo.Config{Algorithm: from.Algorithm(), Format: from.Format(), Insecure: true}); err != nil {
				t.Fatal(err)
			}
			again := open(t, back)
			if _, err := to.ConvertTo(ctx, again, repo.ConvertOptions{Format: from.Format()}); err != nil {
				t.Fatal(err)
			}
			if c.format == from.Format() || from.Format() == erofs.V2 {
				a, b := objectFiles(t, from), objectFiles(t, again)
				for k := range a {
					if strings.TrimPrefix(a[k], from.Path()) != strings.TrimPrefix(b[k], back) {
						t.Fatalf("there and back: %s became %s", a[k], b[k])
					}
				}
			}
		})
	}
}

// Two hundred times killed in the middle of it, repairs and conversions lose nothing, and the next one ends what was begun.
func TestRepairAndConvertKilled(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 5))
	tree := newTree(t, 300, 1)
	good := newRepo(t)
	d := mustImport(t, good, tree, "os")
	objects := objectFiles(t, good)
	work := newRepo(t)
	mustImport(t, work, tree, "os")
	start := time.Now()
	if err := child("repair", work.Path(), good.Path()).Run(); err != nil {
		t.Fatal(err)
	}
	whole := 2 * time.Since(start)
	// Each try gets more time, so that there is an end on any machine.
	kill := func(what, path, other string) (killed int) {
		for most := whole; ; most += most / 4 {
			cmd := child(what, path, other)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Duration(random.Int64N(int64(most))))
			cmd.Process.Kill()
			if cmd.Wait() == nil {
				return killed
			}
			killed++
			if what == "convert" {
				if report, err := open(t, other).Fsck(ctx, repo.FsckOptions{}); err != nil || !report.OK() {
					t.Fatal(report.Findings, err)
				}
			}
		}
	}
	repaired, converted := 0, 0
	for round := 0; repaired < 100; round++ {
		// Damage a fifth of the objects, each in one of three ways, and heal until one heals to the end.
		for k := range 60 {
			path := filepath.Join(work.Path(), strings.TrimPrefix(objects[random.IntN(len(objects))], good.Path()))
			switch k % 3 {
			case 0:
				replaceFile(t, path, nil)
			case 1:
				replaceFile(t, path, []byte("damaged"))
			case 2:
				if other := filepath.Join(filepath.Dir(path), "foreign"); os.Rename(path, other) != nil {
					replaceFile(t, path, nil)
				}
			}
		}
		repaired += kill("repair", work.Path(), good.Path())
		if round%10 == 0 {
			mustBeClean(t, open(t, work.Path()))
			mustBeClean(t, good)
		}
	}
	if report, err := open(t, work.Path()).VerifyImage(ctx, "os", repo.VerifyOptions{}); err != nil || len(report.Findings) > 0 || report.Image != d {
		t.Errorf("%+v, %v", report, err)
	}
	for converted < 100 {
		path := filepath.Join(t.TempDir(), "to")
		if _, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA512, Format: erofs.V1, Insecure: true}); err != nil {
			t.Fatal(err)
		}
		converted += kill("convert", good.Path(), path)
		if report, err := open(t, path).VerifyImage(ctx, "os", repo.VerifyOptions{}); err != nil || len(report.Findings) > 0 {
			t.Fatal(report.Findings, err)
		}
	}
	mustBeClean(t, good)
}
