package dumpfile_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
)

// The dump of a golden tree is what composefs-info prints for its image.
func TestGoldenDumps(t *testing.T) {
	images := golden.Load(t).Dumps
	for _, name := range golden.Names(t) {
		text := golden.Read(t, "dumps/"+name+".dump")
		tree, err := dumpfile.Read(bytes.NewReader(text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for format, style := range map[string]dumpfile.Style{"v0": dumpfile.InfoV0, "v1": dumpfile.InfoV1} {
			var out bytes.Buffer
			if err := dumpfile.Write(&out, tree, style); err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(out.Bytes())
			if got, want := hex.EncodeToString(sum[:]), images[name][format].DumpSha256; got != want {
				t.Errorf("%s %s: another dump:\n%s", name, format, firstLines(out.String()))
			}
		}
	}
}

// A dump by cfsctl is written back byte for byte.
func TestGoldenTreesOfCfsctl(t *testing.T) {
	for _, name := range []string{"files", "links", "metadata", "names", "selinux"} {
		want := golden.Read(t, "trees/"+name+".boot.sha256.dump.gz")
		tree, err := dumpfile.Read(bytes.NewReader(want))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		tree.CountLinks()
		var out bytes.Buffer
		dumpfile.Write(&out, tree, dumpfile.Cfsctl)
		if !bytes.Equal(out.Bytes(), want) {
			t.Errorf("%s: another dump:\n%s", name, firstLines(out.String()))
		}
	}
}

func firstLines(s string) string {
	if len(s) > 2000 {
		s = s[:2000]
	}
	return s
}

const root = "/ 0 40755 2 0 0 0 0.0 - - -\n"

// Each file of testdata is named by its defect; the error must name the line and what is wrong.
func TestHostile(t *testing.T) {
	for name, want := range map[string]string{
		"escape-unknown":         `line 2: PATH: unknown escape "\\q"`,
		"escape-cut-off":         `line 2: PATH: nothing after a backslash`,
		"escape-half-hex":        `line 2: PATH: no two hexadecimal digits`,
		"inline-too-long":        `line 2: CONTENT: 5001 bytes, at most 5000`,
		"inline-size-differs":    `line 2: CONTENT: 3 bytes, but SIZE is 4`,
		"name-dot":               `file name "."`,
		"name-dotdot":            `file name ".."`,
		"name-empty":             `empty file name`,
		"name-too-long":          `256 bytes, at most 255`,
		"parent-missing":         `line 2: PATH: "/a/b": no directory "/a"`,
		"parent-is-file":         `line 3: PATH: "/a/b": no directory "/a"`,
		"path-relative":          `want an absolute path`,
		"path-twice":             `line 3: PATH: "/a": there already`,
		"nul":                    `line 2: a NUL byte`,
		"root-missing":           `the first line is not that of the root`,
		"root-twice":             `a second root`,
		"root-is-file":           `the root is not a directory`,
		"empty":                  `no line for the root directory`,
		"link-to-itself":         `leads back to it`,
		"link-circle":            `leads back to it`,
		"link-to-directory":      `its target is a directory`,
		"link-to-missing":        `no target "/nope"`,
		"link-without-target":    `a hard link without target`,
		"link-of-directory-mode": `a hard link to a directory`,
		"mode-without-type":      `no file type that there is`,
		"link-without-type":      `no file type that there is`,
		"escape-in-unused":       `line 2: PAYLOAD: nothing after a backslash`,
		"size-of-device":         `line 2: SIZE: 5: neither a regular file`,
		"content-of-device":      `line 2: CONTENT: only a regular file has content`,
		"mode-not-octal":         `MODE: "100689": not a number in base 8`,
		"fields-missing":         `only 5 of 11 fields`,
		"number-too-large":       `UID: "4294967296": not a number`,
		"number-negative":        `SIZE: "-1": not a number`,
		"mtime-without-dot":      `MTIME: "5": want seconds`,
		"mtime-nsec-too-large":   `not a number of nanoseconds`,
		"digest-short":           `DIGEST: digest "abcd"`,
		"digest-without-payload": `PAYLOAD: none, but there is a DIGEST`,
		"symlink-without-target": `PAYLOAD: symlink target`,
		"symlink-too-long":       `want 1 to 1024 bytes`,
		"xattr-without-equals":   `no '='`,
		"xattr-without-name":     `the name is empty`,
		"xattrs-too-long":        `bytes of extended attributes, at most 65535`,
		"line-too-long":          `line 2: longer than 1048576 bytes`,
	} {
		text, err := os.ReadFile(filepath.Join("testdata", name+".dump"))
		if err != nil {
			t.Error(err)
			continue
		}
		if _, err := dumpfile.Read(bytes.NewReader(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
}

func TestAccepted(t *testing.T) {
	for name, text := range map[string]string{
		"no newline at the end":          strings.TrimSuffix(root, "\n"),
		"a payload that is no digest":    root + "/a 100 100644 1 0 0 0 0.0 some/where - -\n",
		"a size without anything":        root + "/a 100 100644 1 0 0 0 0.0 - - -\n",
		"a link before its target":       root + "/a 0 @100644 - - - - - /b - -\n/b 1 100644 2 0 0 0 0.0 - x -\n",
		"a link to a link":               root + "/a 0 @100644 - - - - - /b - -\n/b 0 @100644 - - - - - /c - -\n/c 0 10644 3 0 0 0 0.0 - - -\n",
		"a time before 1970":             root + "/a 0 100644 1 0 0 0 -5.7 - - -\n",
		"an attribute given twice":       root + "/a 0 100644 1 0 0 0 0.0 - - - user.a=1 user.a=2\n",
		"names in any order":             root + "/b 0 100644 1 0 0 0 0.0 - - -\n/a 0 100644 1 0 0 0 0.0 - - -\n",
		"content that looks like a dash": root + "/a 1 100644 1 0 0 0 0.0 - \\x2d -\n",
	} {
		if _, err := dumpfile.Read(strings.NewReader(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What only people write is refused where a program's file is expected; the rest is not touched by that.
func TestStrict(t *testing.T) {
	for text, want := range map[string]string{
		strings.TrimSuffix(root, "\n"):               `line 1: no newline at its end`,
		root + "/a 0 100644 1 0 0 7 0.0 - - -\n":     `line 2: RDEV: "7": only a device`,
		root + "/a 5 120777 1 0 0 0 0.0 abc - -\n":   `line 2: SIZE: 5, but the symlink's target has 3 bytes`,
		root + "/a 3 120777 1 0 0 0 0.0 abc abc -\n": `line 2: CONTENT: only a regular file`,
	} {
		if _, err := dumpfile.Read(strings.NewReader(text)); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		if _, err := dumpfile.ReadWith(strings.NewReader(text), dumpfile.Options{Strict: true}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	for _, name := range golden.Names(t) {
		if _, err := dumpfile.ReadWith(bytes.NewReader(golden.Read(t, "dumps/"+name+".dump")), dumpfile.Options{Strict: true}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is read can be written, and reads back as what was written.
func FuzzRead(f *testing.F) {
	for _, name := range golden.Names(f) {
		if text := golden.Read(f, "dumps/"+name+".dump"); len(text) < 1<<14 {
			f.Add(text)
		}
	}
	hostile, _ := filepath.Glob("testdata/*.dump")
	for _, file := range hostile {
		if text, _ := os.ReadFile(file); len(text) < 1<<14 {
			f.Add(text)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		tree, err := dumpfile.Read(bytes.NewReader(text))
		if err != nil {
			return
		}
		tree.CountLinks()
		var one, two bytes.Buffer
		dumpfile.Write(&one, tree, dumpfile.Cfsctl)
		again, err := dumpfile.Read(bytes.NewReader(one.Bytes()))
		if err != nil {
			t.Fatalf("reading back: %v\n%s", err, one.String())
		}
		again.CountLinks()
		dumpfile.Write(&two, again, dumpfile.Cfsctl)
		if !bytes.Equal(one.Bytes(), two.Bytes()) {
			t.Fatalf("written\n%sread back\n%s", one.String(), two.String())
		}
	})
}

// A dump of many small directories with one attribute and one object a file, as operating systems are.
func manyFiles(n int) []byte {
	var b bytes.Buffer
	b.WriteString(root)
	for k := range n {
		if k%100 == 0 {
			fmt.Fprintf(&b, "/d%05d 0 40755 2 0 0 0 1700000000.0 - - - security.selinux=system_u:object_r:usr_t:s0\\x00\n", k/100)
		}
		sum := sha256.Sum256(fmt.Append(nil, k))
		hash := hex.EncodeToString(sum[:])
		fmt.Fprintf(&b, "/d%05d/file-%02d 12345 100644 1 0 0 0 1700000000.%d %s/%s - %s security.selinux=system_u:object_r:usr_t:s0\\x00\n",
			k/100, k%100, k, hash[:2], hash[2:], hash)
	}
	return b.Bytes()
}

func BenchmarkRead(b *testing.B) {
	text := manyFiles(100_000)
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := dumpfile.Read(bytes.NewReader(text)); err != nil {
			b.Fatal(err)
		}
	}
}
