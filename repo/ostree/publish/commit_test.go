package publish_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// compose returns the checksum of the commit of a directory.
func compose(t testing.TB, a fsverity.Algorithm, dir string, d ostree.Description, change ...func(*fstree.Tree)) string {
	t.Helper()
	tree, err := scan.Dir(ctx, dir, scan.Digests(a), scan.Options{Xattrs: fstree.XattrsAll})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range change {
		f(tree)
	}
	o, err := ostree.Compose(ctx, tree, scan.Files(dir), scan.Digests(a), a, d)
	if err != nil {
		t.Fatal(err)
	}
	return o.Commit.String()
}

// The same tree and description give the same commit as ostree commit.
func TestCommitAsOstree(t *testing.T) {
	theirs := filepath.Join(t.TempDir(), "theirs")
	peer(t, "init", "--repo="+theirs, "--mode=bare-user")
	for _, name := range []string{"files", "links", "metadata", "names", "selinux"} {
		dir := tree(t, name)
		for _, alg := range []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512} {
			d := ostree.Description{Subject: "A subject", Body: "and\na body, äöü", Time: 1700000000, Refs: []string{"b/x", "a"},
				Metadata: []ostree.MetadataEntry{{Key: "version", Value: text("1.0")}, {Key: "a", Value: text("")}}}
			want := peer(t, "commit", "--fsync=false", "--repo="+theirs, "--branch=b/x", "--parent=none", "--bind-ref=a", "-s", d.Subject, "-m", d.Body,
				"--timestamp=@1700000000", "--add-metadata-string=version=1.0", "--add-metadata-string=a=", dir)
			if got := compose(t, alg, dir, d); got != want {
				t.Errorf("%s, %v: %s, want %s", name, alg, got, want)
			}
		}
	}
}

