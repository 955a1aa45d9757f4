package selinux_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot/selinux"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// withPolicy makes a tree with a policy whose files are given by their suffixes.
func withPolicy(files map[string]string) *fstree.Tree {
	t := fstree.New()
	dir := t.Root.Dir()
	for _, name := range []string{"etc", "selinux", "p", "contexts", "files"} {
		sub := fstree.NewDir(0o755)
		dir.Set(name, sub)
		if name == "selinux" {
			sub.Dir().Set("config", &fstree.Inode{Content: fstree.Inline("# SELINUXTYPE=other\nSELINUXTYPE = p\n")})
		}
		dir = sub.Dir()
	}
	for suffix, text := range files {
		dir.Set("file_contexts"+suffix, &fstree.Inode{Content: fstree.Inline(text)})
	}
	return t
}

func load(t testing.TB, files map[string]string) *selinux.Policy {
	t.Helper()
	p, err := selinux.Load(withPolicy(files), func(name string, _ *fstree.Inode) (io.ReadCloser, error) {
		return nil, fmt.Errorf("%s was opened", name)
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLabel(t *testing.T) {
	p := load(t, map[string]string{
		"": `
/.*	default
/usr(/.*)?	usr
/usr/lib/[^/]*\.so.*	--	lib
/usr/(bin|sbin)/x	-l	link
/usr/bin/x?	optional
/a|/b	either
/opt/(?!no)[a-z]+	ahead
/none.*	<<none>>
/dot\.dir	dot
/plus+	plus
/brace{2}	brace
/class[]x]end	class
/group(/one|/two)?/last	group
/some.+	some
`,
		".local":    "/usr/local	--	local\n",
		".homedirs": "/home/[^/]+	-d	home\n",
	})
	for _, c := range []struct {
		path string
		kind uint32
		want string
	}{
		{"/", fstree.TypeDir, "default"}, {"/usr", fstree.TypeDir, "usr"}, {"/usrx", fstree.TypeDir, "default"},
		{"/usr/lib/a.so.1", fstree.TypeRegular, "lib"}, {"/usr/lib/a.so.1", fstree.TypeSymlink, "usr"},
		{"/usr/sbin/x", fstree.TypeSymlink, "link"}, {"/usr/bin/", fstree.TypeRegular, "optional"},
		{"/usr/bin/x", fstree.TypeRegular, "optional"}, {"/usr/bin/xx", fstree.TypeRegular, "usr"},
		{"/a", fstree.TypeRegular, "either"}, {"/b", fstree.TypeRegular, "either"}, {"/ab", fstree.TypeRegular, "default"},
		{"/opt/yes", fstree.TypeRegular, "ahead"}, {"/opt/nope", fstree.TypeRegular, "default"},
		{"/none", fstree.TypeRegular, ""}, {"/nonesuch/x", fstree.TypeRegular, ""},
		{"/dot.dir", fstree.TypeDir, "dot"}, {"/dotxdir", fstree.TypeDir, "default"},
		{"/plusss", fstree.TypeDir, "plus"}, {"/plu", fstree.TypeDir, "default"},
		{"/bracee", fstree.TypeDir, "brace"}, {"/brace", fstree.TypeDir, "default"},
		{"/class]end", fstree.TypeDir, "class"}, {"/group/two/last", fstree.TypeDir, "group"}, {"/group/last", fstree.TypeDir, "group"},
		{"/some", fstree.TypeDir, "default"}, {"/somex", fstree.TypeDir, "some"},
		{"/usr/local", fstree.TypeRegular, "local"}, {"/usr/local", fstree.TypeDir, "usr"},
		{"/home/me", fstree.TypeDir, "home"}, {"/home/me", fstree.TypeRegular, "default"}, {"/home/me/x", fstree.TypeDir, "default"},
	} {
		if got, err := p.Label(c.path, c.kind); err != nil || got != c.want {
			t.Errorf("%s %o: %q, %v, want %q", c.path, c.kind, got, err, c.want)
		}
	}
}

func TestPoliciesThatAreMalformed(t *testing.T) {
	for want, files := range map[string]map[string]string{
		"file_contexts: line 2: 1 fields":             {"": "/a x\n/b\n"},
		"file_contexts: line 1: file type \"-x\"":     {"": "/a -x label\n"},
		"file_contexts: line 1: 4 fields":             {"": "/a -- label more\n"},
		"file_contexts.subs: line 3: 1 fields":        {"": "/a x", ".subs": "# comment\n\n/alone\n"},
		"file_contexts: line 2: bufio.Scanner: token": {"": "/a x\n" + strings.Repeat("x", 70_000)},
	} {
		_, err := selinux.Load(withPolicy(files), nil)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	p := load(t, map[string]string{"": "/.* default\n/a/(unclosed x\n"})
	if _, err := p.Label("/a/(unclosed", fstree.TypeRegular); err == nil || !strings.Contains(err.Error(), "file_contexts: line 2: expression") {
		t.Errorf("an expression that is none: %v", err)
	}
	if got, err := p.Label("/b", fstree.TypeRegular); err != nil || got != "default" {
		t.Errorf("a path that does not come near it: %q, %v", got, err)
	}
	// Back-tracking for ever is ended.
	p = load(t, map[string]string{"": "/a/(?=b)(x+x+)+y z\n"})
	if _, err := p.Label("/a/"+strings.Repeat("x", 60), fstree.TypeRegular); err != nil && !strings.Contains(err.Error(), "timeout") {
		t.Errorf("%v", err)
	}
}

// A hard link whose names have different labels becomes two files; the label of the first name stays with the first.
func TestHardLinksAreSplit(t *testing.T) {
	tree := withPolicy(map[string]string{"": "/.* default\n/usr/b.* other\n"})
	usr := fstree.NewDir(0o755)
	shared := &fstree.Inode{Nlink: 4, Content: fstree.Inline("x")}
	for _, name := range []string{"a1", "a2", "b1", "b2"} {
		usr.Dir().Set(name, shared)
	}
	tree.Root.Dir().Set("usr", usr)
	p, err := selinux.Load(tree, nil)
	if err == nil {
		err = p.Apply(tree)
	}
	if err != nil {
		t.Fatal(err)
	}
	label := func(name string) string {
		v, _ := tree.Lookup("usr/" + name).Xattr(selinux.Attribute)
		return string(v)
	}
	if label("a1") != "default" || label("a2") != "default" || label("b1") != "other" || label("b2") != "other" {
		t.Errorf("%s %s %s %s", label("a1"), label("a2"), label("b1"), label("b2"))
	}
	if tree.Lookup("usr/a1") != tree.Lookup("usr/a2") || tree.Lookup("usr/a1") == tree.Lookup("usr/b1") {
		t.Error("linked wrongly")
	}
	selinux.Strip(tree)
	if label("a1") != "" {
		t.Error("not stripped")
	}
}

// As many rules as Debian's policy has, and the paths of a small system.
func BenchmarkLabel(b *testing.B) {
	var rules strings.Builder
	rules.WriteString("/.*	default\n")
	for k := range 5500 {
		switch k % 4 {
		case 0:
			fmt.Fprintf(&rules, "/usr/s?bin/program%d	--	type%d\n", k, k)
		case 1:
			fmt.Fprintf(&rules, "/usr/lib/package%d(/.*)?	type%d\n", k, k)
		case 2:
			fmt.Fprintf(&rules, "/var/lib/[^/]+/data%d/.*\\.db	--	type%d\n", k, k)
		case 3:
			fmt.Fprintf(&rules, "/etc/service%d\\.conf	--	type%d\n", k, k)
		}
	}
	files := map[string]string{"": rules.String()}
	for b.Loop() {
		p := load(b, files)
		for k := range 8000 {
			if _, err := p.Label(fmt.Sprintf("/usr/lib/package%d/file%d", k%5500, k), fstree.TypeRegular); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// The short cuts for plain text at the beginning and the end of an expression change no answer.
func TestShortCutsAgreeWithTheExpression(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	pieces := []string{"/", "a", "b", `\.`, "[ab]", "[^/]", "(a|b)", "(/.*)?", ".*", ".+", "a?", "b*", "a{2}", `\d`, "(ab)?", "a|b", "[]a]", `[\]b]`}
	letters := []string{"/", "a", "b", ".", "aa", "/a", "ab", "]", "1"}
	for range 20_000 {
		expr, path := "/", "/"
		for range r.IntN(6) {
			expr += pieces[r.IntN(len(pieces))]
		}
		for range r.IntN(6) {
			path += letters[r.IntN(len(letters))]
		}
		want := regexp.MustCompile("^(?:" + expr + ")$").MatchString(path)
		p := load(t, map[string]string{"": expr + " yes\n"})
		if got, err := p.Label(path, fstree.TypeRegular); err != nil || (got == "yes") != want {
			t.Fatalf("%s on %s: %q, %v, want %v", expr, path, got, err, want)
		}
	}
}
