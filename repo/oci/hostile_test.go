package oci_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// raw makes one header as it is, with a right checksum, and its data. Fields are "at:text".
func raw(name string, kind byte, data string, fields ...string) []byte {
	h := make([]byte, 512, 1024)
	copy(h, name)
	copy(h[100:], "0000644\x000000000\x000000000\x00"+fmt.Sprintf("%011o\x00%011o\x00", len(data), 0))
	h[156] = kind
	copy(h[257:], "ustar\x0000")
	for _, f := range fields {
		at, text, _ := strings.Cut(f, ":")
		var n int
		fmt.Sscan(at, &n)
		copy(h[n:], text)
	}
	sum := 8 * int(' ')
	for k, c := range h {
		if k < 148 || k >= 156 {
			sum += int(c)
		}
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	h = append(h, data...)
	return append(h, make([]byte, -len(data)&511)...)
}

func pax(records ...string) []byte {
	var data string
	for _, r := range records {
		n := len(r) + 3
		for len(fmt.Sprint(n))+2+len(r) != n {
			n++
		}
		data += fmt.Sprintf("%d %s\n", n, r)
	}
	return raw("pax", 'x', data)
}

var end = make([]byte, 1024)

func join(parts ...[]byte) []byte { return append(bytes.Join(parts, nil), end...) }

// binary writes a number in base 256 into a field of 12 bytes.
func binary(n int64) string {
	b := []byte{0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if n < 0 {
		b = bytes.Repeat([]byte{0xff}, 12)
	}
	for k := range 8 {
		b[11-k] = byte(n >> (8 * k))
	}
	return string(b)
}

// corpus is layers with defects, and what becomes of them: an error with this text, or a tree with these files. Before each stands
// a layer with base/file, base/dir/file and base/link, a symbolic link to dir.
var corpus = map[string]struct {
	layer []byte
	want  string // "error: " and a part of it, or lines
}{
	"absolute-name":               {archiveOf(file("/a", "x")), "a=x"},
	"dot-names":                   {join(raw("././a/./b", '0', "x")), "a/ a/b=x"},
	"double-slash":                {join(raw("a//b", '0', "x")), "a/ a/b=x"},
	"trailing-slash-on-file":      {join(raw("a/", '0', "x")), "a=x"},
	"trailing-slash-old-dir":      {join(raw("a/", 0, "")), "a/"},
	"dot-dot":                     {join(raw("a/../../b", '0', "x")), `error: file name ".."`},
	"dot-dot-link":                {join(raw("a", '1', "", "157:../etc/shadow")), `error: file name ".."`},
	"nul-in-path":                 {join(pax("path=a\x00b"), raw("c", '0', "x")), "error: NUL"},
	"nul-in-gnu-name":             {join(raw("././@LongLink", 'L', "a\x00b"), raw("c", '0', "x")), "a=x"},
	"empty-path":                  {join(raw("", '0', "x")), "error: empty path"},
	"root-is-a-file":              {join(raw("./", '0', "")), "error: the root is not a directory"},
	"path-4097":                   {join(pax("path="+strings.Repeat("a/", 2049)), raw("c", '0', "x")), "error: at most 4096"},
	"component-256":               {join(pax("path="+strings.Repeat("a", 256)), raw("c", '0', "x")), "error: at most 255"},
	"symlink-parent":              {archiveOf(file("base/link/x", "x")), "error: base/link is not a directory"},
	"symlink-parent-same-layer":   {archiveOf(symlink("l", "/etc"), file("l/passwd", "x")), "error: l is not a directory"},
	"file-parent":                 {archiveOf(file("base/file/x", "x")), "error: not a directory"},
	"link-to-missing":             {archiveOf(linkTo("a", "nothing")), "error: there is no such file"},
	"link-to-later":               {archiveOf(linkTo("a", "b"), file("b", "x")), "error: there is no such file"},
	"link-to-outside":             {archiveOf(linkTo("a", "/base/file")), "a=f"}, // of the image's own root
	"link-to-directory":           {archiveOf(linkTo("a", "base/dir")), "error: it is a directory"},
	"link-to-itself":              {archiveOf(linkTo("a", "a")), "error: there is no such file"},
	"link-to-itself-below":        {archiveOf(linkTo("base/file", "base/file")), ""},
	"link-to-whiteout":            {archiveOf(file(".wh.x", ""), linkTo("a", ".wh.x")), "error: there is no such file"},
	"link-to-hidden":              {archiveOf(file("base/.wh.file", ""), linkTo("a", "base/file")), "-base/file a=f"},
	"link-through-symlink":        {archiveOf(linkTo("a", "base/link/file")), "error: there is no such file"},
	"link-to-symlink":             {archiveOf(linkTo("a", "base/link")), "a->dir"},
	"link-chain":                  {archiveOf(file("a", "x"), linkTo("b", "a"), linkTo("c", "b")), "a=x b=x c=x"},
	"link-chain-backwards":        {archiveOf(linkTo("c", "b"), linkTo("b", "a"), file("a", "x")), "error: there is no such file"},
	"link-without-target":         {join(raw("a", '1', "")), "error: empty path"},
	"link-with-data":              {join(raw("a", '1', "x", "157:base/file")), "error: not a regular file"},
	"directory-with-data":         {join(raw("a", '5', "x")), "error: not a regular file"},
	"duplicate":                   {archiveOf(file("a", "1"), file("a", "2")), "a=2"},
	"directory-then-file":         {archiveOf(file("a/b", "1"), file("a", "2")), "a=2"},
	"file-then-directory":         {archiveOf(file("a", "1"), dirOf("a"), file("a/b", "2")), "a/ a/b=2"},
	"directory-twice":             {archiveOf(dirOf("a"), file("a/b", "1"), dirOf("a")), "a/ a/b=1"},
	"opaque-before-siblings":      {archiveOf(file("base/.wh..wh..opq", ""), file("base/new", "x")), "-base/file -base/dir -base/dir/file -base/link base/new=x"},
	"opaque-after-siblings":       {archiveOf(file("base/new", "x"), file("base/.wh..wh..opq", "")), "-base/file -base/dir -base/dir/file -base/link base/new=x"},
	"opaque-misspelled":           {archiveOf(file("base/.wh..wh.opq", "")), ""},
	"opaque-nowhere":              {archiveOf(file("nowhere/.wh..wh..opq", "")), ""},
	"opaque-root":                 {archiveOf(file(".wh..wh..opq", ""), file("a", "x")), "-base -base/file -base/dir -base/dir/file -base/link a=x"},
	"whiteout-of-own-file":        {archiveOf(file("base/file", "new"), file("base/.wh.file", "")), "base/file=new"},
	"whiteout-twice":              {archiveOf(file("base/.wh.file", ""), file("base/.wh.file", "")), "-base/file"},
	"whiteout-through-symlink":    {archiveOf(file("base/link/.wh.file", "")), ""},
	"whiteout-of-directory":       {archiveOf(file("base/.wh.dir", "")), "-base/dir -base/dir/file"},
	"whiteout-empty":              {archiveOf(file("base/.wh.", "")), "error: empty file name"},
	"whiteout-dot-dot":            {archiveOf(file("base/.wh...", "")), `error: file name ".."`},
	"whiteout-hard-link":          {archiveOf(linkTo("base/.wh.file", "base/dir/file")), "-base/file"},
	"whiteout-of-whiteout":        {archiveOf(file("base/.wh..wh.file", "")), ""},
	"char-0-0":                    {archiveOf(tar.Header{Name: "a", Typeflag: tar.TypeChar}), "a:c0"},
	"device":                      {archiveOf(tar.Header{Name: "a", Typeflag: tar.TypeBlock, Devmajor: 8, Devminor: 300}), "a:b1050668"},
	"device-out-of-range":         {join(raw("a", '3', "", "329:7777777\x000000000\x00")), "error: out of range"},
	"fifo":                        {archiveOf(tar.Header{Name: "a", Typeflag: tar.TypeFifo}), "a|"},
	"symlink-1024":                {archiveOf(symlink("a", strings.Repeat("x", 1024))), "a->" + strings.Repeat("x", 1024)},
	"symlink-1025":                {archiveOf(symlink("a", strings.Repeat("x", 1025))), "error: a symlink target of 1025 bytes"},
	"symlink-empty":               {join(raw("a", '2', "")), "error: a symlink target of 0 bytes"},
	"unknown-type":                {join(raw("a", 'V', "")), `error: type 'V'`},
	"bad-checksum":                {slices.Concat(raw("a", '0', "x")[:100], []byte("7"), raw("a", '0', "x")[101:], end), "error: wrong checksum"},
	"truncated-header":            {raw("a", '0', "x")[:300], "error: unexpected EOF"},
	"truncated-data":              {raw("a", '0', strings.Repeat("x", 1000))[:900], "error: unexpected EOF"},
	"truncated-padding":           {raw("a", '0', "x")[:600], "error: unexpected EOF"},
	"truncated-pax":               {pax("path=b")[:600], "error: unexpected EOF"},
	"pax-then-end":                {join(pax("path=b")), "error: wrong checksum"},
	"pax-then-nothing":            {pax("path=b"), "error: unexpected EOF"},
	"no-end":                      {raw("a", '0', "x"), "a=x"},
	"one-block-of-zeros":          {slices.Concat(raw("a", '0', "x"), end[:512], raw("b", '0', "y"), end), "a=x b=y"},
	"one-block-at-the-end":        {slices.Concat(raw("a", '0', "x"), end[:512]), "a=x"},
	"garbage-after-the-end":       {slices.Concat(raw("a", '0', "x"), end, bytes.Repeat([]byte("garbage!"), 100_000)), "a=x"},
	"entries-after-the-end":       {slices.Concat(raw("a", '0', "x"), end, raw("b", '0', "y"), end), "a=x"},
	"size-octal-garbage":          {join(raw("a", '0', "", "124:12x45670000")), "error: size"},
	"size-negative":               {join(raw("a", '0', "", "124:"+binary(-1))), "error: out of range"},
	"size-huge":                   {join(raw("a", '0', "", "124:"+binary(1<<62))), "error: EOF"},
	"size-overflow":               {join(raw("a", '0', "", "124:"+binary(1<<63-1))), "error: out of range"},
	"size-base-256":               {join(raw("a", '0', "x", "124:"+binary(1))), "a=x"},
	"base-256-too-large":          {join(raw("a", '0', "x", "124:\x80\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01\x01")), "error: out of range"},
	"uid-negative":                {join(pax("uid=-1"), raw("a", '0', "x")), "error: out of range"},
	"uid-too-large":               {join(pax("uid=4294967296"), raw("a", '0', "x")), "error: out of range"},
	"mtime-negative":              {join(pax("mtime=-1.5"), raw("a", '0', "x")), "a=x@-2.500000000"},
	"mtime-nanoseconds":           {join(pax("mtime=12.000000001999"), raw("a", '0', "x")), "a=x@12.000000001"},
	"mtime-tenth":                 {join(pax("mtime=12.1"), raw("a", '0', "x")), "a=x@12.100000000"},
	"mtime-base-256-negative":     {join(raw("a", '0', "x", "136:"+binary(-5))), "a=x@-5.000000000"},
	"mtime-garbage":               {join(pax("mtime=12.1x"), raw("a", '0', "x")), "error: not a time"},
	"pax-size-override":           {join(pax("size=2"), raw("a", '0', "xy", "124:00000000007\x00")), "a=xy"},
	"pax-record-1-GiB":            {join(raw("pax", 'x', "", "124:"+binary(1<<30))), "error: at most 1048576"},
	"pax-record-length-zero":      {join(raw("pax", 'x', "0 path=a\n"), raw("a", '0', "")), "error: wrong length"},
	"pax-record-length-too-large": {join(raw("pax", 'x', "99 path=a\n"), raw("a", '0', "")), "error: wrong length"},
	"pax-record-no-newline":       {join(raw("pax", 'x', "9 path=ab"), raw("a", '0', "")), "error: wrong length"},
	"pax-record-no-key":           {join(pax("=a"), raw("a", '0', "")), "error: no key"},
	"pax-deletes":                 {join(pax("path=b", "path="), raw("a", '0', "x")), "a=x"},
	"pax-global":                  {join(raw("pax", 'g', "22 comment=0123456789\n"), raw("a", '0', "x")), "a=x"},
	"pax-global-path":             {join(raw("pax", 'g', "9 path=b\n"), raw("a", '0', "x")), "a=x"},
	"headers-17":                  {join(bytes.Repeat(pax("path=b"), 17), raw("a", '0', "x")), "error: more than 16"},
	"gnu-name-and-pax":            {join(raw("l", 'L', "b\x00"), pax("path=c"), raw("a", '0', "x")), "c=x"},
	"xattr-64-KiB":                {join(pax("SCHILY.xattr.user.x="+strings.Repeat("v", 65537)), raw("a", '0', "x")), "error: at most 65536"},
	"xattr-no-name":               {join(pax("SCHILY.xattr.=v"), raw("a", '0', "x")), "error: name of 0 bytes"},
	"xattr-nul-in-name":           {join(pax("SCHILY.xattr.a\x00b=v"), raw("a", '0', "x")), "error: NUL"},
	"xattr-twice":                 {join(pax("SCHILY.xattr.user.x=1", "SCHILY.xattr.user.a=0", "SCHILY.xattr.user.x=2"), raw("a", '0', "x")), "a=x{user.a=0}{user.x=2}"},
	"xattr-overlay":               {join(pax("SCHILY.xattr.trusted.overlay.opaque=y"), raw("a", '5', "")), "a/{trusted.overlay.opaque=y}"},
	"setuid-capability":           {join(pax("SCHILY.xattr.security.capability=c"), raw("a", '0', "x", "100:0004755\x00")), "a=x{security.capability=c}"},

	"sparse-old": {join(raw("a", 'S', "xy", "257:ustar  \x00", "386:00000000003\x0000000000002\x00", "483:00000000007\x00")), "a=\x00\x00\x00xy\x00\x00"},
	"sparse-old-extended": {slices.Concat(raw("a", 'S', "", "124:00000000001\x00", "257:ustar  \x00", "482:\x01", "483:00000000003\x00"),
		append([]byte("00000000001\x0000000000001\x00"), make([]byte, 512-24)...), append([]byte("x"), make([]byte, 511)...), end), "a=\x00x\x00"},
	"sparse-old-no-end":      {raw("a", 'S', "", "257:ustar  \x00", "482:\x01", "483:00000000003\x00"), "error: unexpected EOF"},
	"sparse-0.0":             {join(pax("GNU.sparse.size=4", "GNU.sparse.numblocks=1", "GNU.sparse.offset=1", "GNU.sparse.numbytes=2"), raw("a", '0', "xy")), "a=\x00xy\x00"},
	"sparse-0.1":             {join(pax("GNU.sparse.size=4", "GNU.sparse.name=b", "GNU.sparse.map=1,2"), raw("GNUSparseFile.1/a", '0', "xy")), "b=\x00xy\x00"},
	"sparse-1.0":             {join(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=4", "GNU.sparse.name=b"), raw("a", '0', "1\n1\n2\n"+strings.Repeat("\x00", 506)+"xy")), "b=\x00xy\x00"},
	"sparse-1.0-large":       {join(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=100000", "GNU.sparse.name=b"), raw("a", '0', "1\n1\n2\n"+strings.Repeat("\x00", 506)+"xy")), "b:object of 100000"},
	"sparse-name-dot-dot":    {join(pax("GNU.sparse.size=4", "GNU.sparse.name=../b", "GNU.sparse.map=1,2"), raw("a", '0', "xy")), `error: file name ".."`},
	"sparse-backwards":       {join(pax("GNU.sparse.size=9", "GNU.sparse.map=5,1,1,1"), raw("a", '0', "xy")), "error: where 6 is reached"},
	"sparse-past-the-end":    {join(pax("GNU.sparse.size=4", "GNU.sparse.map=3,2"), raw("a", '0', "xy")), "error: sparse file"},
	"sparse-sum":             {join(pax("GNU.sparse.size=9", "GNU.sparse.map=3,3"), raw("a", '0', "xy")), "error: 3 bytes in its map, and 2 stored"},
	"sparse-1.0-count":       {join(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=4"), raw("a", '0', "99999999\n"+strings.Repeat("0", 503))), "error: at most 65536"},
	"sparse-1.0-not-numbers": {join(pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=4"), raw("a", '0', "x")), "error: something else than numbers"},
	"sparse-8-EiB":           {join(pax("GNU.sparse.size=9223372036854775807", "GNU.sparse.map=0,2"), raw("a", '0', "xy")), "error: larger than the limit"},
	"sparse-size-garbage":    {join(pax("GNU.sparse.size=x", "GNU.sparse.map=0,2"), raw("a", '0', "xy")), "error: its size is"},
}

func TestHostileLayers(t *testing.T) {
	base := archiveOf(dirOf("base"), file("base/file", "f"), dirOf("base/dir"), file("base/dir/file", "f"), symlink("base/link", "dir"))
	r := newRepo(t, fsverity.SHA256, erofs.V1)
	plain := map[string]string{}
	for name, c := range corpus {
		err := func() error {
			source := newSource(nil, base, c.layer)
			// Only layers are brought, since there is no /usr.
			_, err := oci.Pull(ctx, r, source, oci.PullOptions{})
			if err != nil && !strings.Contains(err.Error(), "no directory /usr") {
				return err
			}
			var out bytes.Buffer
			if err := oci.WriteLayer(&out, r, oci.DigestOf(c.layer)); err != nil || !bytes.Equal(out.Bytes(), c.layer) {
				t.Errorf("%s: the layer does not come back: %v", name, err)
			}
			tree, err := oci.TreeOf(ctx, r, []oci.Digest{oci.DigestOf(base), oci.DigestOf(c.layer)}, scan.Digests(r.Algorithm()), oci.Limits{})
			if err != nil {
				return err
			}
			got := describe(tree)
			if len(plain) == 0 {
				tree, err := oci.TreeOf(ctx, r, []oci.Digest{oci.DigestOf(base)}, nil, oci.Limits{})
				if err != nil {
					t.Fatal(err)
				}
				plain = describe(tree)
			}
			if text := changes(plain, got); text != c.want {
				t.Errorf("%s: %q, want %q", name, text, c.want)
			}
			return nil
		}()
		want, isError := strings.CutPrefix(c.want, "error: ")
		if isError != (err != nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	mustBeClean(t, r)
}

// describe tells of each file what it is.
func describe(tree *fstree.Tree) map[string]string {
	files := map[string]string{}
	tree.Walk(func(path string, i *fstree.Inode) error {
		text := ""
		switch c := i.Content.(type) {
		case *fstree.Directory:
			text = "/"
		case fstree.Inline:
			text = "=" + string(c)
		case *fstree.Object:
			text = fmt.Sprintf(":object of %d", c.Size)
		case fstree.Symlink:
			text = "->" + string(c)
		case fstree.Device:
			text = fmt.Sprintf(":%s%d", map[bool]string{true: "b", false: "c"}[c.Block], c.Rdev)
		case fstree.Fifo:
			text = "|"
		}
		if i.Mtime != (fstree.Time{}) {
			text += fmt.Sprintf("@%d.%09d", i.Mtime.Sec, i.Mtime.Nsec)
		}
		for _, x := range i.Xattrs {
			text += fmt.Sprintf("{%s=%s}", x.Name, x.Value)
		}
		files[strings.TrimPrefix(path, "/")] = text
		return nil
	})
	return files
}

// changes tells what is different, removed files first.
func changes(from, to map[string]string) string {
	var list []string
	for _, path := range []string{"base", "base/file", "base/dir", "base/dir/file", "base/link"} {
		if _, ok := to[path]; !ok {
			list = append(list, "-"+path)
		}
	}
	var added []string
	for path, text := range to {
		if from[path] != text {
			added = append(added, path+text)
		}
	}
	slices.Sort(added)
	return strings.Join(append(list, added...), " ")
}

func TestHostileManifests(t *testing.T) {
	layer := bigLayers(1, 1, 1)[0]
	id := oci.DigestOf(layer)
	descriptor := map[string]any{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": id, "size": len(layer)}
	config := func(ids ...any) any {
		return map[string]any{"architecture": "amd64", "os": "linux", "rootfs": map[string]any{"diff_ids": ids}}
	}
	for name, c := range map[string]struct {
		change func(m *memory)
		want   string // "" for no error
	}{
		"as-it-should-be":  {func(m *memory) {}, ""},
		"no-layers":        {func(m *memory) { m.describe(config(), []any{}) }, "no directory /usr"},
		"same-layer-twice": {func(m *memory) { m.describe(config(id, id), []any{descriptor, descriptor}) }, ""},
		"layers-10000": {func(m *memory) {
			m.describe(config(id), slices.Repeat([]any{descriptor}, 10000))
		}, "at most 1000"},
		"fewer-diff-ids":  {func(m *memory) { m.describe(config(), []any{descriptor}) }, "0 diff IDs"},
		"other-diff-id":   {func(m *memory) { m.describe(config(oci.DigestOf(nil)), []any{descriptor}) }, "the content has digest"},
		"diff-id-no-hash": {func(m *memory) { m.describe(config("sha256:1234"), []any{descriptor}) }, "is not a digest"},
		"diff-id-sha512":  {func(m *memory) { m.describe(config("sha512:"+strings.Repeat("0", 128)), []any{descriptor}) }, "the content has digest sha512:"},
		"diff-id-path":    {func(m *memory) { m.describe(config("sha256:../../x"), []any{descriptor}) }, "is not a digest"},
		"size-negative": {func(m *memory) {
			m.manifest = bytes.Replace(m.manifest, fmt.Appendf(nil, `"size":%d`, len(layer)), []byte(`"size":-1`), 1)
		}, "negative size"},
		"layer-missing":       {func(m *memory) { delete(m.blobs, id) }, "trying again does not help"},
		"config-changed":      {func(m *memory) { m.blobs[configOf(m)] = []byte("{}") }, "the content has digest"},
		"manifest-is-no-json": {func(m *memory) { m.manifest = []byte("<html>") }, "invalid character"},
		"manifest-and-more":   {func(m *memory) { m.manifest = append(m.manifest, "{}"...) }, "something follows"},
		"manifest-empty":      {func(m *memory) { m.manifest = []byte("{}") }, "names no config"},
		"manifest-17-MiB":     {func(m *memory) { m.manifest = bytes.Repeat([]byte(" "), 17<<20) }, "at most"},
		"key-twice": {func(m *memory) {
			m.manifest = append([]byte(`{"layers":[],`), m.manifest[1:]...)
		}, `"layers" is there twice`},
		"key-twice-in-another-case": {func(m *memory) {
			m.manifest = append([]byte(`{"Layers":[],`), m.manifest[1:]...)
		}, "is there twice"},
		"labels-in-two-cases": {func(m *memory) {
			m.describe(map[string]any{"os": "linux", "config": map[string]any{"Labels": map[string]any{"Name": "a", "name": "b"}},
				"rootfs": map[string]any{"diff_ids": []any{id}}}, []any{descriptor})
		}, ""},
		"nested": {func(m *memory) {
			m.manifest = slices.Concat([]byte(`{"x":`), bytes.Repeat([]byte("["), 5000), bytes.Repeat([]byte("]"), 5000), []byte(","), m.manifest[1:])
		}, "nested more than"},
		"index": {func(m *memory) { m.index(2, "amd64") }, ""},
		"index-in-index-in-index": {func(m *memory) {
			for range 6 {
				m.index(1, "amd64")
			}
		}, "too deep"},
		"index-of-other-platforms": {func(m *memory) { m.index(2, "s390x") }, "no image for linux/amd64 in the index: there are linux/s390x, linux/mips"},
		"index-empty":              {func(m *memory) { m.manifest = []byte(`{"manifests":[]}`) }, "no image for"},
		"index-lies": {func(m *memory) {
			d := m.index(1, "amd64")
			m.blobs[d] = append(m.blobs[d], ' ')
		}, "the content has digest"},
	} {
		m := newSource(nil, layer)
		c.change(m)
		r := newRepo(t, fsverity.SHA256, erofs.V1)
		_, err := oci.Pull(ctx, r, m, oci.PullOptions{Tag: "a", Platform: oci.Platform{OS: "linux", Architecture: "amd64"}})
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if tags, _ := oci.Tags(r); (len(tags) > 0) != (err == nil) {
			t.Errorf("%s: tags %v", name, tags)
		}
		mustBeClean(t, r)
	}
}

func configOf(m *memory) oci.Digest {
	var manifest struct{ Config struct{ Digest oci.Digest } }
	json.Unmarshal(m.manifest, &manifest)
	return manifest.Config.Digest
}

// index puts an index before the manifest that names it for a platform, and other ones.
func (m *memory) index(n int, architecture string) oci.Digest {
	d := m.add(m.manifest)
	list := []any{map[string]any{"digest": d, "size": 1, "platform": oci.Platform{OS: "linux", Architecture: architecture}}}
	for range n - 1 {
		list = append(list, map[string]any{"digest": oci.DigestOf(nil), "size": 1, "platform": oci.Platform{OS: "linux", Architecture: "mips"}})
	}
	m.manifest, _ = json.Marshal(map[string]any{"mediaType": "application/vnd.oci.image.index.v1+json", "manifests": list})
	return d
}
