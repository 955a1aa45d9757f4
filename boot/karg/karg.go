// Package karg reads and writes the kernel arguments that name a composefs image.
//
//	composefs.digest=[?]v1-sha512-12:HEX   format version, algorithm with the log2 of its block size, digest
//	composefs=[?]HEX                       an image of format V2; 64 digits are sha256, 128 are sha512
//
// "?" asks for a boot without verification. The command line is what the firmware, the boot loader or a signature vouches
// for; but more can be appended to a signed line, by addons or by the machine's SMBIOS tables, so what stands first has to
// win: of each kind only the first argument counts, though it may be malformed. If both kinds are there, they name images
// in the order of the line, not in that of their algorithms, or an appended sha512 digest would take the place of a signed
// sha256 one. Only one with "?" never comes before one without: there is nothing that it could be robbed of.
//
// The second image is there for a repository that has an image in one format only. It is booted when the first one is
// missing on the disk, if it is verified at least as strictly ([Image.MayReplace]). A line that is signed should name one
// image, or both: then nothing that is appended is a first of its kind.
package karg

import (
	"errors"
	"fmt"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// The two kinds of arguments.
const (
	KeyDigest = "composefs.digest"
	KeyV2     = "composefs"
)

// Image is what an argument names.
type Image struct {
	Key      string // KeyDigest or KeyV2
	Version  int    // 1 for images of V0 and V1, 2 for V2
	Digest   fsverity.Digest
	Insecure bool // "?": whether the image can be verified does not matter
}

// Choice is what a command line asks for.
type Choice struct {
	// Images are to be tried in this order: the second one only if the first is not on the disk, and if MayReplace says
	// so. There is at least one.
	Images []Image
	// Ignored are arguments that do not count, since another of their kind stands before them.
	Ignored []string
}

// ErrNone tells that no argument names an image.
var ErrNone = errors.New("no composefs.digest= or composefs= argument on the kernel command line")

// Parse finds the images that a kernel command line names. The error is ErrNone, or tells what is malformed: then there is
// no image to boot, whatever else is on the line.
func Parse(cmdline string) (Choice, error) {
	var c Choice
	seen := map[string]bool{}
	for _, a := range Split(cmdline) {
		if a.Key != KeyDigest && a.Key != KeyV2 {
			continue
		}
		if seen[a.Key] {
			c.Ignored = append(c.Ignored, a.Key+"="+a.Value)
			continue
		}
		seen[a.Key] = true
		image, err := parseImage(a)
		if err != nil {
			return Choice{}, fmt.Errorf("%s=%.200s: %w", a.Key, a.Value, err)
		}
		c.Images = append(c.Images, image)
	}
	if len(c.Images) == 0 {
		return c, ErrNone
	}
	if len(c.Images) == 2 && c.Images[0].Insecure && !c.Images[1].Insecure {
		c.Images[0], c.Images[1] = c.Images[1], c.Images[0]
	}
	return c, nil
}

func parseImage(a Arg) (Image, error) {
	image := Image{Key: a.Key, Version: 2}
	value, insecure := strings.CutPrefix(a.Value, "?")
	image.Insecure = insecure
	var algorithm fsverity.Algorithm
	if a.Key == KeyDigest {
		kind, hex, ok := strings.Cut(value, ":")
		version, name, ok2 := strings.Cut(kind, "-")
		if !ok || !ok2 {
			return image, errors.New("want VERSION-ALGORITHM-12:DIGEST, for example v1-sha512-12:...")
		}
		switch version {
		case "v1":
			image.Version = 1
		case "v2":
		default:
			return image, fmt.Errorf("image format %q: want v1 or v2", version)
		}
		var err error
		if algorithm, err = fsverity.ParseAlgorithm("fsverity-" + name); err != nil {
			return image, err
		}
		value = hex
	}
	d, err := fsverity.ParseHex(value)
	if err != nil {
		return image, err
	}
	if algorithm != 0 && d.Algorithm() != algorithm {
		return image, fmt.Errorf("a digest of %d digits is not %v", len(value), algorithm)
	}
	image.Digest = d
	return image, nil
}

// strength orders arguments by what they let pass.
func (i Image) strength() int {
	if i.Insecure {
		return 0
	}
	return i.Digest.Algorithm().Size()
}

// MayReplace reports whether i may be booted when missing is not on the disk. Whoever can remove an image must not gain
// by it, so i has to be verified at least as strictly.
func (i Image) MayReplace(missing Image) bool { return i.strength() >= missing.strength() }

// String returns the argument.
func (i Image) String() string {
	mark := ""
	if i.Insecure {
		mark = "?"
	}
	if i.Key == KeyV2 {
		return KeyV2 + "=" + mark + i.Digest.String()
	}
	return fmt.Sprintf("%s=%sv%d-%v-12:%v", KeyDigest, mark, i.Version, i.Digest.Algorithm(), i.Digest)
}

// Make returns the argument by which the ecosystem names an image: composefs.digest for version 1, composefs for 2.
func Make(d fsverity.Digest, version int, insecure bool) Image {
	key := KeyDigest
	if version == 2 {
		key = KeyV2
	}
	return Image{Key: key, Version: version, Digest: d, Insecure: insecure}
}
