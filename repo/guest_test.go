package repo_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/vm"
	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// What needs fs-verity runs in a guest: this test starts itself again there.
func TestRepairWithVerity(t *testing.T) {
	vm.WithVerity(t, "TestRepairWithVerity", func(dir string) { repairWithVerity(t, dir) })
}

func repairWithVerity(t *testing.T, dir string) {
	made := func(name string, a fsverity.Algorithm) *repo.Repo {
		path := filepath.Join(dir, name)
		if _, err := repo.Init(path, repo.Config{Algorithm: a, Format: erofs.V1}); err != nil {
			t.Fatal(err)
		}
		return open(t, path)
	}
	r, other := made("repo", fsverity.SHA512), made("other", fsverity.SHA512)
	tree := newTree(t, 40, 1)
	d := mustImport(t, r, tree, "os")
	mustImport(t, other, tree, "os")
	objects := objectFiles(t, r)
	for k, damage := range []func(path string, content []byte){
		func(path string, content []byte) { replaceFile(t, path, content) },                       // without fs-verity
		func(path string, content []byte) { replaceFile(t, path, append(content, 'x')) },          // and wrong
		func(path string, _ []byte) { replaceFile(t, path, nil) },                                 // missing
		func(path string, _ []byte) { os.Rename(path, filepath.Join(filepath.Dir(path), "new")) }, // another name
	} {
		damage(objects[3*k], contentOf(t, objects[3*k]))
	}
	// Two that have fs-verity with the digest of the other one.
	os.Rename(objects[20], objects[20]+"x")
	os.Rename(objects[21], objects[20])
	os.Rename(objects[20]+"x", objects[21])
	report, err := r.Repair(ctx, repo.RepairOptions{From: []string{other.Path()}})
	if err != nil || !report.After.OK() {
		t.Fatalf("%v\n%v\n%v", err, report.Steps, report.After.Findings)
	}
	actions := map[repo.Action]int{}
	for _, s := range report.Steps {
		actions[s.Action]++
	}
	if actions[repo.ActionEnable] != 1 || actions[repo.ActionRestore] != 5 {
		t.Errorf("%v", actions)
	}
	if v, err := r.VerifyImage(ctx, "os", repo.VerifyOptions{Read: true}); err != nil || len(v.Findings) > 0 || v.Image != d {
		t.Errorf("%+v, %v", v, err)
	}
	for _, o := range objectFiles(t, r) {
		f, err := os.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := fsverity.Measure(f); err != nil || !strings.HasSuffix(o, got.ObjectPath()) {
			t.Errorf("%s: %v, %v", o, got, err)
		}
		f.Close()
	}
	// Another algorithm needs other Merkle trees: the objects are copies.
	to := made("sha256", fsverity.SHA256)
	done, err := r.ConvertTo(ctx, to, repo.ConvertOptions{Format: erofs.V1})
	if err != nil || len(done.Images) != 1 || !to.RequiresVerity() {
		t.Fatal(done, err)
	}
	if v, err := to.VerifyImage(ctx, "os", repo.VerifyOptions{Read: true}); err != nil || len(v.Findings) > 0 || v.Image != done.Images[0].To {
		t.Errorf("%+v, %v", v, err)
	}
	mustBeClean(t, r)
	mustBeClean(t, to)
	// A repository from the time before meta.json, whose objects have fs-verity, requires it.
	os.Remove(filepath.Join(to.Path(), "meta.json"))
	upgraded, err := repo.Open(to.Path(), repo.Options{Upgrade: true})
	if err != nil || !upgraded.RequiresVerity() || upgraded.Algorithm() != fsverity.SHA256 {
		t.Fatal("not upgraded", err)
	}
	upgraded.Close()
}
