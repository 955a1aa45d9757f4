package erofs_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/composefs-boot/composefs-boot/internal/golden"
	"github.com/composefs-boot/composefs-boot/repo/dumpfile"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Every dump gives the very image that mkcomposefs makes of it.
func TestGoldenImages(t *testing.T) {
	images := golden.Load(t).Dumps
	for _, name := range golden.Names(t) {
		tree, err := dumpfile.Read(bytes.NewReader(golden.Read(t, "dumps/"+name+".dump")))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, format := range []erofs.Format{erofs.V0, erofs.V1} {
			var img bytes.Buffer
			if err := erofs.Write(&img, tree, format); err != nil {
				t.Errorf("%s %v: %v", name, format, err)
				continue
			}
			want := images[name][format.String()]
			sum := sha256.Sum256(img.Bytes())
			if hex.EncodeToString(sum[:]) != want.Sha256 || int64(img.Len()) != want.Size {
				t.Errorf("%s %v: %d bytes, not the golden image of %d", name, format, img.Len(), want.Size)
			}
			if got := fsverity.Of(fsverity.SHA256, img.Bytes()).String(); got != want.Fsverity {
				t.Errorf("%s %v: digest %s, want %s", name, format, got, want.Fsverity)
			}
		}
	}
}

// Every golden image becomes a tree, and the tree the same image again.
func TestGoldenImagesReadBack(t *testing.T) {
	for _, name := range golden.Names(t) {
		for _, format := range []erofs.Format{erofs.V0, erofs.V1} {
			if name == "big-directory" || name == "an-os" {
				continue // only their digests are kept
			}
			readBack(t, name, golden.Read(t, "images/"+name+"."+format.String()+".erofs.gz"), format)
		}
	}
}

func readBack(t *testing.T, name string, img []byte, format erofs.Format) {
	t.Helper()
	tree, got, err := erofs.Read(bytes.NewReader(img), int64(len(img)))
	if err != nil || got != format {
		t.Errorf("%s %v: read as %v: %v", name, format, got, err)
		return
	}
	var again bytes.Buffer
	if err := erofs.Write(&again, tree, format); err != nil {
		t.Errorf("%s %v: %v", name, format, err)
		return
	}
	if !bytes.Equal(again.Bytes(), img) {
		t.Errorf("%s %v: another image after reading it", name, format)
	}
}

// A dump becomes an image, the image a tree, and that tree has the same dump. The formats that keep everything do so.
func TestDumpThroughImage(t *testing.T) {
	for _, name := range golden.Names(t) {
		tree, err := dumpfile.Read(bytes.NewReader(golden.Read(t, "dumps/"+name+".dump")))
		if err != nil {
			t.Fatal(err)
		}
		for _, format := range []erofs.Format{erofs.V0, erofs.V1} {
			var img, want, got bytes.Buffer
			if err := erofs.Write(&img, tree, format); err != nil {
				t.Fatal(err)
			}
			again, _, err := erofs.Read(bytes.NewReader(img.Bytes()), int64(img.Len()))
			if err != nil {
				t.Errorf("%s %v: %v", name, format, err)
				continue
			}
			dumpfile.Write(&want, tree, dumpfile.Cfsctl)
			dumpfile.Write(&got, again, dumpfile.Cfsctl)
			if got.String() != want.String() {
				t.Errorf("%s %v: another tree after reading it", name, format)
			}
		}
	}
}
