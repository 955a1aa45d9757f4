// Package chain verifies a boot from firmware to the last file, before it happens: what each step checks of the next one, as
// far as that can be told from an EFI system partition or a unified kernel image, and a repository.
//
//	link           what is checked                                                   who checks it in the boot
//	boot loader    signature and SBAT of systemd-boot                                firmware, shim
//	loader.conf    the editor of the boot menu is off                                nobody: a warning
//	signature      of the UKI, by a key of db, not revoked by dbx                    firmware
//	SBAT           .sbat is well formed, no generation is below the revocation list  shim
//	command line   of every profile: one composefs argument, verified, and nothing   the signature
//	               that starts something else than the image
//	addon          signature, and what it appends                                    firmware, on behalf of the stub
//	initramfs      composefs-setup-root is in it                                     the signature
//	image          is in the repository and has the digest                           composefs-setup-root
//	objects        are all there and have their digests                              overlayfs, fs-verity
//	kernel         is the one that the image's modules are for                       a boot that fails
//	os-release     names the same system                                             nobody
//
// The result is a list of plain values, a [Link] each, in this order: the first that is broken is where the boot stops, or
// where somebody who can write to the disk gets in. A link that could not be checked, since nothing was given to check it
// with, says so: it is never counted as right.
//
// A type 1 entry has a broken link by its nature: its command line and its initramfs are files that nothing signs.
package chain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/uki"
)

// Kind is which link of the chain it is.
type Kind string

// The links, in the order of the boot.
const (
	Loader     Kind = "boot loader"
	LoaderConf Kind = "loader.conf"
	Signature  Kind = "signature"
	SBAT       Kind = "SBAT"
	Cmdline    Kind = "command line"
	Addon      Kind = "addon"
	Initramfs  Kind = "initramfs"
	Image      Kind = "image"
	Objects    Kind = "objects"
	Kernel     Kind = "kernel"
	OSRelease  Kind = "os-release"
)

// Status is what came of a check.
type Status string

// The outcomes.
const (
	OK        Status = "ok"
	Broken    Status = "broken"
	Warning   Status = "warning"     // it does not break the chain, but somebody should know
	Unchecked Status = "not checked" // there was nothing to check it with
)

// Link is one link of the chain.
type Link struct {
	Kind   Kind   `json:"link"`
	Where  string `json:"where,omitempty"` // the profile or the file, if there are several
	Status Status `json:"status"`
	Found  string `json:"found"`
	WayOut string `json:"way_out,omitempty"`
}

// String returns a line without the way out.
func (l Link) String() string {
	if l.Where != "" {
		return fmt.Sprintf("%s: %s: %s", l.Kind, l.Where, l.Found)
	}
	return fmt.Sprintf("%s: %s", l.Kind, l.Found)
}

// Type is what kind of a boot entry it is.
type Type string

// The types of the Boot Loader Specification.
const (
	Type1 Type = "type 1"
	Type2 Type = "UKI"
)

// Entry is what can be booted, and its links.
type Entry struct {
	Path  string `json:"path"` // on the partition
	Type  Type   `json:"type"`
	Links []Link `json:"links"`
}

// Report is what was found.
type Report struct {
	Loader  []Link  `json:"loader,omitempty"` // of a partition
	Entries []Entry `json:"entries"`
}

// First returns the first broken link and the path of its entry, "" for the boot loader; nil if no link is broken.
func (r Report) First() (entry string, link *Link) {
	for k, l := range r.Loader {
		if l.Status == Broken {
			return "", &r.Loader[k]
		}
	}
	for _, e := range r.Entries {
		for k, l := range e.Links {
			if l.Status == Broken {
				return e.Path, &e.Links[k]
			}
		}
	}
	return "", nil
}

// Options are what the chain is verified with. What is not given is not checked.
type Options struct {
	Trust     *uki.Trust // db and dbx of the firmware
	SBATLevel string     // text of a revocation list, as shim has it in its variable SbatLevel
	Repo      *repo.Repo
	Verify    repo.VerifyOptions // of images
	Allow     []string           // kernel arguments that are permitted: names, or NAME=VALUE
}

// verifier verifies entries, and every image once.
type verifier struct {
	Options
	ctx    context.Context
	fsys   fs.FS
	levels []generation
	images map[fsverity.Digest]*image
	files  []fs.File
}

func newVerifier(ctx context.Context, fsys fs.FS, o Options) (*verifier, error) {
	v := &verifier{Options: o, ctx: ctx, fsys: fsys, images: map[fsverity.Digest]*image{}}
	if o.SBATLevel != "" {
		var err error
		if v.levels, err = parseSBAT(o.SBATLevel, 2); err != nil {
			return nil, fmt.Errorf("SBAT level: %w", err)
		}
	}
	return v, nil
}

func (v *verifier) close() {
	for _, f := range v.files {
		f.Close()
	}
}

// open opens a file, which must be one that can be read anywhere, until the verifier is closed.
func (v *verifier) open(name string) (uki.Content, error) {
	f, err := v.fsys.Open(name)
	if err != nil {
		return uki.Content{}, err
	}
	v.files = append(v.files, f)
	info, err := f.Stat()
	if err != nil {
		return uki.Content{}, err
	}
	r, ok := f.(io.ReaderAt)
	if !ok || !info.Mode().IsRegular() {
		return uki.Content{}, &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	return uki.Content{ReaderAt: r, Size: info.Size()}, nil
}

// UKI verifies one unified kernel image. Addons are looked for in the directory beside it, NAME.extra.d. An error means that
// the check could not be done; what is wrong is in the report.
func UKI(ctx context.Context, fsys fs.FS, name string, o Options) (Report, error) {
	v, err := newVerifier(ctx, fsys, o)
	if err != nil {
		return Report{}, err
	}
	defer v.close()
	e, err := v.uki(name, nil)
	return Report{Entries: []Entry{e}}, err
}
