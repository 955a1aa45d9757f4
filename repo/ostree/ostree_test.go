package ostree_test

import (
	"context"
	"encoding/json"
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

var ctx = context.Background()

// ref is that of the vectors. Its commit is the second one.
const ref = "vec/x86_64/one"

// vectors is digests.json.
type vectors struct {
	Commits struct{ First, Second string }
	Digests map[string]map[string]string // mode -> "sha256 v1" -> image digest
}

func loadVectors(t testing.TB) (v vectors) {
	t.Helper()
	if err := json.Unmarshal(golden.Read(t, "ostree/digests.json"), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// vector returns the repository of a mode.
func vector(t testing.TB, mode string) string {
	t.Helper()
	return filepath.Join(golden.Extract(t, "ostree/"+mode+".tar.gz"), mode)
}

func local(t testing.TB, path string) *ostree.Local {
	t.Helper()
	l, err := ostree.OpenLocal(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func newRepo(t testing.TB, a fsverity.Algorithm, f erofs.Format) *repo.Repo {
	t.Helper()
	path := filepath.Join(t.TempDir(), "repo")
	if _, err := repo.Init(path, repo.Config{Algorithm: a, Format: f, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	return openRepo(t, path)
}

func openRepo(t testing.TB, path string) *repo.Repo {
	t.Helper()
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func pull(t testing.TB, r *repo.Repo, source ostree.Source, name string, o ostree.PullOptions) ostree.Pulled {
	t.Helper()
	list, err := ostree.Pull(ctx, r, source, []string{name}, o)
	if err != nil {
		t.Fatal(err)
	}
	return list[0]
}

// Every mode, algorithm and format gives the image that composefs-rs makes.
func TestGolden(t *testing.T) {
	for mode, digests := range loadVectors(t).Digests {
		source := local(t, vector(t, mode))
		name := ref
		if _, err := source.Ref(ctx, name); err != nil { // the first commit alone could be made
			refs, err := source.Refs()
			if err != nil || len(refs) != 1 {
				t.Fatalf("%s: %v %v", mode, refs, err)
			}
			name = refs[0].Name
		}
		for _, a := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
			r := newRepo(t, a, erofs.V1)
			p := pull(t, r, source, name, ostree.PullOptions{Formats: []erofs.Format{erofs.V1, erofs.V2}})
			for _, f := range []erofs.Format{erofs.V1, erofs.V2} {
				hash := map[fsverity.Algorithm]string{fsverity.SHA256: "sha256", fsverity.SHA512: "sha512"}[a]
				want := digests[hash+" "+f.String()]
				if got, ok := p.Find(false, f); !ok || got.String() != want {
					t.Errorf("%s %s %v: %v, want %s", mode, hash, f, got, want)
				}
			}
		}
	}
}

// The same commit is the same stream in every repository: disks with one are made again bit for bit.
func TestSameStream(t *testing.T) {
	source := local(t, vector(t, "archive"))
	var first fsverity.Digest
	for k := range 20 {
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		p := pull(t, r, source, ref, ostree.PullOptions{Depth: -1, Formats: []erofs.Format{erofs.V1, erofs.V2}})
		d, err := r.StreamObject("ostree-commit-" + p.Checksum.String())
		if err != nil {
			t.Fatal(err)
		}
		if k == 0 {
			first = d
		} else if d != first {
			t.Fatalf("stream %v, and then %v", first, d)
		}
	}
}
