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
