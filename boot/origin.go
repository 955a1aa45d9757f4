package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/composefs-boot/composefs-boot/repo/fsverity"
)

// Origin is where a deployment comes from, and how it is booted: the file DIGEST.origin of its state, whose keys are bootc's.
//
//	[origin]
//	container-image-reference=ostree-unverified-image:docker://registry.example/os:1
//	[boot]
//	boot_type=bls
//	digest=SHA256
//	initramfs=native
//	[image]
//	manifest_digest=sha256:HEX
//
// The first and the last section are there for OCI images. An OSTree commit has, with the key of ostree's own origins,
//
//	[origin]
//	refspec=REMOTE:REF
//	[ostree]
//	commit=HEX
//
// Nothing that is verified depends on this file.
type Origin struct {
	Image      string // name of the OCI image that upgrades are of, with its transport; "" for a directory
	Manifest   string // digest of the manifest
	Refspec    string // REMOTE:REF of the OSTree commits that upgrades are of, or PATH:REF with an absolute path; "": none
	Commit     string // checksum of the commit that the deployment was made of
	BootType   string // "bls": type 1 entry, or "uki"
	BootDigest string // SHA-256 of kernel and initramfs, or of the UKI
	Native     bool   // see Unified
}

// unverified is what bootc has before the names of images whose signatures are left to the machine's policy.
const unverified = "ostree-unverified-image:"

// native is what the key initramfs has, which bootc does not know, if the installer made it.
const native = "native"

func (o Origin) text() string {
	var b strings.Builder
	switch {
	case o.Image != "":
		fmt.Fprintf(&b, "[origin]\ncontainer-image-reference=%s%s\n", unverified, o.Image)
	case o.Refspec != "":
		fmt.Fprintf(&b, "[origin]\nrefspec=%s\n", o.Refspec)
	}
	fmt.Fprintf(&b, "[boot]\nboot_type=%s\ndigest=%s\n", o.BootType, o.BootDigest)
	if o.Native {
		b.WriteString("initramfs=" + native + "\n")
	}
	if o.Manifest != "" {
		fmt.Fprintf(&b, "[image]\nmanifest_digest=%s\n", o.Manifest)
	}
	if o.Commit != "" {
		fmt.Fprintf(&b, "[ostree]\ncommit=%s\n", o.Commit)
	}
	return b.String()
}

// parseOrigin reads an origin. What it does not know, it passes over.
func parseOrigin(text []byte) (o Origin, err error) {
	var initramfs string
	keys := map[string]*string{"boot/initramfs": &initramfs, "origin/container-image-reference": &o.Image, "boot/boot_type": &o.BootType,
		"boot/digest": &o.BootDigest, "image/manifest_digest": &o.Manifest, "origin/refspec": &o.Refspec, "ostree/commit": &o.Commit}
	section := ""
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if name, ok := strings.CutPrefix(line, "["); ok && strings.HasSuffix(name, "]") {
			section = name[:len(name)-1]
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return o, fmt.Errorf("line %d: neither a section nor KEY=VALUE", n)
		}
		if to := keys[section+"/"+strings.TrimSpace(key)]; to != nil {
			*to = strings.TrimSpace(value)
		}
	}
	o.Image, o.Native = o.imageName(), initramfs == native
	return o, lines.Err()
}

// imageName takes away what says how signatures are checked: bootc's words, or those of ostree-rs-ext.
func (o Origin) imageName() string {
	for _, prefix := range []string{unverified, "ostree-image-signed:"} {
		if name, ok := strings.CutPrefix(o.Image, prefix); ok {
			return name
		}
	}
	if name, ok := strings.CutPrefix(o.Image, "ostree-unverified-registry:"); ok {
		return "docker://" + name
	}
	return o.Image
}

// statePath is the state of a deployment, relative to the physical root.
func statePath(d fsverity.Digest) string { return "state/deploy/" + d.String() }

func originPath(d fsverity.Digest) string { return statePath(d) + "/" + d.String() + ".origin" }

// readOrigin reads the origin of a deployment; one that has none has an empty one.
func readOrigin(root *os.Root, d fsverity.Digest) (Origin, error) {
	f, err := root.Open(originPath(d))
	if errors.Is(err, os.ErrNotExist) {
		return Origin{}, nil
	}
	if err != nil {
		return Origin{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxText))
	if err != nil {
		return Origin{}, err
	}
	o, err := parseOrigin(b)
	if err != nil {
		return o, fmt.Errorf("%s: %w", path.Join(root.Name(), originPath(d)), err)
	}
	return o, nil
}

// WriteOrigin gives the deployment of the plan its origin, also if it has another one: the same system may come under another
// name or manifest.
func (p Plan) WriteOrigin(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, f := range p.Files {
		if f.Path != originPath(p.Digest) {
			continue
		}
		if err := writeFile(root, f); err != nil {
			return fmt.Errorf("%s: %w", path.Join(dir, f.Path), err)
		}
	}
	return syncAll(root)
}
