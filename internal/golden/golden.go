// Package golden gives tests the golden vectors: inputs made for this project and the answers of the reference tools
// (the C tools 1.0.8, cfsctl 0.9.4, fsverity 1.6) for them. testdata/README.md tells what is what.
package golden

import (
	"bytes"
	"compress/gzip"
	"embed"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

//go:embed testdata
var files embed.FS

// Digests is digests.json.
type Digests struct {
	Fsverity []Fsverity
	// Dumps: dump name -> "v0" or "v1" -> what mkcomposefs makes of it.
	Dumps map[string]map[string]Image
	// Trees: tree name -> mode ("container", "boot", "as-is", "keep-user-xattrs") -> "sha256" or "sha512" -> "v0", "v1"
	// or "v2" -> image digest.
	Trees map[string]Tree
}

// Fsverity is the digest of a file that [Fsverity.Content] makes.
type Fsverity struct {
	Size           int
	Seed           int
	Sha256, Sha512 string
}

// Image describes an image file: its size, its SHA-256, its fs-verity digest and the SHA-256 of its dump.
type Image struct {
	Size       int64
	Sha256     string
	Fsverity   string
	DumpSha256 string `json:"dump_sha256"`
}

// Tree has the image digests of one tree by mode, and the kernel arguments of its boot images.
type Tree struct {
	Modes map[string]map[string]map[string]string
	Karg  map[string]string
	// CTool: options of mkcomposefs, "" for none -> "v0" or "v1" -> image digest, sha256.
	CTool map[string]map[string]string
}

// UnmarshalJSON tells the modes from the other keys.
func (t *Tree) UnmarshalJSON(b []byte) error {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return err
	}
	t.Modes = map[string]map[string]map[string]string{}
	t.CTool = map[string]map[string]string{}
	for key, value := range raw {
		switch key {
		case "karg":
			if err := json.Unmarshal(value, &t.Karg); err != nil {
				return err
			}
		case "boot", "container", "as-is", "keep-user-xattrs":
			var m map[string]map[string]string
			if err := json.Unmarshal(value, &m); err != nil {
				return err
			}
			t.Modes[key] = m
		default:
			options, ok := strings.CutPrefix(key, "mkcomposefs")
			var m map[string]string
			if !ok || json.Unmarshal(value, &m) != nil {
				return fmt.Errorf("tree vectors: %s", key)
			}
			t.CTool[strings.TrimSpace(options)] = m
		}
	}
	return nil
}

// Load returns digests.json.
func Load(t testing.TB) *Digests {
	t.Helper()
	var d Digests
	if err := json.Unmarshal(Read(t, "digests.json"), &d); err != nil {
		t.Fatal(err)
	}
	return &d
}

// Content returns the bytes whose digest v is.
func (v Fsverity) Content() []byte {
	b := make([]byte, v.Size)
	for k := range b {
		i := k % 65536
		b[k] = byte(i*31 + (i>>8)*7 + v.Seed)
	}
	return b
}

// Read returns a file of testdata, uncompressed if its name ends in .gz and tar is not before it.
func Read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := files.ReadFile(path.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasSuffix(name, ".gz") && !strings.HasSuffix(name, ".tar.gz") {
		z, err := gzip.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if b, err = io.ReadAll(z); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return b
}

// Files returns a directory of testdata.
func Files(t testing.TB, name string) fs.FS {
	t.Helper()
	sub, err := fs.Sub(files, path.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return sub
}

// Names returns the names of the dumps: every one has an entry in Digests.Dumps.
func Names(t testing.TB) []string {
	t.Helper()
	entries, err := files.ReadDir("testdata/dumps")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".dump"))
	}
	return names
}

// Extract unpacks a tar.gz file of testdata into a new directory and returns its path. Device nodes and trusted
// attributes are in some, so it needs root.
func Extract(t testing.TB, name string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("unpacking a golden tree with devices and trusted attributes needs root: run the tests with sudo")
	}
	dir := filepath.Join(t.TempDir(), "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("tar", "--xattrs", "--xattrs-include=*", "--delay-directory-restore", "-xzpf", "-", "-C", dir)
	cmd.Stdin = bytes.NewReader(Read(t, name))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	return dir
}
