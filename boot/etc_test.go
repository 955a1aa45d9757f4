package boot_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/boot"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
)

// etcTree makes a directory of files with these contents; of what ends with a slash the content is the permissions.
func etcTree(list map[string]string) *fstree.Inode {
	t := fstree.New()
	for _, name := range slices.Sorted(maps.Keys(list)) {
		i := &fstree.Inode{Perm: 0o644, Nlink: 1, Content: fstree.Inline(list[name])}
		if strings.HasSuffix(name, "/") {
			i = fstree.NewDir(0o755)
			fmt.Sscanf(list[name], "%o", &i.Perm)
		}
		if strings.HasPrefix(list[name], "-> ") {
			i.Content = fstree.Symlink(list[name][3:])
		}
		clean := path.Clean(name)
		t.Lookup(path.Join("/", path.Dir(clean))).Dir().Set(path.Base(clean), i)
	}
	return t.Root
}

// etcList is the reverse.
func etcList(i *fstree.Inode) map[string]string {
	list := map[string]string{}
	(&fstree.Tree{Root: i}).Walk(func(name string, i *fstree.Inode) error {
		name = strings.TrimPrefix(name, "/")
		switch c := i.Content.(type) {
		case *fstree.Directory:
			if name != "" {
				list[name+"/"] = fmt.Sprintf("%o", i.Perm)
			}
		case fstree.Inline:
			list[name] = string(c)
		case fstree.Symlink:
			list[name] = "-> " + string(c)
		}
		return nil
	})
	return list
}

func TestMergeEtc(t *testing.T) {
	for name, test := range map[string]struct{ old, mine, next, want map[string]string }{
		"image changes":     {map[string]string{"a": "1"}, map[string]string{"a": "1"}, map[string]string{"a": "2"}, map[string]string{"a": "2"}},
		"machine changes":   {map[string]string{"a": "1"}, map[string]string{"a": "m"}, map[string]string{"a": "2"}, map[string]string{"a": "m"}},
		"image adds":        {nil, nil, map[string]string{"a": "2"}, map[string]string{"a": "2"}},
		"machine adds":      {nil, map[string]string{"a": "m"}, nil, map[string]string{"a": "m"}},
		"both add":          {nil, map[string]string{"a": "m"}, map[string]string{"a": "2"}, map[string]string{"a": "m"}},
		"image removes":     {map[string]string{"a": "1"}, map[string]string{"a": "1"}, nil, nil},
		"machine removes":   {map[string]string{"a": "1"}, nil, map[string]string{"a": "2"}, nil},
		"removed, changed":  {map[string]string{"a": "1"}, map[string]string{"a": "m"}, nil, map[string]string{"a": "m"}},
		"machine's link":    {map[string]string{"a": "1"}, map[string]string{"a": "-> b"}, map[string]string{"a": "1"}, map[string]string{"a": "-> b"}},
		"image's directory": {nil, map[string]string{"x": "m"}, map[string]string{"d/": "700", "d/a": "2"}, map[string]string{"x": "m", "d/": "700", "d/a": "2"}},
		"image removes a directory": {map[string]string{"d/": "755", "d/a": "1", "d/b": "1"}, map[string]string{"d/": "755", "d/a": "1", "d/b": "1"},
			nil, nil},
		"image removes a directory with a change": {map[string]string{"d/": "755", "d/a": "1", "d/b": "1"},
			map[string]string{"d/": "755", "d/a": "m", "d/b": "1"}, nil, map[string]string{"d/": "755", "d/a": "m"}},
		"machine removes a directory": {map[string]string{"d/": "755", "d/a": "1"}, nil, map[string]string{"d/": "755", "d/a": "2", "d/b": "2"}, nil},
		"in a directory of both": {map[string]string{"d/": "755", "d/a": "1", "d/b": "1"}, map[string]string{"d/": "755", "d/b": "m", "d/c": "m"},
			map[string]string{"d/": "700", "d/a": "2", "d/b": "2", "d/n": "2"}, map[string]string{"d/": "700", "d/b": "m", "d/c": "m", "d/n": "2"}},
		"permissions": {map[string]string{"d/": "755"}, map[string]string{"d/": "750"}, map[string]string{"d/": "700"}, map[string]string{"d/": "750"}},
		"image makes a file of a directory": {map[string]string{"d/": "755", "d/a": "1"}, map[string]string{"d/": "755", "d/a": "1"},
			map[string]string{"d": "2"}, map[string]string{"d": "2"}},
		"of one with a change": {map[string]string{"d/": "755", "d/a": "1"}, map[string]string{"d/": "755", "d/a": "1", "d/b": "m"},
			map[string]string{"d": "2"}, map[string]string{"d/": "755", "d/b": "m"}},
		"machine makes a directory of a file": {map[string]string{"d": "1"}, map[string]string{"d/": "755", "d/a": "m"},
			map[string]string{"d": "2"}, map[string]string{"d/": "755", "d/a": "m"}},
	} {
		got := etcList(boot.MergeEtc(etcTree(test.old), etcTree(test.mine), etcTree(test.next)))
		if !maps.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

// Without changes of the machine, /etc is that of the new image; without another image, it is the machine's.
func TestMergeEtcWithNothingToMerge(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	tree := func() map[string]string {
		list := map[string]string{}
		for _, name := range []string{"a", "b", "d", "e"} {
			switch random.IntN(4) {
			case 0:
				list[name] = fmt.Sprint(random.IntN(2))
			case 1:
				list[name+"/"] = []string{"755", "700"}[random.IntN(2)]
				for _, file := range []string{"x", "y"} {
					if random.IntN(2) == 0 {
						list[name+"/"+file] = fmt.Sprint(random.IntN(2))
					}
				}
			}
		}
		return list
	}
	for range 500 {
		old, other := tree(), tree()
		if got := etcList(boot.MergeEtc(etcTree(old), etcTree(old), etcTree(other))); !maps.Equal(got, other) {
			t.Fatalf("image %v, then %v: %v", old, other, got)
		}
		if got := etcList(boot.MergeEtc(etcTree(old), etcTree(other), etcTree(old))); !maps.Equal(got, other) {
			t.Fatalf("image %v, changed to %v: %v", old, other, got)
		}
	}
}