// The dictionary of a bootable commit has the order of a hash table.
func TestBootableAsOstree(t *testing.T) {
	theirs, dir := filepath.Join(t.TempDir(), "theirs"), t.TempDir()
	peer(t, "init", "--repo="+theirs, "--mode=archive")
	modules := filepath.Join(dir, "usr/lib/modules/6.1.0-ö")
	if err := os.MkdirAll(modules, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(modules, "vmlinuz"), []byte("a kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	for n := range 60 {
		d := ostree.Description{Time: 1, Refs: []string{"os"}, Bootable: true}
		args := []string{"commit", "--fsync=false", "--repo=" + theirs, "--branch=os", "--parent=none", "--bootable", "--timestamp=@1"}
		for k := range n {
			key := fmt.Sprintf("key.%d.%c", k*k, 'a'+k%26)
			if k%7 == 3 {
				key += "ü"
			}
			d.Metadata = append(d.Metadata, ostree.MetadataEntry{Key: key, Value: text("v")})
			args = append(args, "--add-metadata-string="+key+"=v")
		}
		want := peer(t, append(args, dir)...)
		if got := compose(t, fsverity.SHA256, dir, d); got != want {
			t.Errorf("%d keys: %s, want %s", n, got, want)
		}
	}
}

// Values in GVariant text are understood as ostree does.
func TestMetadataAsOstree(t *testing.T) {
	theirs, dir := filepath.Join(t.TempDir(), "theirs"), t.TempDir()
	peer(t, "init", "--repo="+theirs, "--mode=archive")
	for _, text := range []string{"true", "-7", "uint32 0x10", "byte 0x41", "2.5", "'it\\'s \\u00fc\\n'", "b'a\\001'", "['a', 'b']", "[1, uint16 2]",
		"@ay []", "()", "(1,)", "(byte 1, 'x', int64 -5)", "<5>", "{'a': <byte 1>, 'b': <'x'>}", "{1: [2.5]}", "just 5", "@mi nothing",
		"[just 'a', nothing]", "[[], [1]]", "@a{sv} {}", "objectpath '/a'", "{'a', 1}", "[<1>, <'a'>]", "@as ['x']", "double 1", "@aay [b'x']"} {
		v, err := gvariant.ParseText(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		d := ostree.Description{Time: 1, Metadata: []ostree.MetadataEntry{{Key: "k", Value: v}}}
		want := peer(t, "commit", "--fsync=false", "--repo="+theirs, "--orphan", "--no-bindings", "--timestamp=@1", "--add-metadata=k="+text, dir)
		if got := compose(t, fsverity.SHA256, dir, d); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

// The options that change a tree change it as those of ostree do.
func TestChangesAsOstree(t *testing.T) {
	theirs := filepath.Join(t.TempDir(), "theirs")
	peer(t, "init", "--repo="+theirs, "--mode=bare-user")
	dir := tree(t, "metadata")
	for option, c := range map[string]ostree.Changes{
		"--canonical-permissions": ostree.CanonicalPermissions,
		"--no-xattrs":             {NoXattrs: true},
		"--mode-ro-executables":   {ROExecutables: true},
		"--owner-uid=5":           {Owner: new(uint32(5))},
		"--owner-gid=6":           {Group: new(uint32(6))},
	} {
		want := peer(t, "commit", "--fsync=false", "--repo="+theirs, "--orphan", "--timestamp=@1", option, dir)
		got := compose(t, fsverity.SHA256, dir, ostree.Description{Time: 1, Refs: []string{}}, applied(t, c))
		if got != want {
			t.Errorf("%s: %s, want %s", option, got, want)
		}
	}
}

func applied(t testing.TB, c ostree.Changes) func(*fstree.Tree) {
	return func(tree *fstree.Tree) {
		if _, err := c.Apply(tree); err != nil {
			t.Fatal(err)
		}
	}
}

// Single files are changed and left out as by ostree: also those of several names.
func TestOverridesAsOstree(t *testing.T) {
	theirs := filepath.Join(t.TempDir(), "theirs")
	peer(t, "init", "--repo="+theirs, "--mode=bare-user")
	dir := t.TempDir()
	for _, name := range []string{"a/b/file", "a/b/other", "a/skip/below", "c"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "c"), filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	modes, skips := filepath.Join(t.TempDir(), "modes"), filepath.Join(t.TempDir(), "skips")
	for _, c := range []struct {
		modes, skips string
		options      []string
		changes      ostree.Changes
	}{
		{"+2048 /a/b/file\n=384 /c\n\n+1 /a\n=493 /\n", "/a/skip\n/a/b/other\n", nil, ostree.Changes{}},
		{"+0x800 /d", "/c", []string{"--mode-ro-executables", "--owner-uid=3"}, ostree.Changes{ROExecutables: true, Owner: new(uint32(3))}},
		{"+1024 /a/b\n=2541 /c\n", "", []string{"--canonical-permissions"}, ostree.CanonicalPermissions},
	} {
		for path, text := range map[string]string{modes: c.modes, skips: c.skips} {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.changes.ReadModes(c.modes); err != nil {
			t.Fatal(err)
		}
		if err := c.changes.ReadSkips(c.skips); err != nil {
			t.Fatal(err)
		}
		args := append([]string{"commit", "--fsync=false", "--repo=" + theirs, "--orphan", "--timestamp=@1", "--statoverride=" + modes, "--skip-list=" + skips}, c.options...)
		want := peer(t, append(args, dir)...)
		if got := compose(t, fsverity.SHA256, dir, ostree.Description{Time: 1, Refs: []string{}}, applied(t, c.changes)); got != want {
			t.Errorf("%q, %q: %s, want %s", c.modes, c.skips, got, want)
		}
	}
	var o ostree.Overrides
	for _, text := range []string{"2048", "+x /a", "+5000 /a", "=-1 /a", "=0755 /a", "=5 a", "+ /a"} {
		if err := o.ReadModes(text); err == nil {
			t.Errorf("%q is read", text)
		}
	}
	for _, text := range []string{"a", "/"} {
		if err := o.ReadSkips(text); err == nil {
			t.Errorf("%q is read", text)
		}
	}
	missing := ostree.Changes{Overrides: ostree.Overrides{Skip: map[string]bool{"/a": true, "/x": true}, Modes: map[string]ostree.ModeOverride{"/a/y": {}}}}
	tree := fstree.New()
	tree.Root.Dir().Set("a", fstree.NewDir(0o755))
	if _, err := missing.Apply(tree); err == nil || err.Error() != "/a/y: to have another mode, and not in the tree (and 1 more)" {
		t.Error(err)
	}
}

// randomTree makes a tree of what OSTree can hold, and nothing that it would change.
func randomTree(random *rand.Rand) (*fstree.Tree, map[*fstree.Inode][]byte) {
	contents := map[*fstree.Inode][]byte{}
	same := map[string]*fstree.Inode{} // files that are alike are one
	var dir func(depth int) *fstree.Inode
	meta := func(i *fstree.Inode) *fstree.Inode {
		i.UID, i.GID = random.Uint32N(3), random.Uint32N(3)
		if random.IntN(4) == 0 {
			i.Xattrs = []fstree.Xattr{{Name: "security.selinux", Value: []byte("label\x00")}, {Name: "user.x", Value: []byte{byte(random.IntN(3))}}}
		}
		return i
	}
	dir = func(depth int) *fstree.Inode {
		d := fstree.NewDir([]uint32{0o755, 0o700, 0o1777, 0o2775}[random.IntN(4)])
		for k := range random.IntN(7) {
			name := fmt.Sprintf("%c%d-ü\n", 'a'+random.IntN(26), k)
			i := meta(&fstree.Inode{Perm: []uint32{0o644, 0o755, 0o4755, 0}[random.IntN(4)]})
			switch kind := random.IntN(4); {
			case kind == 0 && depth < 5:
				i = dir(depth + 1)
			case kind == 1:
				i.Perm, i.Content = 0o777, fstree.Symlink(strings.Repeat("x", 1+random.IntN(3)))
			default:
				content := bytes.Repeat([]byte{byte(random.IntN(4))}, []int{0, 1, 64, 65, 128, 129, 5000}[random.IntN(7)])
				i.Content = fstree.Inline(content)
			}
			if i.Dir() == nil {
				key := fmt.Sprintf("%+v", *i)
				if old := same[key]; old != nil {
					i = old
				} else {
					same[key] = i
					if content, ok := i.Content.(fstree.Inline); ok {
						contents[i] = content
					}
				}
			}
			d.Dir().Set(name, i)
		}
		return meta(d)
	}
	tree := &fstree.Tree{Root: dir(0)}
	tree.CountLinks()
	return tree, contents
}

// A tree becomes a commit, and the commit the same tree.
func TestTreeReturns(t *testing.T) {
	random := rand.New(rand.NewPCG(5, 6))
	for round := range 200 {
		tree, contents := randomTree(random)
		alg := []fsverity.Algorithm{fsverity.SHA256, fsverity.SHA512}[round%2]
		inline := 2 * alg.Size() // as much as commits keep by themselves
		for i, content := range contents {
			if len(content) > fstree.MaxInline && (len(content) > inline || round%4 < 2) {
				i.Content = &fstree.Object{Digest: fsverity.Of(alg, content), Size: uint64(len(content))}
			}
		}
		open := func(_ string, i *fstree.Inode) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(contents[i])), nil
		}
		o, err := ostree.Compose(ctx, tree, open, scan.Digests(alg), alg, ostree.Description{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := o.Tree(ostree.RightNames)
		if err != nil {
			t.Fatal(err)
		}
		for i, content := range contents {
			if len(content) <= inline {
				i.Content = fstree.Inline(content)
			}
		}
		if err := fstree.Diff(tree, got, func(d fstree.Difference) error { return fmt.Errorf("%+v", d) }); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

// What cannot be in a commit is refused, and what it is of is named.
func TestComposeRefuses(t *testing.T) {
	file := func(change func(*fstree.Inode)) *fstree.Tree {
		tree := fstree.New()
		i := &fstree.Inode{Perm: 0o644, Content: fstree.Inline("x")}
		change(i)
		tree.Root.Dir().Set("f", i)
		return tree
	}
	object := func(d fsverity.Digest, size uint64) *fstree.Tree {
		return file(func(i *fstree.Inode) { i.Content = &fstree.Object{Digest: d, Size: size} })
	}
	content := bytes.Repeat([]byte("y"), 1000)
	open := func(string, *fstree.Inode) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }
	right := fsverity.Of(fsverity.SHA256, content)
	kernels := fstree.New()
	modules := fstree.NewDir(0o755)
	for _, release := range []string{"1", "2"} {
		dir := fstree.NewDir(0o755)
		dir.Dir().Set("vmlinuz", &fstree.Inode{Content: fstree.Inline("")})
		modules.Dir().Set(release, dir)
	}
	usr, lib := fstree.NewDir(0o755), fstree.NewDir(0o755)
	kernels.Root.Dir().Set("usr", usr)
	usr.Dir().Set("lib", lib)
	lib.Dir().Set("modules", modules)
	odd := fstree.New()
	odd.Root.Dir().Set("\xff", fstree.NewDir(0o755))
	key := ostree.MetadataEntry{Key: "version", Value: text("1")}
	for want, c := range map[string]struct {
		tree *fstree.Tree
		d    ostree.Description
	}{
		"/f: a character device: OSTree holds": {tree: file(func(i *fstree.Inode) { i.Content = fstree.Device{} })},
		"/f: a fifo: OSTree holds":             {tree: file(func(i *fstree.Inode) { i.Content = fstree.Fifo{} })},
		"/f: a socket: OSTree holds":           {tree: file(func(i *fstree.Inode) { i.Content = fstree.Socket{} })},
		"/f: a symbolic link with a target of": {tree: file(func(i *fstree.Inode) { i.Content = fstree.Symlink("") })},
		`extended attribute "user.a\x00b"`:     {tree: file(func(i *fstree.Inode) { i.Xattrs = []fstree.Xattr{{Name: "user.a\x00b"}} })},
		"/f: it has changed":                   {tree: object(fsverity.Of(fsverity.SHA256, content[1:]), 1000)},
		"f: it has changed":                    {tree: object(right, 999)},
		"it has changed":                       {tree: object(right, 1001)},
		"want one of sha256":                   {tree: object(fsverity.Of(fsverity.SHA512, content), 1000)},
		"is known by the digest":               {tree: object(fsverity.Digest{}, 1000)},
		"not UTF-8":                            {tree: odd},
		"the key is there twice":               {tree: fstree.New(), d: ostree.Description{Metadata: []ostree.MetadataEntry{key, key}}},
		"no directory /usr/lib/modules":        {tree: fstree.New(), d: ostree.Description{Bootable: true}},
		"both 1 and 2 in /usr/lib/modules":     {tree: kernels, d: ostree.Description{Bootable: true}},
		"metadata: 1001 keys":                  {tree: fstree.New(), d: ostree.Description{Metadata: make([]ostree.MetadataEntry, 1001)}},
	} {
		_, err := ostree.Compose(ctx, c.tree, open, scan.Digests(fsverity.SHA256), fsverity.SHA256, c.d)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
		if strings.Contains(want, "changed") && !errors.Is(err, repo.ErrCorrupt) {
			t.Errorf("%v: not ErrCorrupt", err)
		}
	}
}
